import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_layers import (
    attention,
    block_of,
    exact_gelu,
    forward,
    layer_norm,
    linear,
    lines_traced,
    mlp,
    parameters,
    random_model,
    rms_norm,
)

from models.layers import StochasticDepth
from models.vit import CONFIGS, Config, ViT

TINY = Config(
    image_size=6,
    num_channels=2,
    patch_size=3,
    num_classes=5,
    num_layers=3,
    num_heads=2,
    width=8,
    mlp_width=12,
)


def build(config=TINY, seed=0):
    return ViT(config, rngs=nnx.Rngs(seed))


def images(batch=4):
    return jax.random.normal(jax.random.key(0), (batch, 6, 6, 2))


def numpy_forward(model, images):
    """ViT, a patch and a block at a time, in float64."""
    p, config = parameters(model), model.config
    norm = {"layer": layer_norm, "rms": rms_norm}[config.norm]
    size = config.patch_size
    patches = [
        np.tensordot(images[:, i : i + size, j : j + size], p["patch_embedding"]["kernel"], 3)
        for i in range(0, config.image_size, size)
        for j in range(0, config.image_size, size)
    ]
    x = np.stack(patches, axis=1) + p["patch_embedding"]["bias"]
    if config.pool == "class":
        x = np.concatenate([np.tile(p["class_token"], (len(x), 1, 1)), x], axis=1)
    x = x + p["position_embedding"]
    for layer in range(config.num_layers):
        block = block_of(p["blocks"], layer)
        x = x + attention(norm(x, block["attention_norm"], 1e-6), block["attention"], True)
        x = x + mlp(norm(x, block["mlp_norm"], 1e-6), block["mlp"], exact_gelu)
    x = norm(x, p["norm"], 1e-6)
    return linear(x[:, 0] if config.pool == "class" else x.mean(1), p["head"])


@pytest.mark.parametrize(("norm", "pool"), [("layer", "mean"), ("rms", "class")])
def test_equals_vit_in_numpy(norm, pool):
    model = random_model(ViT, dataclasses.replace(TINY, norm=norm, pool=pool, remat=norm == "rms"))
    logits = forward(model, images())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, numpy_forward(model, np.asarray(images())), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [("tiny", 5_717_416), ("base", 86_567_656), ("large", 304_326_632), ("giant", 1_012_611_432)],
)
def test_has_the_published_number_of_parameters(name, count):
    model = nnx.eval_shape(lambda: ViT(CONFIGS[name], rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_rms_norm_has_no_beta():
    blocks = parameters(random_model(ViT, dataclasses.replace(TINY, norm="rms")))["blocks"]
    assert list(blocks["attention_norm"]) == list(blocks["mlp_norm"]) == ["scale"]


def test_initial_weights_are_truncated_xavier():
    model = build(dataclasses.replace(TINY, width=96, mlp_width=384, num_heads=3, num_layers=4))
    for kernel, fans in (
        (model.blocks.attention.query.kernel, 96 + 96),
        (model.blocks.attention.out.kernel, 96 + 96),
        (model.blocks.mlp.up.kernel, 96 + 384),
        (model.patch_embedding.kernel, 3 * 3 * 2 + 96),
    ):
        std = math.sqrt(2 / fans)
        np.testing.assert_allclose(np.std(kernel[...]), std, rtol=0.05)
        assert np.abs(kernel[...]).max() < 2.3 * std  # two deviations of the one not truncated
    first, second = model.blocks.mlp.up.kernel[0], model.blocks.mlp.up.kernel[1]
    assert np.abs(first - second).max() > 0.01  # each layer has its own


def test_stochastic_depth_leaves_out_whole_images_and_keeps_the_mean():
    layer = StochasticDepth(0.4, rngs=nnx.Rngs(0))
    branch = jnp.ones((4000, 2, 3))
    for depth in (0.0, 0.5, 1.0):
        y = np.asarray(layer(branch, jnp.array(depth)))
        assert (y == y[:, :1, :1]).all()
        kept = 1 - 0.4 * depth
        np.testing.assert_allclose(np.unique(y)[-1], 1 / kept, rtol=1e-6)
        np.testing.assert_allclose(np.mean(y[:, 0, 0] > 0), kept, atol=0.03)
    layer.deterministic = True
    np.testing.assert_array_equal(layer(branch, jnp.array(1.0)), branch)


def test_stochastic_depth_is_random_in_training_and_off_in_evaluation():
    model = random_model(ViT, dataclasses.replace(TINY, stochastic_depth=0.9))
    assert np.abs(forward(model, images()) - forward(model, images())).max() > 1e-3
    model.eval()
    np.testing.assert_allclose(
        forward(model, images()), numpy_forward(model, np.asarray(images())), atol=1e-4
    )


def test_blocks_are_traced_once_whatever_the_depth():
    shallow, deep = (
        lines_traced(ViT, dataclasses.replace(TINY, num_layers=depth), images) for depth in (2, 20)
    )
    assert shallow == deep > 10


def test_images_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"\(1, 6, 6, 3\), not \(batch, 6, 6, 2\)"):
        random_model(ViT, TINY)(jnp.zeros((1, 6, 6, 3)))


def test_patches_that_do_not_divide_the_image_are_an_error():
    with pytest.raises(ValueError, match="patch_size=4 does not divide image_size=6"):
        build(dataclasses.replace(TINY, patch_size=4))
