"""The small problem of a block iteration: what a block of vectors tells of the largest norm."""

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax._jacobi import eigh


def rayleigh_ritz(
    num_vectors: int, factor: jax.Array, gram_r: jax.Array, gram_z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The Rayleigh-Ritz step of a block.

    With :math:`R^H R = Q S^2 Q^H`, the columns of :math:`R Q S^{-1}` are an
    orthonormal basis of the span of :math:`R`, and :math:`Y = Z Q S^{-1}` is
    :math:`A^H` on it. With :math:`Y^H Y = P T^2 P^H`, the largest :math:`\|A^H x\|`
    of a unit vector :math:`x` in that span is :math:`T_1`, and the next block is
    :math:`Y P T^{-1}`, again orthonormal, less its least vectors. A direction of :math:`R` that
    depends on others, :math:`S_i = 0`, gives no vector.

    Args:
        num_vectors: Of the next block, at most k.
        factor: By which :math:`Z` was divided, shape (b,).
        gram_r: :math:`R^H R`, shape (b, k, k).
        gram_z: :math:`Z^H Z`, shape (b, k, k).

    Returns:
        :math:`T_1` of the undivided :math:`A`, shape (b,), NaN if something is not finite;
        `rotation`, shape (b, k, num_vectors): the next block is `Z rotation`, the vector of
        :math:`T_1` last; and which of its vectors are nonzero, shape (b, num_vectors): the last
        ones.
    """
    k, eps = gram_r.shape[-1], jnp.finfo(gram_r.dtype).eps
    finite = jnp.isfinite(factor) & jnp.isfinite(gram_z).all((-1, -2))
    gram_r, gram_z = (  # the matrices last, as the vectorized axis
        jnp.moveaxis(jnp.where(finite[:, None, None], x, 0), 0, -1) for x in (gram_r, gram_z)
    )
    s2, q = eigh(gram_r)
    nonzero = s2 > 4 * k * eps * s2[-1:]  # what is smaller is rounding
    basis = q * _inverse_root(s2, nonzero).astype(q.dtype)[None]
    gram_y = _product(jnp.conj(jnp.swapaxes(basis, 0, 1)), _product(gram_z, basis))
    # A direction that gives no vector comes first here too.
    trace = jnp.sum(jnp.real(jnp.diagonal(gram_y)), axis=-1)
    first = jnp.where(nonzero, 0, -1 - trace[None]).astype(gram_y.dtype)
    t2, p = eigh(gram_y + jnp.eye(k, dtype=gram_y.dtype)[..., None] * first[None])
    t2 = jnp.maximum(t2, eps * t2[-1:])
    largest = jnp.sqrt(jnp.where(nonzero[-1], t2[-1], 0))
    sigma = jnp.where(finite, factor * largest, jnp.nan)
    t2, p, nonzero = t2[-num_vectors:], p[:, -num_vectors:], nonzero[-num_vectors:]
    rotation = _product(basis, p) * _inverse_root(t2, nonzero).astype(p.dtype)[None]
    return sigma, jnp.moveaxis(rotation, -1, 0), nonzero.T


def _inverse_root(squares: jax.Array, nonzero: jax.Array) -> jax.Array:
    """1 / sqrt(x), and 0 for what is zero."""
    return jnp.where(nonzero, lax.rsqrt(jnp.where(nonzero, squares, 1)), 0)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """X Y of b matrices, (k, k, b) and (k, n, b), in the precision of the entries everywhere."""
    return jnp.sum(x[:, :, None] * y[None], axis=1)
