r"""Singular values of a product of two weights, without forming a large product.

With thin factors :math:`A = Q_a R_a` and :math:`B^H = Q_b R_b`, the singular values of
:math:`A B = Q_a (R_a R_b^H) Q_b^H` are those of the small :math:`R_a R_b^H`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from weyl_optax import _sharding as sharding
from weyl_optax._norms.orthogonal_iteration import compute_dtype, scaled_to_one
from weyl_optax._norms.small_problems import singular_values, triangular_factor
from weyl_optax._spectral_norm import spectral_norm


@jax.jit
def product_spectral_norm(first: jax.Array, second: jax.Array) -> jax.Array:
    """Compute the largest singular value of ``first @ second``.

    An estimate from below by :func:`weyl_optax.spectral_norm`, of the product or of a
    smaller matrix with the same singular values.

    Args:
        first: Shape (..., m, k), floating or complex.
        second: Shape (..., k, n). A product of two layers has the first layer's kernel
            first: ``product_spectral_norm(up, down)`` is the norm of W_2 W_1.

    Returns:
        Shape (...), in float32 at least.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import product_spectral_norm
        >>> print(f"{product_spectral_norm(2 * jnp.eye(4), 3 * jnp.eye(4)):.4f}")
        6.0000
    """
    if min(first.ndim, second.ndim) < 2 or first.shape[-1] != second.shape[-2]:
        raise ValueError(
            f"first has the shape {first.shape} and second {second.shape}. Write kernels as "
            "(..., m, k) and (..., k, n)."
        )
    return spectral_norm(product_core(first, second))


@jax.jit
def qk_spectral_norm(query: jax.Array, key: jax.Array) -> jax.Array:
    """Compute the largest singular value of W_q^T W_k, for every head.

    Args:
        query: Kernel of shape (..., d, heads, head_dim), as in Flax, floating.
        key: The same shape.

    Returns:
        Shape (..., heads), in float32 at least: exact except for rounding.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import qk_spectral_norm
        >>> qk_spectral_norm(jnp.ones((64, 4, 16)), jnp.ones((64, 4, 16))).shape
        (4,)
    """
    sigmas, scale = _qk_singular_values(query, key)
    return scale * sigmas[..., 0]


def spectral_energy_concentration(
    query: jax.Array, key: jax.Array, s: jax.typing.ArrayLike
) -> jax.Array:
    r"""Compute the share of the energy of W_q^T W_k that is in a few directions.

    .. math::

        \mathrm{SEC}(d_q, s) = \sum_{i=1}^{s} \sigma_i^2(W_q^\top W_k) \Big/
            \sum_{i=1}^{d_q} \sigma_i^2(W_q^\top W_k)

    A value near 1 with a small ``s`` comes with attention that collapses. If ``head_dim`` is
    below d, it is computed from the thin factors, in O(d head_dim^2) operations, without forming
    the d x d product.

    Args:
        query: Kernel of shape (..., d, heads, head_dim), as in Flax, floating.
        key: The same shape.
        s: Number of the largest singular values that count, at least 1; or an array of
            such numbers.

    Returns:
        Shape (..., heads) followed by the shape of ``s``, in float32 at least: 0 to 1,
        or NaN if the product is zero.

    Raises:
        ValueError: If the shapes do not fit, or if ``s`` is below 1.

    Example:
        >>> import jax
        >>> from weyl_optax.dynamics import spectral_energy_concentration
        >>> query, key = jax.random.normal(jax.random.key(0), (2, 256, 4, 64))
        >>> print(spectral_energy_concentration(query, key, s=4).round(2))
        [0.17 0.16 0.17 0.17]

    References:
        Qi et al., `Taming Transformer Without Using Learning Rate Warmup
        <https://arxiv.org/abs/2505.21910>`_, 2025, equation 4
    """
    if not isinstance(s, Tracer) and np.min(s) < 1:
        raise ValueError(f"s must be at least 1, got {s}.")
    sigmas, _ = _qk_singular_values(query, key)
    energy = jnp.cumsum(jnp.square(sigmas / sigmas[..., :1]), axis=-1)
    return jnp.take(energy / energy[..., -1:], jnp.asarray(s) - 1, axis=-1, mode="clip")


@jax.jit
def _qk_singular_values(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of W_q^T W_k, shape (..., heads, min(d, head_dim)), descending, up to a scale (..., heads).

    The scale keeps the product from overflow and underflow.
    """
    if query.ndim < 3 or query.shape != key.shape:
        raise ValueError(
            f"query has the shape {query.shape} and key {key.shape}. Both must have the same "
            "(..., d, heads, head_dim)."
        )
    (query, of_query), (key, of_key) = (
        scaled_to_one(kernel.astype(compute_dtype(kernel)), (-3, -1)) for kernel in (query, key)
    )
    core = product_core(jnp.swapaxes(query, -3, -2), jnp.moveaxis(key, -3, -1))
    return singular_values(core), of_query * of_key


def product_core(first: jax.Array, second: jax.Array) -> jax.Array:
    """A matrix with the singular values of `first @ second`, as small as possible."""
    dtype = jnp.promote_types(compute_dtype(first), compute_dtype(second))
    first, second = (sharding.replicate(x.astype(dtype)) for x in (first, second))
    if first.shape[-1] < min(first.shape[-2], second.shape[-1]):
        first = triangular_factor(first)
        second = _conjugate_transpose(triangular_factor(_conjugate_transpose(second)))
    return jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)


def _conjugate_transpose(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))
