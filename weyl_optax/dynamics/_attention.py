"""How far attention has collapsed, read off its maps."""

import enum

import jax
import jax.numpy as jnp

from weyl_optax._norms.orthogonal_iteration import scaled_to_one
from weyl_optax._norms.small_problems import singular_values


class CollapseMode(enum.IntEnum):
    """What an attention map is: if not negative, the first bit says low-rank, the second sparse.

    Only the last two are collapses of the entropy. A benign one, near the identity, makes
    attention a linear layer, and training goes on. A malignant one, in which all queries
    attend to the same few keys, comes with a crash.
    """

    UNDEFINED = -1
    """No map of attention (an entry is not finite, all are zero), or one of one query or key."""
    NORMAL = 0
    LOW_RANK = 1
    """Low-rank, but not sparse, like the uniform map of a new model."""
    BENIGN = 2
    """Sparse, but not low-rank."""
    MALIGNANT = 3
    """Sparse and low-rank."""


def attention_entropy(weights: jax.Array) -> jax.Array:
    """Compute the entropy of attention, in nats.

    Args:
        weights: Attention maps of shape (..., queries, keys), floating, whose rows sum to 1.

    Returns:
        The mean over the queries, shape (...), in float32 at least: from 0, if each
        query attends to one key, to log(keys), if it attends to all equally.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import attention_entropy
        >>> print(attention_entropy(jnp.eye(8)))
        0.0
        >>> print(f"{attention_entropy(jnp.full((8, 8), 1 / 8)):.4f}")
        2.0794

    References:
        Zhai et al., `Stabilizing Transformer Training by Preventing Attention Entropy
        Collapse <https://arxiv.org/abs/2303.06296>`_, 2023
    """
    return jax.scipy.special.entr(_floats(weights)).sum(-1).mean(-1)


def effective_rank(weights: jax.Array) -> jax.Array:
    """Compute the exponential of the entropy of the normalized singular values.

    Args:
        weights: Matrices of shape (..., m, n), floating.

    Returns:
        Shape (...), in float32 at least: from 1, for a matrix of rank one, to min(m, n),
        if all singular values are the same. NaN for a matrix of zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import effective_rank
        >>> print(f"{effective_rank(jnp.eye(8)):.2f} {effective_rank(jnp.ones((8, 8))):.2f}")
        8.00 1.00

    References:
        Roy and Vetterli, `The effective rank: A measure of effective dimensionality
        <https://ieeexplore.ieee.org/document/7098875>`_, 2007
    """
    sigmas = singular_values(scaled_to_one(_floats(weights), (-2, -1))[0])
    shares = sigmas / sigmas.sum(-1, keepdims=True)
    return jnp.exp(jax.scipy.special.entr(shares).sum(-1))


def collapse_mode(
    weights: jax.Array,
    *,
    sparse_entropy: jax.typing.ArrayLike = 0.25,
    low_rank: jax.typing.ArrayLike = 0.2,
) -> jax.Array:
    """Tell whether an attention map has collapsed, and whether the collapse is malignant.

    Args:
        weights: Attention maps of shape (..., queries, keys), floating, whose rows sum to 1.
        sparse_entropy: A map is sparse if its entropy is at most this share of the
            largest, log(keys).
        low_rank: A map has low rank if its effective rank is at most this share of the
            largest, min(queries, keys), or one.

    Returns:
        Values of :class:`CollapseMode`, shape (...), int32.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import CollapseMode, collapse_mode
        >>> all_take_one_key = jnp.zeros((8, 8)).at[:, 2].set(1.0)
        >>> CollapseMode(int(collapse_mode(all_take_one_key))).name
        'MALIGNANT'

    References:
        Qi et al., `Taming Transformer Without Using Learning Rate Warmup
        <https://arxiv.org/abs/2505.21910>`_, 2025
    """
    queries, keys = weights.shape[-2:]
    entropy, rank = attention_entropy(weights), effective_rank(weights)
    # A map of one query or one key is both, whatever the model does.
    is_defined = jnp.isfinite(entropy) & jnp.isfinite(rank) & (min(queries, keys) > 1)
    is_sparse = entropy <= sparse_entropy * jnp.log(keys)
    is_low_rank = rank <= jnp.maximum(low_rank * min(queries, keys), 1 + 1e-3)  # by rounding
    mode = is_low_rank + 2 * is_sparse.astype(jnp.int32)
    return jnp.where(is_defined, mode, int(CollapseMode.UNDEFINED))


def _floats(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
