"""Models with a loss and a batch, and their training step, for the benchmarks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import models.gpt
import models.vit
from examples import language, placement, training, vision
from models.gpt import GPT
from models.vit import ViT

Name = Literal["gpt-nano", "vit-nano", "gpt2-small", "gpt2-small-0.5M", "vit-base"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Time the training steps of models."""

    models: tuple[Name, ...] = ("gpt-nano", "vit-nano")
    """What to train; those that are not nano are for a GPU."""
    seconds: float = 20.0
    """Time for each model."""


class Task(NamedTuple):
    """What is trained."""

    model: nnx.Module
    numbers: Any  # how its leaves are read as matrices
    loss: Callable[[nnx.Module, Any], jax.Array]
    batch: Any
    accumulate: int = 1  # parts of the batch


def image_loss(model: ViT, batch: dict[str, np.ndarray]) -> jax.Array:
    """Cross entropy in nats per image."""
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def make(name: Name) -> Task:
    """A task of that name; those that are not nano compute in bfloat16, and are for a GPU."""
    rng, rngs = np.random.default_rng(0), nnx.Rngs(0)
    if name.startswith("vit"):
        config, size = models.vit.CONFIGS["nano"], 64
        if name == "vit-base":
            config, size = dataclasses.replace(models.vit.CONFIGS["base"], dtype="bfloat16"), 256
        shape = (size, config.image_size, config.image_size, config.num_channels)
        images = rng.standard_normal(shape, np.float32)
        labels = rng.integers(0, config.num_classes, size)
        model, batch = ViT(config, rngs=rngs), {"image": images, "label": labels}
        return Task(model, vision.numbers_of(model), image_loss, batch)
    config, size, accumulate = models.gpt.CONFIGS["nano"], (8, 129), 1
    if name.startswith("gpt2-small"):
        config = dataclasses.replace(models.gpt.CONFIGS["gpt2-small"], dtype="bfloat16")
        accumulate = 60 if name == "gpt2-small-0.5M" else 1
        size = (8 * accumulate, 1025)
    tokens = rng.integers(0, config.vocab_size, size, np.int32)
    model = GPT(config, rngs=rngs)
    return Task(model, language.numbers_of(model), language.next_token_loss, tokens, accumulate)


class Training:
    """A task in training, on one device.

    Args:
        task: What is trained. The first step takes the arrays of its model.
        make_optimizer: From its numbers.
    """

    def __init__(self, task: Task, make_optimizer: Callable[[Any], optax.GradientTransformation]):
        optimizer = make_optimizer(task.numbers)
        model = placement.place_model(task.model, placement.make_mesh(None, rows=1))
        self.graph, self.state, self._update = training.start(model, task.loss, optimizer)
        self.batch = jax.tree.map(
            lambda x: x.reshape(task.accumulate, -1, *x.shape[1:]), task.batch
        )

    def step(self) -> jax.Array:
        """Takes a step.

        Returns:
            Its loss.
        """
        self.state, loss = self._update(self.state, self.batch)
        return loss
