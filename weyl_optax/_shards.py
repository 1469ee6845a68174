"""The shards of a leaf inside of a `shard_map`, where every device sees its own alone.

What is summed over a divided axis is summed over the devices among which it is divided, too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

Names = tuple[str, ...]  # mesh axes


def divisors(partition: PartitionSpec | None, rank: int) -> tuple[Names, ...]:
    """The manual mesh axes that divide each axis of a leaf: none outside of a `shard_map`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    entries = [*(partition or ()), *[None] * rank][:rank]
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return tuple(tuple(name for name in entry if name in manual) for entry in names)


def count(names: Names) -> int:
    """The number of shards along some mesh axes."""
    return lax.axis_size(names) if names else 1


def total(x: jax.Array, names: Names) -> jax.Array:
    """The sum over the shards."""
    return lax.psum(x, names) if names else x


def largest(x: jax.Array, names: Names) -> jax.Array:
    """The largest of the shards, entry by entry."""
    return lax.pmax(x, names) if names else x


def own(x: jax.Array, names: Sequence[Names]) -> jax.Array:
    """This device's shard of an array that is whole on all, by the mesh axes of its axes."""
    for axis, divisor in enumerate(names):
        if divisor:
            size = x.shape[axis] // count(divisor)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(divisor) * size, size, axis)
    return x


def local(places: np.ndarray, size: int, names: Names) -> np.ndarray | jax.Array:
    """Places on an axis as places on this device's shard; what it has not is out of bounds."""
    if not names:
        return places
    places_here = places - lax.axis_index(names) * size
    return jnp.where(places_here < 0, size, places_here)  # a negative index counts from the end


def whole(x: jax.Array, names: Sequence[Names]) -> jax.Array:
    """The array of which every device has a shard, by the mesh axes of its axes."""
    for axis, divisor in enumerate(names):
        if divisor:
            size = x.shape[axis]
            shape = [*x.shape[:axis], size * count(divisor), *x.shape[axis + 1 :]]
            start = lax.axis_index(divisor) * size
            x = lax.dynamic_update_slice_in_dim(lax.full_like(x, 0, shape=shape), x, start, axis)
            x = lax.psum(x, divisor)  # the same on all devices, in its type too
    return x
