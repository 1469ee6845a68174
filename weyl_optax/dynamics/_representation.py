"""How far a step moves what a network computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from weyl_optax._norms.orthogonal_iteration import compute_dtype, tree_norm


def relative_representation_change(
    fn: Callable[[optax.Params, Any], Any],
    params: optax.Params,
    updates: optax.Updates,
    batch: Any,
) -> jax.Array:
    r"""Compute how much a step changes the output of a network, relative to its size.

    .. math::

        \frac{\lVert \partial_\theta f(\theta, x) \, \Delta\theta \rVert_2}
             {\lVert f(\theta, x) \rVert_2}

    To first order in the step, by one :func:`jax.jvp`.

    Args:
        fn: Takes ``params`` and ``batch``, and returns an array or a tree of arrays.
        params: Where the step starts.
        updates: The step, as ``optax.apply_updates`` adds it; a tree like ``params``.
        batch: Whatever ``fn`` takes.

    Returns:
        A scalar, in float32 at least; the norms are over all entries of the output.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import relative_representation_change
        >>> dense = lambda w, x: x @ w
        >>> w, x = jnp.eye(3), jnp.ones((8, 3))
        >>> print(f"{relative_representation_change(dense, w, -0.1 * w, x):.3f}")
        0.100

    References:
        Kosson et al., `Analyzing & Reducing the Need for Learning Rate Warmup in GPT
        Training <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    updates = jax.tree.map(lambda u, p: jnp.asarray(u, jnp.result_type(p)), updates, params)
    output, change = jax.jvp(lambda p: fn(p, batch), (params,), (updates,))
    # A sum of squares of float16 overflows from a norm of 256 on.
    change, output = (
        jax.tree.map(lambda x: x.astype(compute_dtype(x)), y) for y in (change, output)
    )
    return tree_norm(change) / tree_norm(output)
