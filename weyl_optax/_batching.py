"""Small problems of many leaves, in one call."""

from collections.abc import Callable, Hashable, Sequence

import jax
from jax import lax

from weyl_optax import _sharding

Problem = tuple[jax.Array, ...]  # arrays of shape (*batch, s, ...)


def alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """The places of each kind in a list."""
    places: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return list(places.values())


def map_batched(
    fn: Callable[..., Problem], problems: Sequence[Problem], num_batch_axes: Sequence[int]
) -> list[Problem]:
    """Calls `fn`, which takes and gives arrays of shape (b, ...), on the arrays of every stack.

    Problems so small would leave a device idle, and be compiled one by one: all of one type are
    one call. They are joined along the axis of the stack, which follows the batch axes, so that a
    sharded batch axis stays where it is.
    """

    def type_of(x: jax.Array, rank: int) -> Hashable:
        """Shape less the stack, dtype, sharding, and over which manual mesh axes it varies."""
        return jax.typeof(lax.index_in_dim(x, 0, rank, keepdims=False))

    results: list[Problem] = [()] * len(problems)
    for places in alike(
        [
            (rank, *(type_of(x, rank) for x in problem))
            for problem, rank in zip(problems, num_batch_axes, strict=True)
        ]
    ):
        rank = num_batch_axes[places[0]]
        joined = [
            lax.concatenate(parts, rank)
            for parts in zip(*(problems[i] for i in places), strict=True)
        ]
        batch = joined[0].shape[: rank + 1]
        outputs = fn(*(_sharding.merge_axes(x, rank + 1) for x in joined))
        outputs = [y.reshape(*batch, *y.shape[1:]) for y in outputs]
        start = 0
        for i in places:
            end = start + problems[i][0].shape[rank]
            results[i] = tuple(lax.slice_in_dim(y, start, end, axis=rank) for y in outputs)
            start = end
    return results
