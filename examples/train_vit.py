"""Train a ViT or a Swin at full learning rate: AdamW without and with warmup, and AdamW²."""

import dataclasses
from pathlib import Path
from typing import Literal

from examples import optimizers, processes, program, results, vision
from examples.image_data import Images

PresetName = Literal[
    "nano", "vit-base", "vit-large", "vit-giant", "swin-small", "swin-base", "flatten-small"
]


@dataclasses.dataclass(frozen=True)
class First:
    """The flags that `--help` shows first."""

    preset: PresetName = "nano"
    """What all other flags are by default: nano is for two CPU cores, the others the paper's
    recipes for ImageNet."""
    runs: tuple[optimizers.Name, ...] = ("adamw", "adamw_warmup", "adamw2")
    """The optimizers to compare. Each trains the same model, one after the other."""
    out: Path = Path("runs/train_vit")
    """The folder for the results: the losses, the pictures and the checkpoints."""
    resume: bool = False
    """Go on with the run in that folder, from its last checkpoint."""


@dataclasses.dataclass(frozen=True)
class Flags(processes.Flags, vision.Config, First):
    """Train the same classifier on the same batches with several optimizers, and compare them."""


def parse(arguments: list[str] | None = None) -> Flags:
    """The flags, with the defaults of the preset that they name."""
    return program.parse(Flags, vision.PRESETS, arguments)


def main(flags: Flags, images: Images) -> None:
    """Trains, and shows a table, what it says, and pictures."""
    print(
        f"{len(images.train):,} images of {len(images.classes):,} classes to train on, "
        f"{len(images.validation):,} held out."
    )
    program.train_each(flags, lambda name: vision.train(name, flags, images, flags.out))
    if images.skipped:
        print(f"Files that cannot be read as images, and were skipped: {len(images.skipped):,}.")
    if processes.is_first():
        results.report(flags, judged_by="val_accuracy")


if __name__ == "__main__":
    program.run(parse, vision.prepare, main)
