"""How the leaves of a parameter tree are read as batches of matrices.

The specification is `optax.contrib.MuonDimensionNumbers`, so that a tree written
for Muon works unchanged. Axes that it does not name are batch axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

WeightDimNumOrFn: TypeAlias = (
    MuonDimensionNumbers | optax.Params | Callable[[optax.Params], optax.Params]
)


class Matrices(NamedTuple):
    """A leaf, read as a batch of matrices of shape (reduction, output)."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]  # axes, ascending; each index is a matrix of its own
    reduction: tuple[int, ...]  # axes, ascending; together the rows
    output: tuple[int, ...]  # axes, ascending; together the columns

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.sizes(self.batch)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return math.prod(self.sizes(self.reduction)), math.prod(self.sizes(self.output))

    @property
    def is_vector(self) -> bool:
        """Whether it has one row or one column: its spectral norm is the 2-norm."""
        return min(self.matrix_shape) == 1


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, keyed by their path."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if path_name(path) in named:
            raise ValueError(f"Two leaves have the path {path_name(path)!r}. Rename one of them.")
        named[path_name(path)] = leaf
    return named


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, of a `jax.ShapeDtypeStruct`, or of a Python number."""
    return tuple(getattr(leaf, "shape", ()))


def path_name(path: Sequence[Any]) -> str:
    """A leaf's path as `a/b/c`, without the `.value` of a boxed Flax parameter."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def read(
    params: optax.Params, weight_dimension_numbers: WeightDimNumOrFn | None
) -> dict[str, Matrices]:
    """Reads every leaf that has something to bound, keyed by its path.

    Without a specification, ranks 0 and 1 are scalars and vectors, and above
    that the last two axes are the matrix and the rest is batch.

    Args:
        params: A tree of arrays, or of anything with a shape and a dtype.
        weight_dimension_numbers: A tree with the paths of `params`, and a
            `MuonDimensionNumbers` or `None` for each; or a function that makes
            such a tree of `params`.

    Returns:
        A `Matrices` for each leaf, but for those whose specification is `None`,
        that have no entries, or whose entries are neither floats nor complex.

    Raises:
        ValueError: If the specification does not fit `params`.
    """
    leaves = by_path(params)
    if weight_dimension_numbers is None:
        numbers = {path: default_numbers(len(shape_of(leaf))) for path, leaf in leaves.items()}
    else:
        numbers = _specified_numbers(params, leaves, weight_dimension_numbers)
    return {
        path: _matrices(path, shape_of(leaf), numbers[path])
        for path, leaf in leaves.items()
        if numbers[path] is not None
        and math.prod(shape_of(leaf)) > 0
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    }


def default_numbers(rank: int) -> MuonDimensionNumbers:
    """The reading of a leaf of which only the rank is known."""
    if rank < 2:
        return MuonDimensionNumbers((), tuple(range(-rank, 0)))
    return MuonDimensionNumbers((-2,), (-1,))


def _specified_numbers(
    params: optax.Params, leaves: dict[str, Any], weight_dimension_numbers: WeightDimNumOrFn
) -> dict[str, MuonDimensionNumbers | None]:
    """The specification, keyed by path and checked against the leaves' paths."""

    def is_hole(x: Any) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    def is_entry(x: Any) -> bool:
        return is_hole(x) or isinstance(x, MuonDimensionNumbers)

    if callable(weight_dimension_numbers):
        weight_dimension_numbers = weight_dimension_numbers(params)
    entries = jax.tree_util.tree_leaves_with_path(weight_dimension_numbers, is_leaf=is_entry)
    numbers = {path_name(path): None if is_hole(entry) else entry for path, entry in entries}

    for path in leaves.keys() - numbers.keys():
        raise ValueError(
            f"weight_dimension_numbers has no entry for the leaf {path!r} of shape "
            f"{shape_of(leaves[path])}. Give it optax.contrib.MuonDimensionNumbers("
            "reduction_axis, output_axis), or None to leave it unbounded."
        )
    # Where params is None or masked, the specification may say anything.
    holes = [
        path_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hole)
        if is_hole(leaf)
    ]
    for path in numbers.keys() - leaves.keys():
        if not any(hole in ("", path) or path.startswith(hole + "/") for hole in holes):
            raise ValueError(
                f"weight_dimension_numbers has an entry at {path!r}, where params has no leaf. "
                f"The leaves of params are {sorted(leaves)}: give each of them one entry."
            )
    return numbers


def _matrices(path: str, shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> Matrices:
    if not isinstance(numbers, MuonDimensionNumbers):
        raise ValueError(
            f"weight_dimension_numbers has {numbers!r} for the leaf {path!r} of shape {shape}. "
            "Write optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis), or None."
        )

    def normalize(axes: int | Sequence[int]) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        for axis in axes:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"weight_dimension_numbers has {numbers} for the leaf {path!r} of shape "
                    f"{shape}: it has no axis {axis}. A vector is written with no reduction "
                    "axis, MuonDimensionNumbers(reduction_axis=(), output_axis=0)."
                )
        return tuple(sorted(axis % len(shape) for axis in axes))

    reduction, output = normalize(numbers.reduction_axis), normalize(numbers.output_axis)
    named = reduction + output
    if len(set(named)) < len(named):
        raise ValueError(
            f"weight_dimension_numbers has {numbers} for the leaf {path!r} of shape {shape}, which "
            "names an axis twice. An axis is a reduction, an output, or, unnamed, a batch axis."
        )
    batch = tuple(axis for axis in range(len(shape)) if axis not in named)
    return Matrices(shape, batch, reduction, output)
