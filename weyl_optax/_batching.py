"""Small problems of many leaves, in one call."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from weyl_optax import _sharding

Problem = tuple[jax.Array, ...]  # arrays of shape (*batch, ...)


def map_batched(
    fn: Callable[..., Problem], problems: Sequence[Problem], num_batch_axes: Sequence[int]
) -> list[Problem]:
    """Calls `fn`, which takes and gives arrays of shape (b, ...), on the arrays of every leaf.

    Problems so small would leave a device idle, and be compiled one by one: all of one type are
    one call. They are joined along a new axis, so that a sharded batch axis stays where it is.
    """
    # Shape, dtype, sharding, and over which manual mesh axes it varies.
    kinds = [
        (rank, *map(jax.typeof, problem))
        for problem, rank in zip(problems, num_batch_axes, strict=True)
    ]
    results: list[Problem] = [()] * len(problems)
    for kind in dict.fromkeys(kinds):
        rank = kind[0]
        places = [i for i, other in enumerate(kinds) if other == kind]
        joined = [
            jnp.stack(parts, axis=rank)
            for parts in zip(*(problems[i] for i in places), strict=True)
        ]
        batch = joined[0].shape[: rank + 1]
        outputs = fn(*(_sharding.merge_axes(x, rank + 1) for x in joined))
        outputs = [y.reshape(*batch, *y.shape[1:]) for y in outputs]
        for position, i in enumerate(places):
            results[i] = tuple(y[(slice(None),) * rank + (position,)] for y in outputs)
    return results
