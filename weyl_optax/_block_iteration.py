r"""Spectral norms of a list of leaves, by warm-started block power iteration.

One iteration on a matrix :math:`A`, from a block :math:`V` of :math:`k` vectors:

.. math::

    R = A V, \qquad Z = A^H R, \qquad V \leftarrow \text{a basis of } Z.

It reads :math:`A` twice, and costs hardly more than with a single vector, since
the products are bound by reading :math:`A`. The rest is :math:`k \times k`.

A matrix that is sparse may leave the span of a block for good, which then sees nothing of it.
So one vector of each block is drawn afresh in every update. Its image joins the block's twice:
as it is, where a single column of :math:`A` stands out, and in its fifth power, entry by entry,
which is nearly the row of :math:`A` that stands out.

A matrix with a short side needs no search: its norm is that of the Gram matrix of this side.
"""

import functools
import math
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from weyl_optax import _jacobi, _sharding, _shards
from weyl_optax._batching import alike, map_batched
from weyl_optax._dimension_numbers import MatrixSpec
from weyl_optax._rayleigh_ritz import rayleigh_ritz

BLOCK_SIZE = 8  # vectors kept for each matrix
COLD_ITERS = 16  # iterations that find a norm from a random block
SHORT_SIDE = 16  # up to which a Gram matrix is cheaper than a search, and exact
WEIGHT_SEED, UPDATE_SEED, FRESH_SEED = 0, 1, 2  # of new blocks, and of fresh vectors
NUM_WINDOWS = 2**10  # of signs, after which the fresh vectors come again
START_SIZE = 2.0**-10  # of the vectors of a new block, beside the unit vectors of a searched one

Blocks: TypeAlias = Sequence[jax.Array | None]  # None for a matrix that is not searched


def compute_dtype(x: Any) -> Any:
    """float32 at least; float64 and complex leaves keep their own."""
    dtype = jnp.result_type(x)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def real_dtype(x: Any) -> Any:
    """The dtype of a leaf's norms."""
    return jnp.finfo(compute_dtype(x)).dtype


def zero_norms(leaves: Sequence[Any], specs: Sequence[MatrixSpec]) -> list[jax.Array]:
    """The norms before the first search: zeros, shape (*batch,)."""

    def zeros(a: Any, spec: MatrixSpec) -> jax.Array:
        summed = spec.names(spec.matrix_axes)
        norms = _sharding.zeros(a, spec.batch_shape, real_dtype(a), summed)
        return _sharding.reshard_as(a, norms, spec.batch)

    return [zeros(a, spec) for a, spec in zip(leaves, specs, strict=True)]


def new_blocks(leaves: Sequence[Any], specs: Sequence[MatrixSpec], seed: int) -> Blocks:
    """Blocks that were not searched yet.

    All leaves start from the same random numbers, which do not depend on their matrices.

    Args:
        leaves: The leaves, or their shapes and dtypes.
        specs: How they are read.
        seed: Of the random numbers.

    Returns:
        `BLOCK_SIZE` vectors along the shorter side: shape (*batch, k, *output) or
        (*batch, *reduction, k); None for a matrix that is not searched.
    """
    draws = jax.random.normal(jax.random.key(seed), (BLOCK_SIZE * _longest_side(specs),))

    def new_block(a: Any, spec: MatrixSpec) -> jax.Array | None:
        if not _is_searched(spec):
            return None
        labels = Labels.of(spec)
        sizes = dict(zip(labels.leaf, spec.shape, strict=True), y=BLOCK_SIZE)
        shape = [sizes[label] for label in labels.block]
        size = START_SIZE / math.sqrt(min(spec.matrix_shape))
        start = size * _own_part(
            labels,
            labels.block,
            [1 if label in labels.batch else sizes[label] for label in labels.block],
            lambda whole: draws[: math.prod(whole)].reshape(whole),
        )
        others = [label for label in labels.leaf if label not in labels.block]
        zeros = _sharding.zeros(a, shape, compute_dtype(a), labels.divisors(others))
        block = zeros + start.astype(compute_dtype(a))
        return _sharding.reshard_as(a, block, labels.axes(labels.block))

    return [new_block(a, spec) for a, spec in zip(leaves, specs, strict=True)]


def _own_part(
    labels: "Labels",
    vectors: str,
    shape: Sequence[int],
    make: Callable[[Sequence[int]], jax.Array],
) -> jax.Array:
    """Vectors with these labels, of this shape, from `make`, which makes them of a given shape.

    In a `shard_map`, `make` makes all of them, and this device takes its part. Along the batch
    they are its own already.
    """
    names = [() if label in labels.batch else labels.divisors(label) for label in vectors]
    whole = [size * _shards.count(divisors) for size, divisors in zip(shape, names, strict=True)]
    return _shards.own(make(whole), names)


def _longest_side(specs: Sequence[MatrixSpec]) -> int:
    """The size of the longest vector of a block."""
    return max((min(spec.matrix_shape) for spec in specs if _is_searched(spec)), default=0)


def updated_norms(
    matrices: Sequence[jax.Array],
    specs: Sequence[MatrixSpec],
    blocks: Blocks,
    last: Sequence[jax.Array | None],
    count: jax.Array,
    num_iters: jax.typing.ArrayLike,
) -> tuple[list[jax.Array], Blocks]:
    """The norms of matrices that changed since the last update.

    Args:
        matrices: The leaves.
        specs: How they are read.
        blocks: Those of the last update.
        last: The norms of the last update; None for a leaf that gets no rows of its own.
        count: The number of the update.
        num_iters: Number of iterations, at least 1. May be traced.

    Returns:
        The norms, as of `spectral_norms`, and the next blocks; the block of a matrix that is
        zero or not finite stays as it was.
    """
    starts: list[Any] = list(blocks)
    searched = [i for i, v in enumerate(blocks) if v is not None]
    seeded = [i for i in searched if last[i] is not None]
    for places in _kinds(seeded, matrices, specs):
        seeds = _seeds_from_rows(
            [matrices[i] for i in places], specs[places[0]], [last[i] for i in places]
        )
        for i, seed in zip(places, seeds, strict=True):
            starts[i] = starts[i] + seed
    for i in searched:
        starts[i] = _with_fresh_vector(starts[i], specs[i], i, count)
    norms, found = spectral_norms(tuple(specs), matrices, starts, num_iters)
    return norms, [
        None if v is None or new is None else jnp.where(_expand(sigma > 0, v), new, v)
        for v, new, sigma in zip(blocks, found, norms, strict=True)
    ]


def spectral_norms(
    specs: tuple[MatrixSpec, ...],
    matrices: Sequence[jax.Array],
    blocks: Blocks,
    num_iters: jax.typing.ArrayLike,
) -> tuple[list[jax.Array], Blocks]:
    """The spectral norms of leaves, and the next blocks.

    Args:
        specs: How the leaves are read.
        matrices: The leaves.
        blocks: Where to start.
        num_iters: Number of iterations, at least 1. May be traced.

    Returns:
        The norms, of shape (*batch,) each: exact for vectors and matrices with a side of at most
        `SHORT_SIDE`, estimates from below for others, NaN where one is not finite. They have
        the derivative u v^H, of the leading singular vectors. And the next blocks.
    """
    once = isinstance(num_iters, int) and num_iters == 1
    loop = None if once else jnp.asarray(num_iters)
    return _spectral_norms(specs, list(matrices), list(blocks), loop)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _spectral_norms(
    specs: tuple[MatrixSpec, ...],
    matrices: list[jax.Array],
    blocks: list[jax.Array | None],
    num_iters: jax.Array | None,
) -> tuple[list[jax.Array], list[jax.Array | None]]:
    leaves = [a.astype(compute_dtype(a)) for a in matrices]
    norms: list[Any] = [
        _vector_norm(a, spec) if _is_vector(spec) else None
        for a, spec in zip(leaves, specs, strict=True)
    ]
    short = [i for i, spec in enumerate(specs) if _is_short(spec)]
    grams = [_scaled_gram(leaves[i], specs[i]) for i in short]
    ranks = [len(specs[i].batch) for i in short]
    largest = map_batched(
        lambda gram: (_eigh(gram)[0][:, -1],),
        [(jnp.expand_dims(gram, rank),) for (gram, _), rank in zip(grams, ranks, strict=True)],
        ranks,
    )
    for i, (_, scale), (square,) in zip(short, grams, largest, strict=True):
        norms[i] = scale * jnp.sqrt(jnp.maximum(jnp.squeeze(square, -1), 0))

    searched = [i for i, spec in enumerate(specs) if _is_searched(spec)]
    step = functools.partial(
        _iteration, [leaves[i] for i in searched], [Labels.of(specs[i]) for i in searched]
    )
    # The first iteration stands outside of the loop: its results are sharded as the leaves are.
    found, new = step([blocks[i] for i in searched])
    if num_iters is not None and searched:
        count = jnp.ceil(num_iters).astype(jnp.int32)
        found, new = lax.fori_loop(1, count, lambda _, carry: step(carry[1]), (found, new))
    next_blocks = list(blocks)
    for i, sigma, block in zip(searched, found, new, strict=True):
        norms[i], next_blocks[i] = sigma, block
    return norms, next_blocks


@_spectral_norms.defjvp
def _spectral_norms_jvp(specs: tuple[MatrixSpec, ...], primals: Any, tangents: Any) -> Any:
    norms, blocks = _spectral_norms(specs, *primals)
    derivatives = [
        _derivative(a.astype(compute_dtype(a)), da.astype(compute_dtype(a)), spec, sigma, block)
        for a, da, spec, sigma, block in zip(
            primals[0], tangents[0], specs, norms, blocks, strict=True
        )
    ]
    return (norms, blocks), (derivatives, jax.tree.map(jnp.zeros_like, blocks))


def _derivative(
    a: jax.Array, da: jax.Array, spec: MatrixSpec, sigma: jax.Array, block: jax.Array | None
) -> jax.Array:
    """Re(u^H dA v), of the singular vectors of the largest singular value; 0 for a zero matrix.

    With v from the block, u = A v over a length such that u^H A v is the estimate of the norm:
    then the derivative along A is the estimate too, as it should be for a norm.
    """
    inverse = jnp.where(sigma > 0, 1 / jnp.where(sigma > 0, sigma, 1), 0)
    if _is_vector(spec):
        unit = a * jnp.expand_dims(inverse, spec.matrix_axes).astype(a.dtype)
        inner = jnp.sum(jnp.real(jnp.conj(unit) * da), axis=spec.matrix_axes)
        return _shards.total(inner, spec.names(spec.matrix_axes))
    labels = Labels.of(spec)
    v = _once_differentiable(_leading_vector(a, spec, block))
    vector, image = (side.replace("y", "") for side in (labels.block, labels.image))
    expression = f"{labels.leaf},{vector}->{image}"
    u = _product(a, labels, lax.Precision.HIGH, expression, a, v)
    u = u * _expand(inverse, u).astype(u.dtype)
    moved = _product(a, labels, lax.Precision.HIGH, expression, da, v)
    axes = tuple(range(len(spec.batch), u.ndim))
    square, inner = (
        _shards.total(
            jnp.sum(jnp.real(jnp.conj(u) * x), axis=axes), labels.divisors(image[len(spec.batch) :])
        )
        for x in (u, moved)
    )
    return inner / jnp.where(square > 0, square, 1)


def _leading_vector(a: jax.Array, spec: MatrixSpec, block: jax.Array | None) -> jax.Array:
    """The right singular vector v of the largest singular value."""
    labels = Labels.of(spec)
    if block is not None:
        return lax.index_in_dim(block, -1, labels.block.index("y"), keepdims=False)
    gram, _ = _scaled_gram(a, spec)
    vectors = _eigh(gram.reshape(-1, *gram.shape[-2:]))[1][..., -1]
    sizes = dict(zip(labels.leaf, spec.shape, strict=True))
    side = labels.block.replace("y", "")
    return _own_part(labels, side, [sizes[label] for label in side], vectors.reshape)


def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of Hermitian matrices, shape (b, n, n)."""
    values, vectors = _jacobi.eigh(jnp.moveaxis(gram, 0, -1))
    return values.T, jnp.moveaxis(vectors, -1, 0)


@jax.custom_jvp
def _once_differentiable(v: jax.Array) -> jax.Array:
    return v


@_once_differentiable.defjvp
def _second_derivative(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "A spectral norm has no second derivative here. Put jax.lax.stop_gradient around the "
        "norm, or around the update of the optimizer, in the inner derivative."
    )


def _kinds(
    places: Sequence[int], leaves: Sequence[jax.Array], specs: Sequence[MatrixSpec]
) -> list[list[int]]:
    """The places of leaves in groups of a kind, which are stacked.

    They are a weight, its update, and their counterparts in other layers: leaves that lie on the
    devices alike, which a shape alone does not say.
    """
    kinds = alike([(jax.typeof(leaves[i]), specs[i]) for i in places])
    return [[places[j] for j in group] for group in kinds]


def _is_vector(spec: MatrixSpec) -> bool:
    """Whether it has one row or one column: its spectral norm is the 2-norm."""
    return min(spec.matrix_shape) == 1


def _is_short(spec: MatrixSpec) -> bool:
    return 1 < min(spec.matrix_shape) <= SHORT_SIDE


def _is_searched(spec: MatrixSpec) -> bool:
    return min(spec.matrix_shape) > SHORT_SIDE


class Labels(NamedTuple):
    """Einsum labels: an axis by its position in the leaf, the vectors of a block `y`.

    A vector along the output axes is a row, (*batch, k, *output), and one along the reduction
    axes a column, (*batch, *reduction, k): so neither of the two products transposes the leaf.
    The block lies along the shorter side.
    """

    batch: str
    leaf: str
    block: str  # V, and Z = A^H R
    image: str  # R = A V
    spec: MatrixSpec

    @classmethod
    def of(cls, spec: MatrixSpec) -> "Labels":
        batch, reduction, output = (
            "".join(string.ascii_lowercase[axis] for axis in axes)
            for axes in (spec.batch, spec.reduction, spec.output)
        )
        leaf = string.ascii_lowercase[: len(spec.shape)]
        rows, columns = f"{batch}y{output}", f"{batch}{reduction}y"
        m, n = spec.matrix_shape
        sides = (rows, columns) if n <= m else (columns, rows)
        return cls(batch, leaf, *sides, spec)

    def stacked(self) -> "Labels":
        """The labels of several leaves of a kind, stacked behind their batch axes."""
        stack, rank = self.batch + "S", len(self.batch)
        return self._replace(
            batch=stack, block=stack + self.block[rank:], image=stack + self.image[rank:]
        )

    def axes(self, labels: Iterable[str]) -> list[int | None]:
        """The axis of the leaf for each label, None for one that the leaf has not."""
        return [self.leaf.index(label) if label in self.leaf else None for label in labels]

    def divisors(self, labels: Iterable[str]) -> _shards.Names:
        """The mesh axes that divide the axes of some labels."""
        return self.spec.names([axis for axis in self.axes(labels) if axis is not None])

    def total(self, expression: str, x: jax.Array) -> jax.Array:
        """An einsum of shards, summed over all shards of what is contracted."""
        operands, _, out = expression.partition("->")
        return _shards.total(x, self.divisors(sorted({*operands} - {*out, ","})))


def _product(
    a: jax.Array, labels: Labels, on_tpu: lax.Precision, expression: str, *operands: jax.Array
) -> jax.Array:
    """An einsum of the leaf `a` with vectors, which lies on the devices as the axes of `a` do.

    A TPU multiplies in bfloat16. DEFAULT is one product, with an error of 2^-9; HIGH is three, with
    one of 2^-16. HIGHEST is six, in a program that takes twice as long to run and to compile.
    """
    einsum = functools.partial(_einsum, a, labels, expression)
    product = lax.platform_dependent(
        *operands,
        tpu=functools.partial(einsum, on_tpu),
        default=functools.partial(einsum, lax.Precision.HIGHEST),
    )
    return labels.total(expression, product)


def _small_product(
    a: jax.Array, labels: Labels, expression: str, *operands: jax.Array
) -> jax.Array:
    """An einsum of vectors only, exact in the precision of its entries; it lies as `a` does.

    On a TPU it is a sum of products, entry by entry, which compiles in a tenth of the time.
    """
    product = lax.platform_dependent(
        *operands,
        tpu=functools.partial(_sum_of_products, expression),
        default=functools.partial(_einsum, a, labels, expression, lax.Precision.HIGHEST),
    )
    return labels.total(expression, product)


def _einsum(
    a: jax.Array, labels: Labels, expression: str, precision: lax.Precision, *operands: jax.Array
) -> jax.Array:
    axes = labels.axes(expression.rpartition("->")[2])
    sharding = _sharding.of_axes(a, axes)
    return jnp.einsum(expression, *operands, precision=precision, out_sharding=sharding)


def _sum_of_products(expression: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two operands, without a matrix product."""
    operands, _, out = expression.partition("->")
    x_labels, y_labels = operands.split(",")
    every = out + "".join(sorted({*x_labels, *y_labels} - {*out}))

    def spread(operand: jax.Array, labels: str) -> jax.Array:
        order = [labels.index(label) for label in every if label in labels]
        missing = [axis for axis, label in enumerate(every) if label not in labels]
        return jnp.expand_dims(jnp.transpose(operand, order), missing)

    summed = tuple(range(len(out), len(every)))
    return jnp.sum(spread(x, x_labels) * spread(y, y_labels), axis=summed)


def _expand(per_matrix: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(per_matrix, tuple(range(per_matrix.ndim, like.ndim)))


def scaled_to_one(
    x: jax.Array, axes: Sequence[int], names: _shards.Names = ()
) -> tuple[jax.Array, jax.Array]:
    """X over its largest absolute value, so that no square of it overflows, and this value.

    `names` are the mesh axes that divide the axes.
    """
    largest = _shards.largest(jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True), names)
    scaled = x / jnp.where(largest > 0, largest, 1).astype(x.dtype)
    return scaled, jnp.squeeze(largest, tuple(axes))


def _vector_norm(a: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The 2-norm over all but the batch axes, without overflow or underflow."""
    names = spec.names(spec.matrix_axes)
    a, largest = scaled_to_one(jnp.abs(a), spec.matrix_axes, names)
    return largest * jnp.sqrt(_shards.total(jnp.sum(a * a, axis=spec.matrix_axes), names))


def _scaled_gram(a: jax.Array, spec: MatrixSpec) -> tuple[jax.Array, jax.Array]:
    """The Gram matrices of the short side, (*batch, n, n), and by what the leaf was divided."""
    labels, size = Labels.of(spec), min(spec.matrix_shape)
    a, scale = scaled_to_one(a, spec.matrix_axes, spec.names(spec.matrix_axes))
    a = jnp.where(jnp.isfinite(jnp.expand_dims(scale, spec.matrix_axes)), a, 0)
    side = labels.block.translate({ord(label): None for label in labels.batch + "y"})
    a = _shards.whole(a, [labels.divisors(label) if label in side else () for label in labels.leaf])
    other = labels.leaf.translate({ord(label): label.upper() for label in side})
    expression = f"{labels.leaf},{other}->{labels.batch}{side}{side.upper()}"
    gram = jnp.einsum(
        expression,
        jnp.conj(a),
        a,
        precision=lax.Precision.HIGHEST,
        # No mesh axis can shard both copies of the side.
        out_sharding=_sharding.of_axes(a, [*spec.batch, *[None] * (2 * len(side))]),
    )
    return labels.total(expression, gram).reshape(*scale.shape, size, size), scale


def _seeds_from_rows(
    leaves: Sequence[jax.Array], spec: MatrixSpec, last: Sequence[Any]
) -> list[jax.Array]:
    """What to add to the blocks of leaves of a kind: rows, where a matrix was zero, or not finite.

    A row of A is A^H e_i, already in the row space of A, as a random vector is only after a product
    with A^H. They are scaled by START_SIZE, so that they hardly change a block that was searched.
    """
    labels, axis = Labels.of(spec), len(spec.batch)
    rows = jnp.stack([_rows(a, spec) for a in leaves], axis)
    names = labels.divisors(labels.block[axis:])
    rows, scale = scaled_to_one(rows, range(axis + 1, rows.ndim), names)
    unseen = ~(jnp.stack(last, axis) > 0) & jnp.isfinite(scale)
    seeds = jnp.where(_expand(unseen, rows), jnp.asarray(START_SIZE, rows.dtype) * rows, 0)
    return list(jnp.unstack(seeds, axis=axis))


def _rows(a: jax.Array, spec: MatrixSpec) -> jax.Array:
    """`BLOCK_SIZE` rows at even distances, from the first of the matrix on, laid like a block."""
    labels = Labels.of(spec)
    long_axes = [axis for axis in range(a.ndim) if labels.leaf[axis] not in labels.block]
    sizes = spec.whole_sizes(long_axes)
    places = np.unravel_index(np.arange(BLOCK_SIZE) * (math.prod(sizes) // BLOCK_SIZE), sizes)
    index: list[Any] = [slice(None)] * a.ndim
    for axis, place in zip(long_axes, places, strict=True):
        index[axis] = _shards.local(place, a.shape[axis], spec.divisors[axis])
    # Indexed axes that are not neighbors come first, others stay where they are.
    are_neighbors = long_axes == list(range(long_axes[0], long_axes[-1] + 1))
    kept = [axis for axis in range(a.ndim) if axis not in long_axes]
    position = long_axes[0] if are_neighbors else 0
    order: list[int | None] = [*kept[:position], None, *kept[position:]]
    names = spec.names(long_axes)
    rows = lax.stop_gradient(a).at[tuple(index)]
    rows = rows.get(
        mode="fill" if names else "promise_in_bounds",  # a row of another shard is zero
        fill_value=0,
        out_sharding=_sharding.of_axes(a, order),
    )
    rows = jnp.transpose(rows, [order.index(axis) for axis in labels.axes(labels.block)])
    return _shards.total(jnp.conj(rows.astype(compute_dtype(a))), names)


def _with_fresh_vector(v: jax.Array, spec: MatrixSpec, place: int, count: jax.Array) -> jax.Array:
    """The block with random signs in place of its least vector, the first.

    They are a window of a constant, which moves on from update to update. It is longer by the
    place of the leaf in the list, so that the compiler does not make one of those of all leaves,
    which would lie on the devices as one leaf wants it.
    """
    labels = Labels.of(spec)
    axis = labels.block.index("y")

    def window(shape: Sequence[int]) -> jax.Array:
        length = math.prod(shape)
        signs = 2 * np.random.default_rng(FRESH_SEED).integers(0, 2, length + NUM_WINDOWS) - 1
        constant = jnp.asarray(np.pad(signs, (0, place)), jnp.int8)
        start = jnp.remainder(count, NUM_WINDOWS)
        window = lax.dynamic_slice(constant, (start,), (length,)).astype(v.dtype)
        return (window / math.sqrt(length)).reshape(shape)

    shape = [
        1 if label in labels.batch + "y" else size
        for label, size in zip(labels.block, v.shape, strict=True)
    ]
    fresh = _own_part(labels, labels.block, shape, window)
    is_first = lax.broadcasted_iota(
        jnp.int32, [BLOCK_SIZE if i == axis else 1 for i in range(v.ndim)], axis
    )
    return jnp.where(is_first == 0, fresh, v)


def _iteration(
    leaves: Sequence[jax.Array], labels: Sequence[Labels], blocks: Sequence[Any]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One iteration on every matrix: its norm and its next block.

    Each matrix is multiplied alone. What follows is done once for all leaves of a kind, which are
    stacked behind the batch axes: a model has many, and their blocks are small.
    """
    kinds = _kinds(range(len(leaves)), leaves, [label.spec for label in labels])
    products, small = [], []
    for places in kinds:
        z, factor, grams = _products(
            [leaves[i] for i in places], labels[places[0]], [blocks[i] for i in places]
        )
        products.append(z)
        small.append((factor, *grams))

    solve = functools.partial(rayleigh_ritz, BLOCK_SIZE)
    solved = map_batched(solve, small, [len(labels[places[0]].batch) for places in kinds])
    norms: list[Any] = [None] * len(leaves)
    next_blocks: list[Any] = [None] * len(leaves)
    for places, z, solution in zip(kinds, products, solved, strict=True):
        a, label = leaves[places[0]], labels[places[0]]
        stack = label.stacked()
        sigma, rotation, nonzero = (
            _sharding.reshard_as(a, x, stack.axes(stack.batch)) for x in solution
        )
        mix = f"{stack.block},{stack.batch}yz->{stack.block.replace('y', 'z')}"
        rotated = _small_product(a, stack, mix, z, rotation)
        axes = [i for i in range(z.ndim) if stack.block[i] not in stack.batch + "y"]
        nonzero = jnp.expand_dims(nonzero, axes)
        parts = (jnp.unstack(x, axis=len(label.batch)) for x in (sigma, rotated, nonzero))
        for i, norm, found, is_found in zip(places, *parts, strict=True):
            # A direction in which A is zero gives no vector: the one that was there stays.
            norms[i], next_blocks[i] = norm, jnp.where(is_found, found, blocks[i])
    return norms, next_blocks


def _products(
    leaves: Sequence[jax.Array], labels: Labels, blocks: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Z = A^H R over a factor, the factor, shape (*batch, s), and the Gram matrices of R and Z.

    R = A V, with one vector more. Every vector of it has a largest entry of 1: no product and no
    Gram matrix overflows or underflows.

    Args:
        leaves: `s` leaves of a kind.
        labels: Of each of them.
        blocks: A block for each.
    """
    stack, axis = labels.stacked(), len(labels.batch)
    product = functools.partial(_product, leaves[0], labels)
    forward = f"{labels.leaf},{labels.block}->{labels.image}"
    back = f"{labels.image},{labels.leaf}->{labels.block}"
    # What follows is exact for the R that there is.
    images = [
        product(lax.Precision.DEFAULT, forward, a, v) for a, v in zip(leaves, blocks, strict=True)
    ]
    r = jnp.stack(images, axis)
    y = stack.image.index("y")
    axes = [i for i in range(axis + 1, r.ndim) if i != y]
    r, largest = scaled_to_one(r, axes, stack.divisors(stack.image[i] for i in axes))
    fresh = lax.slice_in_dim(r, 0, 1, axis=y)
    r = lax.concatenate([fresh * (jnp.abs(fresh) ** 4).astype(r.dtype), r], y)
    factor = jnp.max(largest, axis=-1)
    extended = jnp.unstack(jnp.conj(r), axis=axis)
    pulled_back = [
        product(lax.Precision.HIGH, back, x, a) for x, a in zip(extended, leaves, strict=True)
    ]
    z = jnp.conj(jnp.stack(pulled_back, axis))
    z = z / _expand(jnp.where(factor > 0, factor, 1), z).astype(z.dtype)
    gram = functools.partial(_gram, leaves[0], stack)
    return z, factor, (gram(stack.image, r), gram(stack.block, z))


def _gram(a: jax.Array, labels: Labels, x_labels: str, x: jax.Array) -> jax.Array:
    """X^H X, shape (*batch, k, k)."""
    expression = f"{x_labels},{x_labels.replace('y', 'z')}->{labels.batch}yz"
    return _small_product(a, labels, expression, jnp.conj(x), x)
