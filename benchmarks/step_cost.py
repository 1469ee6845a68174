"""What a whole training step costs with each optimizer, as a ratio to `optax.adamw`."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from benchmarks import measure, peers, tasks


@dataclasses.dataclass(frozen=True)
class Flags(tasks.Flags):
    """Time a step (forward, backward, update) with each optimizer and with optax.adamw, in turns.

    A cap of rank 32 is a quarter of the width of the small models.
    """

    optimizers: tuple[peers.Name, ...] = (
        peers.OURS, "adamw2, a cap of rank 32", "optax.contrib.muon",
    )  # fmt: skip
    """Optimizers."""
    seconds: float = 60.0
    """Time for each model."""
    out: Path = Path("runs/benchmarks/step_cost.json")
    """The file for the table."""


def measure_model(name: tasks.Name, flags: Flags) -> list[dict[str, Any]]:
    """The rows of a model."""
    steps = {
        optimizer: tasks.Training(tasks.make(name), peers.OPTIMIZERS[optimizer]).step
        for optimizer in (peers.BASE, *flags.optimizers)
    }
    times = measure.seconds(steps, flags.seconds)
    return [
        {
            "model": name,
            "optimizer": optimizer,
            "ms": 1e3 * time,
            "time": time / times[peers.BASE],
        }
        for optimizer, time in times.items()
    ]


def main(flags: Flags) -> None:
    """Prints the table."""
    rows = [row for name in flags.models for row in measure_model(name, flags)]
    measure.report(rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
