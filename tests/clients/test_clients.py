"""The params of other libraries, and of models in their layouts, are read as they are used."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from checks import TAU, assert_bounded, axes, by_path
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, dimension_numbers_from
from weyl_optax.flax import dimension_numbers

FAST_COMPILATION = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

TOKENS = jnp.arange(12).reshape(2, 6) % 7
VOCABULARY, D, HEADS, HEAD_DIM, HIDDEN, LAYERS = 7, 8, 2, 5, 12, 3

VECTOR = ((), (0,))
STACKED_VECTOR = ((), (1,))
DENSE = ((0,), (1,))
QUERY = ((0,), (1, 2))
OUT = ((0, 1), (2,))


def assert_trains(loss, params, *inputs, numbers, expected):
    """Three jitted steps: params stay finite, and no step is above tau."""
    solver = adamw2(0.1, tau=TAU, weight_dimension_numbers=numbers)
    trained, fixed = eqx.partition(params, eqx.is_inexact_array)
    state = jax.jit(solver.init, compiler_options=FAST_COMPILATION)(trained)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def step(trained, state):
        grads = jax.grad(lambda p: loss(eqx.combine(p, fixed), *inputs))(trained)
        updates, state = solver.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(3):
        before = by_path(trained)
        trained, state = step(trained, state)
        assert_bounded(before, trained, expected)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def attend(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)


class MaxTextBlock(nn.Module):
    """As in MaxText: attention kernels keep their heads, a gated MLP has wi_0, wi_1 and wo."""

    @nn.compact
    def __call__(self, x, _):
        def dense(name, features, axis=-1):
            return nn.DenseGeneral(features, axis=axis, use_bias=False, name=name)

        y = nn.RMSNorm(name="pre_norm")(x)
        q, k, v = (dense(name, (HEADS, HEAD_DIM))(y) for name in ("query", "key", "value"))
        x = x + dense("out", D, (-2, -1))(attend(q, k, v))
        gate, up = (dense(name, HIDDEN)(x) for name in ("wi_0", "wi_1"))
        return x + dense("wo", D)(jax.nn.silu(gate) * up), None


class MaxText(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, D, name="token_embedder")
        layers = nn.scan(
            MaxTextBlock,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        return nn.Dense(VOCABULARY, use_bias=False, name="logits_dense")(x)


MAXTEXT = {
    "token_embedder/embedding": DENSE,
    "layers/pre_norm/scale": ((), (0,)),  # (features, layers)
    "layers/query/kernel": ((0,), (2, 3)),
    "layers/key/kernel": ((0,), (2, 3)),
    "layers/value/kernel": ((0,), (2, 3)),
    "layers/out/kernel": ((0, 2), (3,)),
    "layers/wi_0/kernel": ((0,), (2,)),
    "layers/wi_1/kernel": ((0,), (2,)),
    "layers/wo/kernel": ((0,), (2,)),
    "logits_dense/kernel": DENSE,
}


@pytest.mark.slow
def test_maxtext_layout_with_layers_on_axis_1():
    model = MaxText(axis=1)
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params, tokens):
        return cross_entropy(model.apply({"params": params}, tokens), tokens)

    numbers = dimension_numbers_from(loss, params, TOKENS)
    assert params["layers"]["query"]["kernel"].shape == (D, LAYERS, HEADS, HEAD_DIM)
    assert axes(numbers) == MAXTEXT
    assert_trains(loss, params, TOKENS, numbers=numbers, expected=MAXTEXT)


def test_the_muon_numbers_of_maxtext_leave_embedding_norms_and_head_unbounded():
    muon = {
        path: None
        if any(name in path for name in ("scale", "embedding", "logits_dense"))
        else MuonDimensionNumbers((0, -2), (-1,))
        if "/out/" in path
        else MuonDimensionNumbers((0,), (-2, -1))
        if any(f"/{name}/" in path for name in ("query", "key", "value"))
        else MuonDimensionNumbers((0,), (-1,))
        for path in MAXTEXT
    }
    shapes = {
        path: leaf.shape
        for path, leaf in by_path(
            jax.eval_shape(MaxText(axis=1).init, jax.random.key(0), TOKENS)["params"]
        ).items()
    }
    positive = {
        path: tuple(tuple(axis % len(shapes[path]) for axis in side) for side in entry)
        for path, entry in muon.items()
        if entry is not None
    }
    free = {"token_embedder/embedding", "layers/pre_norm/scale", "logits_dense/kernel"}
    assert positive == {path: entry for path, entry in MAXTEXT.items() if path not in free}


@pytest.mark.slow
def test_nanodo_layout_in_partitioned_boxes():
    class NanoDO(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            init = nn.with_partitioning(nn.initializers.xavier_uniform(), ("data", None, None))
            embed = nn.Embed(VOCABULARY, D, name="embed")
            x = embed(tokens) + nn.Embed(6, D, name="pos_embed")(jnp.arange(6)[None])
            q, k, v = (
                nn.DenseGeneral((HEADS, HEAD_DIM), use_bias=False, kernel_init=init, name=name)(x)
                for name in ("query", "key", "value")
            )
            out = nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="attn_out_proj")
            return embed.attend(nn.LayerNorm(use_bias=False)(x + out(attend(q, k, v))))

    model = NanoDO()
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params, tokens):
        return cross_entropy(model.apply({"params": params}, tokens)[:, :-1], tokens[:, 1:])

    expected = {
        "embed/embedding": DENSE,
        "pos_embed/embedding": DENSE,
        "query/kernel": QUERY,
        "key/kernel": QUERY,
        "value/kernel": QUERY,
        "attn_out_proj/kernel": OUT,
        "LayerNorm_0/scale": VECTOR,
    }
    numbers = dimension_numbers_from(loss, params, TOKENS)
    assert isinstance(params["query"]["kernel"], nn.Partitioned)
    assert axes(numbers) == expected
    assert_trains(loss, params, TOKENS, numbers=numbers, expected=expected)


def gemma_loss(params, tokens):
    """The einsums of Gemma, with one head of keys and values for all queries."""
    x = params["input_embedding"][tokens]
    y = x * (1 + params["pre_attention_norm"])
    q = jnp.einsum("BTD,NDH->BTNH", y, params["q_einsum"])
    k, v = jnp.einsum("BSD,CKDH->CBSKH", y, params["kv_einsum"])
    q = q.reshape(*q.shape[:2], 1, HEADS, HEAD_DIM)
    weights = jax.nn.softmax(jnp.einsum("BTKGH,BSKH->BTKGS", q, k))
    encoded = jnp.einsum("BTKGS,BSKH->BTKGH", weights, v).reshape(*x.shape[:2], HEADS, HEAD_DIM)
    x = x + jnp.einsum("BTNH,NHD->BTD", encoded, params["attn_vec_einsum"])
    gate, up = jnp.einsum("...F,NHF->N...H", x, params["gating_einsum"])
    x = x + jnp.einsum("...H,HF->...F", jax.nn.gelu(gate) * up, params["linear"])
    return cross_entropy((x @ params["input_embedding"].T)[:, :-1], tokens[:, 1:])


def test_gemma_layout_of_einsum_kernels():
    shapes = {
        "input_embedding": (VOCABULARY, D),
        "pre_attention_norm": (D,),
        "q_einsum": (HEADS, D, HEAD_DIM),
        "kv_einsum": (2, 1, D, HEAD_DIM),
        "attn_vec_einsum": (HEADS, HEAD_DIM, D),
        "gating_einsum": (2, HIDDEN, D),
        "linear": (HIDDEN, D),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    expected = {
        "input_embedding": DENSE,
        "pre_attention_norm": VECTOR,
        "q_einsum": ((1,), (0, 2)),
        "kv_einsum": ((2,), (0, 1, 3)),
        "attn_vec_einsum": OUT,
        "gating_einsum": ((2,), (0, 1)),
        "linear": DENSE,
    }
    numbers = dimension_numbers_from(gemma_loss, params, TOKENS)
    assert axes(numbers) == expected
    assert_trains(gemma_loss, params, TOKENS, numbers=numbers, expected=expected)


def test_einsum_layers_of_nnx():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.q_einsum = nnx.Einsum("BTD,NDH->BTNH", (HEADS, D, HEAD_DIM), rngs=rngs)
            self.attn_vec_einsum = nnx.Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, D), rngs=rngs)

        def __call__(self, x):
            return self.attn_vec_einsum(self.q_einsum(x))

    numbers = dimension_numbers(Attention.__call__, Attention(nnx.Rngs(0)), jnp.ones((2, 6, D)))
    assert axes(numbers) == {"q_einsum/kernel": ((1,), (0, 2)), "attn_vec_einsum/kernel": OUT}


class ViTBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
        y = nn.Dense(HIDDEN)(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(y)), None


class ViT(nn.Module):
    """As in big_vision: patches by a convolution, learned positions, scanned blocks."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, D)
        x += self.param("pos_embedding", nn.initializers.normal(0.1), (1, x.shape[1], D))
        blocks = nn.scan(
            ViTBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = blocks(name="encoderblock")(x, None)
        return nn.Dense(5, kernel_init=nn.initializers.zeros, name="head")(x.mean(1))


@pytest.mark.slow
def test_big_vision_layout_of_a_scanned_vit():
    model, labels = ViT(), jnp.arange(3)
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    params = model.init(jax.random.key(1), images)["params"]

    def loss(params, images, labels):
        return cross_entropy(model.apply({"params": params}, images), labels)

    attention = "encoderblock/MultiHeadDotProductAttention_0"
    expected = {
        "embedding/kernel": ((0, 1, 2), (3,)),
        "embedding/bias": VECTOR,
        "pos_embedding": ((), (0, 1, 2)),
        f"{attention}/out/kernel": ((1, 2), (3,)),
        f"{attention}/out/bias": STACKED_VECTOR,
        "head/kernel": DENSE,
        "head/bias": VECTOR,
    }
    for name in ("query", "key", "value"):
        expected[f"{attention}/{name}/kernel"] = ((1,), (2, 3))
        expected[f"{attention}/{name}/bias"] = ((), (1, 2))
    for i in range(2):
        expected[f"encoderblock/LayerNorm_{i}/scale"] = STACKED_VECTOR
        expected[f"encoderblock/LayerNorm_{i}/bias"] = STACKED_VECTOR
        expected[f"encoderblock/Dense_{i}/kernel"] = ((1,), (2,))
        expected[f"encoderblock/Dense_{i}/bias"] = STACKED_VECTOR
    numbers = dimension_numbers_from(loss, params, images, labels)
    assert axes(numbers) == expected
    assert_trains(loss, params, images, labels, numbers=numbers, expected=expected)


class EquinoxModel(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, use_query_bias=True, key=keys[0])
        self.mlp = eqx.nn.MLP(D, 3, HIDDEN, depth=1, key=keys[1])

    def __call__(self, x):
        return jax.vmap(self.mlp)(self.attention(x, x, x))


@pytest.mark.slow
def test_equinox_as_its_documentation_trains():
    model = EquinoxModel(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, D))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    out_in = ((1,), (0,))
    expected = {
        "attention/query_proj/weight": out_in,
        "attention/query_proj/bias": VECTOR,
        "attention/key_proj/weight": out_in,
        "attention/value_proj/weight": out_in,
        "attention/output_proj/weight": out_in,
        "mlp/layers/0/weight": out_in,
        "mlp/layers/0/bias": VECTOR,
        "mlp/layers/1/weight": out_in,
        "mlp/layers/1/bias": VECTOR,
    }
    numbers = dimension_numbers_from(loss, model, x)
    assert axes(numbers) == expected

    solver = adamw2(0.1, tau=TAU, weight_dimension_numbers=numbers)
    state = solver.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model, x)
        updates, state = solver.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    for _ in range(3):
        before = by_path(eqx.filter(model, eqx.is_array))
        model, state = step(model, state)
        assert_bounded(before, eqx.filter(model, eqx.is_array), expected)
    assert jnp.isfinite(loss(model, x))


@pytest.mark.slow
def test_haiku():
    def forward(tokens):
        init = hk.initializers.VarianceScaling()
        x = hk.Embed(VOCABULARY, D)(tokens)
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x += hk.MultiHeadAttention(HEADS, HEAD_DIM, model_size=D, w_init=init)(y, y, y)
        return hk.nets.MLP([HIDDEN, VOCABULARY])(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), TOKENS)

    def loss(params, tokens):
        return cross_entropy(model.apply(params, tokens), tokens)

    expected = {
        "embed/embeddings": DENSE,
        "layer_norm/scale": VECTOR,
        "layer_norm/offset": VECTOR,
    }
    for layer in ("query", "key", "value", "linear"):
        expected[f"multi_head_attention/{layer}/w"] = DENSE
        expected[f"multi_head_attention/{layer}/b"] = VECTOR
    for i in range(2):
        expected[f"mlp/~/linear_{i}/w"] = DENSE
        expected[f"mlp/~/linear_{i}/b"] = VECTOR
    numbers = dimension_numbers_from(loss, params, TOKENS)
    assert axes(numbers) == expected
    assert_trains(loss, params, TOKENS, numbers=numbers, expected=expected)
