"""How exact the spectral norms of the bound are: on real runs, and on updates made to hide."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

from benchmarks import adversarial, measure, peers
from examples import program, training
from examples.optimizers import is_decayed, is_hidden_kernel
from examples.paper import nano
from examples.rivals import is_numbers
from weyl_optax import bound_metrics, scale_by_weyl_bound

PHASES = {
    "all": slice(None),
    "first step": slice(0, 1),
    "steps 2 to 20": slice(1, 20),
    "later": slice(20, None),
}
KINDS = {
    "attention": {"query", "key", "value", "out"},
    "mlp": {"up", "down"},
    "other": set(),  # embeddings, patches, head
}
MIN_STD = 1e-3
TAU = 0.03  # by which norms may grow, exponentially: then Rule 1 is met with equality


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train the nano models without warmup, and compare every estimate with an exact SVD.

    Then do the same with streams of updates that leave the subspace of a warm start.
    """

    models: tuple[Literal["gpt", "vit"], ...] = ("gpt", "vit")
    """What to train."""
    cap_rank: int | None = None
    """Singular values that a cap lowers before the bound, in hidden kernels; by default none."""
    steps: int = 300
    """Updates, at least 21."""
    seed: int = 0
    """Of the weights and the batches."""
    out: Path = Path("runs/benchmarks/estimator_accuracy.json")
    """The file for the tables."""


Arrays = dict[str, np.ndarray]  # by path


class Step(NamedTuple):
    """An update of a run: matrices (batch, m, n) by path, and norms (batch,)."""

    rate: float
    weights: Arrays  # before it
    updates: Arrays  # as the bound was given them, or as its cap has left them
    sigma_weight: Arrays  # as the bound found them
    sigma_update: Arrays


class Recorded(NamedTuple):
    """State of :func:`record`."""

    updates: optax.Updates


def record() -> optax.GradientTransformation:
    """Keeps the updates that pass."""
    return optax.GradientTransformation(
        lambda params: Recorded(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params: (updates, Recorded(updates)),
    )


def run(model: nano.Nano, cap_rank: int | None, steps: int) -> Iterator[Step]:
    """Trains with AdamW², and hands every update over."""
    config = model.config
    task = model.make_task(config, model.data)
    rate = optax.cosine_decay_schedule(config.learning_rate, steps)
    bound = scale_by_weyl_bound(
        TAU,
        rate,
        growth="exponential",
        weight_decay=config.weight_decay,
        weight_decay_mask=is_decayed,
        min_std=MIN_STD,
        weight_dimension_numbers=task.numbers,
        cap_rank=cap_rank,
        cap_mask=is_hidden_kernel,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2),
        bound,
        record(),
        optax.scale_by_learning_rate(rate),
    )
    _, state, update = training.start(task.model, task.loss, optimizer)
    with contextlib.closing(task.batches):
        for step in tqdm(range(steps), mininterval=10):
            weights = matrices(state["params"], task.numbers)
            state, _ = update(state, training.next_batch(task, config.accumulate))
            recorded = jax.device_get(state["opt_state"][3])
            found = jax.device_get(bound_metrics(state["opt_state"]))
            bounded = matrices(recorded.updates, task.numbers)
            yield Step(
                float(rate(step)),
                weights,
                {
                    path: u / found[f"{path}/scale"].reshape(-1, 1, 1)
                    - decay(path, weights, config)
                    for path, u in bounded.items()
                },
                {path: found[f"{path}/sigma_weight"].ravel() for path in weights},
                {path: found[f"{path}/sigma_update"].ravel() for path in weights},
            )


def decay(path: str, weights: Arrays, config: program.Config) -> np.ndarray:
    """What the decay adds to an update."""
    return config.weight_decay * weights[path] * is_decayed({path: 0})[path]


def matrices(tree: Any, numbers: Any) -> Arrays:
    """The leaves as (batch, m, n), by path, without the vectors, whose norms are exact."""
    entries = jax.tree.leaves(numbers, is_leaf=is_numbers)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
            peers.as_matrices(leaf, entry)
        )
        for (path, leaf), entry in zip(jax.tree.leaves_with_path(tree), entries, strict=True)
        if entry.reduction_axis
    }


def exact(a: np.ndarray) -> np.ndarray:
    """The spectral norms of (batch, m, n), from the smaller Gram matrix in float64."""
    a = np.float64(a)
    at = np.swapaxes(a, -1, -2)
    gram = a @ at if a.shape[-2] < a.shape[-1] else at @ a
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[..., -1], 0))


Estimator = Callable[[Step], tuple[Arrays, Arrays]]  # norms of the weights, of the updates


def ours(step: Step) -> tuple[Arrays, Arrays]:
    """What the bound itself found."""
    return step.sigma_weight, step.sigma_update


def cold(num_iters: int) -> Estimator:
    """The paper's power iterations."""
    norms = peers.cold_power_iterations(num_iters)

    @jax.jit
    def of_each(arrays: Arrays) -> Arrays:
        return {path: norms(a) for path, a in arrays.items()}

    return lambda step: jax.device_get((of_each(step.weights), of_each(step.updates)))


def warm_vector() -> Estimator:
    """One power iteration in each step, from the singular vector of the last step."""
    kept: dict[str, Arrays] = {"weights": {}, "updates": {}}

    @jax.jit
    def iterate(a: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = jnp.einsum("bmn,bn->bm", a, v)
        z = jnp.einsum("bmn,bm->bn", a, u / _at_least_tiny(u))
        return jnp.linalg.norm(z, axis=-1), z / _at_least_tiny(z)

    def norms(of: str, arrays: Arrays) -> Arrays:
        found = {}
        for path, a in arrays.items():
            start = np.random.default_rng(0).normal(size=a.shape[::2]).astype(a.dtype)
            found[path], kept[of][path] = iterate(a, kept[of].get(path, start))
        return jax.device_get(found)

    return lambda step: (norms("weights", step.weights), norms("updates", step.updates))


def _at_least_tiny(x: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.maximum(norms, jnp.finfo(x.dtype).tiny)


def estimators() -> dict[str, Estimator]:
    """All, at their start."""
    return {
        peers.OURS: ours,
        "1 warm iteration of one vector": warm_vector(),
        "2 cold iterations": cold(2),
        "3 cold iterations": cold(3),
    }


def follow(model: nano.Nano, cap_rank: int | None, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """What every estimator found, at every matrix and step of a run.

    Returns:
        By estimator and path, an array (steps, 3, batch): by how much it is below the exact
        norm of the weight and of the update, relative; and the factor by which the weight's
        norm grows in a step with this estimator.
    """
    config = model.config
    compared = estimators()
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in compared}
    for step in run(model, cap_rank, steps):
        estimates = {name: estimate(step) for name, estimate in compared.items()}
        for path, w in step.weights.items():
            u = np.float64(step.updates[path])
            sigma_w, sigma_u = exact(w), exact(u)
            decayed = u + decay(path, step.weights, config)
            least = MIN_STD * sum(math.sqrt(side) for side in w.shape[-2:])
            for name, (of_weights, of_updates) in estimates.items():
                allowed = TAU * np.maximum(of_weights[path], least)
                rate = np.minimum(step.rate, allowed / of_updates[path])
                after = exact(w - rate[:, None, None] * decayed)
                below = 1 - of_weights[path] / sigma_w, 1 - of_updates[path] / sigma_u
                growth = after / np.maximum(sigma_w, least)
                found[name].setdefault(path, []).append(np.stack([*below, growth]))
    return {
        name: {path: np.stack(values) for path, values in by_path.items()}
        for name, by_path in found.items()
    }


def kind(path: str) -> str:
    """Of the weight at a path."""
    return next((name for name, layers in KINDS.items() if layers & set(path.split("/"))), "other")


def error_rows(name: str, found: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Median and 99th percentile of the errors, in percent, by kind of weight and by phase."""
    rows = []
    for i, quantity in enumerate(("sigma(W)", "sigma(U)")):
        for of_kind in ("all", *KINDS):
            for estimator, by_path in found.items():
                errors = np.concatenate(
                    [v[:, i] for path, v in by_path.items() if of_kind in ("all", kind(path))],
                    axis=-1,
                )
                row = {"model": name, "of": quantity, "kind": of_kind, "estimator": estimator}
                for phase, steps in PHASES.items():
                    row[f"{phase}, %"] = 100 * float(np.median(errors[steps]))
                    row[f"{phase}, p99"] = 100 * float(np.percentile(errors[steps], 99))
                rows.append(row)
    return rows


def growth_rows(name: str, found: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """How often the norm of a weight grows by more than Rule 1 allows."""
    rows = []
    for estimator, by_path in found.items():
        growth = np.concatenate([v[:, 2].ravel() for v in by_path.values()])
        rows.append(
            {
                "model": name,
                "estimator": estimator,
                "matrix-steps": growth.size,
                "norm > 1.01 (1 + tau), %": 100 * float(np.mean(growth > 1.01 * (1 + TAU))),
                "growth > 1.01 tau, %": 100 * float(np.mean(growth - 1 > 1.01 * TAU)),
                "largest growth / tau": float(growth.max() - 1) / TAU,
            }
        )
    return rows


def adversarial_rows(cap_rank: int | None, steps: int, seed: int) -> list[dict[str, Any]]:
    """How many times the norm of an update is what an estimator found, from the third step on."""
    rows = []
    for name, stream in (adversarial.CHANGES | adversarial.MOVES).items():
        grads = stream(np.random.default_rng(seed), steps)
        updates = [np.float32(u) for u in adversarial.adam(grads)]
        bound = scale_by_weyl_bound(jnp.inf, cap_rank=cap_rank)
        params = {"w": jnp.ones(updates[0].shape)}
        state, update = bound.init(params), jax.jit(bound.update)
        compared = estimators()
        ratios: dict[str, list[float]] = {estimator: [] for estimator in compared}
        for u in updates:
            capped, state = update({"w": u}, state, params)
            batch = {"w": np.asarray(capped["w"])[None]}
            found = {"w": np.asarray(state.sigma_update["w"])[None]}
            step = Step(0.0, batch, batch, found, found)
            (sigma,) = exact(batch["w"])
            for estimator, estimate in compared.items():
                _, estimates = estimate(step)
                ratios[estimator].append(sigma / max(float(estimates["w"][0]), 1e-30))
        for estimator, values in ratios.items():
            settled = np.array(values[2:])
            rows.append(
                {
                    "stream": name,
                    "estimator": estimator,
                    "median": float(np.median(settled)),
                    "p99": float(np.percentile(settled, 99)),
                    "steps above 1.1, %": 100 * float(np.mean(settled > 1.1)),
                }
            )
    return rows


def main(flags: Flags) -> None:
    """Prints the tables."""
    if flags.steps < 21:
        sys.exit(f"error: --steps {flags.steps}: it must be at least 21, to have every phase.")
    errors, growths = [], []
    for name in flags.models:
        model = nano.load(name)
        config = dataclasses.replace(model.config, steps=flags.steps, seed=flags.seed)
        found = follow(model._replace(config=config), flags.cap_rank, flags.steps)
        errors += error_rows(name, found)
        growths += growth_rows(name, found)
    measure.report(errors, flags.out)
    measure.report(growths, flags.out.with_stem("rule_1"))
    rows = adversarial_rows(flags.cap_rank, flags.steps, flags.seed)
    measure.report(rows, flags.out.with_stem("adversarial"))


if __name__ == "__main__":
    main(tyro.cli(Flags))
