r"""Largest singular values by warm-started block power iteration.

One iteration on a matrix :math:`A`, from a block :math:`V` of :math:`k` vectors:

.. math::

    R = A V, \qquad Z = A^H R, \qquad V \leftarrow \text{a basis of } Z.

It reads :math:`A` twice, and costs hardly more than with a single vector, since
the products are bound by reading :math:`A`. The rest is :math:`k \times k`: on an
accelerator, one batch of all the matrices of a model; on a CPU, leaf by leaf.
"""

import functools
import itertools
import math
import string
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax._matrices import Matrices

BLOCK_SIZE = 8  # vectors kept for each matrix
COLD_ITERS = 8  # iterations for a matrix that is met for the first time
EIGH_WORK = 2**14  # operations, as b k^3, of a batch that jaxlib leaves in one thread

Arrays: TypeAlias = dict[str, jax.Array]


def compute_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
    """float32 at least; float64 and complex leaves keep their own."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def random_blocks(leaves: Arrays, matrices: dict[str, Matrices], seed: int) -> Arrays:
    """A random start for every matrix; vectors need none.

    The matrices of one model may all start from the same numbers: what they are has
    nothing to do with them.

    Returns:
        Keyed by path, `BLOCK_SIZE` vectors along the shorter side of the matrix:
        shape (*batch, k, *output), or (*batch, *reduction, k).
    """
    shapes = {}
    for path, m in matrices.items():
        if not m.is_vector:
            sizes = dict(zip(_Labels.of(m).leaf, m.shape, strict=True), y=BLOCK_SIZE)
            shapes[path] = tuple(sizes[label] for label in _Labels.of(m).near)
    batch_ranks = {path: len(matrices[path].batch) for path in shapes}
    longest = max((math.prod(s[batch_ranks[path] :]) for path, s in shapes.items()), default=0)
    draw = jax.random.normal(jax.random.key(seed), (longest,))

    def block(path: str) -> jax.Array:
        own = shapes[path][batch_ranks[path] :]
        start = draw[: math.prod(own)].reshape(own).astype(compute_dtype(leaves[path]))
        return jnp.tile(start, (*shapes[path][: batch_ranks[path]], *(1 for _ in own)))

    return {path: block(path) for path in shapes}


def zero_norms(leaves: Arrays, matrices: dict[str, Matrices]) -> Arrays:
    """The norms of matrices that were never met, shape (*batch,), keyed by path."""
    return {
        path: jnp.zeros(m.batch_shape, jnp.finfo(compute_dtype(leaves[path])).dtype)
        for path, m in matrices.items()
    }


def norms(
    leaves: Sequence[Arrays],
    matrices: dict[str, Matrices],
    blocks: Sequence[Arrays],
    last: Sequence[Arrays],
    num_iters: jax.typing.ArrayLike,
) -> tuple[list[Arrays], list[Arrays]]:
    """The spectral norms of several trees (weights, updates), in one iteration.

    Args:
        leaves: The arrays of each tree, keyed by path.
        matrices: How they are read, the same for each tree.
        blocks: Where to start, from `random_blocks` or from an earlier call.
        last: The norms that the earlier call found. A matrix that is met for the
            first time (its last norm was 0 or NaN) asks for `COLD_ITERS` iterations.
        num_iters: Number of iterations, at least 1. May be traced.

    Returns:
        The new blocks, and the norms, of shape (*batch,) each: exact for vectors,
        estimates from below for matrices, NaN where one is not finite. The block
        of a matrix that is zero or not finite stays as it was.
    """
    keys = [(i, path) for i, tree in enumerate(blocks) for path in tree]
    new_blocks, sigmas = _iterate(
        [leaves[i][path] for i, path in keys],
        tuple(matrices[path] for _, path in keys),
        tuple(path for _, path in keys),
        [blocks[i][path] for i, path in keys],
        [last[i][path] for i, path in keys],
        num_iters,
    )
    found_blocks: list[Arrays] = [{} for _ in leaves]
    found_norms = [
        {path: _vector_norm(tree[path], m) for path, m in matrices.items() if m.is_vector}
        for tree in leaves
    ]
    for (i, path), block, sigma in zip(keys, new_blocks, sigmas, strict=True):
        found_blocks[i][path], found_norms[i][path] = block, sigma
    return found_blocks, found_norms


def _vector_norm(x: jax.Array, matrices: Matrices) -> jax.Array:
    """The 2-norm over all but the batch axes, without overflow or underflow."""
    axes = matrices.reduction + matrices.output
    x = jnp.abs(x.astype(compute_dtype(x)))
    largest = jnp.max(x, axis=axes, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    return jnp.squeeze(largest, axes) * jnp.sqrt(jnp.sum(x * x, axis=axes))


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


@functools.partial(jax.jit, static_argnames=("matrices", "owners"))
def _iterate(
    leaves: Sequence[jax.Array],
    matrices: Sequence[Matrices],
    owners: Sequence[str],
    blocks: Sequence[jax.Array],
    last: Sequence[jax.Array],
    num_iters: jax.typing.ArrayLike,
) -> tuple[list[jax.Array], list[jax.Array]]:
    if not leaves:
        return [], []
    labels = [_Labels.of(m) for m in matrices]

    def more(carry):
        i, _, sigmas = carry
        met = [jnp.any((new > 0) & ~(old > 0)) for new, old in zip(sigmas, last, strict=True)]
        return (i < num_iters) | ((i < COLD_ITERS) & jnp.any(jnp.stack(met)))

    def body(carry):
        i, blocks, _ = carry
        return i + 1, *_iteration(leaves, labels, owners, blocks)

    zeros = [jnp.zeros_like(sigma) for sigma in last]
    _, blocks, sigmas = lax.while_loop(more, body, (0, list(blocks), zeros))
    return blocks, sigmas


def _iteration(
    leaves: Sequence[jax.Array],
    labels: Sequence[_Labels],
    owners: Sequence[str],
    blocks: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One iteration on every matrix: its next block and its norm."""
    products, small = [], []
    for a, label, v in zip(leaves, labels, blocks, strict=True):
        r, z, factor = _products(a.astype(v.dtype), label, v)
        products.append(z)
        grams = _gram(r, label.far, label), _gram(z, label.near, label)
        small.append((factor.reshape(-1), *(g.reshape(-1, *g.shape[-2:]) for g in grams)))

    # An accelerator would be idle in calls so small: there, one has them all. On a CPU, XLA
    # compiles kernels that are alike once, but the slice of every part of a result anew; so a
    # call has the matrices of one leaf, of its weight and of its update.
    dtypes = [v.dtype for v in blocks]
    solved = lax.platform_dependent(
        small,
        cpu=lambda x: _in_batches(_rayleigh_ritz, x, list(zip(dtypes, owners, strict=True))),
        default=lambda x: _in_batches(_rayleigh_ritz, x, dtypes),
    )
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
    factor = jnp.max(jnp.abs(r), axis=tuple(range(len(labels.batch), r.ndim)))
    divisor = jnp.where(factor == 0, 1, factor)
    r = r / _expand(divisor, r)
    z = jnp.conj(_einsum(f"{labels.far},{labels.leaf}->{labels.near}", jnp.conj(r), a))
    return r, z / _expand(divisor, z), factor


def _expand(per_matrix: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(per_matrix, tuple(range(per_matrix.ndim, like.ndim)))


def _gram(x: jax.Array, x_labels: str, labels: _Labels) -> jax.Array:
    """X^H X, shape (*batch, k, k)."""
    return _einsum(f"{x_labels},{x_labels.replace('y', 'z')}->{labels.batch}yz", jnp.conj(x), x)


def _einsum(expression: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(expression, *operands, precision=lax.Precision.HIGHEST)


def _in_batches(
    fn: Callable[..., tuple[jax.Array, ...]],
    arguments: Sequence[tuple[jax.Array, ...]],
    kinds: Sequence[Hashable],
) -> list[tuple[jax.Array, ...]]:
    """Calls `fn` on arrays of shape (b, ...), those of one kind joined into one call."""
    results: dict[int, tuple[jax.Array, ...]] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        parts = [arguments[i] for i in places]
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        outputs = fn(*map(jnp.concatenate, zip(*parts, strict=True)))
        split = [jnp.split(y, ends[:-1]) for y in outputs]
        results |= dict(zip(places, zip(*split, strict=True), strict=True))
    return [results[i] for i in range(len(arguments))]


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
    s2, q = _eigh(gram_r)  # ascending
    heard = s2 > k * eps * s2[..., -1:]

    def columns_over_root(x: jax.Array, squares: jax.Array) -> jax.Array:
        """X D^(-1/2), without the silent columns."""
        return x * jnp.where(heard, lax.rsqrt(jnp.where(heard, squares, 1)), 0)[..., None, :]

    y = columns_over_root(q, s2)
    t2, p = _eigh(jnp.swapaxes(jnp.conj(y), -1, -2) @ gram_z @ y)
    t2 = jnp.maximum(t2, eps * t2[..., -1:])
    turn = columns_over_root(y @ p, t2)
    return jnp.where(finite, factor * jnp.sqrt(t2[..., -1]), jnp.nan), turn, heard


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and vectors of Hermitian matrices (b, k, k).

    On a CPU, jaxlib spreads a batch that is worth it over XLA's threads, and waits for them in
    one of these threads: with few of them, two batches in one program (the bounds of two
    groups of an `optax.partition`, say) can wait for each other forever. So they go in parts
    that are too small for that.
    """
    eigh = functools.partial(jnp.linalg.eigh, symmetrize_input=False)

    def in_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = EIGH_WORK // x.shape[-1] ** 3
        parts = [eigh(x[i : i + size]) for i in range(0, len(x), size)]
        values, vectors = zip(*parts, strict=True)
        return jnp.concatenate(values), jnp.concatenate(vectors)

    return lax.platform_dependent(x, cpu=in_parts, default=lambda x: tuple(eigh(x)))
