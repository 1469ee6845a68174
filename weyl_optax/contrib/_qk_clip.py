"""QK-Clip: shrink query and key weights where attention logits are too large."""

from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax

from weyl_optax._arguments import check_above
from weyl_optax._reading.specification import (
    leaves_with_path,
    path_name,
    replace_boxed,
    shape_of,
    unbox,
)


def qk_clip(
    threshold: float = 100.0,
    layers: tuple[str, str] = ("*query", "*key"),
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink the query and key weights of every head whose attention logits are too large.

    Put it last in a chain. With the largest logit :math:`S` of a head in the batch, and the
    threshold :math:`t`, the weights after the step are multiplied by

    .. math::

        \sqrt{\min(1, t / S)}

    in both the query's and the key's layer: the head's logits shrink by
    :math:`\min(1, t / S)`. If no logit is above the threshold, nothing happens.

    Args:
        threshold: :math:`t`, above 0.
        layers: Patterns of the paths of a query's and a key's layer, see :mod:`fnmatch`. Their
            leaves, kernels and biases, end in the axes (heads, head dimension), as in
            Flax; axes before the features of a kernel are a stack of layers.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs` without state. Its ``update`` needs the
        params, and ``max_logits=``: a dict from the path of each attention, such as
        ``"blocks/attention"``, to the largest logits of its heads, shape (\*stack, heads).

    Raises:
        ValueError: If ``threshold`` is not above 0, if ``update`` is called without params or
            ``max_logits``, if these lack an attention or have one of no layer, or if their shape
            does not fit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from weyl_optax.contrib import qk_clip
        >>> params = {name: {"kernel": jnp.ones((8, 2, 4))} for name in ("query", "key", "value")}
        >>> solver = optax.chain(optax.sgd(0.0), qk_clip(100.0))
        >>> updates, _ = solver.update(
        ...     params, solver.init(params), params, max_logits={"": jnp.array([50.0, 400.0])})
        >>> for name in ("query", "value"):
        ...     print(name, params[name]["kernel"][0, :, 0] + updates[name]["kernel"][0, :, 0])
        query [1.  0.5]
        value [1. 1.]

    References:
        Kimi Team, `Kimi K2: Open Agentic Intelligence <https://arxiv.org/abs/2507.20534>`_, 2025,
        section 2.1
    """
    check_above("threshold", threshold, 0)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None or max_logits is None:
            raise ValueError(
                "qk_clip needs the params and the largest logits: call update(updates, state, "
                "params, max_logits={'path/of/attention': array of shape (*stack, heads)})."
            )
        leaves, structure = leaves_with_path(params)
        steps = structure.flatten_up_to(updates)
        clipped, used = [], set()
        for (path, w), u in zip(leaves, steps, strict=True):
            layer = path_name(path[:-1])
            if u is None or not any(fnmatchcase(layer, pattern) for pattern in layers):
                clipped.append(u)
                continue
            attention = path_name(path[:-2])
            used.add(attention)
            largest = _logits_of(attention, path_name(path), w, max_logits)
            # NaN is not <= anything: it passes into the weights.
            scale = jnp.sqrt(jnp.where(largest <= threshold, 1, threshold / largest))
            step = jnp.asarray(unbox(u))
            axes = range(largest.ndim - 1, step.ndim - 2)  # the features of a kernel
            scale = jnp.expand_dims(scale, (*axes, -1)).astype(step.dtype)
            clipped.append(replace_boxed(u, scale * step + (scale - 1) * w.astype(step.dtype)))
        if unused := set(max_logits) - used:
            raise ValueError(
                f"max_logits has {sorted(unused)}, where no layer matches {layers}. Give layers=, "
                "the patterns of the paths of a query's and a key's layer."
            )
        return structure.unflatten(clipped), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _logits_of(attention: str, leaf: str, w: Any, max_logits: Any) -> jax.Array:
    if attention not in max_logits:
        raise ValueError(
            f"max_logits has no entry for the attention {attention!r}, only for "
            f"{sorted(max_logits)}. Give the largest logits of its heads."
        )
    largest = jnp.asarray(max_logits[attention])
    shape, stack = shape_of(w), largest.ndim - 1
    own = shape[stack:]  # (features, heads, head dimension), or without features for a bias
    if len(own) not in (2, 3) or largest.shape != (*shape[:stack], own[-2]):
        raise ValueError(
            f"max_logits[{attention!r}] has the shape {largest.shape}, and the leaf {leaf!r} "
            f"{shape}. A kernel is (*stack, features, heads, head dimension), and max_logits "
            "(*stack, heads)."
        )
    return largest
