"""How the params of Flax NNX models are read as matrices. Needs flax."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from weyl_optax._reading.specification import DimensionNumbers
from weyl_optax._reading.traced import dimension_numbers_from


def dimension_numbers(
    fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
    overrides: Mapping[str, DimensionNumbers | None] | None = None,
    by_part: bool = False,
    **kwargs: Any,
) -> Any:
    """Read each param of an NNX model as the matrix by which the model multiplies its inputs.

    Like :func:`weyl_optax.dimension_numbers_from`, for a function of a model instead of its
    params. ``fn(model, *args, **kwargs)`` is traced, not run, and the model is unchanged.
    Anything else in the model, such as batch statistics, dropout state, or a cache, counts as an
    input. For a Linen model, use :func:`weyl_optax.dimension_numbers_from` itself.

    Args:
        fn: The training loss, or the model's call, such as ``nnx.MultiHeadAttention.__call__``.
        model: An ``nnx.Module``, or only its shapes, from ``nnx.eval_shape``.
        *args: The other arguments of `fn`, among them the inputs: trees of arrays or of
            :class:`jax.ShapeDtypeStruct`. Arrays that `fn` closes over are constants, not inputs.
        wrt: Which variables of the model the optimizer gets, as for ``nnx.Optimizer``.
        overrides: Patterns of paths, such as ``'*/norm/scale'``, and what to return for
            their leaves, `None` to leave them unbounded. The first match counts.
        by_part: As for :func:`weyl_optax.dimension_numbers_from`, for fused kernels.
        **kwargs: Like `args`.

    Returns:
        A tree like ``nnx.state(model, wrt)``, with an
        :class:`optax.contrib.MuonDimensionNumbers` for each variable.

    Raises:
        ValueError: If `model` is not an ``nnx.Module``, or as
            :func:`weyl_optax.dimension_numbers_from`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from weyl_optax import tabulate
        >>> from weyl_optax.flax import dimension_numbers
        >>> model = nnx.MultiHeadAttention(4, 64, use_bias=False, decode=False, rngs=nnx.Rngs(0))
        >>> loss = lambda model, x: jnp.mean((model(x) - x) ** 2)
        >>> numbers = dimension_numbers(loss, model, jnp.ones((2, 8, 64)))
        >>> print(tabulate(nnx.state(model, nnx.Param), numbers))
        path          shape        read as
        key/kernel    (64, 4, 16)  1 matrix of 64 x 64
        out/kernel    (4, 16, 64)  1 matrix of 64 x 64
        query/kernel  (64, 4, 16)  1 matrix of 64 x 64
        value/kernel  (64, 4, 16)  1 matrix of 64 x 64
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model must be an nnx.Module, got {type(model).__name__}. Write dimension_numbers("
            "loss, model, *inputs), or, for params by themselves, as those of Linen, "
            "weyl_optax.dimension_numbers_from(loss, params, *inputs)."
        )
    graph, params, rest = nnx.split(model, wrt, ...)

    def of_params(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(nnx.merge(graph, params, rest), *args, **kwargs)

    return dimension_numbers_from(
        of_params, params, rest, *args, overrides=overrides, by_part=by_part, **kwargs
    )
