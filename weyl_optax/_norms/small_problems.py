"""Decompositions of many small matrices, and the one workaround they need.

On a CPU, jaxlib (0.8 to 0.10, `ParallelBatchMap` of its LAPACK kernels) spreads a large enough
batch over XLA's thread pool, and waits for the parts in one of the pool's own threads. With
few threads, two batches in one program (two groups of an `optax.partition`, say) can then wait
for each other forever. https://github.com/jax-ml/jax/issues/39292 is about the same code.
So a CPU gets one matrix at a time, also under a `vmap`.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from weyl_optax import _sharding as sharding


def together(fn: Callable[[jax.Array], Any], matrices: Sequence[jax.Array]) -> list[Any]:
    """Applies `fn`, which takes (..., m, n) to arrays (..., *), to some arrays (*batch, m, n).

    A CPU takes one matrix after the other; any other device takes all of one kind at once, stacked
    behind the batch axes, which stay where they are.
    """

    def one_by_one(matrices: Sequence[jax.Array]) -> list[Any]:
        one = jax.custom_batching.sequential_vmap(fn)
        return [one(x) if x.ndim == 2 else _mapped(one, x) for x in matrices]

    def at_once(matrices: Sequence[jax.Array]) -> list[Any]:
        kinds: dict[Hashable, list[int]] = {}
        for i, x in enumerate(matrices):
            kinds.setdefault(jax.typeof(x), []).append(i)
        results: list[Any] = [None] * len(matrices)
        for places in kinds.values():
            axis = matrices[places[0]].ndim - 2
            solved = fn(jnp.stack([matrices[i] for i in places], axis))
            for place, i in enumerate(places):
                results[i] = jax.tree.map(
                    lambda y, place=place, axis=axis: lax.index_in_dim(y, place, axis, False),
                    solved,
                )
        return results

    # Behind a barrier, XLA combines the all-reduces of all matrices into one.
    matrices = lax.optimization_barrier(list(matrices))
    return lax.platform_dependent(matrices, cpu=one_by_one, default=at_once)


def _mapped(fn: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    results = lax.map(fn, x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)


def singular_values(x: jax.Array) -> jax.Array:
    """Of matrices (..., m, n), shape (..., min(m, n)), descending."""
    (values,) = together(lambda a: jnp.linalg.svd(a, compute_uv=False), [sharding.replicate(x)])
    return values


def triangular_factor(x: jax.Array) -> jax.Array:
    """R of Q R = A, of matrices (..., m, n) with m at least n, shape (..., n, n)."""
    (factor,) = together(lambda a: jnp.linalg.qr(a, mode="r"), [sharding.replicate(x)])
    return factor
