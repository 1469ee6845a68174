"""Which rank to cap: losses of AdamW² over the rank, on models of several kinds and widths."""

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from examples import program, results, tables, training
from examples.paper import nano, run_table
from examples.paper.run_table import Line, RunTable
from examples.paper.trainer import NOTHING_KEPT

Name = Literal["gpt", "gpt-wide", "gpt-widest", "vit", "swin"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train small models with AdamW², without a cap and with caps of several ranks.

    What the table has is not trained again.
    """

    models: tuple[Name, ...] = ("gpt", "vit", "swin")
    """What to train."""
    ranks: tuple[int, ...] = (0, 8, 16, 32, 64)
    """Singular values that are lowered, 0 for no cap."""
    steps: tuple[int, ...] = (200,)
    """Updates."""
    learning_rates: tuple[float, ...] = (0.01, 0.03)
    """Peak rates."""
    tau: float = 0.1
    """Largest relative growth of a spectral norm in an update."""
    seeds: int = 1
    """Seeds, from 0 on."""
    table: Path = Path("examples/paper/results/cap_ranks.jsonl")
    """The table of all runs."""


def prepare(flags: Flags) -> dict[str, nano.Nano]:
    """What to train.

    Raises:
        ValueError: If a flag is out of range.
    """
    program.check_lists(flags, "models", "ranks", "steps", "learning_rates")
    if any(rank < 2 and rank != 0 for rank in flags.ranks):
        raise ValueError("--ranks: each must be 0, for no cap, or at least 2.")
    run_table.read(flags.table)  # which checks it
    models = {name: nano.load(name) for name in flags.models}
    for run in runs(flags):
        for model in models.values():
            config_of(model, flags.tau, **run)  # which checks it
    return models


def runs(flags: Flags) -> list[dict[str, Any]]:
    """All of a model, in the order of its table."""
    keys = ("steps", "learning_rate", "rank", "seed")
    values = (flags.steps, flags.learning_rates, flags.ranks, range(flags.seeds))
    return [dict(zip(keys, run, strict=True)) for run in itertools.product(*values)]


def config_of(model: nano.Nano, tau: float, rank: int, **run: Any) -> program.Config:
    """How a run is trained."""
    return dataclasses.replace(model.config, tau=tau, cap_rank=rank or 2, **run)


def main(flags: Flags, models: dict[str, nano.Nano]) -> None:
    """Trains what the table has not, and shows it."""
    losses: dict[tuple[str, int, float], dict[int, list[float]]] = {}
    for name, model in models.items():
        common = {
            "model": name,
            "data": model.data.fingerprint,
            "batch": model.config.batch,
            "tau": flags.tau,
        }
        table = RunTable(flags.table, common)
        for run in runs(flags):
            line = table.get(run, lambda: train(model, flags.tau, run))  # noqa: B023
            row = losses.setdefault((name, run["steps"], run["learning_rate"]), {})
            row.setdefault(run["rank"], []).append(run_table.loss_of(line, "val_loss"))
    head = ["validation loss", "steps", "rate"]
    rows = [head + [f"rank {rank}" if rank else "no cap" for rank in flags.ranks]]
    for (name, steps, rate), row in losses.items():
        means = (f"{np.mean(row[rank]):.3f}" for rank in flags.ranks)
        rows.append([name, str(steps), str(rate), *means])
    print(tables.markdown(rows))


def train(model: nano.Nano, tau: float, run: dict[str, Any]) -> Line:
    """What a run adds to its line."""
    name = "adamw2_cap" if run["rank"] else "adamw2"
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.train(name, config_of(model, tau, **run), model.data, Path(folder), norms=False)
        except training.Stopped:
            raise training.Stopped(NOTHING_KEPT) from None
        return {"val_loss": results.summarize(Path(folder), name)["val_loss"]}


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
