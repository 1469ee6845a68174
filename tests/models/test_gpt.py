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
    forward,
    layer_norm,
    linear,
    lines_traced,
    mlp,
    parameters,
    random_model,
    softmax,
    tanh_gelu,
)

from models import layers
from models.gpt import CONFIGS, GPT, Config

TINY = Config(vocab_size=11, context_length=7, num_layers=3, num_heads=2, width=8)


def build(config=TINY, seed=0):
    return GPT(config, rngs=nnx.Rngs(seed))


def tokens(shape=(2, 7), seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def numpy_forward(model, tokens):
    """GPT-2, a block at a time, in float64."""
    p, config = parameters(model), model.config
    time = tokens.shape[1]
    x = p["token_embedding"]["embedding"][tokens] + p["position_embedding"]["embedding"][:time]
    for layer in range(config.num_layers):
        block = block_of(p["blocks"], layer)
        h = layer_norm(x, block["attention_norm"], 1e-5)
        x = x + attention(h, block["attention"], np.tri(time, dtype=bool))
        x = x + mlp(layer_norm(x, block["mlp_norm"], 1e-5), block["mlp"], tanh_gelu)
    return layer_norm(x, p["norm"], 1e-5) @ p["token_embedding"]["embedding"].T


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_equals_gpt_2_in_numpy(use_bias, remat):
    model = random_model(GPT, dataclasses.replace(TINY, use_bias=use_bias, remat=remat))
    logits = forward(model, tokens())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, numpy_forward(model, np.asarray(tokens())), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "use_bias", "count"),
    [
        ("gpt2-small", True, 124_439_808),
        ("gpt2-small", False, 124_337_664),
        ("gpt2-large", True, 774_030_080),
    ],
)
def test_has_the_published_number_of_parameters(name, use_bias, count):
    config = dataclasses.replace(CONFIGS[name], use_bias=use_bias)
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_initial_weights_are_those_of_nanogpt():
    config = Config(vocab_size=500, context_length=300, num_layers=6, num_heads=4, width=128)
    blocks = build(config).blocks
    for kernel in (blocks.attention.query.kernel, blocks.mlp.up.kernel):
        np.testing.assert_allclose(
            np.std(kernel[...], axis=tuple(range(1, kernel.ndim))), 0.02, rtol=0.05
        )
    for kernel in (blocks.attention.out.kernel, blocks.mlp.down.kernel):
        np.testing.assert_allclose(np.std(kernel[...]), 0.02 / math.sqrt(12), rtol=0.05)
    np.testing.assert_array_equal(blocks.mlp.up.bias[...], 0)
    first, second = blocks.mlp.up.kernel[0], blocks.mlp.up.kernel[1]
    assert np.abs(first - second).max() > 0.01  # each layer has its own


def test_a_token_sees_only_what_is_before_it():
    model = random_model(GPT, TINY)
    changed = tokens().at[:, 4].add(1) % TINY.vocab_size
    before, after = forward(model, tokens()), forward(model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_attention_weights_and_logits_are_those_of_numpy():
    model = random_model(GPT, TINY)
    found = layers.attention_weights(model, tokens())
    p = parameters(model)
    first = block_of(p["blocks"], 0)
    x = p["token_embedding"]["embedding"][tokens()] + p["position_embedding"]["embedding"]
    x = layer_norm(x, first["attention_norm"], 1e-5)
    q, k = (linear(x, first["attention"][name]) for name in ("query", "key"))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / 4**0.5
    scores = np.where(np.tri(7), scores, -np.inf)
    assert found.shape == (3, 2, 2, 7, 7)
    np.testing.assert_allclose(found[0], softmax(scores), atol=1e-5)
    largest = layers.largest_logits(model, tokens())
    assert largest.shape == (3, 2)
    np.testing.assert_allclose(largest[0], scores.max((0, 2, 3)), rtol=1e-5)


def test_dropout_is_random_in_training_and_off_in_evaluation():
    model = random_model(GPT, dataclasses.replace(TINY, dropout=0.5))
    assert np.abs(forward(model, tokens()) - forward(model, tokens())).max() > 1e-3
    model.eval()
    np.testing.assert_array_equal(forward(model, tokens()), forward(model, tokens()))
    np.testing.assert_allclose(
        forward(model, tokens()), numpy_forward(model, np.asarray(tokens())), atol=1e-4
    )


def test_bfloat16_computes_in_16_bits_over_float32_parameters():
    model = random_model(GPT, dataclasses.replace(TINY, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    logits, exact = forward(model, tokens()), numpy_forward(model, np.asarray(tokens()))
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="8 positions, more than context_length=7"):
        random_model(GPT, TINY)(tokens((1, 8)))


def test_blocks_are_traced_once_whatever_the_depth():
    shallow, deep = (
        lines_traced(GPT, dataclasses.replace(TINY, num_layers=depth), tokens) for depth in (2, 20)
    )
    assert shallow == deep > 10


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ValueError, match="num_heads=3 does not divide width=8"):
        build(dataclasses.replace(TINY, num_heads=3))
