"""Where the state of an optimizer lies on the devices."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def state_shardings(
    optimizer: optax.GradientTransformation, params: optax.Params
) -> optax.OptState:
    """Where the state of an optimizer should lie, given where its params do.

    A moment lies as its param. What the bound keeps of a matrix is divided among devices by those
    axes of the param that it has: an array of norms by the batch axes; a block of vectors by the
    batch axes, and by the axes of the shorter side.

    On a mesh with automatic axes nothing else says so: :func:`jax.jit` puts a whole copy of what
    ``init`` returns on every device.

    Args:
        optimizer: Any transformation, with the bound in it or not.
        params: A tree of arrays, or of :class:`jax.ShapeDtypeStruct`, with a
            :class:`jax.sharding.NamedSharding` each. One that has none is on all devices.

    Returns:
        A tree like the state, with a :class:`jax.sharding.NamedSharding` for each leaf, whose
        ``spec`` is the partition: for ``out_shardings``, of ``jax.jit(optimizer.init)`` and of a
        training step.

    Raises:
        ValueError: If the params lie on no mesh, or on several.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> from weyl_optax import adamw2, state_shardings
        >>> mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:2])
        >>> params = {"w": jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, P("fsdp")))}
        >>> solver = adamw2(1e-2)
        >>> shardings = state_shardings(solver, params)
        >>> state = jax.jit(solver.init, out_shardings=shardings)(params)
        >>> tuple(state[0].mu["w"].sharding.spec), tuple(state[1].weight_block["w"].sharding.spec)
        (('fsdp', None), ('fsdp', None))
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    if len(meshes) != 1:
        raise ValueError(
            f"The params lie on {len(meshes) or 'no'} meshes. Place them on one, as "
            "jax.device_put(params, shardings), with a jax.sharding.NamedSharding each; or pass "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...) in their place."
        )
    (mesh,) = meshes
    # Were all axes explicit, the types of what `init` returns would say where it lies.
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(explicit, spec))

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(optimizer.init, jax.tree.map(typed, params))
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, P() if leaf.sharding is None else leaf.sharding.spec),
        state,
    )
