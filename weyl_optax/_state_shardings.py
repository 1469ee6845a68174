"""How the state of an optimizer is sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def state_shardings(
    optimizer: optax.GradientTransformation, params: optax.Params
) -> optax.OptState:
    """Get the shardings of an optimizer's state from those of its params.

    A moment is sharded like its param. What the bound keeps for a matrix is sharded along the
    param's axes that it has: an array of norms along the batch axes; a block of vectors along the
    batch axes and the axes of the shorter side.

    On a mesh with automatic axes you have to ask for this: by itself, :func:`jax.jit` replicates
    what ``init`` returns on every device.

    Args:
        optimizer: Any transformation, with or without the bound.
        params: A tree of arrays, or of :class:`jax.ShapeDtypeStruct`, with a
            :class:`jax.sharding.NamedSharding` each. One without is replicated.

    Returns:
        A tree like the state, with a :class:`jax.sharding.NamedSharding` for each leaf, whose
        ``spec`` is the partition. Pass it as ``out_shardings`` to jit ``optimizer.init`` or a
        training step.

    Raises:
        ValueError: If the params are on no mesh, or on several.

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
    # With all axes explicit, the types of what `init` returns say how it is sharded.
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
        on_mesh = NamedSharding(explicit, spec)
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=on_mesh)

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(optimizer.init, jax.tree.map(typed, params))
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, P() if leaf.sharding is None else leaf.sharding.spec),
        state,
    )
