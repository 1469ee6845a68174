"""Decompositions of batches of small matrices, and the one workaround that they need.

On a CPU, jaxlib (0.8 to 0.10, `ParallelBatchMap` of its LAPACK kernels) spreads a batch that is
worth it over XLA's thread pool, and waits for the parts in one of the pool's own threads. With
few threads, two batches in one program (two groups of an `optax.partition`, say) can then wait
for each other forever. https://github.com/jax-ml/jax/issues/39292 is about the same code.
So a CPU is given one matrix at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax import _sharding


def singular_values(x: jax.Array) -> jax.Array:
    """Of matrices (..., m, n), shape (..., min(m, n)), descending."""
    return _batched(lambda a: jnp.linalg.svd(a, compute_uv=False), x)


def triangular_factor(x: jax.Array) -> jax.Array:
    """R of Q R = A, of matrices (..., m, n) with m at least n, shape (..., n, n)."""
    return _batched(lambda a: jnp.linalg.qr(a, mode="r"), x)


def _batched(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`fn` of a batch (b, m, n), on a CPU of one matrix after the other.

    On explicit axes every device has all of it: LAPACK takes no part of a matrix.
    """
    flat = _sharding.replicate(x).reshape(-1, *x.shape[-2:])
    results = lax.platform_dependent(flat, cpu=lambda x: lax.map(fn, x), default=fn)
    return results.reshape(*x.shape[:-2], *results.shape[1:])
