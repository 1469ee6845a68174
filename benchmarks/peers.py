"""The optimizers that the benchmarks compare, by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from examples.rivals import is_numbers
from upstream.optax import _weyl_bound
from weyl_optax import adamw2
from weyl_optax.contrib import rotate, soft_spectral_clip

RATE, TAU = 1e-3, 0.01
BASE = "optax.adamw"
OURS = "adamw2"

Norms = Callable[[jax.Array], jax.Array]  # (batch, m, n) -> (batch,)


def as_matrices(x: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
    """A leaf as (batch, m, n); its axes are batch, reduction and output axes in this order."""
    reduction, output = (
        (axes,) if isinstance(axes, int) else axes
        for axes in (numbers.reduction_axis, numbers.output_axis)
    )
    sizes = [math.prod(x.shape[axis] for axis in axes) for axes in (reduction, output)]
    return x.reshape(-1, *sizes)


def bound_by(norms: Norms, weight_dimension_numbers: Any) -> optax.GradientTransformation:
    """Algorithm 1 of arXiv 2505.21910 with an estimator of the spectral norm that keeps nothing."""

    def bound(update: jax.Array, weight: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
        matrices = as_matrices(update, numbers)
        allowed = TAU * norms(as_matrices(weight, numbers))
        scale = jnp.minimum(1, allowed / (RATE * norms(matrices)))
        return (scale[:, None, None] * matrices).reshape(update.shape)

    return optax.stateless(
        lambda updates, params: jax.tree.map(bound, updates, params, weight_dimension_numbers)
    )


def cold_power_iterations(num_iters: int) -> Norms:
    """The paper's: from a random vector at every step."""

    def norm(a: jax.Array) -> jax.Array:
        v = jnp.asarray(np.random.default_rng(0).normal(size=a.shape[-1]), a.dtype)
        for _ in range(num_iters):
            u = a @ v
            u = u / jnp.linalg.norm(u)
            v = u @ a
            v = v / jnp.linalg.norm(v)
        return jnp.linalg.norm(a @ v)

    return jax.vmap(norm)


def optax_power_iteration(a: jax.Array) -> jax.Array:
    """Of A^T A, as many iterations as the paper's."""

    def norm(a: jax.Array) -> jax.Array:
        start = jnp.asarray(np.random.default_rng(0).normal(size=a.shape[-1]), a.dtype)
        eigenvalue, _ = optax.power_iteration(lambda v: (a @ v) @ a, v0=start, num_iters=3)
        return jnp.sqrt(eigenvalue)

    return jax.vmap(norm)(a)


def exact_svd(a: jax.Array) -> jax.Array:
    """One matrix at a time, so that LAPACK has all threads."""
    return jax.lax.map(lambda a: jnp.linalg.svd(a, compute_uv=False)[0], a)


def _bounded_adam(norms: Norms) -> Callable[[Any], optax.GradientTransformation]:
    return lambda numbers: optax.chain(
        optax.scale_by_adam(),
        bound_by(norms, numbers),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(RATE),
    )


def _matrices_only(numbers: Any) -> Any:
    """None for vectors, embeddings and heads, which Muon leaves to Adam."""

    def of_leaf(path: Any, numbers: MuonDimensionNumbers) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_vector = numbers.reduction_axis == ()
        return None if is_vector or name.endswith("embedding") or "head/" in name else numbers

    return jax.tree.map_with_path(of_leaf, numbers, is_leaf=is_numbers)


def _of_rank_2(numbers: Any) -> Any:
    """None for vectors."""
    return jax.tree.map(
        lambda x: None if x.reduction_axis == () else x, numbers, is_leaf=is_numbers
    )


def _capped(numbers: Any, rank: int) -> optax.GradientTransformation:
    mask = jax.tree.map(
        lambda x: x is not None,
        _matrices_only(numbers),
        is_leaf=lambda x: x is None or is_numbers(x),
    )
    return adamw2(RATE, tau=TAU, weight_dimension_numbers=numbers, cap_rank=rank, cap_mask=mask)


OPTIMIZERS: Mapping[str, Callable[[Any], optax.GradientTransformation]] = {
    BASE: lambda _: optax.adamw(RATE),
    OURS: lambda numbers: adamw2(RATE, tau=TAU, weight_dimension_numbers=numbers),
    "adamw2, as offered to Optax": lambda numbers: _weyl_bound.adamw2(
        RATE, tau=TAU, weight_dimension_numbers=_of_rank_2(numbers)
    ),
    "adamw2, a cap of rank 32": lambda numbers: _capped(numbers, 32),
    "adamw2, a cap of rank 192": lambda numbers: _capped(numbers, 192),
    "optax.lamb": lambda _: optax.lamb(RATE),
    "optax.adaptive_grad_clip after Adam": lambda _: optax.chain(
        optax.adamw(RATE), optax.adaptive_grad_clip(TAU)
    ),
    "optax.radam": lambda _: optax.radam(RATE),
    "optax.contrib.schedule_free_adamw": lambda _: optax.contrib.schedule_free_adamw(RATE),
    "optax.contrib.muon": lambda numbers: optax.contrib.muon(
        RATE, muon_weight_dimension_numbers=_matrices_only(numbers)
    ),
    "soft spectral clip after Adam": lambda numbers: optax.chain(
        optax.scale_by_adam(),
        soft_spectral_clip(10.0, _matrices_only(numbers)),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(RATE),
    ),
    "AdamH": lambda numbers: optax.chain(
        optax.adamw(RATE), rotate(RATE, _matrices_only(numbers), per="matrix", decay=0.0)
    ),
    "bound, 3 cold iterations (the paper)": _bounded_adam(cold_power_iterations(3)),
    "bound, optax.power_iteration": _bounded_adam(optax_power_iteration),
    "bound, exact SVD": _bounded_adam(exact_svd),
}

Name: TypeAlias = Literal[*OPTIMIZERS]
