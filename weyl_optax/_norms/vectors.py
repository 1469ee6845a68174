"""The vectors whose norms count: the units of a matrix, or the whole matrix."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from weyl_optax._arguments import check_in
from weyl_optax._norms.orthogonal_iteration import compute_dtype
from weyl_optax._reading.specification import (
    DimensionNumbers,
    MatrixSpec,
    SplitDimensionNumbers,
    WeightDimNumOrFn,
    resolve_dimension_numbers,
)

Per = Literal["unit", "matrix"]


def check_per(per: Any) -> None:
    """Checks that it is a `Per`."""
    check_in("per", per, get_args(Per))


def weight_vectors(
    weight_dimension_numbers: WeightDimNumOrFn | None, per: Per
) -> Callable[[optax.Params], Any]:
    """A specification of each matrix as vectors: one for each output unit, or one of all entries.

    Vectors and scalars, which are biases and gains, are left out, and so are units with one
    input: a single number has no direction.
    """
    check_per(per)

    def vectors(spec: MatrixSpec | None) -> DimensionNumbers | None:
        if spec is None or not spec.reduction:
            return None
        axes = spec.reduction if per == "unit" else spec.matrix_axes
        if any(math.prod(part.sizes(axes)) == 1 for part in spec.parts):
            return None
        if spec.split_axis in axes:
            return SplitDimensionNumbers((), axes, spec.split_axis, spec.part_sizes)
        return MuonDimensionNumbers((), axes)

    return lambda params: jax.tree.map(
        vectors,
        resolve_dimension_numbers(params, weight_dimension_numbers),
        is_leaf=lambda x: x is None,
    )


def inner(x: jax.Array, y: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The real inner product of the vectors, shape (*batch), in float32 at least."""
    x, y = (a.astype(compute_dtype(a)) for a in (x, y))
    product = jnp.real(jnp.conj(x) * y)
    return jnp.sum(product, axis=spec.matrix_axes)


def length(x: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The 2-norms of the vectors, shape (*batch), in float32 at least."""
    x, size = _scaled(x, spec)
    return size * jnp.sqrt(inner(x, x, spec))


def radial(u: jax.Array, w: jax.Array, spec: MatrixSpec) -> jax.Array:
    """How long `u` is along the vectors of `w`, shape (*batch); zero, where these are zero."""
    w, _ = _scaled(w, spec)
    return _multiple(u, w, spec) * jnp.sqrt(inner(w, w, spec))


def tangent(u: jax.Array, w: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The part of `u` orthogonal to the vectors of `w`; all of it, where these are zero."""
    w, _ = _scaled(w, spec)
    return u.astype(compute_dtype(u)) - spec.times(_multiple(u, w, spec), w)


def running_rms(
    root: jax.Array, count: jax.Array, now: jax.Array, decay: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The root of a running mean of squares, from zero, and how many finite values it has."""
    finite, keep = jnp.isfinite(now), jnp.asarray(decay, root.dtype)
    mean = jnp.hypot(jnp.sqrt(keep) * root, jnp.sqrt(1 - keep) * now)
    root = jnp.where(finite, mean, root).astype(root.dtype)
    return root, jnp.where(finite, count + 1, count)


def _multiple(u: jax.Array, w: jax.Array, spec: MatrixSpec) -> jax.Array:
    """That of the scaled vectors of `w` which is nearest to `u`; shape (*batch)."""
    u, size = _scaled(u, spec)
    square = inner(w, w, spec)
    return size * (inner(w, u, spec) / jnp.where(square > 0, square, 1))


def _scaled(x: jax.Array, spec: MatrixSpec) -> tuple[jax.Array, jax.Array]:
    """The vectors over a power of two, which rounds nothing, so that no square of them overflows.

    Returns:
        With entries up to 1, and the power, (*batch).
    """
    x = x.astype(compute_dtype(x))
    largest = jnp.max(jnp.abs(x), axis=spec.matrix_axes)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))
    exponent = jnp.clip(exponent, -126, 126)
    one = jnp.ones_like(largest)
    return spec.times(jnp.ldexp(one, -exponent), x), jnp.ldexp(one, exponent)
