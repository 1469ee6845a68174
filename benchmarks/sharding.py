"""What an optimizer's update moves between devices, and how long it takes to compile."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import models.gpt
from benchmarks import measure, peers, trees
from weyl_optax import state_shardings

# The axes by which the layers of a GPT are divided in tensor parallelism, without the layer axis.
TENSOR_AXES = {
    "query/kernel": 1,
    "key/kernel": 1,
    "value/kernel": 1,
    "query/bias": 0,
    "key/bias": 0,
    "value/bias": 0,
    "out/kernel": 0,
    "up/kernel": 1,
    "up/bias": 0,
    "down/kernel": 0,
    "gate/kernel": 1,
    "token_embedding/embedding": 0,
    "head/kernel": 1,
}


class Layout(NamedTuple):
    """How many devices there are along each mesh axis."""

    fsdp: int = 1
    tensor: int = 1
    layers: int = 1

    def spec(self, name: str, shape: Sequence[int], is_stacked: bool) -> P:
        """The partition of a leaf: its tensor axis, and the largest other one that fsdp divides."""
        axes: list[str | None] = [None] * len(shape)
        if is_stacked and self.layers > 1:
            axes[0] = "layers"
        if self.tensor > 1:
            for ending, axis in TENSOR_AXES.items():
                if name.endswith(ending):
                    axes[axis + is_stacked] = "tensor"
        free = [
            axis
            for axis in range(is_stacked, len(shape))
            if axes[axis] is None and shape[axis] % self.fsdp == 0
        ]
        if self.fsdp > 1 and free and math.prod(shape) >= 2**16:
            axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
        return P(*axes)


LAYOUTS: Mapping[str, Layout] = {
    "fsdp-8": Layout(fsdp=8),
    "tensor-8": Layout(tensor=8),
    "data-4-tensor-2": Layout(fsdp=4, tensor=2),
    "layers-4": Layout(layers=4),
    "fsdp-64": Layout(fsdp=64),
}


def gpt2(name: str, **changes: Any) -> trees.Tree:
    """A GPT-2 with 16 heads and a padded vocabulary, which eight devices divide."""
    config = dataclasses.replace(
        models.gpt.CONFIGS[name], num_heads=16, pad_vocab_to_multiple_of=64, **changes
    )
    return trees.gpt(config)


MODELS: Mapping[str, Callable[[], trees.Tree]] = {
    "gpt2-small": lambda: gpt2("gpt2-small"),
    "gpt2-small-unstacked": lambda: trees.unstacked(gpt2("gpt2-small")),
    "gpt2-large": lambda: gpt2("gpt2-large"),
    "llama-7b": trees.llama_7b,
}

ModelName: TypeAlias = Literal[*MODELS]
LayoutName: TypeAlias = Literal[*LAYOUTS]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compile an update for many devices, and count what it moves and what it takes."""

    models: tuple[ModelName, ...] = ("gpt2-small",)
    """Parameter trees."""
    layouts: tuple[LayoutName, ...] = ("fsdp-8", "tensor-8", "data-4-tensor-2", "layers-4")
    """How the weights lie on the devices."""
    optimizers: tuple[peers.Name, ...] = (
        "optax.adamw",
        "adamw2",
        "optax.lamb",
        "optax.contrib.muon",
    )
    """Optimizers; muon takes a minute to compile."""
    topology: str | None = None
    """A TPU to compile for, as v5e:2x4; that needs the package libtpu, and no TPU. By default,
    virtual devices of the CPU."""
    out: Path = Path("runs/benchmarks/sharding.json")
    """The file for the table."""


def place(shapes: Any, layout: Layout, devices: Sequence[Any]) -> Any:
    """Shapes with the shardings of a layout."""
    devices = devices[: math.prod(layout)]
    mesh = Mesh(np.array(devices).reshape(layout), Layout._fields)

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_stacked = re.search(r"\bblocks/\D", name) is not None
        spec = layout.spec(name, leaf.shape, is_stacked)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map_with_path(placed, shapes)


def placed_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The shapes of the state of an optimizer of placed params, placed as these."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, params),
        state_shardings(optimizer, params),
    )


def compile_update(optimizer: optax.GradientTransformation, params: Any, state: Any) -> Any:
    """The program of one jitted, donated update, whose results lie as its arguments."""
    outputs = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    update = jax.jit(optimizer.update, donate_argnums=1, out_shardings=outputs)
    return update.lower(params, state, params).compile()


class Collective(NamedTuple):
    """An operation between devices, and what it gives."""

    name: str
    sizes: tuple[int, ...]  # entries of each array
    num_bytes: int


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(program: str) -> list[Collective]:
    """Those of a compiled program.

    What a TPU overlaps with other work is in the program in several pieces, of one channel.
    """
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found: dict[Any, Collective] = {}
    for outputs, name, line in re.findall(rf"= (.*?) ({names})(?:-start)?\((.*)", program):
        dtypes, shapes = zip(*re.findall(r"(\w+)\[([\d,]*)\]", outputs), strict=True)
        sizes = tuple(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
        num_bytes = sum(_BYTES[dtype] * size for dtype, size in zip(dtypes, sizes, strict=True))
        channel = re.search(r"channel_id=\d+", line)
        key = channel[0] if channel else len(found)
        found.setdefault(key, Collective(name, sizes, num_bytes))
    return list(found.values())


def largest(moved: Sequence[Collective]) -> int:
    """The entries of the largest array that some collectives give."""
    return max((max(collective.sizes) for collective in moved), default=0)


def measure_layout(model: ModelName, name: LayoutName, flags: Flags) -> list[dict[str, Any]]:
    """The rows of a model and a layout."""
    devices: Sequence[Any] = jax.devices()
    if flags.topology is not None:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology).devices
    tree = MODELS[model]()
    params = place(tree.shapes, LAYOUTS[name], devices)
    rows = []
    for optimizer in flags.optimizers:
        transformation = peers.OPTIMIZERS[optimizer](tree.numbers)
        state = placed_state(transformation, params)
        start = time.process_time()  # of all threads: what else runs does not count
        program = compile_update(transformation, params, state)
        seconds = time.process_time() - start
        moved, memory = collectives(program.as_text()), program.memory_analysis()
        rows.append(
            {
                "model": model,
                "layout": name,
                "optimizer": optimizer,
                "collectives": len(moved),
                "MB": sum(collective.num_bytes for collective in moved) / 1e6,
                "largest array": largest(moved),
                # On each device: params, gradients and state; and what else an update takes.
                "arrays MB": memory.argument_size_in_bytes / 1e6,
                "temporary MB": memory.temp_size_in_bytes / 1e6,
                "accessed MB": program.cost_analysis()["bytes accessed"] / 1e6,
                "compile s": seconds,
                "code MB": memory.generated_code_size_in_bytes / 1e6,
            }
        )
    return rows


def main(flags: Flags) -> None:
    """Prints the table."""
    jax.config.update("jax_enable_compilation_cache", False)  # its time is measured
    jax.config.update(
        "jax_num_cpu_devices", max(math.prod(LAYOUTS[name]) for name in flags.layouts)
    )
    rows = [
        row
        for model in flags.models
        for name in flags.layouts
        for row in measure_layout(model, name, flags)
    ]
    measure.report(rows, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
