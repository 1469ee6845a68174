r"""Largest singular values by warm-started block power iteration.

One iteration on a matrix :math:`A`, from a block :math:`V` of :math:`k` vectors:

.. math::

    R = A V, \qquad Z = A^H R, \qquad V \leftarrow \text{a basis of } Z.

It reads :math:`A` twice, and costs hardly more than with a single vector, since
the products are bound by reading :math:`A`. The rest is :math:`k \times k`.

A matrix with a short side needs no search: its norm is that of the Gram matrix of this side.
"""

import functools
import math
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax import _small
from weyl_optax._matrices import Matrices

BLOCK_SIZE = 8  # vectors kept for each matrix
COLD_ITERS = 16  # iterations that find a norm from nothing
SHORT_SIDE = 16  # up to which a Gram matrix is cheaper than a search, and exact
FAINT = 2.0**-10  # of a start, beside the vectors of unit length of a block that was searched

Arrays: TypeAlias = dict[str, jax.Array]


def compute_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """float32 at least; float64 and complex leaves keep their own."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def random_blocks(leaves: Arrays, matrices: dict[str, Matrices], seed: int) -> Arrays:
    """A random start for every matrix that is searched.

    The matrices of one model may all start from the same numbers: what they are has
    nothing to do with them.

    Returns:
        Keyed by path, `BLOCK_SIZE` vectors along the shorter side of the matrix, of
        length `FAINT` about: shape (*batch, k, *output), or (*batch, *reduction, k).
    """
    shapes = {}
    for path, m in matrices.items():
        if _is_searched(m):
            sizes = dict(zip(_Labels.of(m).leaf, m.shape, strict=True), y=BLOCK_SIZE)
            shapes[path] = tuple(sizes[label] for label in _Labels.of(m).near)
    batch_ranks = {path: len(matrices[path].batch) for path in shapes}
    longest = max((math.prod(s[batch_ranks[path] :]) for path, s in shapes.items()), default=0)
    draw = jax.random.normal(jax.random.key(seed), (longest,))

    def block(path: str) -> jax.Array:
        batch, own = shapes[path][: batch_ranks[path]], shapes[path][batch_ranks[path] :]
        size = FAINT / math.sqrt(min(matrices[path].matrix_shape))
        start = (draw[: math.prod(own)] * size).reshape(own).astype(compute_dtype(leaves[path]))
        return jnp.tile(start, (*batch, *(1 for _ in own)))

    return {path: block(path) for path in shapes}


def zero_norms(leaves: Arrays, matrices: dict[str, Matrices]) -> Arrays:
    """The norms of matrices that were never met, shape (*batch,), keyed by path."""
    return {
        path: jnp.zeros(m.batch_shape, jnp.finfo(compute_dtype(leaves[path])).dtype)
        for path, m in matrices.items()
    }


def with_own_rows(
    leaves: Arrays, matrices: dict[str, Matrices], blocks: Arrays, last: Arrays
) -> Arrays:
    """The blocks, with some of its rows added where a matrix was zero, or not finite, before.

    A row of A is A^H times a unit vector, and so ahead of a random vector by half an iteration.
    The rows are as faint as a random start: a block that was searched goes on almost unchanged.

    Args:
        leaves: The arrays, keyed by path, of the dtype of their blocks.
        matrices: How they are read.
        blocks: From `random_blocks` or from an earlier call of `norms`.
        last: The norms that were found last.
    """
    return {
        path: _with_own_rows(leaves[path], matrices[path], v, last[path])
        for path, v in blocks.items()
    }


def where_found(norms: Arrays, new: Arrays, old: Arrays) -> Arrays:
    """The new blocks, but the old ones of matrices that are zero or not finite."""
    return {path: jnp.where(_expand(norms[path] > 0, v), v, old[path]) for path, v in new.items()}


def norms(
    leaves: Sequence[Arrays],
    matrices: dict[str, Matrices],
    blocks: Sequence[Arrays],
    num_iters: jax.typing.ArrayLike,
) -> tuple[list[Arrays], list[Arrays]]:
    """The spectral norms of several trees (weights, updates), searched together.

    Args:
        leaves: The arrays of each tree, keyed by path.
        matrices: How they are read, the same for each tree.
        blocks: Where to start, from `random_blocks` or from an earlier call.
        num_iters: Number of iterations, at least 1. May be traced.

    Returns:
        The new blocks, and the norms, of shape (*batch,) each: exact for vectors and
        matrices with a side of at most `SHORT_SIDE`, estimates from below for others, NaN
        where one is not finite. The block of a matrix that is zero or not finite stays as
        it was.
    """
    trees = range(len(leaves))
    found_blocks: list[Arrays] = [{} for _ in trees]
    found_norms: list[Arrays] = [
        {path: _vector_norm(leaves[i][path], m) for path, m in matrices.items() if m.is_vector}
        for i in trees
    ]
    thin = [path for path, m in matrices.items() if not m.is_vector and not _is_searched(m)]
    keys = [(i, path) for i in trees for path in thin]
    sigmas = _gram_norms(
        [leaves[i][path] for i, path in keys],
        tuple(matrices[path] for _, path in keys),
    )
    for (i, path), sigma in zip(keys, sigmas, strict=True):
        found_norms[i][path] = sigma

    keys = [(i, path) for i in trees for path in blocks[i]]
    searched = _search(
        [leaves[i][path] for i, path in keys],
        tuple(matrices[path] for _, path in keys),
        [blocks[i][path] for i, path in keys],
        num_iters,
    )
    for (i, path), block, sigma in zip(keys, *searched, strict=True):
        found_blocks[i][path], found_norms[i][path] = block, sigma
    return found_blocks, found_norms


def _is_searched(matrices: Matrices) -> bool:
    return min(matrices.matrix_shape) > SHORT_SIDE


class _Labels(NamedTuple):
    """Einsum labels: an axis by its position in the leaf, a block's vectors `y`.

    A vector along the output axes is a row, (*batch, k, *output), and one along
    the reduction axes a column, (*batch, *reduction, k): so neither of the two
    products transposes the leaf. The block lies along the shorter side.
    """

    batch: str
    leaf: str
    near: str  # the block, and A^H R
    far: str  # R

    @classmethod
    def of(cls, matrices: Matrices) -> "_Labels":
        batch, reduction, output = (
            "".join(string.ascii_lowercase[axis] for axis in axes)
            for axes in (matrices.batch, matrices.reduction, matrices.output)
        )
        leaf = string.ascii_lowercase[: len(matrices.shape)]
        rows, columns = f"{batch}y{output}", f"{batch}{reduction}y"
        m, n = matrices.matrix_shape
        return cls(batch, leaf, *((rows, columns) if n <= m else (columns, rows)))


def _vector_norm(x: jax.Array, matrices: Matrices) -> jax.Array:
    """The 2-norm over all but the batch axes, without overflow or underflow."""
    axes = matrices.reduction + matrices.output
    x, largest = _scaled(jnp.abs(x.astype(compute_dtype(x))), axes)
    return largest * jnp.sqrt(jnp.sum(x * x, axis=axes))


def _scaled(x: jax.Array, axes: Iterable[int]) -> tuple[jax.Array, jax.Array]:
    """X over its largest absolute value, so that no square of it overflows, and this value."""
    axes = tuple(axes)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    return x / jnp.where(largest > 0, largest, 1), jnp.squeeze(largest, axes)


def _einsum(expression: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(expression, *operands, precision=lax.Precision.HIGHEST)


def _expand(per_matrix: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(per_matrix, tuple(range(per_matrix.ndim, like.ndim)))


@functools.partial(jax.jit, static_argnames="matrices")
def _gram_norms(leaves: Sequence[jax.Array], matrices: Sequence[Matrices]) -> list[jax.Array]:
    """The norms of matrices with a short side, from the Gram matrix of that side."""
    grams, scales = [], []
    for a, m in zip(leaves, matrices, strict=True):
        labels, size = _Labels.of(m), min(m.matrix_shape)
        a, scale = _scaled(a.astype(compute_dtype(a)), m.reduction + m.output)
        a = jnp.where(jnp.isfinite(jnp.expand_dims(scale, m.reduction + m.output)), a, 0)
        side = labels.near.translate({ord(axis): None for axis in labels.batch + "y"})
        other = labels.leaf.translate({ord(axis): axis.upper() for axis in side})
        expression = f"{labels.leaf},{other}->{labels.batch}{side}{side.upper()}"
        grams.append((_einsum(expression, jnp.conj(a), a).reshape(-1, size, size),))
        scales.append(scale)
    eigenvalues = _small.solve(lambda gram: (_small.eigvalsh(gram),), grams)
    return [
        scale * jnp.sqrt(squares[:, -1].reshape(scale.shape))
        for scale, (squares,) in zip(scales, eigenvalues, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="matrices")
def _with_own_rows(a: jax.Array, matrices: Matrices, v: jax.Array, last: jax.Array) -> jax.Array:
    labels, batch = _Labels.of(matrices), len(matrices.batch)
    near = [labels.leaf.index(label) for label in labels.near[batch:].replace("y", "")]
    far = sorted(set(range(a.ndim)) - {*matrices.batch, *near})
    limits, strides, wanted = list(a.shape), [1] * a.ndim, BLOCK_SIZE
    for axis in far:
        count = min(a.shape[axis], wanted)
        strides[axis] = a.shape[axis] // count
        limits[axis] = (count - 1) * strides[axis] + 1
        wanted = math.ceil(wanted / count)
    sample = lax.slice(a, [0] * a.ndim, limits, strides)
    rows = jnp.conj(sample).transpose(*matrices.batch, *far, *near)
    rows = rows.reshape(*matrices.batch_shape, -1, *(a.shape[axis] for axis in near))
    rows = lax.slice_in_dim(rows, 0, BLOCK_SIZE, axis=batch)
    rows, scale = _scaled(jnp.moveaxis(rows, batch, labels.near.index("y")), range(batch, v.ndim))
    return v + jnp.where(_expand(~(last > 0) & jnp.isfinite(scale), v), FAINT * rows, 0)


@functools.partial(jax.jit, static_argnames="matrices")
def _search(
    leaves: Sequence[jax.Array],
    matrices: Sequence[Matrices],
    blocks: Sequence[jax.Array],
    num_iters: jax.typing.ArrayLike,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The next block and the norm of every matrix."""
    labels = [_Labels.of(m) for m in matrices]
    leaves = [a.astype(v.dtype) for a, v in zip(leaves, blocks, strict=True)]
    nothing = [
        jnp.zeros(m.batch_shape, jnp.finfo(v.dtype).dtype)
        for m, v in zip(matrices, blocks, strict=True)
    ]

    def body(_: Any, carry: tuple[list[jax.Array], Any]) -> tuple[list[jax.Array], list[jax.Array]]:
        return _iteration(leaves, labels, carry[0])

    # XLA removes the loop where it knows that num_iters is 1.
    num_iters = jnp.ceil(num_iters).astype(jnp.int32)
    return lax.fori_loop(0, num_iters, body, (list(blocks), nothing))


def _iteration(
    leaves: Sequence[jax.Array],
    labels: Sequence[_Labels],
    blocks: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One iteration on every matrix: its next block and its norm."""
    products, small = [], []
    for a, label, v in zip(leaves, labels, blocks, strict=True):
        r, z, factor = _products(a, label, v)
        products.append(z)
        grams = _gram(r, label.far, label), _gram(z, label.near, label)
        small.append((factor.reshape(-1), *(g.reshape(-1, *g.shape[-2:]) for g in grams)))

    solved = _small.solve(_rayleigh_ritz, small)
    next_blocks, sigmas = [], []
    for v, z, label, (sigma, turn, heard) in zip(blocks, products, labels, solved, strict=True):
        batch = v.shape[: len(label.batch)]
        mix = f"{label.near},{label.batch}yz->{label.near.replace('y', 'z')}"
        turned = _einsum(mix, z, turn.reshape(*batch, *turn.shape[1:]))
        # Columns that are not there stay as they were.
        axes = [axis for axis in range(v.ndim) if label.near[axis] not in label.batch + "y"]
        heard = jnp.expand_dims(heard.reshape(*batch, -1), axes)
        next_blocks.append(jnp.where(heard, turned, v))
        sigmas.append(sigma.reshape(batch))
    return next_blocks, sigmas


def _products(
    a: jax.Array, labels: _Labels, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R = A V and Z = A^H R, both of A divided by a factor, shape (*batch,).

    With R at most 1, no product and no Gram matrix overflows or underflows.
    """
    r = _einsum(f"{labels.leaf},{labels.near}->{labels.far}", a, v)
    r, factor = _scaled(r, range(len(labels.batch), r.ndim))
    z = jnp.conj(_einsum(f"{labels.far},{labels.leaf}->{labels.near}", jnp.conj(r), a))
    return r, z / _expand(jnp.where(factor > 0, factor, 1), z), factor


def _gram(x: jax.Array, x_labels: str, labels: _Labels) -> jax.Array:
    """X^H X, shape (*batch, k, k)."""
    return _einsum(f"{x_labels},{x_labels.replace('y', 'z')}->{labels.batch}yz", jnp.conj(x), x)


def _rayleigh_ritz(
    factor: jax.Array, gram_r: jax.Array, gram_z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The Rayleigh-Ritz step of a block.

    With :math:`R^H R = Q S^2 Q^H`, the columns of :math:`R Q S^{-1}` are an
    orthonormal basis of the span of :math:`R`, and :math:`Y = Z Q S^{-1}` is
    :math:`A^H` on it. With :math:`Y^H Y = P T^2 P^H`, the largest :math:`\|A^H x\|`
    of a unit vector :math:`x` in that span is :math:`T_1`, and the next block is
    :math:`Y P T^{-1}`, again orthonormal. A direction of :math:`V` in which
    :math:`A` is silent, :math:`S_i = 0`, gives no column.

    Args:
        factor: By which :math:`A` was divided, shape (b,).
        gram_r: :math:`R^H R`, shape (b, k, k).
        gram_z: :math:`Z^H Z`, shape (b, k, k).

    Returns:
        :math:`T_1` of the undivided :math:`A`, shape (b,), NaN if something is not finite;
        `turn`, shape (b, k, k): the next block is `Z turn`; and which of its columns there
        are, shape (b, k).
    """
    k, eps = gram_r.shape[-1], jnp.finfo(gram_r.dtype).eps
    finite = jnp.isfinite(factor) & jnp.isfinite(gram_z).all((-1, -2))
    gram_r, gram_z = (jnp.where(finite[:, None, None], x, 0) for x in (gram_r, gram_z))
    s2, q = _small.eigh(gram_r)  # ascending
    heard = s2 > k * eps * s2[..., -1:]

    def columns_over_root(x: jax.Array, squares: jax.Array) -> jax.Array:
        """X D^(-1/2), without the silent columns."""
        return x * jnp.where(heard, lax.rsqrt(jnp.where(heard, squares, 1)), 0)[..., None, :]

    y = columns_over_root(q, s2)
    t2, p = _small.eigh(_einsum("bji,bjk,bkl->bil", jnp.conj(y), gram_z, y))
    t2 = jnp.maximum(t2, eps * t2[..., -1:])
    turn = columns_over_root(_einsum("bij,bjk->bik", y, p), t2)
    return jnp.where(finite, factor * jnp.sqrt(t2[..., -1]), jnp.nan), turn, heard
