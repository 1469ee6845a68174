"""Decompositions of batches of small matrices, and the one workaround that they need.

On a CPU, jaxlib (0.8 to 0.10, `ParallelBatchMap` of its LAPACK kernels) spreads a batch that is
worth it over XLA's thread pool, and waits for the parts in one of the pool's own threads. With
few threads, two batches in one program (two groups of an `optax.partition`, say) can then wait
for each other forever. https://github.com/jax-ml/jax/issues/39292 is about the same code.
So a CPU is given its batches in parts that are small enough to stay in one thread.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ONE_THREAD = 2**14  # operations, as b n^3, of a batch (b, n, n) that jaxlib leaves in one thread


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of Hermitian matrices (b, n, n)."""
    fn = functools.partial(jnp.linalg.eigh, symmetrize_input=False)
    return _in_parts(lambda x: tuple(fn(x)), x, ONE_THREAD // x.shape[-1] ** 3)


def eigvalsh(x: jax.Array) -> jax.Array:
    """Eigenvalues, ascending, of Hermitian matrices (b, n, n)."""
    fn = functools.partial(jnp.linalg.eigvalsh, symmetrize_input=False)
    return _in_parts(fn, x, ONE_THREAD // x.shape[-1] ** 3)


def singular_values(x: jax.Array) -> jax.Array:
    """Of matrices (..., m, n), shape (..., min(m, n)), descending."""
    return _batched(lambda a: jnp.linalg.svd(a, compute_uv=False), x)


def triangular_factor(x: jax.Array) -> jax.Array:
    """R of Q R = A, of matrices (..., m, n) with m at least n, shape (..., n, n)."""
    return _batched(lambda a: jnp.linalg.qr(a, mode="r"), x)


def _batched(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    flat = _in_parts(fn, x.reshape(-1, *x.shape[-2:]), 1)
    return flat.reshape(*x.shape[:-2], *flat.shape[1:])


def _in_parts(fn: Callable[[jax.Array], Any], x: jax.Array, size: int) -> Any:
    """`fn` of a batch (b, m, n), on a CPU of parts of at most `size`."""

    def in_parts(x: jax.Array) -> Any:
        return fn(x) if len(x) <= size else lax.map(fn, x, batch_size=size)

    return lax.platform_dependent(x, cpu=in_parts, default=fn)
