"""GI-Adam beside Adam with and without warmup, as in figure 1 of arXiv 2406.09405, on digits.

The paper's best test accuracies, of a ResNet on CIFAR-10, at peak rates of 0.0102 and 0.041: Adam
0.912 and 0.104, GI-Adam 0.934 and 0.893, 1,024 steps of warmup 0.939 and 0.902.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits

from benchmarks import measure
from weyl_optax.contrib import gi_adamw

TRAINED = 1400  # of 1,797 images; the others are held out


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train perceptrons on scikit-learn's digits at growing rates, and print their accuracies."""

    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Learning rates, constant after the warmup."""
    steps: int = 400
    """Updates."""
    warmup: int = 100
    """Updates of linear warmup, for the runs that have it."""
    seeds: int = 5
    """Runs of each, of which the mean is shown."""
    out: Path = Path("runs/benchmarks/gi_adam.json")
    """The file for the table."""


class MLP(nnx.Module):
    """Four layers with ReLU and He's initialization."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        init = nnx.initializers.he_normal()
        sizes = [64, width, width, width, 10]
        self.layers = nnx.List(
            nnx.Linear(n_in, n_out, kernel_init=init, rngs=rngs)
            for n_in, n_out in itertools.pairwise(sizes)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def best_accuracy(optimizer: optax.GradientTransformation, steps: int, seeds: int) -> float:
    """The best accuracy on held-out digits during a training, mean over the seeds."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray((digits.data - digits.data.mean(0)) / digits.data.std(), jnp.float32)
    images, labels = images[order], jnp.asarray(digits.target)[order]

    @jax.jit
    def train(model: tuple[nnx.GraphDef, nnx.State], key: jax.Array) -> jax.Array:
        graph, params = model

        def loss(params: optax.Params, batch: jax.Array) -> jax.Array:
            logits = nnx.merge(graph, params)(images[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

        def step(carry: tuple, batch: jax.Array) -> tuple[tuple, jax.Array]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
            found = nnx.merge(graph, params)(images[TRAINED:]).argmax(-1)
            return (params, state), jnp.mean(found == labels[TRAINED:])

        batches = jax.random.randint(key, (steps, 128), 0, TRAINED)
        _, accuracies = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return accuracies.max()

    accuracies = [
        train(nnx.split(MLP(nnx.Rngs(seed)), nnx.Param), jax.random.key(seed))
        for seed in range(seeds)
    ]
    return float(np.mean(accuracies))


def optimizers(rate: float, warmup: int) -> dict[str, Callable[[], optax.GradientTransformation]]:
    """What is compared, by name."""
    return {
        "Adam": lambda: optax.adam(rate),
        "GI-Adam": lambda: gi_adamw(rate, weight_decay=0.0),
        "Adam, warmup": lambda: optax.adam(optax.linear_schedule(0.0, rate, warmup)),
    }


def main(flags: Flags) -> None:
    """Prints the table."""
    rows = []
    for rate in flags.rates:
        row: dict[str, str | float] = {"peak rate": f"{rate:g}"}
        for name, make in optimizers(rate, flags.warmup).items():
            row[name] = best_accuracy(make(), flags.steps, flags.seeds)
        rows.append(row)
    measure.report(rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
