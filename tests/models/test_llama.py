import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_layers import (
    block_of,
    forward,
    linear,
    lines_traced,
    parameters,
    random_model,
    rms_norm,
    softmax,
)
from optax.contrib import MuonDimensionNumbers

from models import layers
from models.llama import Config, Llama
from weyl_optax.flax import dimension_numbers

TINY = Config(
    vocab_size=11, context_length=7, num_layers=3, num_heads=2, width=8, inner_width=12,
    rotary_base=10.0,
)  # fmt: skip
QK_NORM = dataclasses.replace(TINY, qk_norm=True)


def tokens(shape=(2, 7), seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def turn(x, base):
    """Rotary positions as products of complex numbers; `x` is (batch, time, heads, 2 F)."""
    half = x.shape[-1] // 2
    numbers = x[..., :half] + 1j * x[..., half:]
    angles = np.outer(np.arange(x.shape[1]), base ** (-np.arange(half) / half))
    turned = numbers * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def numpy_scores(x, p, config):
    q, k = linear(x, p["query"]), linear(x, p["key"])
    if config.qk_norm:
        q, k = rms_norm(q, p["query_norm"], 1e-5), rms_norm(k, p["key_norm"], 1e-5)
    q, k = turn(q, config.rotary_base), turn(k, config.rotary_base)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    return np.where(np.tri(x.shape[1]), scores, -np.inf)


def numpy_forward(model, tokens):
    """A Llama, a block at a time, in float64."""
    p, config = parameters(model), model.config
    x = p["token_embedding"]["embedding"][tokens]
    for layer in range(config.num_layers):
        block = block_of(p["blocks"], layer)
        h = rms_norm(x, block["attention_norm"], 1e-5)
        weights = softmax(numpy_scores(h, block["attention"], config))
        y = np.einsum("bnts,bsnh->btnh", weights, linear(h, block["attention"]["value"]))
        x = x + np.einsum("btnh,nhd->btd", y, block["attention"]["out"]["kernel"])
        h = rms_norm(x, block["mlp_norm"], 1e-5)
        gate, up = linear(h, block["mlp"]["gate"]), linear(h, block["mlp"]["up"])
        x = x + linear(gate / (1 + np.exp(-gate)) * up, block["mlp"]["down"])
    return linear(rms_norm(x, p["norm"], 1e-5), p["head"])


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("config", [TINY, QK_NORM], ids=["plain", "qk_norm"])
def test_equals_a_llama_in_numpy(config, remat):
    model = random_model(Llama, dataclasses.replace(config, remat=remat))
    logits = forward(model, tokens())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, numpy_forward(model, np.asarray(tokens())), atol=1e-4)


@pytest.mark.parametrize("config", [TINY, QK_NORM], ids=["plain", "qk_norm"])
def test_attention_weights_are_those_of_numpy(config):
    model = random_model(Llama, config)
    p = parameters(model)
    first = block_of(p["blocks"], 0)
    x = rms_norm(p["token_embedding"]["embedding"][tokens()], first["attention_norm"], 1e-5)
    expected = softmax(numpy_scores(x, first["attention"], config))
    found = layers.attention_weights(model, tokens())
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_has_the_number_of_parameters_of_llama_7b():
    config = Config(num_layers=32, num_heads=32, width=4096, inner_width=11008)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == 6_738_415_616


def test_every_kernel_is_read_as_the_matrix_that_it_is():
    model = nnx.eval_shape(lambda: Llama(QK_NORM, rngs=nnx.Rngs(0)))
    numbers = nnx.as_pure(dimension_numbers(Llama.__call__, model, tokens()))
    dense = MuonDimensionNumbers((1,), (2,))
    heads = MuonDimensionNumbers((1,), (2, 3))
    assert numbers["blocks"]["mlp"] == {name: {"kernel": dense} for name in ("gate", "up", "down")}
    attention = numbers["blocks"]["attention"]
    for name in ("query", "key", "value"):
        assert attention[name]["kernel"] == heads
    assert attention["out"]["kernel"] == MuonDimensionNumbers((1, 2), (3,))
    assert numbers["head"]["kernel"] == MuonDimensionNumbers((0,), (1,))
    assert attention["query_norm"]["scale"] == MuonDimensionNumbers((), (1,))


def test_a_token_sees_only_what_is_before_it():
    model = random_model(Llama, TINY)
    changed = tokens().at[:, 4].add(1) % TINY.vocab_size
    before, after = forward(model, tokens()), forward(model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="8 positions, more than context_length=7"):
        random_model(Llama, TINY)(tokens((1, 8)))


def test_blocks_are_traced_once_whatever_the_depth():
    shallow, deep = (
        lines_traced(Llama, dataclasses.replace(TINY, num_layers=depth), tokens)
        for depth in (2, 20)
    )
    assert shallow == deep > 10


def test_heads_of_an_odd_width_are_an_error():
    with pytest.raises(ValueError, match="width=6 / num_heads=2 must be even"):
        Llama(dataclasses.replace(TINY, width=6), rngs=nnx.Rngs(0))
