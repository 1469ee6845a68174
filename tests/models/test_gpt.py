import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import weyl_optax
from models.gpt import CONFIGS, GPT, Config
from weyl_optax.flax import dimension_numbers

TINY = Config(vocab_size=11, context_length=7, num_layers=3, num_heads=2, width=8)


def build(config=TINY, seed=0):
    return GPT(config, rngs=nnx.Rngs(seed))


def tokens(shape=(2, 7), seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def perturbed(model):
    """Every parameter moved off its initial value, so that biases and scales count."""
    keys = iter(jax.random.split(jax.random.key(1), 100))
    state = nnx.state(model, nnx.Param)
    noisy = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state)
    nnx.update(model, noisy)
    return model


def numpy_forward(model, tokens):
    """GPT-2, a block at a time, in float64."""
    p = jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    config = model.config
    head = config.width // config.num_heads

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p.get("bias", 0)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = p["token_embedding"]["embedding"][tokens]
    x = x + p["position_embedding"]["embedding"][: tokens.shape[1]]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda w, layer=layer: w[layer], p["blocks"])
        a, m = block["attention"], block["mlp"]
        h = norm(x, block["attention_norm"])
        q, k, v = (
            np.einsum("btd,dnh->bnth", h, a[n]["kernel"])
            + a[n].get("bias", np.zeros((config.num_heads, head)))[:, None]
            for n in ("query", "key", "value")
        )
        scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(head)
        scores = np.where(np.tri(tokens.shape[1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bnth,nhd->btd", weights @ v, a["out"]["kernel"])
        x = x + out + a["out"].get("bias", 0)
        h = norm(x, block["mlp_norm"]) @ m["up"]["kernel"] + m["up"].get("bias", 0)
        x = x + gelu(h) @ m["down"]["kernel"] + m["down"].get("bias", 0)
    return norm(x, p["norm"]) @ p["token_embedding"]["embedding"].T


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_equals_gpt_2_in_numpy(use_bias, remat):
    model = perturbed(build(dataclasses.replace(TINY, use_bias=use_bias, remat=remat)))
    logits = model(tokens())
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
    model = perturbed(build())
    changed = tokens().at[:, 4].add(1) % TINY.vocab_size
    before, after = model(tokens()), model(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_dropout_is_random_in_training_and_off_in_evaluation():
    model = perturbed(build(dataclasses.replace(TINY, dropout=0.5)))
    assert np.abs(model(tokens()) - model(tokens())).max() > 1e-3
    model.eval()
    np.testing.assert_array_equal(model(tokens()), model(tokens()))
    np.testing.assert_allclose(
        model(tokens()), numpy_forward(model, np.asarray(tokens())), atol=1e-4
    )


def test_bfloat16_computes_in_16_bits_over_float32_parameters():
    model = perturbed(build(dataclasses.replace(TINY, dtype="bfloat16")))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    logits, exact = model(tokens()), numpy_forward(model, np.asarray(tokens()))
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="8 positions, more than context_length=7"):
        build()(tokens((1, 8)))


def test_blocks_are_traced_once_whatever_the_depth():
    sizes = []
    for depth in (2, 20):
        model = nnx.eval_shape(lambda d=depth: build(dataclasses.replace(TINY, num_layers=d)))
        graph, state = nnx.split(model)
        jaxpr = jax.make_jaxpr(lambda s, g=graph: nnx.merge(g, nnx.as_pure(s))(tokens()))(state)
        sizes.append(len(str(jaxpr).splitlines()))
    assert sizes[0] == sizes[1]


def test_every_leaf_is_read_as_the_matrix_of_its_layer():
    model = build()
    table = weyl_optax.tabulate(nnx.state(model, nnx.Param), dimension_numbers(model))
    assert table == (
        "path                           shape         read as\n"
        "blocks/attention/key/bias      (3, 2, 4)     3 vectors of 8\n"
        "blocks/attention/key/kernel    (3, 8, 2, 4)  3 matrices of 8 x 8\n"
        "blocks/attention/out/bias      (3, 8)        3 vectors of 8\n"
        "blocks/attention/out/kernel    (3, 2, 4, 8)  3 matrices of 8 x 8\n"
        "blocks/attention/query/bias    (3, 2, 4)     3 vectors of 8\n"
        "blocks/attention/query/kernel  (3, 8, 2, 4)  3 matrices of 8 x 8\n"
        "blocks/attention/value/bias    (3, 2, 4)     3 vectors of 8\n"
        "blocks/attention/value/kernel  (3, 8, 2, 4)  3 matrices of 8 x 8\n"
        "blocks/attention_norm/bias     (3, 8)        3 vectors of 8\n"
        "blocks/attention_norm/scale    (3, 8)        3 vectors of 8\n"
        "blocks/mlp/down/bias           (3, 8)        3 vectors of 8\n"
        "blocks/mlp/down/kernel         (3, 32, 8)    3 matrices of 32 x 8\n"
        "blocks/mlp/up/bias             (3, 32)       3 vectors of 32\n"
        "blocks/mlp/up/kernel           (3, 8, 32)    3 matrices of 8 x 32\n"
        "blocks/mlp_norm/bias           (3, 8)        3 vectors of 8\n"
        "blocks/mlp_norm/scale          (3, 8)        3 vectors of 8\n"
        "norm/bias                      (8,)          1 vector of 8\n"
        "norm/scale                     (8,)          1 vector of 8\n"
        "position_embedding/embedding   (7, 8)        1 matrix of 7 x 8\n"
        "token_embedding/embedding      (11, 8)       1 matrix of 11 x 8"
    )
