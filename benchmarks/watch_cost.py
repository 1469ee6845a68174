"""What `examples.watch` costs, as a share of a training step."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import tyro
from flax import nnx

from benchmarks import measure, peers, tasks
from examples.watch import watch


@dataclasses.dataclass(frozen=True)
class Flags(tasks.Flags):
    """Time a training step and a call of watch, in turns."""

    out: Path = Path("runs/benchmarks/watch_cost.json")
    """The file for the table."""


def measure_model(name: tasks.Name, budget: float) -> dict[str, Any]:
    """A row of the table."""
    task = tasks.make(name)
    training = tasks.Training(task, peers.OPTIMIZERS[peers.OURS])

    @jax.jit
    def terms(params: Any, rest: Any) -> dict[str, jax.Array]:
        return watch(nnx.merge(training.graph, params, rest), task.batch, task.loss)

    calls = {
        "step": training.step,
        "watch": lambda: terms(training.state["params"], training.state["rest"]),
    }
    times = measure.seconds(calls, budget)
    return {
        "model": name,
        "step, ms": 1e3 * times["step"],
        "watch, ms": 1e3 * times["watch"],
        "watch / step": times["watch"] / times["step"],
    }


def main(flags: Flags) -> None:
    """Prints the table."""
    measure.report([measure_model(name, flags.seconds) for name in flags.models], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
