r"""A cap on the leading singular values of a matrix, from the vectors of a search.

It lowers the :math:`k` leading ones to the level :math:`\ell = \sigma_k`, and needs the norm of
what is left, :math:`C = A - U_k (\Sigma_k - \ell) V_k^H`. That is above :math:`\ell`, since the
vectors are not exact. With :math:`U` and :math:`V` for the vectors of the search, and
:math:`\bar U` and :math:`\bar V` for all other directions,

.. math::

    C = [U\;\bar U]
        \begin{bmatrix} L & 0 \\ \bar U^H A V & \bar U^H A \bar V \end{bmatrix}
        [V\;\bar V]^H, \qquad \|L\|_2 = \ell;

the zero is there because :math:`V` spans the rows of :math:`U^H A`. One more product gives the
norm of the first column, :math:`c = \|C V\|_2`. We take the last entry to be at most
:math:`\ell`, which it is if the search has found what is larger, and :math:`L` to be
:math:`\ell` where :math:`C V` is largest. Then the norm is that of :math:`[\ell, 0; r, \ell]`
with :math:`r^2 = c^2 - \ell^2`, which is :math:`(r + \sqrt{r^2 + 4 \ell^2}) / 2`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax import _sharding as sharding
from weyl_optax._norms.orthogonal_iteration import (
    SHORT_SIDE,
    Labels,
    einsum,
    gram,
    is_found,
    undifferentiable,
)
from weyl_optax._norms.small_problems import together
from weyl_optax._reading.specification import MatrixSpec

LEAST_LEVEL = 0.01  # as a share of the largest singular value: for low ranks
NO_DERIVATIVE = (
    "A spectral cap has no derivative here. Put jax.lax.stop_gradient around the update of the "
    "optimizer, or leave the cap out."
)


def rank_of(spec: MatrixSpec, cap_rank: int) -> int:
    """How many singular values of each matrix to lower."""
    n = min(spec.matrix_shape)
    return min(cap_rank, n // 2) if n > SHORT_SIDE else 0


def lower(
    leaves: Sequence[jax.Array],
    specs: Sequence[MatrixSpec],
    blocks: Sequence[jax.Array],
    spectra: Sequence[Any],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Lower the leading singular values of some leaves, all that their spectra have.

    Args:
        leaves: Arrays of the dtype of the blocks.
        specs: How they are read.
        blocks: As a search of them has left them.
        spectra: What it has found besides.

    Returns:
        The leaves, and the norms of their matrices. Neither has a derivative.
    """
    constants = lax.stop_gradient((list(leaves), list(blocks), list(spectra)))
    capped, norms = _lower(tuple(specs), *constants)
    fixed = functools.partial(undifferentiable, NO_DERIVATIVE)
    return list(map(fixed, capped, leaves)), list(map(fixed, norms, leaves))


@functools.partial(jax.jit, static_argnums=0)
def _lower(
    specs: tuple[MatrixSpec, ...],
    leaves: list[jax.Array],
    blocks: list[jax.Array],
    spectra: list[tuple[jax.Array, jax.Array]],
) -> tuple[list[jax.Array], list[jax.Array]]:
    excesses, levels, grams = zip(*map(_excess, specs, leaves, blocks, spectra), strict=True)
    squares = together(_largest_eigenvalue, grams)
    norms = [
        sharding.reshard_as(a, _norm(level, square), spec.batch)
        for a, spec, level, square in zip(leaves, specs, levels, squares, strict=True)
    ]
    return list(map(_without_excess, specs, leaves, blocks, excesses)), norms


@functools.partial(jax.jit, static_argnums=0)
def _excess(
    spec: MatrixSpec, a: jax.Array, v: jax.Array, spectrum: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U_k (S_k - l); the level l, (*batch,); and the Gram matrix of C V over it."""
    sigma, left = spectrum
    labels = Labels.of(spec)
    axis, vector_axes = labels.image.index("y"), labels.vector_axes(labels.image)
    rank = left.shape[axis]
    level = jnp.maximum(sigma[..., rank - 1], LEAST_LEVEL * sigma[..., 0])
    above = jnp.maximum(sigma[..., :rank] - level[..., None], 0)
    excess = left * jnp.expand_dims(above, vector_axes).astype(left.dtype)
    # Nothing is subtracted from a matrix that is not finite.
    excess = jnp.where(jnp.expand_dims(jnp.isfinite(above), vector_axes), excess, 0)
    forward = f"{labels.leaf},{labels.block}->{labels.image}"
    image = einsum(a, labels, lax.Precision.HIGH, forward, a, v)
    lowered = lax.slice_in_dim(image, 0, rank, axis=axis) - excess
    others = lax.slice_in_dim(image, rank, None, axis=axis)
    image = lax.concatenate([lowered, others], axis)
    inverse = 1 / jnp.where(level > 0, level, 1)[..., None]
    inverse = jnp.where(is_found(jnp.square(sigma * inverse)), inverse, 0)
    image = image * jnp.expand_dims(inverse, vector_axes).astype(image.dtype)
    return excess, level, gram(a, labels, labels.image, image)


@jax.jit
def _largest_eigenvalue(g: jax.Array) -> jax.Array:
    """Of G, (..., k, k), positive semidefinite: tr(G^257) / tr(G^256)."""
    power = g
    for _ in range(8):
        trace = jnp.trace(power, axis1=-2, axis2=-1)[..., None, None]
        power = power / jnp.where(trace == 0, 1, trace)
        power = jnp.matmul(power, power, precision=lax.Precision.HIGHEST)
    square = jnp.real(jnp.trace(power, axis1=-2, axis2=-1))
    product = jnp.real(jnp.sum(power * jnp.conj(g), axis=(-2, -1)))
    return product / jnp.where(square > 0, square, 1)


@jax.jit
def _norm(level: jax.Array, square: jax.Array) -> jax.Array:
    """(r + sqrt(r^2 + 4 l^2)) / 2, from c^2 / l^2."""
    r = jnp.sqrt(jnp.maximum(square - 1, 0))
    return level * (r + jnp.sqrt(r * r + 4)) / 2


@functools.partial(jax.jit, static_argnums=0)
def _without_excess(
    spec: MatrixSpec, a: jax.Array, block: jax.Array, excess: jax.Array
) -> jax.Array:
    """A - U_k (S_k - l) V_k^H."""
    labels = Labels.of(spec)
    rank = excess.shape[labels.image.index("y")]
    v = lax.slice_in_dim(block, 0, rank, axis=labels.block.index("y"))
    x, y = (labels.image, excess), (labels.block, jnp.conj(v))
    # Columns before rows: the product is then laid out like the leaf.
    (columns, c), (rows, r) = (x, y) if labels.image.endswith("y") else (y, x)
    return a - einsum(a, labels, lax.Precision.HIGH, f"{columns},{rows}->{labels.leaf}", c, r)
