"""Where the arrays of the bound lie on the devices of a mesh.

On explicit axes, JAX wants to be told how each result is sharded. The bound's arrays have some of a
leaf's axes, and lie on the devices as these do. On automatic axes the compiler decides; all that it
is told is that moments lie as their params.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from weyl_optax import _shards


def of_axes(a: Any, axes: Sequence[int | None]) -> NamedSharding | None:
    """The sharding of an array whose axes are these axes of `a`; None is an unsharded axis.

    None in a mesh without explicit axes.
    """
    if not isinstance(a, jax.Array):
        return None  # a shape alone, or an array of NumPy
    sharding = jax.typeof(a).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = [None if axis is None else sharding.spec[axis] for axis in axes]
    return NamedSharding(sharding.mesh, P(*spec))


def zeros(a: Any, shape: Sequence[int], dtype: Any, summed: _shards.Names) -> jax.Array:
    """Zeros that vary over the manual axes of a `shard_map` as a sum of `a` over some of them."""
    if isinstance(a, Tracer):
        return _shards.total(lax.full_like(a, 0, dtype, shape), summed)
    return jnp.zeros(shape, dtype)


def reshard_as(a: Any, x: jax.Array, axes: Sequence[int | None]) -> jax.Array:
    """`x`, laid as the axes of `a` that it begins with; the rest of its axes are not sharded."""
    sharding = of_axes(a, [*axes, *[None] * (x.ndim - len(axes))])
    if sharding is None:
        return x
    if isinstance(x, Tracer) or isinstance(a, Tracer):
        return jax.sharding.reshard(x, sharding)
    # Eagerly, `x` may lie on one device, and no mesh may be set: that of `a` is meant.
    return jax.device_put(x, NamedSharding(a.sharding.mesh, sharding.spec))


def merge_axes(x: jax.Array, num_axes: int) -> jax.Array:
    """The first axes of `x` as one. The first of them may be sharded, the others are gathered."""
    shape = (-1, *x.shape[num_axes:])
    sharding = of_axes(x, [0, *[None] * (x.ndim - 1)])
    if sharding is None:
        return x.reshape(shape)
    merged = of_axes(x, [0, *[None] * (x.ndim - num_axes)])
    return jnp.reshape(jax.sharding.reshard(x, sharding), shape, out_sharding=merged)


def replicate(x: jax.Array) -> jax.Array:
    """`x` on every device."""
    return reshard_as(x, x, [None] * x.ndim)


def shard_alike(tree: Any, other: Any) -> Any:
    """A tree like another, each leaf divided as the compiler divides that of the other.

    It divides alike what an operation takes and what it gives: here a choice between the two, whose
    outcome the compiler does not know. (JAX's own `shard_alike` numbers its pairs anew each time,
    so that no cache of compiled programs finds one again.)
    """

    def alike(x: Any, y: Any) -> Any:
        if not isinstance(y, Tracer):
            return x
        never = lax.optimization_barrier(jnp.zeros([], bool))
        return jnp.where(never, y.astype(x.dtype), x)

    return jax.tree.map(alike, tree, other)
