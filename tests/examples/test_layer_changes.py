"""What a step changes in each layer, against the layer by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.layer_changes import layer_representation_changes
from models.gpt import GPT, Config


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 8, rngs=rngs, bias_init=nnx.initializers.ones)
        self.layers = nnx.List([nnx.LinearGeneral(8, (2, 4), rngs=rngs)])
        self.conv = nnx.Conv(4, 3, (2,), use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        hidden = jnp.tanh(self.up(x))
        return self.norm(self.conv(self.layers[0](hidden)))


def updates_of(model):
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def call(model, x):
    return model(x)


def norm(x):
    return np.linalg.norm(np.asarray(x, float).ravel())


def test_layers_of_several_kinds():
    model = Net(nnx.Rngs(0))
    updates = updates_of(model)
    x = jax.random.normal(jax.random.key(2), (6, 5))
    found = layer_representation_changes(model, updates, x, call)
    assert set(found) == {"up", "layers/0", "conv"}
    change, kernel = updates["up"]["kernel"], model.up.kernel[...]
    np.testing.assert_allclose(found["up"], norm(x @ change) / norm(x @ kernel), rtol=1e-5)
    hidden = jnp.tanh(model.up(x))
    change, kernel = updates["layers"][0]["kernel"], model.layers[0].kernel[...]
    np.testing.assert_allclose(
        found["layers/0"],
        norm(np.einsum("bi,ijk->bjk", hidden, change))
        / norm(np.einsum("bi,ijk->bjk", hidden, kernel)),
        rtol=1e-5,
    )
    inputs = model.layers[0](hidden)
    before, step = nnx.clone(model.conv), nnx.clone(model.conv)
    step.kernel[...] = updates["conv"]["kernel"]
    np.testing.assert_allclose(found["conv"], norm(step(inputs)) / norm(before(inputs)), rtol=1e-5)


@pytest.mark.slow
def test_the_blocks_of_a_gpt():
    """Of stacked blocks; the first one's query and key see the normed embedding."""
    config = Config(
        vocab_size=11, context_length=8, num_layers=3, num_heads=2, width=16, use_bias=True
    )
    model = GPT(config, rngs=nnx.Rngs(0))
    updates = updates_of(model)
    tokens = jax.random.randint(jax.random.key(2), (2, 8), 0, 11)
    found = layer_representation_changes(model, updates, tokens, call)
    layers = ("query", "key", "value", "out")
    assert {f"blocks/attention/{name}" for name in layers} <= set(found)
    assert {"blocks/mlp/up", "blocks/mlp/down"} <= set(found)
    assert all(change.shape in ((3,), ()) for change in found.values())
    x = model.token_embedding(tokens) + model.position_embedding(jnp.arange(8))
    block = jax.tree.map(lambda leaf: leaf[0], nnx.as_pure(nnx.state(model.blocks, nnx.Param)))
    scale, bias = block["attention_norm"]["scale"], block["attention_norm"]["bias"]
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * scale + bias
    for name in ("query", "key"):
        kernel = block["attention"][name]["kernel"]
        change = updates["blocks"]["attention"][name]["kernel"][0]
        np.testing.assert_allclose(
            found[f"blocks/attention/{name}"][0],
            norm(np.einsum("btd,dnh->btnh", normed, change))
            / norm(np.einsum("btd,dnh->btnh", normed, kernel)),
            rtol=1e-3,
        )


def test_what_does_not_fit_is_an_error():
    model = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match="no kernel at"):
        layer_representation_changes(model, {}, jnp.ones((1, 5)), call)
    with pytest.raises(ValueError, match="no layer with a kernel"):
        layer_representation_changes(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), {}, jnp.ones(3), call)
