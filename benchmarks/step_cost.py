"""What a whole training step costs with `adamw2`, as a ratio to `optax.adamw`."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from benchmarks import measure, peers, tasks


@dataclasses.dataclass(frozen=True)
class Flags(tasks.Flags):
    """Time a step (forward, backward, update) with adamw2 and with optax.adamw, in turns."""

    seconds: float = 60.0
    """Time for each model."""
    out: Path = Path("runs/benchmarks/step_cost.json")
    """The file for the table."""


def measure_model(name: tasks.Name, budget: float) -> dict[str, Any]:
    """A row of the table."""
    base, own = (
        tasks.Training(tasks.make(name), peers.OPTIMIZERS[which])
        for which in (peers.BASE, peers.OURS)
    )
    times = measure.seconds({"base": base.step, "own": own.step}, budget)
    return {
        "model": name,
        f"{peers.BASE}, ms": 1e3 * times["base"],
        f"{peers.OURS}, ms": 1e3 * times["own"],
        f"{peers.OURS} / {peers.BASE}": times["own"] / times["base"],
    }


def main(flags: Flags) -> None:
    """Prints the table."""
    measure.report([measure_model(name, flags.seconds) for name in flags.models], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
