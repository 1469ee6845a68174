"""Loss curves of AdamW² over tau, of a GPT and a Swin: figure 6 of arXiv 2505.21910."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from examples import language, plots, program, results, training, vision
from examples.image_data import load_images
from examples.text_data import load_corpus


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train the nano GPT and the nano Swin with AdamW² at every tau."""

    models: tuple[Literal["gpt", "swin"], ...] = ("gpt", "swin")
    """What to train."""
    taus: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Largest relative growth of a spectral norm in an update."""
    steps: int = 200
    """Updates."""
    seed: int = 0
    """Of the weights and the batches."""
    out: Path = Path("runs/tau_ablation")
    """The folder of the runs."""
    resume: bool = False
    """Go on with the runs in that folder."""


def prepare(flags: Flags) -> dict[str, tuple[Any, program.Config, Any]]:
    """For each model: its module, its config and its data. Begins or goes on with the folder.

    Raises:
        ValueError: If a flag is out of range, or if it would lose or mix runs.
    """
    tasks = {}
    for model in flags.models:
        if model == "gpt":
            module, config, data = language, language.PRESETS["nano"], load_corpus(None)
        else:
            module, data = vision, load_images(None, num_channels=1)
            config = dataclasses.replace(vision.PRESETS["nano"], model="swin-nano")
        config = dataclasses.replace(config, steps=flags.steps, seed=flags.seed)
        for tau in flags.taus:
            dataclasses.replace(config, tau=tau)  # which checks it
        tasks[model] = module, config, data
    program.begin(flags)
    return tasks


def main(flags: Flags, tasks: dict[str, tuple[Any, program.Config, Any]]) -> None:
    """Trains, and shows the table and the picture."""
    lines: dict[str, dict[float, plots.Lines]] = {model: {} for model in tasks}
    runs: dict[str, Any] = {model: {} for model in tasks}
    for model, (module, config, data) in tasks.items():
        for tau in flags.taus:
            folder = flags.out / model / f"{tau:g}"
            folder.mkdir(parents=True, exist_ok=True)
            module.train("adamw2", dataclasses.replace(config, tau=tau), data, folder)
            lines[model][tau] = training.read_metrics(folder, "adamw2")
            runs[model][f"{tau:g}"] = results.summarize(folder, "adamw2")
            results.write_summary(flags.out, runs)
    rows = [f"{'validation loss':16}" + "".join(f"{f'tau {tau:g}':>11}" for tau in flags.taus)]
    for model, by_tau in runs.items():
        losses = [run["val_loss"] for run in by_tau.values()]
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        rows.append(f"{model:16}" + "".join(f"{cell:>11}" for cell in cells))
    print("\n".join(rows))
    print(f"\nPicture: {plots.save(plots.tau_ablation(lines), flags.out / 'tau_ablation.png')}")


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
