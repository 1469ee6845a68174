"""Finer matrices: a specification in which each unit, or each head, is bounded by itself."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from weyl_optax._reading.specification import (
    DimensionNumbers,
    WeightDimNumOrFn,
    axes_of,
    default_numbers,
    is_entry,
    is_function,
    names,
    path_name,
    shape_of,
    with_axes,
)

ATTENTION = ("*attention*", "*attn*", "*query*", "*key*", "*value*", "out/*", "*/out/*")


def by_unit(weight_dimension_numbers: WeightDimNumOrFn | None = None) -> WeightDimNumOrFn:
    r"""Bound the incoming weights of every output unit by themselves, as a vector.

    A unit's step is then at most :math:`\tau` times the 2-norm of its own weights, as in
    adaptive gradient clipping. It is cheaper than the bound of the matrix: a 2-norm needs
    no search, and no vectors are kept between updates. It guarantees less: the columns
    of a matrix grow by at most :math:`1 + \tau`, and so does its Frobenius norm, but its
    spectral norm may grow by more, up to
    :math:`1 + \tau \|W\|_F / \|W\|_2`, if all units move the same way.

    Args:
        weight_dimension_numbers: How each leaf is read as matrices, as for
            :func:`scale_by_weyl_bound`: a tree, or a function that makes one.

    Returns:
        The same with every matrix split into its columns, one for each index of the
        output axes. Vectors, scalars and unbounded leaves are unchanged.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax import by_unit, tabulate
        >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}
        >>> print(tabulate(params, by_unit()))
        path    shape      read as
        bias    (256,)     1 vector of 256
        kernel  (64, 256)  256 vectors of 64

    References:
        Brock et al, `High-Performance Large-Scale Image Recognition Without Normalization
        <https://arxiv.org/abs/2102.06171>`_, 2021

    .. seealso:: :func:`by_head`, :func:`scale_by_weyl_bound`
    """

    def columns(entry: DimensionNumbers) -> DimensionNumbers:
        if axes_of(entry.reduction_axis):
            return with_axes(entry, entry.reduction_axis, ())
        return entry

    return map_entries(columns, weight_dimension_numbers)


def by_head(
    weight_dimension_numbers: WeightDimNumOrFn, paths: str | Sequence[str] = ATTENTION
) -> WeightDimNumOrFn:
    r"""Bound every attention head by itself.

    A head's part of the query, key and value kernels, and of the output projection, is a
    matrix of its own. The bound holds for the part of every head. The whole
    kernel's norm may grow by more than :math:`1 + \tau`, but by at most a factor
    :math:`1 + \tau \sqrt{h}` with :math:`h` heads. It costs as much as for the whole matrix.

    Args:
        weight_dimension_numbers: How each leaf is read as matrices, as for
            :func:`scale_by_weyl_bound`: a tree, or a function that makes one. The heads
            must be an axis of their own; where they are not, as in a fused kernel of shape
            (d, 3 * heads * dim), write a :class:`SplitDimensionNumbers` with
            ``sizes=(dim,) * 3 * heads``.
        paths: Pattern, or patterns, of the paths of attention's leaves, see :mod:`fnmatch`.
            The first of their two output axes (of query, key, value), or else of their two
            reduction axes (of the output), is the axis of the heads. Others are unchanged.

    Returns:
        The same with the axis of the heads among the batch axes.

    Raises:
        ValueError: If there is no leaf with heads at these paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from weyl_optax import by_head, tabulate
        >>> from weyl_optax.flax import dimension_numbers
        >>> model = nnx.MultiHeadAttention(4, 64, use_bias=False, decode=False, rngs=nnx.Rngs(0))
        >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
        >>> numbers = dimension_numbers(loss, model, jnp.ones((2, 8, 64)))
        >>> print(tabulate(nnx.state(model, nnx.Param), by_head(numbers)))
        path          shape        read as
        key/kernel    (64, 4, 16)  4 matrices of 64 x 16
        out/kernel    (4, 16, 64)  4 matrices of 16 x 64
        query/kernel  (64, 4, 16)  4 matrices of 64 x 16
        value/kernel  (64, 4, 16)  4 matrices of 64 x 16

    .. seealso:: :func:`by_unit`, :func:`scale_by_weyl_bound`
    """
    if is_function(weight_dimension_numbers):
        return lambda params: by_head(weight_dimension_numbers(params), paths)
    patterns = (paths,) if isinstance(paths, str) else tuple(paths)
    found = []

    def heads(path: Any, entry: Any) -> Any:
        name = path_name(names(path))
        if not isinstance(entry, DimensionNumbers) or not any(
            fnmatchcase(name, pattern) for pattern in patterns
        ):
            return entry
        reduction, output = axes_of(entry.reduction_axis), axes_of(entry.output_axis)
        if len(output) == 2 > len(reduction):
            output = output[1:]
        elif len(reduction) == 2 > len(output):
            reduction = reduction[1:]
        else:
            return entry
        found.append(name)
        return with_axes(entry, reduction, output)

    per_head = jax.tree.map_with_path(heads, weight_dimension_numbers, is_leaf=is_entry)
    if not found:
        raise ValueError(
            f"by_head found no leaf with an axis of heads at the paths {patterns}. Give it "
            "paths=, the patterns of the paths of attention's kernels and biases."
        )
    return per_head


def map_entries(
    fn: Callable[[DimensionNumbers], DimensionNumbers | None],
    weight_dimension_numbers: WeightDimNumOrFn | None,
) -> WeightDimNumOrFn:
    """The same specification with `fn` applied to each entry; unbounded leaves stay so."""

    def checked(params: Any) -> Any:
        if isinstance(params, jax.Array) and jnp.issubdtype(params.dtype, jnp.integer):
            raise ValueError(
                "weight_dimension_numbers was called with a step count. Within "
                'optax.inject_hyperparams, write static_args=("weight_dimension_numbers",).'
            )
        return params

    def mapped(numbers: Any) -> Any:
        return jax.tree.map(
            lambda entry: fn(entry) if isinstance(entry, DimensionNumbers) else entry,
            numbers,
            is_leaf=is_entry,
        )

    if weight_dimension_numbers is None:
        return lambda params: mapped(
            jax.tree.map(lambda leaf: default_numbers(len(shape_of(leaf))), checked(params))
        )
    if is_function(weight_dimension_numbers):
        # What it gives for a params tree of one leaf may be None: unbounded, and not the default.
        return lambda params: mapped(weight_dimension_numbers(checked(params)))
    return mapped(weight_dimension_numbers)
