"""Decompositions of a batch of matrices that cannot wait for each other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def singular_values(x: jax.Array) -> jax.Array:
    """Of matrices (..., m, n), shape (..., min(m, n)), descending."""
    return _one_by_one(lambda a: jnp.linalg.svd(a, compute_uv=False), x)


def triangular_factor(x: jax.Array) -> jax.Array:
    """R of Q R = A, of matrices (..., m, n) with m at least n, shape (..., n, n)."""
    return _one_by_one(lambda a: jnp.linalg.qr(a, mode="r"), x)


def _one_by_one(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`fn` of a batch, on a CPU by one matrix after the other.

    There, jaxlib spreads a batch over XLA's threads, and waits for them in one of these
    threads: on a few cores, two batches in one program can wait for each other forever.
    """

    def one_by_one(x: jax.Array) -> jax.Array:
        flat = lax.map(fn, x.reshape(-1, *x.shape[-2:]))
        return flat.reshape(*x.shape[:-2], *flat.shape[1:])

    return lax.platform_dependent(x, cpu=one_by_one, default=fn)
