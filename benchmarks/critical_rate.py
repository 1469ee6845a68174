"""What the first step of the nano GPT can bear: critical rates, and what the sharpness allows."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from benchmarks import measure
from examples import training
from examples.paper import nano
from weyl_optax.contrib import scale_by_gi_adam
from weyl_optax.dynamics import adam_preconditioner, critical_learning_rate, sharpness

B1, B2 = 0.9, 0.95


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure at the initial weights, on the first batch, of several seeds."""

    seeds: int = 3
    """From 0."""
    out: Path = Path("runs/benchmarks/critical_rate.json")
    """The file for the table."""


def measured(seed: int) -> dict[str, str | float]:
    """A line of the table."""
    task = nano.load("gpt")
    config = dataclasses.replace(task.config, seed=seed)
    task = task.make_task(config, task.data)
    batch = jax.tree.map(lambda x: x[0], training.next_batch(task, 1))
    graph, params, rest = nnx.split(task.model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)

    def loss(params: Any, batch: Any) -> jax.Array:
        return task.loss(nnx.merge(graph, params, rest), batch)

    def critical(optimizer: optax.GradientTransformation) -> float:
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        step = jax.tree.map(jnp.negative, updates)
        find = jax.jit(lambda step: critical_learning_rate(loss, params, step, batch, target=100.0))
        return float(find(step)[0])

    grads = jax.jit(jax.grad(loss))(params, batch)
    adam = optax.scale_by_adam(B1, B2)
    _, state = adam.update(grads, adam.init(params), params)
    curvature = jax.jit(lambda p: sharpness(loss, params, batch, preconditioner=p))
    ones = jax.tree.map(jnp.ones_like, params)
    preconditioned = float(curvature(adam_preconditioner(state, B1, B2)))
    return {
        "seed": str(seed),
        "critical: Adam": critical(adam),
        "GI-Adam": critical(scale_by_gi_adam(B1, B2)),
        "SGD": critical(optax.identity()),
        "by sharpness: SGD": 2 / float(curvature(ones)),
        "Adam": (2 + 2 * B1) / ((1 - B1) * preconditioned),
    }


def main(flags: Flags) -> None:
    """Prints the table."""
    measure.report([measured(seed) for seed in range(flags.seeds)], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
