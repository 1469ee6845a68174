"""The spectral norms of a tree, on their own."""

from typing import Any

import jax
import jax.numpy as jnp

from weyl_optax._arguments import check_at_least
from weyl_optax._norms import orthogonal_iteration as iteration
from weyl_optax._reading.specification import BoundedLeaves, WeightDimNumOrFn


def spectral_norm(
    tree: Any,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    *,
    num_iters: jax.typing.ArrayLike = 32,
) -> Any:
    """Estimate the largest singular value of every matrix in a tree.

    Runs orthogonal iteration from a fixed random start. Except for rounding, the
    estimate is never above the exact norm, and it rises to it with ``num_iters``.
    The norms of vectors, scalars and matrices with a side of at most 16 are exact.

    The derivative is :math:`u v^H`, with the leading singular vectors as exact as the block of
    vectors has become, so the norm can be a regularizer. There is no second derivative.

    Args:
        tree: An array or a tree of arrays, floating or complex.
        weight_dimension_numbers: How each leaf is read as matrices, see
            :func:`weyl_optax.scale_by_weyl_bound`.
        num_iters: Number of iterations, at least 1. Each reads a matrix twice.

    Returns:
        A tree like ``tree``: for each leaf an array of its batch shape, in float32
        at least, or ``None`` if the leaf has nothing to measure.

    Raises:
        ValueError: If ``weight_dimension_numbers`` does not fit ``tree``, or if
            ``num_iters`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax import spectral_norm
        >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> print(f"{spectral_norm(w):.4f}")
        3.0000
        >>> spectral_norm(jnp.ones((12, 64, 256))).shape
        (12,)
    """
    check_at_least("num_iters", num_iters, 1)
    leaves = BoundedLeaves(tree, weight_dimension_numbers)
    matrices = list(map(jnp.asarray, leaves.of(tree)))
    blocks = list(map(iteration.new_block, matrices, leaves.specs))
    return leaves.put(iteration.search(matrices, leaves.specs, blocks, num_iters).sigmas)
