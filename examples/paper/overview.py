"""The picture on top of the README: what the bound does to four optimizers, and where it acts."""

import dataclasses
import math
from pathlib import Path

import tyro

from examples import plots, program, recorder
from examples.paper import run_table

PAIRS = {"adamw": "adamw2", "radam": "radam_bound", "lion": "lion_bound", "muon": "muon_bound"}
Curves = dict[str, dict[float, float]]  # by optimizer, loss over peak rate


@dataclasses.dataclass(frozen=True)
class Flags:
    """Draw the picture, from the earlier comparison and a run of `examples.train_gpt`."""

    table: Path = Path("examples/paper/results/compare.jsonl")
    """The runs of the earlier comparison."""
    run: Path = Path("runs/train_gpt")
    """The folder of `python -m examples.train_gpt`."""
    picture: Path = Path("examples/pictures/overview.png")
    """Where to draw it."""


def losses_by_rate(table: Path) -> Curves:
    """The validation loss of a GPT after 200 steps over the peak rate, on the first seed.

    All other settings are those of the best run.

    Raises:
        ValueError: If the table has no such run of an optimizer.
    """
    lines = run_table.read(table)
    of_all = {"model": "gpt", "data": None, "steps": 200, "seed": 0}
    curves: Curves = {}
    for name in (name for pair in PAIRS.items() for name in pair):
        runs = [x for x in lines if (of_all | {"optimizer": name}).items() <= x.items()]
        if not runs:
            raise ValueError(f"--table {table} has no run of {name}. Leave --table out.")
        best = min(runs, key=lambda x: x["val_loss"] or math.inf)["settings"]
        rates = {
            x["settings"]["learning_rate"]: x["val_loss"] or math.inf
            for x in runs
            if x["settings"] | {"learning_rate": 0} == best | {"learning_rate": 0}
        }
        curves[name] = dict(sorted(rates.items()))
    return curves


def prepare(flags: Flags) -> Curves:
    """Reads the table.

    Raises:
        ValueError: If there is no table, or no run.
    """
    if not flags.table.is_file():
        raise ValueError(f"--table {flags.table} is no file.")
    lines = recorder.read_metrics(flags.run, "adamw2")
    if not lines or not any(key.endswith("/scale") for key in lines[0]):
        raise ValueError(
            f"--run {flags.run} has no run of AdamW² that logs its bound. Make one: python -m "
            f"examples.train_gpt --runs adamw2 --out {flags.run}"
        )
    return losses_by_rate(flags.table)


def main(flags: Flags, curves: Curves) -> None:
    """Draws the picture."""
    lines = recorder.read_metrics(flags.run, "adamw2")
    print(plots.save(plots.overview(PAIRS, curves, lines), flags.picture))


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
