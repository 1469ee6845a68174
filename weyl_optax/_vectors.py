"""The vectors whose norms count: those of the units of a matrix, or the matrix as a whole."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from weyl_optax._arguments import check_in
from weyl_optax._dimension_numbers import MatrixSpec, WeightDimNumOrFn, axes_of
from weyl_optax._granularity import by_unit, map_entries
from weyl_optax._orthogonal_iteration import compute_dtype

Per = Literal["unit", "matrix"]


def check_per(per: Any) -> None:
    """Checks that it is a `Per`."""
    check_in("per", per, get_args(Per))


def only_matrices(weight_dimension_numbers: WeightDimNumOrFn | None) -> WeightDimNumOrFn:
    """A specification with the matrices alone."""
    return map_entries(
        lambda entry: entry if axes_of(entry.reduction_axis) else None, weight_dimension_numbers
    )


def weight_vectors(weight_dimension_numbers: WeightDimNumOrFn | None, per: Per) -> WeightDimNumOrFn:
    """A specification of each matrix as vectors: one for each output unit, or one of all entries.

    Vectors and scalars, which are biases and gains, are left out.
    """
    check_per(per)
    matrices = only_matrices(weight_dimension_numbers)
    if per == "unit":
        return by_unit(matrices)
    return map_entries(
        lambda entry: MuonDimensionNumbers(
            (), axes_of(entry.reduction_axis) + axes_of(entry.output_axis)
        ),
        matrices,
    )


def inner(x: jax.Array, y: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The real inner product of the vectors, shape (*batch), in float32 at least."""
    x, y = (a.astype(compute_dtype(a)) for a in (x, y))
    product = jnp.real(jnp.conj(x) * y)
    return jnp.sum(product, axis=spec.matrix_axes)


def length(x: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The 2-norms of the vectors, shape (*batch), in float32 at least."""
    return jnp.sqrt(inner(x, x, spec))


def tangent(u: jax.Array, w: jax.Array, spec: MatrixSpec) -> jax.Array:
    """What of `u` is orthogonal to the vectors of `w`; all of it, where these are zero."""
    u, w = (x.astype(compute_dtype(x)) for x in (u, w))
    square = inner(w, w, spec)
    radial = inner(w, u, spec) / jnp.where(square > 0, square, 1)
    return u - times(radial, w, spec)


def times(factor: jax.Array, x: jax.Array, spec: MatrixSpec) -> jax.Array:
    """Each vector of `x` times its own factor, (*batch)."""
    return jnp.expand_dims(factor, spec.matrix_axes).astype(x.dtype) * x
