"""What `weyl_optax.dynamics.watch` costs, as a share of a training step."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from flax import nnx

import models.gpt
import models.vit
from benchmarks import measure
from examples import training
from examples.language import next_token_loss
from models.gpt import GPT
from models.vit import ViT
from weyl_optax import adamw2
from weyl_optax.dynamics import watch
from weyl_optax.flax import dimension_numbers


@dataclasses.dataclass(frozen=True)
class Flags:
    """Time a training step and a call of watch, in turns."""

    models: tuple[Literal["gpt-nano", "vit-nano", "gpt2-small"], ...] = ("gpt-nano", "vit-nano")
    """What to train; GPT-2 small, on 8 sequences of 1024 tokens, is for a GPU."""
    repeats: int = 20
    """Calls of each."""
    out: Path = Path("runs/benchmarks/watch_cost.json")
    """The file for the table."""


def image_loss(model: ViT, batch: dict[str, np.ndarray]) -> jax.Array:
    """Cross entropy in nats per image."""
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def make(name: str) -> tuple[nnx.Module, Callable, Any]:
    """A model, its loss and a batch, of the examples' sizes."""
    rng = np.random.default_rng(0)
    if name == "vit-nano":
        images = rng.normal(size=(64, 8, 8, 1)).astype(np.float32)
        batch = {"image": images, "label": rng.integers(0, 10, 64)}
        return ViT(models.vit.CONFIGS["nano"], rngs=nnx.Rngs(0)), image_loss, batch
    config, size = models.gpt.CONFIGS["nano"], (8, 129)
    if name == "gpt2-small":
        small = models.gpt.CONFIGS["gpt2-small"]
        config, size = dataclasses.replace(small, dtype="bfloat16"), (8, 1025)
    tokens = rng.integers(0, config.vocab_size, size)
    return GPT(config, rngs=nnx.Rngs(0)), next_token_loss, tokens


def measure_model(name: str, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    model, loss, batch = make(name)
    optimizer = adamw2(1e-3, weight_dimension_numbers=dimension_numbers(model))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    state = {"params": params, "rest": rest, "opt_state": jax.jit(optimizer.init)(params)}
    update = training.make_update(graph, loss, optimizer, accumulate=1)

    def step() -> jax.Array:
        nonlocal state
        state, value = update(state, batch)
        return value

    @jax.jit
    def terms(params: Any, rest: Any) -> dict[str, jax.Array]:
        return watch(nnx.merge(graph, params, rest), batch, loss)

    calls = {"step": step, "watch": lambda: terms(state["params"], state["rest"])}
    times = measure.seconds(calls, repeats)
    return {
        "model": name,
        "step, ms": 1e3 * times["step"],
        "watch, ms": 1e3 * times["watch"],
        "watch / step": times["watch"] / times["step"],
    }


def main(flags: Flags) -> None:
    """Prints the table."""
    measure.report([measure_model(name, flags.repeats) for name in flags.models], flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
