"""What one optimizer update costs, beside the peers, as ratios to `optax.adamw`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import tyro

from benchmarks import measure, peers, trees, updates

TreeName: TypeAlias = Literal[*trees.TREES]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Time one jitted, donated update of every optimizer in turns with one of optax.adamw."""

    trees: tuple[TreeName, ...] = tuple(trees.TREES)
    """Parameter trees."""
    optimizers: tuple[peers.Name, ...] = tuple(peers.OPTIMIZERS)
    """Optimizers; muon and the exact SVD take minutes for an update of GPT-2."""
    seconds: float = 10.0
    """Time for each optimizer on each tree, compilation not counted."""
    out: Path = Path("runs/benchmarks/update_cost.json")
    """The file for the table."""


LEAST_BYTES = {
    "floor of optax.adamw": 28,  # a parameter: reads w, g, m, v, and writes m, v, u
    "floor of the bound": 40,  # the same, and then reads u, w again, and writes u
}


def floors(num_params: int) -> dict[str, float]:
    """The least seconds of an update: its bytes over the bandwidth that a copy reaches."""
    x = jnp.zeros(2**26, jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)  # reads and writes all of it

    def rewrite() -> jax.Array:
        nonlocal x
        x = step(x)
        return x

    bandwidth = 2 * x.nbytes / measure.seconds({"rewrite": rewrite}, budget=2)["rewrite"]
    return {name: num_params * size / bandwidth for name, size in LEAST_BYTES.items()}


def measure_tree(name: str, flags: Flags) -> list[dict[str, Any]]:
    """The rows of a tree."""
    tree = trees.TREES[name]()
    grads = trees.fill(tree, seed=1)
    base = updates.Update(peers.OPTIMIZERS[peers.BASE](tree.numbers), tree, grads)
    rows = []
    for optimizer in flags.optimizers:
        own = updates.Update(peers.OPTIMIZERS[optimizer](tree.numbers), tree, grads)
        times = measure.seconds({"own": own.step, "base": base.step}, flags.seconds)
        rows.append(
            {
                "tree": name,
                "optimizer": optimizer,
                "ms": 1e3 * times["own"],
                "time": times["own"] / times["base"],
                "bytes": own.bytes_moved / base.bytes_moved,
                "compilation": own.compile_seconds / base.compile_seconds,
                "state": own.state_bytes / base.state_bytes,
            }
        )
    num_params = trees.num_bytes(grads) // 4
    for floor, least in floors(num_params).items():
        rows.append(
            {"tree": name, "optimizer": floor, "ms": 1e3 * least, "time": least / times["base"]}
        )
    return rows


def main(flags: Flags) -> None:
    """Prints the table."""
    jax.config.update("jax_enable_compilation_cache", False)  # its time is measured
    measure.keep_freed_memory()
    measure.report([row for name in flags.trees for row in measure_tree(name, flags)], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
