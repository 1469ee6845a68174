"""How the leaves of a parameter tree are read as batches of matrices.

The specification is `optax.contrib.MuonDimensionNumbers`, so a tree written
for Muon works unchanged. Axes that it does not name are batch axes.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpy.lib.array_utils import normalize_axis_tuple
from optax.contrib import MuonDimensionNumbers

from weyl_optax import _sharding as sharding


class SplitDimensionNumbers(NamedTuple):
    """How a fused kernel is read: as matrices that lie side by side along an axis.

    Put it in a specification where an :class:`optax.contrib.MuonDimensionNumbers` would make
    one matrix of them. Each part is bounded by itself. The fields of a state have a tuple in the
    leaf's place, with an array for each. Along an explicit mesh axis, JAX cuts a leaf only if the
    number of devices divides every size.

    Args:
        reduction_axis: The axes of the rows, as in ``MuonDimensionNumbers``.
        output_axis: The axes of the columns.
        split_axis: The axis along which the parts lie, one of the above, written the same way.
        sizes: The sizes of the parts along it, which add up to the size of the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax import SplitDimensionNumbers, tabulate
        >>> params = {"kernel": jnp.ones((64, 96)), "bias": jnp.ones(96)}
        >>> numbers = {
        ...     "kernel": SplitDimensionNumbers(0, 1, split_axis=1, sizes=(64, 16, 16)),
        ...     "bias": SplitDimensionNumbers((), 0, split_axis=0, sizes=(64, 16, 16)),
        ... }
        >>> print(tabulate(params, numbers))
        path    shape     read as
        bias    (96,)     1 vector of 64, 1 vector of 16, 1 vector of 16
        kernel  (64, 96)  1 matrix of 64 x 64, 1 matrix of 64 x 16, 1 matrix of 64 x 16

    .. seealso:: :func:`weyl_optax.dimension_numbers_from`, whose ``by_part`` finds the parts
    """

    reduction_axis: int | Sequence[int]
    output_axis: int | Sequence[int]
    split_axis: int
    sizes: Sequence[int]


DimensionNumbers: TypeAlias = MuonDimensionNumbers | SplitDimensionNumbers
WeightDimNumOrFn: TypeAlias = DimensionNumbers | optax.Params | Callable[[optax.Params], Any]


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """A leaf, read as a batch of matrices of shape (reduction, output), or several side by side."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]  # axes, ascending; each index is a matrix of its own
    reduction: tuple[int, ...]  # axes, ascending; together the rows
    output: tuple[int, ...]  # axes, ascending; together the columns
    split_axis: int | None = None  # of a fused leaf: the axis along which its parts lie
    part_sizes: tuple[int, ...] = ()  # and their sizes along it

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The sizes of some axes."""
        return tuple(map(self.shape.__getitem__, axes))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of an array with an entry for each matrix."""
        return self.sizes(self.batch)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.sizes(self.reduction)), math.prod(self.sizes(self.output))

    @property
    def matrix_axes(self) -> tuple[int, ...]:
        """All axes but the batch axes."""
        return self.reduction + self.output

    @property
    def parts(self) -> tuple["MatrixSpec", ...]:
        """The parts of a fused leaf, as leaves of their own; of any other leaf, itself."""
        if self.split_axis is None:
            return (self,)
        start, end = self.shape[: self.split_axis], self.shape[self.split_axis + 1 :]
        return tuple(
            MatrixSpec((*start, size, *end), self.batch, self.reduction, self.output)
            for size in self.part_sizes
        )

    def times(self, factor: jax.Array, x: jax.Array) -> jax.Array:
        """Each matrix of `x` times its own factor, (*batch)."""
        return jnp.expand_dims(factor, self.matrix_axes).astype(x.dtype) * x

    def split(self, x: Any) -> Sequence[Any]:
        """The parts of an array like the leaf, or of what a state keeps for it."""
        if self.split_axis is None:
            return (x,)
        if shape_of(x) == self.shape:
            return lax.split(jnp.asarray(x), self.part_sizes, self.split_axis)
        if x is None:
            return (None,) * len(self.part_sizes)
        if isinstance(x, (tuple, list)) and len(x) == len(self.part_sizes):
            return x
        return ((x,),) * len(self.part_sizes)  # a state for another reading, which fits no part

    def spread(self, factors: Sequence[jax.Array], a: jax.Array) -> jax.Array:
        """The factors of each part's matrices, (*batch), laid out to multiply the leaf `a`.

        To cut the leaf and join it again would write it once more.
        """
        if self.split_axis is None:
            return jnp.expand_dims(factors[0], self.matrix_axes)
        along = [
            jnp.repeat(jnp.expand_dims(x, self.matrix_axes), size, self.split_axis)
            for x, size in zip(factors, self.part_sizes, strict=True)
        ]
        factor = lax.concatenate(along, self.split_axis)
        axes = [axis if size > 1 else None for axis, size in enumerate(factor.shape)]
        return sharding.reshard_as(a, factor, axes)

    def join(self, parts: Sequence[Any], like: Any) -> Any:
        """An array like the leaf, or what a state keeps for it, from its parts."""
        if self.split_axis is None:
            return parts[0]
        if shape_of(like) == self.shape:
            return lax.concatenate(parts, self.split_axis)
        return tuple(parts)


def resolve_dimension_numbers(
    params: optax.Params, weight_dimension_numbers: WeightDimNumOrFn | None
) -> Any:
    """Reads every leaf as a batch of matrices.

    Args:
        params: A tree of arrays, or of anything with a shape and a dtype.
        weight_dimension_numbers: For each leaf, or for a whole subtree, a
            `MuonDimensionNumbers`, or `None` to leave it unbounded; or a function
            that makes such a tree of `params`. By default, see `default_numbers`.

    Returns:
        A tree like `params`, unboxed: a `MatrixSpec` for each leaf, or `None` where
        the specification is `None`, and for leaves without floating or complex entries.

    Raises:
        ValueError: If the specification does not fit `params`.
    """
    leaves, treedef = leaves_with_path(params)
    if weight_dimension_numbers is None:
        numbers = [default_numbers(len(shape_of(leaf))) for _, leaf in leaves]
    else:
        if is_function(weight_dimension_numbers):
            weight_dimension_numbers = weight_dimension_numbers(params)
        numbers = _specified_numbers(params, leaves, weight_dimension_numbers)
    return treedef.unflatten(
        _matrix_spec(path, shape_of(leaf), entry)
        if entry is not None and _has_floats(leaf)
        else None
        for (path, leaf), entry in zip(leaves, numbers, strict=True)
    )


def with_axes(
    numbers: DimensionNumbers, reduction: int | Sequence[int], output: int | Sequence[int]
) -> DimensionNumbers:
    """The same with other axes, still in parts if one of these is split."""
    is_split = isinstance(numbers, SplitDimensionNumbers) and numbers.split_axis in (
        *axes_of(reduction),
        *axes_of(output),
    )
    if is_split:
        return numbers._replace(reduction_axis=reduction, output_axis=output)
    return MuonDimensionNumbers(reduction, output)


def is_function(weight_dimension_numbers: Any) -> TypeGuard[Callable[[optax.Params], Any]]:
    """Whether it makes a tree from the params, and is not one: an Equinox model is callable too."""
    return callable(weight_dimension_numbers) and jax.tree_util.all_leaves(
        [weight_dimension_numbers]
    )


def default_numbers(rank: int) -> MuonDimensionNumbers:
    """How a leaf is read if only its rank is known.

    Ranks 0 and 1 are scalars and vectors; above that the last two axes are the matrix and
    the rest is batch, as in `jnp.linalg`.
    """
    if rank < 2:
        return MuonDimensionNumbers((), tuple(range(-rank, 0)))
    return MuonDimensionNumbers((-2,), (-1,))


class BoundedLeaves:
    """The leaves of a tree that are bounded, unboxed, as a list.

    These are the leaves that `weight_dimension_numbers` reads as matrices, except those whose
    update is `None`, which are not trained. A fused leaf is listed part by part. A state has a
    tuple of what is kept for each part.

    Args:
        params: As for `resolve_dimension_numbers`.
        weight_dimension_numbers: As there.
        updates: A tree like `params`, except for `None` in place of leaves.

    Raises:
        ValueError: As `resolve_dimension_numbers`, and if `updates` do not fit `params`.
    """

    def __init__(
        self,
        params: optax.Params,
        weight_dimension_numbers: WeightDimNumOrFn | None,
        updates: optax.Updates | None = None,
    ):
        leaves, self._treedef = leaves_with_path(params if updates is None else updates)
        specs = resolve_dimension_numbers(params, weight_dimension_numbers)
        try:
            specs = self._treedef.flatten_up_to(specs)
        except ValueError as error:
            raise ValueError(f"updates and params differ in structure: {error}") from None
        held = self._treedef.flatten_up_to(params)
        for (path, leaf), param in zip(leaves, held, strict=True):
            if param is None and leaf is not None:
                raise ValueError(
                    f"The leaf {path_name(path)!r} is None in params and has an update. Leave it "
                    "out of both, or make its update None."
                )
        self._specs = {
            i: spec
            for i, ((_, leaf), spec) in enumerate(zip(leaves, specs, strict=True))
            if spec is not None and leaf is not None
        }
        for i, spec in self._specs.items():
            path, leaf = leaves[i]
            if not isinstance(spec, MatrixSpec):
                raise ValueError(
                    f"updates and params differ in structure: {path_name(path)!r} is a leaf of "
                    "updates and none of params."
                )
            if shape_of(leaf) != spec.shape:
                raise ValueError(
                    f"The leaf {path_name(path)!r} has shape {shape_of(leaf)} in updates, "
                    f"{spec.shape} in params."
                )
        self.specs = tuple(part for spec in self._specs.values() for part in spec.parts)
        self.paths = tuple(
            path_name(leaves[i][0] if spec.split_axis is None else (*leaves[i][0], str(part)))
            for i, spec in self._specs.items()
            for part in range(len(spec.parts))
        )

    def of(self, tree: Any) -> list[Any]:
        """What another tree of this structure has in their places."""
        leaves = self._treedef.flatten_up_to(tree)
        return [x for i, spec in self._specs.items() for x in spec.split(unbox(leaves[i]))]

    def of_each_part(self, tree: Any) -> list[Any]:
        """As `of`, from a tree with one entry for a leaf, whatever its parts."""
        leaves = self._treedef.flatten_up_to(tree)
        return [unbox(leaves[i]) for i, spec in self._specs.items() for _ in spec.parts]

    def times(self, factors: Sequence[jax.Array], tree: Any, like: Any) -> Any:
        """The tree with each matrix times a factor, and the dtypes of the tree `like`."""
        leaves, likes = map(self._treedef.flatten_up_to, (tree, like))
        remaining = iter(factors)
        for i, spec in self._specs.items():
            a = jnp.asarray(unbox(leaves[i]))
            factor = spec.spread(list(itertools.islice(remaining, len(spec.parts))), a)
            leaves[i] = replace_boxed(likes[i], factor.astype(a.dtype) * a)
        return jax.tree.map(
            lambda x, old: x if x is old else jnp.asarray(x, jnp.result_type(old)),
            self._treedef.unflatten(leaves),
            like,
        )

    def put(self, values: Sequence[Any], tree: Any = None) -> Any:
        """A tree of this structure with the values in their places, and elsewhere as `tree`."""
        leaves = [None] * self._treedef.num_leaves
        if tree is not None:
            leaves = self._treedef.flatten_up_to(tree)
        remaining = iter(values)
        for i, spec in self._specs.items():
            parts = list(itertools.islice(remaining, len(spec.parts)))
            leaves[i] = replace_boxed(leaves[i], spec.join(parts, unbox(leaves[i])))
        return self._treedef.unflatten(leaves)


def leaves_with_path(tree: Any) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """The leaves of a tree, unboxed, with their paths; and its structure.

    `None` counts as a leaf, and so does a box: what the bound keeps for an array does not have
    the axes that the box names.

    Raises:
        ValueError: If two leaves have the same path.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    leaves = [(names(path), unbox(leaf)) for path, leaf in entries]
    for path, count in Counter(path_name(path) for path, _ in leaves).items():
        if count > 1:
            raise ValueError(f"Two leaves have the path {path!r}. Rename one of them.")
    return leaves, treedef


def is_boxed(x: Any) -> bool:
    """Whether it is a boxed array: a `flax.linen.Partitioned`, or a `flax.nnx.Variable`."""
    return hasattr(x, "unbox") or hasattr(x, "get_metadata")


def unbox(x: Any) -> Any:
    """The content of a box, or `x` itself if it is not boxed."""
    if not is_boxed(x):
        return x
    contents = jax.tree.leaves(x, is_leaf=is_entry)
    if len(contents) != 1:
        raise ValueError(f"A box must hold one array, and {x!r} holds {len(contents)}.")
    return contents[0]


def replace_boxed(x: Any, content: Any) -> Any:
    """The same box around another content, or the content itself if there is no box."""
    return jax.tree.map(lambda _: content, x) if is_boxed(x) else content


def overridden(
    paths: Sequence[str], overrides: Mapping[str, DimensionNumbers | None] | None
) -> dict[str, DimensionNumbers | None]:
    """The entries given by patterns of paths, such as `"*/norm/scale"`; the first match counts.

    Raises:
        ValueError: If a pattern matches no path.
    """
    numbers: dict[str, DimensionNumbers | None] = {}
    for pattern, entry in (overrides or {}).items():
        matches = [path for path in paths if fnmatchcase(path, pattern)]
        if not matches:
            raise ValueError(
                f"overrides has {pattern!r}, which matches none of the leaves {sorted(paths)}."
            )
        numbers = dict.fromkeys(matches, entry) | numbers
    return numbers


def axes_of(axes: int | Sequence[int]) -> tuple[int, ...]:
    """The axes of a side of a `MuonDimensionNumbers`, where a single one may be just a number."""
    return (axes,) if isinstance(axes, (int, np.integer)) else tuple(axes)


def names(path: Sequence[Any]) -> tuple[str, ...]:
    """A leaf's path, whatever the containers are: a field, a key and an index are names."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_name(path: Sequence[str]) -> str:
    """A leaf's path as `a/b/c`."""
    return "/".join(path)


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, of a `jax.ShapeDtypeStruct`, or of a Python number."""
    return tuple(getattr(leaf, "shape", ()))


def _is_leaf(x: Any) -> bool:
    return x is None or is_boxed(x)


def _is_hole(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def is_entry(x: Any) -> bool:
    """Whether it stands for a leaf, or for a subtree, in a specification."""
    return _is_hole(x) or isinstance(x, DimensionNumbers)


def _has_floats(leaf: Any) -> bool:
    """Whether it has entries, and they are floating or complex."""
    if not (hasattr(leaf, "dtype") or isinstance(leaf, (float, complex))):
        return False
    return math.prod(shape_of(leaf)) > 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _specified_numbers(
    params: optax.Params, leaves: Sequence[tuple[tuple[str, ...], Any]], specification: Any
) -> list[DimensionNumbers | None]:
    """The entry for each leaf: the one at its path, or at the path of a subtree around it."""
    entries = {
        names(path): None if _is_hole(unbox(entry)) else unbox(entry)
        for path, entry in jax.tree.leaves_with_path(
            specification, is_leaf=lambda x: is_entry(x) or is_boxed(x)
        )
    }
    used, numbers = set(), []
    for path, leaf in leaves:
        around = [path[:end] for end in range(len(path) + 1) if path[:end] in entries]
        if not around and _has_floats(leaf):
            raise ValueError(
                f"weight_dimension_numbers has no entry for the leaf {path_name(path)!r} of shape "
                f"{shape_of(leaf)}. Give it optax.contrib.MuonDimensionNumbers("
                "reduction_axis, output_axis), or None to leave it unbounded."
            )
        used.update(around)
        numbers.append(entries[around[-1]] if around else None)

    # An entry where params is masked is ignored.
    masked = [
        names(path)
        for path, leaf in jax.tree.leaves_with_path(params, is_leaf=_is_hole)
        if _is_hole(leaf)
    ]
    for path in entries.keys() - used:
        if not any(path[: len(hole)] == hole or hole[: len(path)] == path for hole in masked):
            paths = sorted(path_name(path) for path, _ in leaves)
            raise ValueError(
                f"weight_dimension_numbers has an entry at {path_name(path)!r}, where params has "
                f"no leaf. The leaves of params are {paths}: give each of them one entry."
            )
    return numbers


def _matrix_spec(
    path: tuple[str, ...], shape: tuple[int, ...], numbers: DimensionNumbers
) -> MatrixSpec:
    where = f"for the leaf {path_name(path)!r} of shape {shape}"
    if not isinstance(numbers, DimensionNumbers):
        raise ValueError(
            f"weight_dimension_numbers has {numbers!r} {where}. "
            "Write optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis), or None."
        )

    def normalize(axes: int | Sequence[int]) -> tuple[int, ...]:
        try:
            return tuple(sorted(normalize_axis_tuple(axes, len(shape), allow_duplicate=True)))
        except (TypeError, np.exceptions.AxisError) as error:
            raise ValueError(
                f"weight_dimension_numbers has {numbers} {where}: {error}. A vector is written "
                "with no reduction axis, MuonDimensionNumbers(reduction_axis=(), output_axis=0)."
            ) from None

    reduction, output = normalize(numbers.reduction_axis), normalize(numbers.output_axis)
    named = reduction + output
    if len(set(named)) < len(named):
        raise ValueError(
            f"weight_dimension_numbers has {numbers} {where}, which names an axis twice. "
            "An axis is a reduction, an output, or, unnamed, a batch axis."
        )
    batch = tuple(sorted(set(range(len(shape))) - set(named)))
    spec = MatrixSpec(shape, batch, reduction, output)
    if isinstance(numbers, MuonDimensionNumbers):
        return spec
    written = (*axes_of(numbers.reduction_axis), *axes_of(numbers.output_axis))
    axes = () if numbers.split_axis is None else normalize(numbers.split_axis)
    if len(axes) != 1 or numbers.split_axis not in written:
        raise ValueError(
            f"weight_dimension_numbers has {numbers} {where}: split_axis must be one of its "
            "reduction or output axes, written alike. On a batch axis, each index is a matrix of "
            "its own anyway."
        )
    (split_axis,) = axes
    sizes = axes_of(() if numbers.sizes is None else numbers.sizes)
    is_positive = all(isinstance(size, (int, np.integer)) and size > 0 for size in sizes)
    if not is_positive or sum(sizes) != shape[split_axis]:
        raise ValueError(
            f"weight_dimension_numbers has {numbers} {where}: the sizes of its parts must be "
            f"positive and add up to {shape[split_axis]}, that of axis {split_axis}."
        )
    return dataclasses.replace(spec, split_axis=split_axis, part_sizes=sizes)
