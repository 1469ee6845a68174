"""Parameter trees of real models, filled with random numbers, and how their leaves are read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import models.gpt
import models.vit
from examples import language, vision
from examples.rivals import is_numbers


class Tree(NamedTuple):
    """Shapes of parameters, and the matrices in them."""

    shapes: Any  # of jax.ShapeDtypeStruct
    numbers: Any  # of MuonDimensionNumbers, like the shapes


def fill(tree: Tree, seed: int) -> Any:
    """Parameters or gradients: normal numbers, scaled as a weight of the last two axes."""
    rng = np.random.default_rng(seed)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        deviation = sum(shape.shape[-2:]) ** -0.5
        return jax.device_put(rng.standard_normal(shape.shape, np.float32) * np.float32(deviation))

    return jax.tree.map(draw, tree.shapes)


def of_model(make: Callable[[], Any], numbers_of: Callable[[Any], Any]) -> Tree:
    """That of the model that `make` would make, read by `numbers_of`."""
    model = nnx.eval_shape(make)
    params = nnx.state(model, nnx.Param)
    return Tree(nnx.to_pure_dict(params), nnx.to_pure_dict(numbers_of(model)))


def gpt(config: models.gpt.Config) -> Tree:
    """That of a GPT."""
    return of_model(lambda: models.gpt.GPT(config, rngs=nnx.Rngs(0)), language.numbers_of)


def gpt2_small() -> Tree:
    """GPT-2 small, 124 M parameters, its 12 layers stacked."""
    return gpt(models.gpt.CONFIGS["gpt2-small"])


def vit_base() -> Tree:
    """ViT-B/16, 87 M parameters, its 12 layers stacked."""
    config = models.vit.CONFIGS["base"]
    return of_model(lambda: models.vit.ViT(config, rngs=nnx.Rngs(0)), vision.numbers_of)


def llama_7b() -> Tree:
    """The 6.7 B parameters of a Llama of 32 stacked layers; its heads are flat."""
    layers, width, hidden, vocabulary = 32, 4096, 11008, 32000
    dense = MuonDimensionNumbers(1, 2)
    kernels = {
        **{f"attention/{name}": (width, width) for name in ("query", "key", "value", "out")},
        **{f"mlp/{name}": (width, hidden) for name in ("gate", "up")},
        "mlp/down": (hidden, width),
    }
    leaves = {f"blocks/{name}/kernel": ((layers, *shape), dense) for name, shape in kernels.items()}
    leaves |= {
        f"blocks/{name}/scale": ((layers, width), MuonDimensionNumbers((), 1))
        for name in ("attention_norm", "mlp_norm")
    }
    leaves |= {
        "token_embedding/embedding": ((vocabulary, width), MuonDimensionNumbers(0, 1)),
        "head/kernel": ((width, vocabulary), MuonDimensionNumbers(0, 1)),
        "norm/scale": ((width,), MuonDimensionNumbers((), 0)),
    }
    return Tree(
        {name: jax.ShapeDtypeStruct(shape, np.float32) for name, (shape, _) in leaves.items()},
        {name: numbers for name, (_, numbers) in leaves.items()},
    )


def unstacked(tree: Tree) -> Tree:
    """Every layer's leaves by themselves, as a model that does not scan over them has them."""
    (depth,) = {leaf.shape[0] for leaf in jax.tree.leaves(tree.shapes["blocks"])}

    def layer(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    def without_layers(numbers: MuonDimensionNumbers) -> MuonDimensionNumbers:
        reduction, output = (
            tuple(axis - 1 for axis in ((axes,) if isinstance(axes, int) else axes))
            for axes in numbers
        )
        return MuonDimensionNumbers(reduction, output)

    shapes = jax.tree.map(layer, tree.shapes["blocks"])
    numbers = jax.tree.map(without_layers, tree.numbers["blocks"], is_leaf=is_numbers)
    return Tree(
        tree.shapes | {"blocks": {str(i): shapes for i in range(depth)}},
        tree.numbers | {"blocks": {str(i): numbers for i in range(depth)}},
    )


def lora() -> Tree:
    """Adapters of rank 8 on all six weights of GPT-2 small's layers: 144 small leaves."""
    sides = {
        "query": (768, 768),
        "key": (768, 768),
        "value": (768, 768),
        "out": (768, 768),
        "up": (768, 3072),
        "down": (3072, 768),
    }

    def of(make: Callable[[int, int], Any]) -> dict[str, Any]:
        layer = {name: {"a": make(m, 8), "b": make(8, n)} for name, (m, n) in sides.items()}
        return {str(i): layer for i in range(12)}

    return Tree(
        of(lambda m, n: jax.ShapeDtypeStruct((m, n), np.float32)),
        of(lambda m, n: MuonDimensionNumbers(0, 1)),
    )


TREES: Mapping[str, Callable[[], Tree]] = {
    "gpt2-small": gpt2_small,
    "gpt2-small-unstacked": lambda: unstacked(gpt2_small()),
    "vit-base": vit_base,
    "lora": lora,
}


def num_bytes(tree: optax.Params) -> int:
    """The bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
