"""Where arrays lie: a mesh of devices, and the shardings of a model and its batches on it."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
ROWS = P(AXES)  # of a batch, over all devices
SMALL = 4096  # a leaf with fewer entries in a layer is replicated

T = TypeVar("T")
Model = TypeVar("Model", bound=nnx.Module)


def make_mesh(axes: str | None, rows: int) -> Mesh:
    """A mesh over data and fsdp.

    Args:
        axes: Its sizes, as `data=2,fsdp=4`; an axis that is not named has size 1. By default,
            all devices are along data. If there is one process, they may be fewer: the
            greatest number that divides `rows`.
        rows: What is to be divided among the devices.

    Raises:
        ValueError: If the axes are not all devices, or do not divide the rows.
    """
    devices = jax.devices()
    sizes = {"data": len(devices)} if axes is None else _parse(axes)
    if axes is None and jax.process_count() == 1:
        sizes["data"] = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
        devices = devices[: sizes["data"]]
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    size, flag = math.prod(shape), f"--mesh {axes}" if axes else "--mesh"
    if size != len(devices):
        raise ValueError(
            f"{flag}: {size} devices, but there are {len(devices)}. Write sizes whose product is "
            f"{len(devices)}, as data={len(devices)} or fsdp={len(devices)}."
        )
    if rows % size:
        raise ValueError(
            f"{flag}: {size} devices do not divide the {rows} examples that are computed at once, "
            f"--batch / --accumulate. Make them a multiple of {size}."
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=devices)


def _parse(axes: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in axes.split(",")]
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names) or not all(
        name in AXES and size.isdecimal() and int(size) > 0 for name, _, size in pairs
    ):
        raise ValueError(f"--mesh {axes}: write data=N, fsdp=N or data=N,fsdp=M.")
    return {name: int(size) for name, _, size in pairs}


def leaf_sharding(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a leaf of a model lies: along fsdp by its largest axis that can be divided.

    The first axis of a leaf under `blocks` counts the layers, and is not divided: each
    layer is gathered when it is computed. A small leaf is replicated.
    """
    first = any(getattr(key, "key", None) == "blocks" for key in path)
    size = mesh.shape["fsdp"]
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % size == 0]
    if not axes or math.prod(shape[first:]) < SMALL:
        return NamedSharding(mesh, P())
    axis = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))


def place_model(model: Model, mesh: Mesh) -> Model:
    """The model with every leaf where it lies."""
    graph, state = nnx.split(model)
    state = nnx.as_pure(state)
    shardings = jax.tree.map_with_path(lambda path, x: leaf_sharding(path, x.shape, mesh), state)
    return nnx.merge(graph, jax.jit(lambda x: x, out_shardings=shardings)(state))


def spread_rows(function: Callable[[Any, Any], T], mesh: Mesh) -> Callable[[Any, Any], T]:
    """A function of a model and a batch, with the rows of activations over all devices.

    So the compiler gathers the weights of a block where it computes it, which is what fsdp means;
    those that are in no block are gathered first. Left alone, it divides the features of the
    activations as the weights are divided, in place of their rows.
    """
    everywhere = NamedSharding(mesh, P())

    @functools.wraps(function)
    def spread(model: Any, batch: Any) -> T:
        rest = nnx.state(model, nnx.All(nnx.Param, lambda path, _: "blocks" not in path))
        nnx.update(model, jax.lax.with_sharding_constraint(rest, everywhere))
        owners = [module for _, module in nnx.iter_modules(model) if hasattr(module, "blocks")]
        for owner in owners:
            owner.blocks = _SpreadRows(owner.blocks, NamedSharding(mesh, ROWS))
        result = function(model, batch)
        for owner in owners:
            owner.blocks = owner.blocks.inner
        return result

    return spread


class _SpreadRows(nnx.Module):
    """Blocks, or one of them, with the rows of their input and output over all devices."""

    def __init__(self, blocks: nnx.Module, sharding: NamedSharding):
        self.inner, self.sharding = blocks, sharding

    def __call__(self, x: jax.Array, *inputs: jax.Array) -> jax.Array:
        x = self.inner(jax.lax.with_sharding_constraint(x, self.sharding), *inputs)
        return jax.lax.with_sharding_constraint(x, self.sharding)


def place_batch(batch: Any, mesh: Mesh, spec: P) -> Any:
    """A batch on the devices, from the rows that each process has of it."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
