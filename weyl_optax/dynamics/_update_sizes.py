"""The sizes of a step: in length and in angle."""

import jax
import jax.numpy as jnp
import optax

from weyl_optax._norms.vectors import Per, check_per, length, radial, tangent
from weyl_optax._reading.granularity import by_unit
from weyl_optax._reading.specification import BoundedLeaves, WeightDimNumOrFn


def update_sizes(
    updates: optax.Updates,
    params: optax.Params,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    *,
    per: Per = "matrix",
) -> dict[str, jax.Array]:
    r"""Measure the length of every update, and the angle by which it turns its weight.

    Args:
        updates: The updates of any optimizer, as :func:`optax.apply_updates` adds them.
        params: The weights before the update.
        weight_dimension_numbers: How each leaf is read as matrices, see
            :func:`weyl_optax.scale_by_weyl_bound`.
        per: ``"matrix"`` for one number per matrix of a leaf, or ``"unit"`` for one per output
            unit. A vector has one either way.

    Returns:
        For each leaf, arrays of its batch shape (and, per unit, of its output shape):
        ``<path>/l2``, the 2-norm of the update, and ``<path>/angle``, in radians, between
        the weight before and after; 0 for a weight of zeros.

    Raises:
        ValueError: If ``per`` is neither of the two, or if ``weight_dimension_numbers`` does
            not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import update_sizes
        >>> sizes = update_sizes({"w": jnp.array([[0.0, 3.0]])}, {"w": jnp.array([[3.0, 0.0]])})
        >>> for name, size in sizes.items():
        ...     print(f"{name} {size:.3f}")
        w/l2 3.000
        w/angle 0.785

    References:
        Kosson et al., `Analyzing & Reducing the Need for Learning Rate Warmup in GPT
        Training <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    check_per(per)
    if per == "unit":
        weight_dimension_numbers = by_unit(weight_dimension_numbers)
    leaves = BoundedLeaves(params, weight_dimension_numbers, updates)
    sizes = {}
    for path, u, w, spec in zip(
        leaves.paths, leaves.of(updates), leaves.of(params), leaves.specs, strict=True
    ):
        u, w = jnp.asarray(u), jnp.asarray(w)
        norm = length(w, spec)
        along = norm + radial(u, w, spec)
        sizes[f"{path}/l2"] = length(u, spec)
        sizes[f"{path}/angle"] = jnp.where(
            norm > 0, jnp.arctan2(length(tangent(u, w, spec), spec), along), 0
        )
    return sizes
