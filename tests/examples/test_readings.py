"""The leaves of the models are read as the matrices of their layers, at every size."""

import jax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import models.gpt
from examples import language, vision
from models.gpt import GPT
from models.swin import Swin
from models.vit import ViT

# By the end of a path, without the axis of the layers; the first that fits counts.
LAYERS = {
    "query/kernel": ((0,), (1, 2)),
    "key/kernel": ((0,), (1, 2)),
    "value/kernel": ((0,), (1, 2)),
    "query/bias": ((), (0, 1)),
    "key/bias": ((), (0, 1)),
    "value/bias": ((), (0, 1)),
    "out/kernel": ((0, 1), (2,)),
    "patch_embedding/kernel": ((0, 1, 2), (3,)),
    "attention/convolution/kernel": ((), (0, 1, 2)),
    "kernel": ((0,), (1,)),
    "embedding": ((0,), (1,)),
    "relative_position_bias": ((0,), (1,)),
    "bias": ((), (0,)),
    "scale": ((), (0,)),
    "class_token": ((), (0,)),
}


def expected(path):
    numbers = next(numbers for end, numbers in LAYERS.items() if path.endswith(end))
    is_stacked = "blocks/" in path
    return tuple(tuple(axis + is_stacked for axis in axes) for axes in numbers)


def assert_read(model, numbers):
    leaves = jax.tree.leaves_with_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    entries = jax.tree.leaves(numbers, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers))
    for (path, leaf), entry in zip(leaves, entries, strict=True):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = (axes if isinstance(axes, tuple) else (axes,) for axes in entry)
        assert tuple(tuple(a % leaf.ndim for a in side) for side in axes) == expected(path), path


@pytest.mark.parametrize("name", models.gpt.CONFIGS)
def test_gpt(name):
    model = nnx.eval_shape(lambda: GPT(models.gpt.CONFIGS[name], rngs=nnx.Rngs(0)))
    assert_read(model, language.numbers_of(model))


@pytest.mark.parametrize("name", vision.SIZES)
def test_vit_and_swin(name):
    kind = ViT if name.startswith("vit-") else Swin
    model = nnx.eval_shape(lambda: kind(vision.SIZES[name], rngs=nnx.Rngs(0)))
    assert_read(model, vision.numbers_of(model))
