"""Loss curves of AdamW² over tau, of a GPT and a Swin: figure 6 of arXiv 2505.21910."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from examples import optimizers, plots, program, recorder, results, run_folder, tables
from examples.paper import nano


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train the nano GPT and the nano Swin with AdamW² at every tau."""

    models: tuple[Literal["gpt", "swin"], ...] = ("gpt", "swin")
    """What to train."""
    taus: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Largest relative growth of a spectral norm in an update."""
    growth: optimizers.Growth = "linear"
    """Linear over the updates, or exponential, as in the paper."""
    steps: int = 200
    """Updates."""
    seed: int = 0
    """Of the weights and the batches."""
    out: Path = Path("runs/tau_ablation")
    """The folder of the runs."""
    resume: bool = False
    """Go on with the runs in that folder."""


def prepare(flags: Flags) -> dict[str, nano.Nano]:
    """What to train. Begins or goes on with the folder.

    Raises:
        ValueError: If a flag is out of range, or if it would lose or mix runs.
    """
    program.check_lists(flags, "models", "taus")
    tasks = {}
    for name in flags.models:
        model = nano.load(name)
        config = dataclasses.replace(
            model.config, steps=flags.steps, seed=flags.seed, growth=flags.growth
        )
        for tau in flags.taus:
            dataclasses.replace(config, tau=tau)  # which checks it
        tasks[name] = model._replace(config=config)
    run_folder.begin(flags)
    return tasks


def main(flags: Flags, tasks: dict[str, nano.Nano]) -> None:
    """Trains, and shows the table and the picture."""
    lines: dict[str, dict[float, plots.Lines]] = {name: {} for name in tasks}
    runs: dict[str, Any] = {name: {} for name in tasks}
    for name, model in tasks.items():
        for tau in flags.taus:
            folder = flags.out / name / str(tau)
            folder.mkdir(parents=True, exist_ok=True)
            config = dataclasses.replace(model.config, tau=tau)
            model.train("adamw2", config, model.data, folder, norms=False)
            lines[name][tau] = recorder.read_metrics(folder, "adamw2")
            runs[name][str(tau)] = results.summarize(folder, "adamw2")
            results.write_summary(flags.out, runs)
    rows = [["validation loss", *(f"tau {tau}" for tau in flags.taus)]]
    for name, by_tau in runs.items():
        losses = [run["val_loss"] for run in by_tau.values()]
        rows.append([name, *("-" if loss is None else f"{loss:.3f}" for loss in losses)])
    print(tables.layout(rows))
    print(f"\nPicture: {plots.save(plots.tau_ablation(lines), flags.out / 'tau_ablation.png')}")


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
