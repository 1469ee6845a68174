r"""Spectral norms of a list of leaves, by warm-started orthogonal iteration.

One iteration on a matrix :math:`A`, from a block :math:`V` of vectors, the leading one first:

.. math::

    Q = \operatorname{orth}(A V), \qquad Y = A^H Q, \qquad
    Y^H Y = P \Lambda P^H, \qquad V \leftarrow Y P \Lambda^{-1/2}.

The columns of :math:`Q P` and :math:`V` are then estimates of the leading singular vectors, and
:math:`\Lambda^{1/2}` of the singular values, from below. An iteration reads :math:`A` twice, and
costs hardly more than with a single vector, since the products are bound by reading :math:`A`.

After a long search, a block may be orthogonal to what is new in :math:`A`, so its last vectors are
drawn afresh in each iteration. Their images find columns of :math:`A` that stand out, and the
fifth power of an image, entry by entry, a row that stands out.

A matrix with a short side needs no search: its norm comes from the Gram matrix of this side.

On a CPU, every distinct operation takes 15 ms to compile and equal ones take nothing, so leaves
are not stacked, and what is done with a leaf depends only on its shape and reading.
"""

import functools
import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax import _sharding as sharding
from weyl_optax._norms.small_problems import together
from weyl_optax._reading.specification import MatrixSpec

BLOCK_SIZE = 8  # vectors of a block, besides those of a cap
FRESH = 1  # vectors drawn afresh in each iteration
FRESH_WITH_CAP = 4  # and with a cap, which must lower what is new at once
COLD_ITERS = 16  # iterations that find a norm from a random block
SHORT_SIDE = 16  # up to this, a Gram matrix is cheaper than a search, and exact
NO_SECOND_DERIVATIVE = (
    "A spectral norm has no second derivative here. Put jax.lax.stop_gradient around the "
    "norm, or around the update of the optimizer, in the inner derivative."
)


class Search(NamedTuple):
    """The results for the matrices of some leaves, one entry per leaf."""

    sigmas: list[jax.Array]  # (*batch,): their spectral norms
    blocks: list[Any]  # the next blocks; None for a matrix that is not searched
    spectra: list[Any]  # singular values, (*batch, k), and left vectors, where they are asked for


def compute_dtype(x: Any) -> Any:
    """float32 at least; float64 and complex leaves keep their own."""
    dtype = jnp.result_type(x)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def zero_norms(a: Any, spec: MatrixSpec) -> jax.Array:
    """The norms before the first search: zeros, shape (*batch,)."""
    dtype = jnp.finfo(compute_dtype(a)).dtype
    norms = sharding.vary_as(a, jnp.zeros(spec.batch_shape, dtype))
    return sharding.reshard_as(a, norms, spec.batch)


def new_block(a: Any, spec: MatrixSpec, rank: int = 0) -> jax.Array | None:
    """A block of random signs for a leaf, or for only its shape and dtype.

    Args:
        a: The leaf.
        spec: How it is read.
        rank: How many singular values a cap lowers.

    Returns:
        Shape (*batch, k, *output) or (*batch, *reduction, k), along the shorter side; None for a
        matrix that is not searched.
    """
    shape = block_shape(spec, rank)
    return None if shape is None else _signs(a, Labels.of(spec), shape, 0)


def block_shape(spec: MatrixSpec, rank: int = 0) -> tuple[int, ...] | None:
    """The shape of `new_block`."""
    n = min(spec.matrix_shape)
    if n <= SHORT_SIDE:
        return None
    labels = Labels.of(spec)
    sizes = dict(zip(labels.leaf, spec.shape, strict=True), y=min(BLOCK_SIZE + rank, n))
    return tuple(map(sizes.__getitem__, labels.block))


def search(
    leaves: Sequence[jax.Array],
    specs: Sequence[MatrixSpec],
    blocks: Sequence[jax.Array | None],
    num_iters: jax.typing.ArrayLike,
    seed: jax.typing.ArrayLike = 0,
    ranks: Sequence[int] | None = None,
) -> Search:
    """Search every matrix of some leaves, starting from blocks.

    Args:
        leaves: Arrays of any floating or complex dtype.
        specs: How they are read.
        blocks: Where to start, see `new_block`.
        num_iters: Number of iterations, at least 1. May be traced.
        seed: For the vectors that are drawn afresh.
        ranks: How many left singular vectors of each leaf to return, by default none.

    Returns:
        The norms: exact for vectors and matrices with a side of at most `SHORT_SIDE`, estimates
        from below for others; NaN where a matrix is not finite. Their derivative is u v^H, with
        the leading singular vectors. The block of a matrix that is zero or not finite is
        unchanged.
    """
    ranks = tuple(ranks or [0] * len(specs))
    fixed = lax.stop_gradient((list(leaves), list(blocks)))
    found = _search(tuple(specs), ranks, *fixed, num_iters, seed)
    sigmas, leading, new, spectra = map(list, zip(*found, strict=True)) if found else ([],) * 4
    sigmas = list(map(_differentiable, specs, leaves, leading, sigmas))
    return Search(sigmas, new, spectra)


class Labels(NamedTuple):
    """Einsum labels: an axis by its position in the leaf, and `y` for the vectors of a block.

    A vector along the output axes is a row, (*batch, y, *output), and one along the reduction
    axes a column, (*batch, *reduction, y), so neither of the two products transposes the leaf.
    The block is along the shorter side.
    """

    leaf: str
    batch: str
    block: str  # V, and Y = A^H Q
    image: str  # A V, and Q

    @classmethod
    def of(cls, spec: MatrixSpec) -> "Labels":
        leaf = string.ascii_lowercase[: len(spec.shape)]
        batch = "".join(map(leaf.__getitem__, spec.batch))
        rows = "".join([batch, "y", *map(leaf.__getitem__, spec.output)])
        columns = "".join([batch, *map(leaf.__getitem__, spec.reduction), "y"])
        m, n = spec.matrix_shape
        return cls(leaf, batch, *((rows, columns) if n <= m else (columns, rows)))

    def axes(self, labels: str) -> list[int | None]:
        """The axis of the leaf for each label, None for one that it does not have."""
        return list(map(dict(zip(self.leaf, range(len(self.leaf)), strict=True)).get, labels))

    def vector_axes(self, labels: str) -> list[int]:
        """Where the axes of a vector are, in a block or in its image."""
        return [i for i, label in enumerate(labels) if label not in self.batch + "y"]


def _signs(a: Any, labels: Labels, shape: Sequence[int], seed: jax.typing.ArrayLike) -> jax.Array:
    """A block of random signs over the root of a vector's length; the same for all of a batch.

    They are a hash of their positions (the end of MurmurHash3), so every device makes its own part.
    """
    place, length = jnp.zeros(shape, jnp.uint32), 1
    for axis, (size, label) in enumerate(zip(shape, labels.block, strict=True)):
        if label not in labels.batch:
            place = place * size + lax.broadcasted_iota(jnp.uint32, shape, axis)
            length *= 1 if label == "y" else size
    x = place ^ (jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    signs = (jnp.where(x >> 31, -1.0, 1.0) / math.sqrt(length)).astype(compute_dtype(a))
    return sharding.reshard_as(a, sharding.vary_as(a, signs), labels.axes(labels.block))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
    specs: tuple[MatrixSpec, ...],
    ranks: tuple[int, ...],
    leaves: list[jax.Array],
    blocks: list[Any],
    num_iters: jax.Array,
    seed: jax.Array,
) -> list[Any]:
    """For each leaf the norms, the leading vectors of its shorter side, the block, the spectrum."""
    found: dict[int, Any] = {}
    short: dict[int, Any] = {}
    long: dict[int, Any] = {}
    for i, (spec, rank, a, block) in enumerate(zip(specs, ranks, leaves, blocks, strict=True)):
        a = a.astype(compute_dtype(a))
        side = min(spec.matrix_shape)
        if side == 1:
            found[i] = _vector_norm(spec, a), None, None, None
        elif side <= SHORT_SIDE:
            short[i] = spec, a
        else:
            long[i] = spec, rank, a, block
    if short:
        found |= zip(short, _solve(*zip(*short.values(), strict=True)), strict=True)
    if long:
        of_long = _iterate(*zip(*long.values(), strict=True), num_iters=num_iters, seed=seed)
        found |= zip(long, of_long, strict=True)
    return [
        (sharding.reshard_as(a, found[i][0], spec.batch), *found[i][1:])
        for i, (a, spec) in enumerate(zip(leaves, specs, strict=True))
    ]


def _iterate(
    specs: Sequence[MatrixSpec],
    ranks: Sequence[int],
    leaves: Sequence[jax.Array],
    blocks: Sequence[jax.Array],
    num_iters: jax.Array,
    seed: jax.Array,
) -> list[Any]:
    """As `_search`, for matrices with two long sides, iterating all of them together."""
    iteration = functools.partial(_iteration, specs, ranks, leaves)
    blocks = list(map(sharding.vary_as, leaves, blocks))
    of_sigmas, _, of_left = jax.eval_shape(iteration, blocks, seed)
    sigmas, blocks, left = lax.fori_loop(
        0,
        jnp.maximum(jnp.ceil(num_iters), 1).astype(jnp.int32),
        lambda i, results: iteration(results[1], seed * COLD_ITERS + i),
        (  # The blocks are all that an iteration takes from the one before.
            list(map(sharding.zeros_of, leaves, of_sigmas)),
            blocks,
            list(map(sharding.zeros_of, leaves, of_left)),
        ),
    )
    return [
        (
            sigma[..., 0],
            lax.index_in_dim(v, 0, Labels.of(spec).block.index("y"), False),
            v,
            None if u is None else (sigma, u),
        )
        for spec, sigma, v, u in zip(specs, sigmas, blocks, left, strict=True)
    ]


def _iteration(
    specs: Sequence[MatrixSpec],
    ranks: Sequence[int],
    leaves: Sequence[jax.Array],
    blocks: Sequence[jax.Array],
    seed: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array | None]]:
    """The singular values, right and left singular vectors of all leaves, as `_rotate` has them."""
    images = map(_image, specs, ranks, leaves, blocks, [seed] * len(specs))
    r, sizes, grams = zip(*images, strict=True)
    factors = together(_orthonormalizer, grams)
    q, y, grams = zip(*map(_pull_back, specs, leaves, r, sizes, factors), strict=True)
    spectra = together(_eigh, grams)
    found = map(_rotate, specs, ranks, leaves, blocks, sizes, q, y, spectra)
    sigmas, blocks, left = map(list, zip(*found, strict=True))
    return sigmas, blocks, left


@functools.partial(jax.jit, static_argnums=(0, 1))
def _image(
    spec: MatrixSpec, rank: int, a: jax.Array, v: jax.Array, seed: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R = A V, with one more vector.

    Returns:
        The image, each vector scaled to a largest entry of 1, so no product or Gram matrix
        overflows or underflows; the size of the largest, (*batch,), clipped so that nothing over
        it does either; R^H R, (*batch, k, k).
    """
    labels = Labels.of(spec)
    axis = labels.block.index("y")
    sizes = [1] * v.ndim  # elsewhere, so the index fits `v` on explicit axes
    sizes[axis] = k = v.shape[axis]
    is_kept = lax.broadcasted_iota(jnp.int32, sizes, axis) < k - (FRESH_WITH_CAP if rank else FRESH)
    v = jnp.where(is_kept, v, _signs(a, labels, v.shape, seed + 1))
    forward = f"{labels.leaf},{labels.block}->{labels.image}"
    r = einsum(a, labels, lax.Precision.DEFAULT, forward, a, v)
    r, sizes = scaled_to_one(r, labels.vector_axes(labels.image))
    axis = labels.image.index("y")
    fresh = lax.slice_in_dim(r, k - 1, k, axis=axis)
    r = lax.concatenate([r, fresh * (jnp.abs(fresh) ** 4).astype(r.dtype)], axis)
    most = 2.0 ** (4 * jnp.finfo(sizes.dtype).maxexp // 5)
    size = jnp.clip(jnp.max(sizes, axis=-1), 1 / most, most)
    return r, size, gram(a, labels, labels.image, r)


@jax.jit
def _orthonormalizer(gram: jax.Array) -> jax.Array:
    """F, upper triangular, that makes the columns of R F orthonormal, from R^H R, (..., k, k).

    A column that depends on those before it becomes nearly zero. Where they are so dependent that
    the rounding of long sums makes R^H R indefinite, they are orthonormal only roughly.
    """
    k, eps = gram.shape[-1], float(jnp.finfo(gram.dtype).eps)
    identity = jnp.broadcast_to(jnp.eye(k, dtype=gram.dtype), gram.shape)
    diagonal = jnp.real(jnp.diagonal(gram, axis1=-2, axis2=-1))

    def cholesky(share: float) -> jax.Array:
        shift = jnp.where(diagonal > 0, share * diagonal, 1)
        shifted = gram + shift[..., None].astype(gram.dtype) * identity
        return lax.linalg.cholesky(shifted, symmetrize_input=False)

    factor = cholesky(k * eps)
    is_definite = jnp.isfinite(factor).all((-2, -1), keepdims=True)
    factor = jnp.where(is_definite, factor, cholesky(k * math.sqrt(eps)))
    inverse = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    return jnp.conj(inverse.mT)


@functools.partial(jax.jit, static_argnums=0)
def _pull_back(
    spec: MatrixSpec, a: jax.Array, r: jax.Array, size: jax.Array, factor: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Q = R F over the size of the image; Y = A^H Q; and Y^H Y, (*batch, k, k)."""
    labels = Labels.of(spec)
    q = _mix(a, labels, labels.image, r, factor / size[..., None, None].astype(factor.dtype))
    back = f"{labels.image},{labels.leaf}->{labels.block}"
    y = jnp.conj(einsum(a, labels, lax.Precision.HIGH, back, jnp.conj(q), a))
    return q, y, gram(a, labels, labels.block, y)


@jax.jit
def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, descending, and eigenvectors, (..., k) and (..., k, k); NaN if not finite."""
    finite = jnp.isfinite(gram).all((-1, -2))
    vectors, values = lax.linalg.eigh(
        jnp.where(finite[..., None, None], gram, 0), symmetrize_input=False
    )
    values = jnp.where(finite[..., None], jnp.maximum(values, 0), jnp.nan)
    return values[..., ::-1], vectors[..., ::-1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rotate(
    spec: MatrixSpec,
    rank: int,
    a: jax.Array,
    v: jax.Array,
    size: jax.Array,
    q: jax.Array,
    y: jax.Array,
    spectrum: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The singular values (*batch, k), the next block, and the left vectors that are asked for."""
    labels = Labels.of(spec)
    k = v.shape[labels.block.index("y")]
    squares, p = spectrum[0][..., :k], spectrum[1][..., :k]
    found = is_found(squares)  # elsewhere, the old vector stays
    inverse = lax.rsqrt(jnp.where(found, squares, 1))[..., None, :]
    new = _mix(a, labels, labels.block, y, p * inverse.astype(p.dtype))
    block = jnp.where(jnp.expand_dims(found, labels.vector_axes(labels.block)), new, v)
    left = None
    if rank:
        left = _mix(a, labels, labels.image, q, p[..., :rank])
        left = left * jnp.expand_dims(size, tuple(range(size.ndim, left.ndim))).astype(left.dtype)
    return size[..., None] * jnp.sqrt(squares), block, left


def is_found(squares: jax.Array) -> jax.Array:
    """Which of the squared singular values, descending, are more than rounding."""
    k = squares.shape[-1]
    return squares > 4 * (k + 1) * jnp.finfo(squares.dtype).eps * squares[..., :1]


def scaled_to_one(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """X over its largest absolute value, so no square of it overflows, and this value.

    The value is clipped to what has a reciprocal that is not subnormal: XLA would make that zero.
    It is NaN for what is not finite.
    """
    largest = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True)
    most = 2.0 ** (jnp.finfo(largest.dtype).maxexp - 2)
    size = jnp.where(jnp.isfinite(largest), jnp.clip(largest, 1 / most, most), jnp.nan)
    return x / size.astype(x.dtype), jnp.squeeze(size, tuple(axes))


def tree_norm(tree: Any) -> jax.Array:
    """The 2-norm over all entries of a tree of arrays in float32 or float64."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    norms = jnp.stack([_norm_over(x, range(x.ndim)) for x in leaves] or [jnp.zeros([])])
    return _norm_over(norms, [0])


def _norm_over(a: jax.Array, axes: Sequence[int]) -> jax.Array:
    a, size = scaled_to_one(jnp.abs(a), axes)
    return size * jnp.sqrt(jnp.sum(a * a, axis=tuple(axes)))


@functools.partial(jax.jit, static_argnums=0)
def _vector_norm(spec: MatrixSpec, a: jax.Array) -> jax.Array:
    """The 2-norm over all but the batch axes."""
    return _norm_over(a, spec.matrix_axes)


def _solve(specs: Sequence[MatrixSpec], leaves: Sequence[jax.Array]) -> list[Any]:
    """As `_search`, for matrices with a short side, from the Gram matrix of this side."""
    grams, sizes = zip(*map(_gram_of_side, specs, leaves), strict=True)
    found = []
    for spec, size, (squares, p) in zip(specs, sizes, together(_eigh, grams), strict=True):
        labels = Labels.of(spec)
        shape = spec.sizes([labels.leaf.index(label) for label in labels.block if label != "y"])
        leading = jnp.conj(p[..., 0]).reshape(shape)
        found.append((size * jnp.sqrt(squares[..., 0]), leading, None, None))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _gram_of_side(spec: MatrixSpec, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix of the shorter side, (*batch, n, n), over a squared size, and the size."""
    labels = Labels.of(spec)
    a, size = scaled_to_one(a, spec.matrix_axes)
    side = "".join(labels.block[i] for i in labels.vector_axes(labels.block))
    other = labels.leaf.translate({ord(x): x.upper() for x in side})
    expression = f"{labels.leaf},{other}->{labels.batch}{side}{side.upper()}"
    product = einsum(a, None, lax.Precision.HIGHEST, expression, jnp.conj(a), a)
    return product.reshape(*spec.batch_shape, *[min(spec.matrix_shape)] * 2), size


def gram(a: jax.Array, labels: Labels, side: str, x: jax.Array) -> jax.Array:
    """X^H X, of vectors of the leaf `a`, (*batch, k, k)."""
    expression = f"{side},{side.replace('y', 'z')}->{labels.batch}yz"
    return einsum(a, None, lax.Precision.HIGHEST, expression, jnp.conj(x), x)


def _mix(a: jax.Array, labels: Labels, x_labels: str, x: jax.Array, factor: jax.Array) -> jax.Array:
    """X F, of vectors of the leaf `a`."""
    expression = f"{x_labels},{labels.batch}yz->{x_labels.replace('y', 'z')}"
    return einsum(a, labels, lax.Precision.HIGHEST, expression, x, factor)


def einsum(
    a: jax.Array,
    labels: Labels | None,
    precision: lax.Precision,
    expression: str,
    *operands: jax.Array,
) -> jax.Array:
    """An einsum sharded like the axes of the leaf `a`; replicated, without labels.

    On a TPU, DEFAULT has an error of 2^-9 or so and HIGH one of 2^-16; on a GPU with TF32, both
    have one of 2^-11.
    """
    out = expression.rpartition("->")[2]
    axes = labels.axes(out) if labels else [None] * len(out)
    laid = sharding.of_axes(a, axes)
    return jnp.einsum(expression, *operands, precision=precision, out_sharding=laid)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    spec: MatrixSpec, a: jax.Array, v: jax.Array | None, sigma: jax.Array
) -> jax.Array:
    """The norms of the leaf `a`, with their derivative; `v` as from `_search`."""
    del spec, a, v
    return sigma


@_differentiable.defjvp
def _derivative(spec: MatrixSpec, primals: Any, tangents: Any) -> Any:
    """Re(u^H dA v), of the singular vectors of the largest singular value; 0 for a zero matrix.

    With v from the block, u = A v over a length such that u^H A v is the estimate of the norm:
    then the derivative along A is the estimate too, as it should be for a norm.
    """
    a, v, sigma = primals
    a, da = (x.astype(compute_dtype(x)) for x in (a, tangents[0]))
    labels, axes = Labels.of(spec), spec.matrix_axes
    if v is None:
        u, moved = undifferentiable(NO_SECOND_DERIVATIVE, a, a), da
    else:
        v = undifferentiable(NO_SECOND_DERIVATIVE, v, a)
        block, image = (side.replace("y", "") for side in (labels.block, labels.image))
        expression = f"{labels.leaf},{block}->{image}"
        u, moved = (einsum(a, labels, lax.Precision.HIGH, expression, x, v) for x in (a, da))
        axes = tuple(range(len(spec.batch), u.ndim))
    inverse = jnp.where(sigma > 0, 1 / jnp.where(sigma > 0, sigma, 1), 0)
    u = u * jnp.expand_dims(inverse, axes).astype(u.dtype)
    square, inner = (jnp.sum(jnp.real(jnp.conj(u) * x), axis=axes) for x in (u, moved))
    return sigma, inner / jnp.where(square > 0, square, 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiable(message: str, x: jax.Array, a: jax.Array) -> jax.Array:
    """X, whose derivative along the leaf `a` is an error with this message."""
    del message, a
    return x


@undifferentiable.defjvp
def _error(message: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(message)
