"""Train a GPT at full learning rate: AdamW without and with warmup, and AdamW²."""

import dataclasses
from pathlib import Path
from typing import Literal

from examples import language, optimizers, processes, program, results
from examples.text_data import Corpus

PresetName = Literal["nano", "gpt2-small", "gpt2-large"]


@dataclasses.dataclass(frozen=True)
class First:
    """The flags that `--help` shows first."""

    preset: PresetName = "nano"
    """What all other flags are by default: nano is for two CPU cores, the others the paper's
    recipe for GPT-2."""
    runs: tuple[optimizers.Name, ...] = ("adamw", "adamw_warmup", "adamw2")
    """The optimizers to compare. Each trains the same model, one after the other."""
    out: Path = Path("runs/train_gpt")
    """The folder for the results: the losses, the pictures and the checkpoints."""
    resume: bool = False
    """Go on with the run in that folder, from its last checkpoint."""


@dataclasses.dataclass(frozen=True)
class Flags(processes.Flags, language.Config, First):
    """Train the same GPT on the same batches with several optimizers, and compare them."""


def parse(arguments: list[str] | None = None) -> Flags:
    """The flags, with the defaults of the preset that they name."""
    return program.parse(Flags, language.PRESETS, arguments)


def main(flags: Flags, corpus: Corpus) -> None:
    """Trains, and shows text, a table, what it says, and pictures."""
    print(f"{corpus.train.size:,} tokens to train on, {corpus.validation.size:,} held out.")
    models = program.train_each(flags, lambda name: language.train(name, flags, corpus, flags.out))
    if "adamw2" in models and corpus.is_text:
        text = language.generate(models["adamw2"], prompt="def ", length=240, seed=flags.seed)
        print(f"\nWhat the model trained with AdamW² writes:\n\n{text}\n")
    if processes.is_first():
        results.report(flags, judged_by="val_loss")


if __name__ == "__main__":
    program.run(parse, language.prepare, main)
