"""How the arrays of the bound are sharded over a mesh.

On explicit axes, JAX must be told how each result is sharded. The bound's arrays have some of a
leaf's axes, and are sharded like these. On automatic axes the compiler decides.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def of_axes(a: Any, axes: Sequence[int | None]) -> NamedSharding | None:
    """The sharding of an array whose axes are these axes of `a`; None is an unsharded axis.

    Returns None on a mesh without explicit axes.
    """
    if not isinstance(a, jax.Array):
        return None  # only a shape, or a NumPy array
    sharding = jax.typeof(a).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = [None if axis is None else sharding.spec[axis] for axis in axes]
    return NamedSharding(sharding.mesh, P(*spec))


def zeros_of(a: jax.Array, type_: Any) -> jax.Array | None:
    """Zeros of the type that `jax.eval_shape` gives for `a`, sharded as it says; None for None."""
    if type_ is None:
        return None
    explicit = None if of_axes(a, []) is None else type_.sharding
    return vary_as(a, jnp.zeros(type_.shape, type_.dtype, out_sharding=explicit))


def vary_as(a: Any, x: jax.Array) -> jax.Array:
    """`x`, varying over the manual axes of a `shard_map` as `a` does: as its sum with a zero."""
    return x + lax.full_like(a, 0, x.dtype, ()) if isinstance(a, Tracer) else x


def reshard_as(a: Any, x: jax.Array, axes: Sequence[int | None]) -> jax.Array:
    """`x`, with its first axes sharded like these axes of `a`, and the rest not sharded."""
    sharding = of_axes(a, [*axes, *[None] * (x.ndim - len(axes))])
    if sharding is None:
        return x
    if isinstance(x, Tracer) or isinstance(a, Tracer):
        return jax.sharding.reshard(x, sharding)
    # Eagerly, `x` may be on one device, and no mesh may be set: use the mesh of `a`.
    return jax.device_put(x, NamedSharding(a.sharding.mesh, sharding.spec))


def replicate(x: jax.Array) -> jax.Array:
    """`x`, replicated on every device."""
    return reshard_as(x, x, [None] * x.ndim)
