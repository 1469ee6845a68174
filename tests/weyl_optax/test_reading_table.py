"""Programs of the field, each with its right reading beside it.

The reading is derived from the mathematics: which axes of a leaf a product with the data sums
(reduction), which go out (output), and which are neither (batch). A leaf that no such product uses
is a vector of all its axes. Where two orders of equal products lead to a reading and its transpose,
either is right: a matrix and its transpose have one norm. Axes of size 1 belong to nothing.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from weyl_optax import dimension_numbers_from


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def matrix(reduction, output):
    return tuple(reduction), tuple(output)


def vector(*axes):
    return (), axes


DENSE = matrix([0], [1])
TRANSPOSED = matrix([1], [0])
EXPERTS = matrix([1], [2])  # a stack of dense matrices
HEADS = matrix([0], [1, 2])  # (d, heads, head_dim)
MERGE = matrix([0, 1], [2])  # (heads, head_dim, d)
CONV = matrix([0, 1, 2], [3])  # (height, width, in, out)
NOTHING = "an error"  # there is no right reading, or it cannot be told

KEY = jax.eval_shape(lambda: jax.random.key(0))
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))

# The sizes: a batch of b sequences of t tokens of d features; h heads of k; f hidden features; e
# experts; v tokens in the vocabulary.
b, t, d, h, k, f, e, v = 2, 5, 6, 2, 3, 7, 4, 9
tokens, x, seq, image = i32(b, t), f32(b, d), f32(b, t, d), f32(b, 8, 8, 3)

TABLE = {}


def program(*inputs, **leaves):
    """Adds a function of (params, *inputs) to the table, with (shape, right reading) by leaf."""

    def add(fn):
        assert fn.__name__ not in TABLE, fn.__name__
        TABLE[fn.__name__] = fn, leaves, inputs
        return fn

    return add


def case(name, fn, shape, right, *inputs):
    """The same for a function of one leaf."""
    assert name not in TABLE, name
    TABLE[name] = lambda p, *inputs: fn(p["w"], *inputs), {"w": (shape, right)}, inputs


def conv(x, w, groups=1, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def attend(q, k, v):
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)


def rotate(y):
    half, other = jnp.split(y, 2, -1)
    return jnp.concatenate([0.6 * half - 0.8 * other, 0.8 * half + 0.6 * other], -1)


def square(y):
    return jnp.mean(y**2)


# Dense layers.

case("dense", lambda w, x: x @ w, (d, f), DENSE, x)
case("dense, out first", lambda w, x: x @ w.T, (f, d), TRANSPOSED, x)
case("dense, its loss", lambda w, x: square(x @ w), (d, f), DENSE, x)
case("dense of a sequence", lambda w, x: x @ w, (d, f), DENSE, seq)
case("dense, by einsum", lambda w, x: jnp.einsum("...i,io->...o", x, w), (d, f), DENSE, seq)
case("dense, mul and sum", lambda w, x: (x[:, :, None] * w).sum(1), (d, f), DENSE, x)
case("dense, by vmap", lambda w, x: jax.vmap(lambda x: w.T @ x)(x), (d, f), DENSE, x)
case("dense, flat features", lambda w, x: x.reshape(b, -1) @ w, (t * d, f), DENSE, seq)
case(
    "dense, first axis kept apart",
    lambda w, x: jnp.einsum("btd,tdf->bf", x, w),
    (t, d, f),
    MERGE,
    seq,
)
case("dense after sigmoid", lambda w, x: jax.nn.relu(jax.nn.sigmoid(x) @ w), (d, f), DENSE, x)
case("dense after softmax", lambda w, x: jax.nn.softmax(x) @ w, (d, f), DENSE, x)
case("dense of one output", lambda w, x: x @ w, (d, 1), DENSE, x)
case(
    "dense in bfloat16",
    lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    (d, f),
    DENSE,
    x,
)
case("dense with muP's multiplier", lambda w, x: (x @ w) / d, (d, f), DENSE, x)
case(
    "dense with a learned multiplier of the data", lambda w, x: x @ (w * x.mean()), (d, f), DENSE, x
)
case("mixer over tokens", lambda w, x: jnp.einsum("btd,ts->bsd", x, w), (t, t), DENSE, seq)
case("gMLP's spatial gate", lambda w, x: x * jnp.einsum("btd,ts->bsd", x, w), (t, t), DENSE, seq)
case(
    "bilinear layer",
    lambda w, x, y: jnp.einsum("boj,bj->bo", jnp.einsum("bi,ioj->boj", x, w), y),
    (d, f, 3),
    matrix([0], [1, 2]),
    x,
    f32(b, 3),
)
case(
    "ensemble by vmap, inputs apart",
    lambda w, x: jax.vmap(jnp.dot)(x, w),
    (e, d, f),
    EXPERTS,
    f32(e, b, d),
)
case("scores of a bilinear form", lambda w, x, y: (x @ w) @ y.T, (d, d), DENSE, x, x)


@program(x, up=((d, f), DENSE), gate=((d, f), DENSE), down=((f, d), DENSE))
def swiglu(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


@program(x, fused=((d, 2 * f), DENSE), down=((f, d), DENSE))
def swiglu_fused(p, x):
    gate, up = jnp.split(x @ p["fused"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["down"]


@program(seq, gating=((2, d, f), matrix([1], [0, 2])), linear=((f, d), DENSE))
def gemma_mlp(p, x):
    gate, up = jnp.einsum("btd,cdf->cbtf", x, p["gating"])
    return jnp.einsum("btf,fd->btd", jax.nn.gelu(gate) * up, p["linear"])


@program(x, w=((d, f), DENSE), b=((f,), vector(0)), g=((f,), vector(0)), alpha=((), vector()))
def dense_norm_relu(p, x):
    return jax.nn.leaky_relu(norm(x @ p["w"] + p["b"]) * p["g"], p["alpha"])


@program(x, w=((d, d), DENSE), alpha=((), vector()))
def rezero(p, x):
    return x + p["alpha"] * jnp.tanh(x @ p["w"])


@program(x, w=((d, d), DENSE), s=((), vector()), g=((d,), vector(0)), b=((d,), vector(0)))
def dynamic_tanh(p, x):
    return (p["g"] * jnp.tanh(p["s"] * x) + p["b"]) @ p["w"]


@program(seq, w=((d, d), DENSE), gamma=((d,), vector(0)))
def layer_scale(p, x):
    return x + p["gamma"] * (x @ p["w"])


@program(x, w=((d, f), DENSE), gamma=((1, f), vector(0, 1)))
def layer_scale_with_kept_dims(p, x):
    return p["gamma"] * (x @ p["w"])


@program(x, v=((d, f), DENSE), g=((1, f), vector(0, 1)))
def weight_norm_with_kept_dims(p, x):
    return x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True))


@program(x, v=((f, d), TRANSPOSED), g=((f, 1), vector(0, 1)))
def weight_norm_out_first(p, x):
    return x @ (p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True))).T


@program(x, v=((d, f), DENSE), g=((f,), vector(0)))
def weight_norm(p, x):
    return x @ (p["g"] * p["v"] * lax.rsqrt(jnp.sum(p["v"] ** 2, 0)))


@program(x, w=((d, f), DENSE), a=((d, 2), DENSE), b=((2, f), DENSE))
def lora(p, x):
    return x @ p["w"] + (x @ p["a"]) @ p["b"]


@program(x, w=((d, f), DENSE), a=((d, 2), DENSE), b=((2, f), DENSE))
def lora_merged(p, x):
    return x @ (p["w"] + 0.5 * p["a"] @ p["b"])


@program(f32(d, f), x, a=((d, 2), DENSE), b=((2, f), DENSE))
def lora_on_a_frozen_weight(p, frozen, x):
    return x @ (frozen + p["a"] @ p["b"])


@program(f32(d, f), x, a=((d, 2), DENSE), b=((2, f), DENSE), m=((1, f), vector(0, 1)))
def dora(p, frozen, x):
    w = frozen + p["a"] @ p["b"]
    return x @ (p["m"] * w / jnp.linalg.norm(w, axis=0, keepdims=True))


@program(x, w=((d, f), DENSE), a=((d, 2), DENSE), b=((2, f), DENSE), m=((f,), vector(0)))
def dora_of_params(p, x):
    w = p["w"] + p["a"] @ p["b"]
    return x @ (p["m"] * w / jnp.linalg.norm(w, axis=0))


@program(x, a=((d, 2), DENSE), c=((2, 2), DENSE), b=((2, f), DENSE))
def three_factors_merged(p, x):
    return x @ (p["a"] @ p["c"] @ p["b"])


@program(x, u=((d, 3), DENSE), s=((3,), vector(0)), v=((3, f), DENSE))
def svd_factors(p, x):
    return x @ ((p["u"] * p["s"]) @ p["v"])


@program(x, delta=((d, f), DENSE))
def delta_on_a_frozen_weight(p, x):
    return x @ (jnp.ones((d, f)) + p["delta"])


@program(x, scale=((1, f), vector(0, 1)))
def dequantization_scale(p, x):
    return x @ (jnp.ones((d, f), jnp.int8).astype(jnp.float32) * p["scale"])


@program(x, w=((d, f), DENSE), s=((1, f), vector(0, 1)))
def learned_step_quantization(p, x):
    return x @ (jnp.round(jnp.clip(p["w"] / p["s"], -8, 7)) * p["s"])


case("binary weights", lambda w, x: x @ (jnp.sign(w) * jnp.abs(w).mean()), (d, f), DENSE, x)
case(
    "quantized with a straight-through estimator",
    lambda w, x: x @ (w + lax.stop_gradient(jnp.round(w) - w)),
    (d, f),
    DENSE,
    x,
)
case("standardized", lambda w, x: x @ ((w - w.mean(0)) / (w.std(0) + 1e-6)), (d, f), DENSE, x)
case("spectrally normalized", lambda w, x: x @ (w / jnp.linalg.norm(w, 2)), (d, f), DENSE, x)
case("scaled by a row", lambda w, x: x @ (w / w[:1]), (d, f), DENSE, x)
case("nonnegative weights", lambda w, x: x @ jax.nn.softplus(w), (d, f), DENSE, x)
case("orthogonal by QR", lambda w, x: x @ jnp.linalg.qr(w)[0], (d, d), NOTHING, x)
case("skew-symmetric", lambda w, x: x @ (w - w.T), (d, d), DENSE, x)
case("a Gram matrix", lambda w, x: x @ (w.T @ w), (f, d), DENSE, x)
case("Neumann series", lambda w, x: x @ (jnp.eye(d) + w + w @ w), (d, d), DENSE, x)
case("lower triangle", lambda w, x: x @ jnp.tril(w), (d, d), DENSE, x)
case("mean of weights", lambda w, x: x @ w.mean(0), (e, d, f), EXPERTS, x)
case("one unit as a sum of units", lambda w, x: x @ w.sum(1), (d, f), DENSE, x)
case(
    "circulant", lambda w, x: x @ w[(np.arange(d)[:, None] - np.arange(d)) % d], (d,), vector(0), x
)
case("a flat buffer", lambda w, x: x @ w[:24].reshape(6, 4) + w[24:28], (40,), vector(0), x)

# Penalties and statistics beside a dense layer.

PENALTIES = {
    "weight decay": lambda w, w0: jnp.sum(w**2),
    "L1": lambda w, w0: jnp.sum(jnp.abs(w)),
    "L2-SP": lambda w, w0: jnp.sum((w - w0) ** 2),
    "EWC": lambda w, w0: jnp.sum(w0 * (w - 1) ** 2),
    "EWC, anchored": lambda w, w0: jnp.vdot(w0, (w - w0) ** 2),
    "slogdet": lambda w, w0: jnp.linalg.slogdet(w)[1],
    "nuclear norm": lambda w, w0: jnp.sum(jnp.linalg.svd(w, compute_uv=False)),
    "spectral norm": lambda w, w0: jnp.linalg.norm(w, 2),
    "trace": lambda w, w0: jnp.trace(w),
    "orthogonality": lambda w, w0: jnp.sum((w.T @ w - jnp.eye(d)) ** 2),
    "group lasso": lambda w, w0: jnp.sum(jnp.linalg.norm(w, axis=1)),
    "entropy": lambda w, w0: -jnp.sum(jax.nn.softmax(w) * jax.nn.log_softmax(w)),
    "largest entry": lambda w, w0: jnp.max(jnp.abs(w)),
    "KL to a prior": lambda w, w0: jnp.sum(jnp.log(jnp.abs(w)) + w0 / w),
}
for name, penalty in PENALTIES.items():
    case(
        f"dense with a penalty: {name}",
        lambda w, x, w0, penalty=penalty: square(x @ w) + 0.1 * penalty(w, w0),
        (d, d),
        DENSE,
        x,
        f32(d, d),
    )
case(
    "quantile as a quantization scale",
    lambda w, x: x @ (jnp.round(w / jnp.quantile(jnp.abs(w), 0.99)) * 0.1),
    (d, d),
    DENSE,
    x,
)
case(
    "magnitude pruning",
    lambda w, x: x @ jnp.where(jnp.abs(w) > jnp.median(jnp.abs(w)), w, 0),
    (d, f),
    DENSE,
    x,
)
case("pruning mask", lambda w, m, x: x @ (w * m), (d, f), DENSE, f32(d, f), x)
case("pruning mask, where", lambda w, m, x: x @ jnp.where(m > 0, w, 0), (d, f), DENSE, f32(d, f), x)
case(
    "inner step of MAML",
    lambda w, x: square(x @ (w - 0.1 * jax.grad(lambda w: square(x @ w))(w))),
    (d, f),
    DENSE,
    x,
)
case(
    "gradient penalty",
    lambda w, x: square(jax.grad(lambda x: square(jnp.tanh(x @ w)))(x)),
    (d, f),
    DENSE,
    x,
)

# Noise and masks.

case(
    "DropConnect, one mask",
    lambda w, x, key: x @ (w * jax.random.bernoulli(key, 0.5, w.shape)),
    (d, f),
    DENSE,
    x,
    KEY,
)
case(
    "DropConnect, a mask per sample",
    lambda w, x, m: jnp.einsum("bi,bio->bo", x, w * m),
    (d, f),
    DENSE,
    x,
    f32(b, d, f),
)
case(
    "DropConnect, raw key",
    lambda w, x, key: x @ (w * jax.random.bernoulli(key, 0.5, w.shape)),
    (d, f),
    DENSE,
    x,
    jax.ShapeDtypeStruct((2,), jnp.uint32),
)
case(
    "evolution strategy",
    lambda w, x, keys: jax.vmap(lambda key: x @ (w + 0.1 * jax.random.normal(key, w.shape)))(keys),
    (d, f),
    DENSE,
    x,
    KEYS,
)
case("noise as an argument", lambda w, x, n: x @ (w + n), (d, f), DENSE, x, f32(d, f))
case(
    "SAM's perturbation",
    lambda w, x: x @ (w + 0.05 * jax.grad(lambda w: square(x @ w))(w)),
    (d, f),
    DENSE,
    x,
)


@program(x, KEYS, mu=((d, f), DENSE), rho=((d, f), DENSE))
def bayes_by_vmap(p, x, keys):
    def sample(key):
        return x @ (p["mu"] + jax.nn.softplus(p["rho"]) * jax.random.normal(key, p["mu"].shape))

    return jax.vmap(sample)(keys)


@program(x, KEY, mu=((d, f), DENSE), rho=((d, f), DENSE))
def local_reparametrization(p, x, key):
    mean, variance = x @ p["mu"], x**2 @ jnp.exp(p["rho"])
    return mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape)


@program(x, f32(b, k), w=((d, f), DENSE), affine=((k, d), DENSE), bias=((d,), vector(0)))
def stylegan_dense(p, x, z):
    w = p["w"] * (z @ p["affine"] + p["bias"] + 1)[:, :, None]
    w = w * lax.rsqrt(jnp.sum(w**2, 1, keepdims=True) + 1e-8)
    return jnp.einsum("bi,bio->bo", x, w)


@program(image, f32(b, k), w=((3, 3, 3, f), CONV), affine=((k, 3), DENSE))
def stylegan_conv(p, x, z):
    w = p["w"] * (z @ p["affine"] + 1)[:, None, None, :, None]
    w = w * lax.rsqrt(jnp.sum(w**2, (1, 2, 3), keepdims=True) + 1e-8)
    return jax.vmap(lambda x, w: conv(x[None], w)[0])(x, w)


@program(x, f32(b, k), w=((d, f), DENSE), gamma=((k, f), DENSE), beta=((k, f), DENSE))
def film(p, x, z):
    return (x @ p["w"]) * (1 + z @ p["gamma"]) + z @ p["beta"]


@program(x, f32(b, k), w=((k, 6 * d), DENSE), out=((d, d), DENSE))
def adaln(p, x, c):
    shift, scale, gate, *_ = jnp.split(jax.nn.silu(c) @ p["w"], 6, axis=-1)
    return x + gate * ((norm(x) * (1 + scale) + shift) @ p["out"])


# Attention.

QKV = dict.fromkeys("qkv", ((d, h, k), HEADS))
OUT = {"o": ((h, k, d), MERGE)}


def project(p, x):
    return [jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv"]


def merge(p, y):
    return jnp.einsum("bthk,hkd->btd", y, p["o"])


@program(seq, **QKV, **OUT)
def attention(p, x):
    return merge(p, attend(*project(p, x)))


@program(seq, qkv=((d, 3 * h * k), DENSE), o=((h * k, d), DENSE))
def attention_fused(p, x):
    q, k_, v_ = (y.reshape(b, t, h, k) for y in jnp.split(x @ p["qkv"], 3, axis=-1))
    return attend(q, k_, v_).reshape(b, t, h * k) @ p["o"]


@program(seq, qkv=((d, 3, h, k), matrix([0], [1, 2, 3])), **OUT)
def attention_fused_by_axes(p, x):
    q, k_, v_ = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", x, p["qkv"]), 2, 0)
    return merge(p, attend(q, k_, v_))


@program(seq, qkv=((d, 3 * h * k), DENSE), bias=((3 * h * k,), vector(0)), **OUT)
def attention_fused_with_bias(p, x):
    y = (x @ p["qkv"] + p["bias"]).reshape(b, t, 3, h, k)
    return merge(p, attend(y[:, :, 0], y[:, :, 1], y[:, :, 2]))


@program(seq, qkv=((d, 3 * h * k), DENSE), **OUT)
def attention_fused_by_heads(p, x):
    return merge(p, attend(*jnp.split((x @ p["qkv"]).reshape(b, t, h, 3 * k), 3, -1)))


@program(seq, qkv=((d, h + 2, k), HEADS), **OUT)
def attention_fused_of_grouped_queries(p, x):
    y = jnp.einsum("btd,dhk->bthk", x, p["qkv"])
    q, k_, v_ = jnp.split(y, [h, h + 1], axis=2)
    return merge(p, attend(q, jnp.repeat(k_, h, 2), jnp.repeat(v_, h, 2)))


@program(seq, **QKV, **OUT, **{f"b{n}": ((h, k), vector(0, 1)) for n in "qkv"})
def attention_with_biases(p, x):
    q, k_, v_ = (y + p[f"b{n}"] for n, y in zip("qkv", project(p, x), strict=True))
    return merge(p, attend(q, k_, v_))


@program(seq, **QKV, **OUT, gq=((h, k), vector(0, 1)), gk=((k,), vector(0)))
def attention_with_qk_norm(p, x):
    q, k_, v_ = project(p, x)
    return merge(p, attend(norm(q) * p["gq"], norm(k_) * p["gk"], v_))


@program(seq, **QKV, temperature=((h, 1, 1), vector(0, 1, 2)))
def cosine_attention(p, x):
    q, k_, v_ = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in project(p, x))
    scores = jnp.einsum("bthk,bshk->bhts", q, k_) * jnp.exp(jnp.minimum(p["temperature"], 4))
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v_)


@program(seq, q=((d, 4, k), HEADS), kv=((d, 2, 2, k), matrix([0], [1, 2, 3])))
def grouped_queries(p, x):
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    kv = jnp.einsum("btd,dchk->cbthk", x, p["kv"])
    return attend(q, *(jnp.repeat(y, 2, axis=2) for y in kv))


@program(seq, q=((d, 4, k), HEADS), k=((d, 2, k), HEADS), v=((d, 2, k), HEADS))
def grouped_queries_by_reshape(p, x):
    q, k_, v_ = project(p, x)
    q = q.reshape(b, t, 2, 2, k)
    w = jax.nn.softmax(jnp.einsum("btgrk,bsgk->bgrts", q, k_))
    return jnp.einsum("bgrts,bsgk->btgrk", w, v_)


@program(seq, q=((d, 2, 2, k), matrix([0], [1, 2, 3])), k=((d, 2, k), HEADS), v=((d, 2, k), HEADS))
def grouped_queries_by_axes(p, x):
    q = jnp.einsum("btd,dgrk->btgrk", x, p["q"])
    k_, v_ = (jnp.einsum("btd,dgk->btgk", x, p[n]) for n in "kv")
    w = jax.nn.softmax(jnp.einsum("btgrk,bsgk->bgrts", q, k_))
    return jnp.einsum("bgrts,bsgk->btgrk", w, v_)


@program(seq, q=((d, 4, k), HEADS), k=((d, 2, k), HEADS), v=((d, 2, k), HEADS))
def grouped_queries_by_a_one_hot_matrix(p, x):
    spread = jnp.repeat(jnp.eye(2), 2, axis=1)
    w = {n: jnp.einsum("dgk,gh->dhk", p[n], spread) for n in "kv"}
    return attend(*project({"q": p["q"], **w}, x))


@program(seq, q=((d, h, k), HEADS), k=((d, k), DENSE), v=((d, k), DENSE))
def multi_query(p, x):
    q, k_, v_ = jnp.einsum("btd,dhk->bthk", x, p["q"]), x @ p["k"], x @ p["v"]
    w = jax.nn.softmax(jnp.einsum("bthk,bsk->bhts", q, k_))
    return jnp.einsum("bhts,bsk->bthk", w, v_)


@program(seq, q=((d, h, k), HEADS), k=((d, k), DENSE))
def multi_query_of_one_token(p, x):
    q, k_ = jnp.einsum("bd,dhk->bhk", x[:, -1], p["q"]), x @ p["k"]
    return jnp.einsum("bhk,bsk->bhs", q, k_)


@program(
    seq,
    down=((d, 4), DENSE),
    up_k=((4, h, k), HEADS),
    up_v=((4, h, k), HEADS),
    q_down=((d, 4), DENSE),
    q_up=((4, h, k), HEADS),
    rope=((d, k), DENSE),
    **OUT,
)
def latent_attention(p, x):
    c, cq = norm(x @ p["down"]), norm(x @ p["q_down"])
    k_, v_ = (jnp.einsum("btc,chk->bthk", c, p[n]) for n in ("up_k", "up_v"))
    shared = jnp.broadcast_to((x @ p["rope"])[:, :, None], k_.shape)
    q = jnp.einsum("btc,chk->bthk", cq, p["q_up"])
    k_ = jnp.concatenate([k_, shared], -1)
    w = jnp.einsum("bthk,bshk->bhts", jnp.concatenate([q, q], -1), k_)
    return merge(p, jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(w), v_))


@program(seq, q=((d, h, k), HEADS), down=((d, 4), DENSE), up=((4, h, k), matrix([2], [0])))
def latent_attention_absorbed(p, x):
    """The keys' head dimension meets the queries head by head, and the latents come out."""
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    q = jnp.einsum("bthk,chk->bthc", q, p["up"])
    return jnp.einsum("bthc,bsc->bhts", q, x @ p["down"])


@program(seq, **QKV, u=((h, k), vector(0, 1)), r=((d, h, k), matrix([2], [0])))
def transformer_xl(p, x):
    """The positions are constants: what meets r are the queries, head by head."""
    q, k_, v_ = project(p, x)
    r = jnp.einsum("sd,dhk->shk", jnp.ones((t, d)), p["r"])
    scores = jnp.einsum("bthk,bshk->bhts", q + p["u"], k_) + jnp.einsum("bthk,shk->bhts", q, r)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v_)


DISTANCES = np.arange(t)[:, None] - np.arange(t) + t - 1


@program(seq, **QKV, rel_k=((2 * t - 1, k), DENSE), rel_v=((2 * t - 1, k), DENSE))
def shaw(p, x):
    q, k_, v_ = project(p, x)
    scores = jnp.einsum("bthk,bshk->bhts", q, k_)
    w = jax.nn.softmax(scores + jnp.einsum("bthk,tsk->bhts", q, p["rel_k"][DISTANCES]))
    rows = jnp.einsum("bhts,tsk->bthk", w, p["rel_v"][DISTANCES])
    return rows + jnp.einsum("bhts,bshk->bthk", w, v_)


@program(f32(b, t, t, k), rel_h=((2 * t - 1, k), DENSE), rel_w=((2 * t - 1, k), DENSE))
def sam_decomposed_positions(p, q):
    rel_h = jnp.einsum("bhwk,hsk->bhws", q, p["rel_h"][DISTANCES])
    rel_w = jnp.einsum("bhwk,wsk->bhws", q, p["rel_w"][DISTANCES])
    return rel_h[..., :, None] + rel_w[..., None, :]


@program(seq, **QKV, table=((2 * t - 1, h), DENSE))
def relative_bias_of_t5(p, x):
    q, k_, v_ = project(p, x)
    bias = p["table"][DISTANCES].transpose(2, 0, 1)
    w = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k_) + bias)
    return jnp.einsum("bhts,bshk->bthk", w, v_)


@program(seq, **QKV, bias=((h, t, t), vector(0, 1, 2)))
def absolute_bias_of_scores(p, x):
    q, k_, v_ = project(p, x)
    w = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k_) + p["bias"])
    return jnp.einsum("bhts,bshk->bthk", w, v_)


@program(seq, **QKV, sink=((h,), vector(0)))
def attention_sink(p, x):
    q, k_, v_ = project(p, x)
    scores = jnp.einsum("bthk,bshk->bhts", q, k_)
    sink = jnp.broadcast_to(p["sink"][:, None, None], (b, h, t, 1))
    return jnp.einsum(
        "bhts,bshk->bthk", jax.nn.softmax(jnp.concatenate([scores, sink], -1))[..., :-1], v_
    )


@program(seq, **QKV, talk=((h, h), DENSE))
def talking_heads(p, x):
    q, k_, v_ = project(p, x)
    scores = jnp.einsum("bhts,hg->bgts", jnp.einsum("bthk,bshk->bhts", q, k_), p["talk"])
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v_)


@program(seq, **QKV, gate=((d, h), DENSE), **OUT)
def gated_heads(p, x):
    y = attend(*project(p, x)) * jax.nn.sigmoid(x @ p["gate"])[..., None]
    return merge(p, y)


@program(seq, **QKV)
def linear_attention(p, x):
    q, k_, v_ = project(p, x)
    state = jnp.einsum("bshk,bshv->bhkv", jax.nn.elu(k_) + 1, v_)
    return jnp.einsum("bthk,bhkv->bthv", jax.nn.elu(q) + 1, state)


@program(seq, keys=((f, d), TRANSPOSED), values=((f, d), DENSE))
def persistent_memory(p, x):
    return jax.nn.softmax(x @ p["keys"].T) @ p["values"]


@program(
    seq,
    qa=((d, 4), DENSE),
    q_norm=((4,), vector(0)),
    qb=((4, h, k + 2), HEADS),
    kva=((d, 5 + 2), DENSE),
    kv_norm=((5,), vector(0)),
    kvb=((5, h, k + k), HEADS),
    **OUT,
)
def latent_attention_fused(p, x):
    """As DeepSeek's: low ranks with norms between, and one rotated key of all heads."""
    q = jnp.einsum("btr,rhk->bthk", norm(x @ p["qa"]) * p["q_norm"], p["qb"])
    latent, rotated = jnp.split(x @ p["kva"], [5], -1)
    y = jnp.einsum("btr,rhk->bthk", norm(latent) * p["kv_norm"], p["kvb"])
    k_, v_ = jnp.split(y, 2, -1)
    rotated = jnp.broadcast_to(rotate(rotated)[:, :, None], (b, t, h, 2))
    q = jnp.concatenate([q[..., :k], rotate(q[..., k:])], -1)
    return merge(p, attend(q, jnp.concatenate([k_, rotated], -1), v_))


@program(seq, latents=((3, d), vector(0, 1)), q=((d, d), DENSE), k=((d, d), DENSE))
def perceiver(p, x):
    y = p["latents"] + jax.nn.softmax((p["latents"] @ p["q"]) @ (x @ p["k"]).mT) @ x
    return y


@program(seq, probe=((1, 1, d), vector(0, 1, 2)), **QKV)
def attention_pooling(p, x):
    q = jnp.einsum("btd,dhk->bthk", jnp.tile(p["probe"], (b, 1, 1)), p["q"])
    return attend(q, *project(p, x)[1:])


# Embeddings and positions.

case("embedding", lambda w, t: w[t], (v, d), DENSE, tokens)
case(
    "embedding, scaled and tied", lambda w, t: jnp.tanh(w[t] * d**0.5) @ w.T, (v, d), DENSE, tokens
)
case("embedding, its squared entries", lambda w, t: square(w[t]), (v, d), DENSE, tokens)
case("embedding by a one-hot product", lambda w, t: jax.nn.one_hot(t, v) @ w, (v, d), DENSE, tokens)
case(
    "embedding by a one-hot sum",
    lambda w, t: (jax.nn.one_hot(t, v)[..., None] * w).sum(2),
    (v, d),
    DENSE,
    tokens,
)
case(
    "embedding dropout by rows",
    lambda w, t, m: square((w * m)[t]),
    (v, d),
    DENSE,
    tokens,
    f32(v, 1),
)
case(
    "embedding dropout by entries",
    lambda w, t, m: square((w * m)[t]),
    (v, d),
    DENSE,
    tokens,
    f32(v, d),
)
case("embedding with noise", lambda w, t, n: square((w + n)[t]), (v, d), DENSE, tokens, f32(v, d))
case(
    "embedding with a key's dropout",
    lambda w, t, key: (w * jax.random.bernoulli(key, 0.5, (v, 1)))[t],
    (v, d),
    DENSE,
    tokens,
    KEY,
)
case(
    "embedding, normalized",
    lambda w, t: (w / jnp.linalg.norm(w, axis=1, keepdims=True))[t],
    (v, d),
    DENSE,
    tokens,
)
case("embedding bag", lambda w, t: w[t].mean(1), (v, d), DENSE, tokens)
case(
    "embedding of heads, then scores",
    lambda w, t, y: jnp.einsum("bthd,bsd->bhts", w[t], y),
    (v, h, d),
    HEADS,
    tokens,
    seq,
)
case(
    "codebook of VQ, nearest",
    lambda w, x: w[jnp.argmin(((x[:, None] - w) ** 2).sum(-1), -1)],
    (v, d),
    DENSE,
    x,
)
case(
    "codebooks by vmap",
    lambda w, t: jax.vmap(lambda w, t: w[t], (0, 1), 1)(w, t),
    (t, v, d),
    EXPERTS,
    tokens,
)
case("sampled softmax", lambda w, x, n: x @ w[n].T, (v, d), DENSE, x, i32(5))
case("logits of the labels", lambda w, x, y: jnp.sum(x * w[y], -1), (v, d), DENSE, x, i32(b))
case("position added", lambda w, x: x + w, (t, d), vector(0, 1), seq)
case("position added, then a mean", lambda w, x: (x + w).mean(1), (t, d), vector(0, 1), seq)
case("position sliced", lambda w, x: x + w[:, :t], (1, 8, d), vector(0, 1, 2), seq)
case("position by an index", lambda w, x: x + w[jnp.arange(t)], (8, d), DENSE, seq)
case(
    "position resized",
    lambda w, x: x + jax.image.resize(w, (1, 8, 8, 3), "bilinear"),
    (1, 4, 4, 3),
    vector(0, 1, 2, 3),
    image,
)
case("position pooled", lambda w, x: x + w.reshape(t, 2, d).mean(1), (2 * t, d), vector(0, 1), seq)
case(
    "position gathered for masked tokens",
    lambda w, x, i: jnp.take_along_axis(x + w, i[..., None], 1),
    (t, d),
    vector(0, 1),
    seq,
    i32(b, 3),
)
case(
    "class token",
    lambda w, x: jnp.concatenate([jnp.tile(w, (b, 1, 1)), x], 1),
    (1, 1, d),
    vector(0, 1, 2),
    seq,
)
case(
    "register tokens",
    lambda w, x: jnp.concatenate([jnp.broadcast_to(w, (b, 3, d)), x], 1),
    (3, d),
    vector(0, 1),
    seq,
)
case(
    "mask token",
    lambda w, x, m: jnp.where(m[..., None] > 0, w, x),
    (1, 1, d),
    vector(0, 1, 2),
    seq,
    f32(b, t),
)
case(
    "initial state",
    lambda w, x: lax.scan(
        lambda c, x: (jnp.tanh(c + x), None), jnp.tile(w, (b, 1)), x.swapaxes(0, 1)
    )[0],
    (1, d),
    vector(0, 1),
    seq,
)


@program(tokens, e=((v, d), DENSE), pos=((t, d), vector(0, 1)), w=((d, d), DENSE))
def tokens_and_positions(p, tokens):
    x = p["e"][tokens] + p["pos"]
    return (x + jax.nn.relu(norm(x) @ p["w"])) @ p["e"].T


@program(tokens, e=((v, d), DENSE), pos=((t, d), vector(0, 1)), **QKV)
def tokens_and_positions_in_attention(p, tokens):
    x = norm(p["e"][tokens] + p["pos"])
    return attend(*project(p, x))


@program(tokens, e=((v, 4), DENSE), up=((4, d), DENSE))
def factorized_embedding(p, tokens):
    x = jnp.tanh(p["e"][tokens] @ p["up"])
    return (x @ p["up"].T) @ p["e"].T


@program(tokens, e=((v, 4), DENSE), up=((4, d), DENSE))
def factorized_embedding_merged(p, tokens):
    return (p["e"] @ p["up"])[tokens]


@program(i32(b), i32(b), user=((v, d), DENSE), item=((f, d), DENSE), bias=((v,), vector(0)))
def matrix_factorization(p, i, j):
    return jnp.sum(p["user"][i] * p["item"][j], -1) + p["bias"][i]


@program(x, w=((d,), vector(0)), v=((d, k), DENSE))
def factorization_machine(p, x):
    pairs = (x @ p["v"]) ** 2 - x**2 @ p["v"] ** 2
    return x @ p["w"] + 0.5 * pairs.sum(-1)


@program(x, v=((d, k), DENSE))
def factorization_machine_by_products(p, x):
    rows = x[:, :, None] * p["v"]
    return jnp.sum(rows.sum(1) ** 2 - (rows**2).sum(1), -1)


@program(tokens, v=((v, k), DENSE))
def factorization_machine_of_fields(p, fields):
    rows = p["v"][fields]
    return jnp.einsum("bfk,bgk->bfg", rows, rows)


@program(
    f32(3, d),
    f32(3, k),
    image=((d, f), DENSE),
    text=((k, f), DENSE),
    scale=((), vector()),
    bias=((), vector()),
)
def clip(p, images, texts):
    i, t = images @ p["image"], texts @ p["text"]
    i, t = (
        i / jnp.linalg.norm(i, axis=1, keepdims=True),
        t / jnp.linalg.norm(t, axis=1, keepdims=True),
    )
    return jax.nn.log_softmax(jnp.exp(p["scale"]) * i @ t.T + p["bias"])


@program(x, i32(b), proxies=((f, d), TRANSPOSED), scale=((), vector()))
def cosine_classifier(p, x, y):
    w = p["proxies"] / jnp.linalg.norm(p["proxies"], axis=1, keepdims=True)
    logits = p["scale"] * (x / jnp.linalg.norm(x, axis=1, keepdims=True)) @ w.T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)


# Mixtures of experts.

ROUTER = {"r": ((d, e), DENSE)}
FFN = {"up": ((e, d, f), EXPERTS), "down": ((e, f, d), EXPERTS)}


@program(x, **ROUTER, up=((e, d, f), matrix([1], [0, 2])), down=((e, f, d), EXPERTS))
def dense_experts(p, x):
    """Every token goes to all experts: up is one matrix to all of their units."""
    y = jnp.einsum("bef,efd->bed", jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["up"])), p["down"])
    return jnp.einsum("bed,be->bd", y, jax.nn.softmax(x @ p["r"]))


@program(x, **ROUTER, **FFN)
def experts_by_dispatch(p, x):
    gates = jax.nn.softmax(x @ p["r"])
    dispatch = jax.nn.one_hot(gates.argmax(-1), e)
    y = jnp.einsum("be,bd->ebd", dispatch, x)
    y = jnp.einsum("ebf,efd->ebd", jax.nn.gelu(jnp.einsum("ebd,edf->ebf", y, p["up"])), p["down"])
    return jnp.einsum("ebd,be->bd", y, gates * dispatch)


@program(x, **ROUTER, **FFN)
def experts_by_capacity(p, x):
    gates = jax.nn.softmax(x @ p["r"])
    place = jnp.cumsum(jax.nn.one_hot(gates.argmax(-1), e, dtype=jnp.int32), 0)
    dispatch = jax.nn.one_hot(place, 2) * gates[..., None]
    y = jnp.einsum("bec,bd->ecd", dispatch, x)
    y = jnp.einsum("ecf,efd->ecd", jax.nn.gelu(jnp.einsum("ecd,edf->ecf", y, p["up"])), p["down"])
    return jnp.einsum("ecd,bec->bd", y, dispatch)


@program(x, **ROUTER, **FFN)
def experts_by_ragged_products(p, x):
    order = jnp.argmax(x @ p["r"], -1)
    sizes = jnp.bincount(order, length=e)
    y = lax.ragged_dot(x[jnp.argsort(order)], p["up"], sizes)
    return lax.ragged_dot(jax.nn.silu(y), p["down"], sizes)


@program(x, g=((3, d), vector(1)), **ROUTER, **FFN)
def experts_by_ragged_products_after_a_gain(p, x):
    order = jnp.argmax(x @ p["r"], -1)
    sizes = jnp.bincount(order, length=e)
    y = lax.ragged_dot((x * p["g"][1])[jnp.argsort(order)], p["up"], sizes)
    return lax.ragged_dot(jax.nn.silu(y), p["down"], sizes)


@program(x, **ROUTER, up=((e, d, 2 * f), EXPERTS), bias=((e, 2 * f), DENSE), down=FFN["down"])
def gated_experts_by_ragged_products(p, x):
    order = jnp.argmax(x @ p["r"], -1)
    sizes = jnp.bincount(order, length=e)
    y = lax.ragged_dot(x[jnp.argsort(order)], p["up"], sizes) + p["bias"][jnp.sort(order)]
    gate, y = jnp.split(y, 2, -1)
    return lax.ragged_dot(jax.nn.silu(gate) * y, p["down"], sizes)


@program(x, **ROUTER, up=((e, f, d), matrix([2], [1])), down=FFN["down"])
def experts_by_ragged_products_out_first(p, x):
    order = jnp.argmax(x @ p["r"], -1)
    sizes = jnp.bincount(order, length=e)
    numbers = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
    y = lax.ragged_dot_general(x[jnp.argsort(order)], p["up"], sizes, numbers)
    return lax.ragged_dot(jax.nn.silu(y), p["down"], sizes)


@program(x, **ROUTER, **FFN)
def experts_by_an_index(p, x):
    i = jnp.argmax(x @ p["r"], -1)
    y = jnp.einsum("bd,bdf->bf", x, p["up"][i])
    return jnp.einsum("bf,bfd->bd", jax.nn.relu(y), p["down"][i])


@program(x, **ROUTER, **FFN)
def two_experts_by_an_index(p, x):
    gates, i = lax.top_k(jax.nn.softmax(x @ p["r"]), 2)
    y = jnp.einsum("bd,bkdf->bkf", x, p["up"][i])
    return jnp.einsum("bkf,bkfd,bk->bd", jax.nn.relu(y), p["down"][i], gates)


@program(x, **ROUTER, **FFN)
def experts_by_a_loop(p, x):
    gates = jax.nn.softmax(x @ p["r"])
    return sum(gates[:, i : i + 1] * (jax.nn.relu(x @ p["up"][i]) @ p["down"][i]) for i in range(e))


@program(x, **ROUTER, **FFN)
def experts_by_a_scan(p, x):
    gates = jax.nn.softmax(x @ p["r"])

    def add(y, expert):
        up, down, gate = expert
        return y + gate[:, None] * (jax.nn.relu(x @ up) @ down), None

    return lax.scan(add, jnp.zeros_like(x), (p["up"], p["down"], gates.T))[0]


@program(x, **ROUTER, w=((e, d, f), EXPERTS))
def experts_by_switch(p, x):
    i = jnp.argmax(x.mean(0) @ p["r"])
    return lax.switch(i, [lambda x, j=j: x @ p["w"][j] for j in range(e)], x)


@program(x, **ROUTER, w=((e, d, f), EXPERTS))
def soft_merged_experts(p, x):
    return jnp.einsum(
        "bi,bio->bo", x, jnp.einsum("be,eio->bio", jax.nn.softmax(x @ p["r"]), p["w"])
    )


@program(x, **ROUTER, w=((e, d, f), EXPERTS))
def condconv_dense_by_sum(p, x):
    r = jax.nn.sigmoid(x @ p["r"])
    return jnp.einsum("bi,bio->bo", x, (r[:, :, None, None] * p["w"]).sum(1))


@program(image, r=((3, e), DENSE), w=((e, 3, 3, 3, f), matrix([1, 2, 3], [4])))
def condconv(p, x):
    r = jax.nn.sigmoid(x.mean((1, 2)) @ p["r"])
    w = jnp.einsum("be,ehwio->bhwio", r, p["w"])
    return jax.vmap(lambda x, w: conv(x[None], w)[0])(x, w)


@program(image, r=((3, e), DENSE), w=((e, 3, 3, 3, f), matrix([1, 2, 3], [4])))
def condconv_by_sum(p, x):
    r = jax.nn.sigmoid(x.mean((1, 2)) @ p["r"])
    w = (r[:, :, None, None, None, None] * p["w"]).sum(1)
    return jax.vmap(lambda x, w: conv(x[None], w)[0])(x, w)


@program(x, a=((e,), vector(0)), w=((e, d, f), EXPERTS))
def learned_mixture(p, x):
    return x @ jnp.tensordot(jax.nn.softmax(p["a"]), p["w"], 1)


@program(x, a=((e,), vector(0)), w=((e, d, f), EXPERTS))
def learned_mixture_by_sum(p, x):
    return x @ (jax.nn.softmax(p["a"])[:, None, None] * p["w"]).sum(0)


@program(f32(f, v, d), a=((f, 3), DENSE), basis=((3, d, 5), EXPERTS))
def rgcn_basis(p, x):
    w = jnp.einsum("rb,bio->rio", p["a"], p["basis"])
    return jnp.einsum("rni,rio->no", x, w)


@program(f32(b, k), x, hyper=((k, d * f), DENSE))
def hypernetwork(p, z, x):
    w = (z @ p["hyper"]).reshape(b, d, f)
    return jnp.einsum("bi,bio->bo", x, w)


@program(x, z=((k,), vector(0)), hyper=((k, d * f), DENSE), bias=((d * f,), vector(0)))
def hypernetwork_of_a_learned_code(p, x):
    return jnp.tanh(x @ jnp.tanh(p["z"] @ p["hyper"] + p["bias"]).reshape(d, f))


# Convolutions.

case("convolution", lambda w, x: conv(x, w), (3, 3, 3, f), CONV, image)
case("patches", lambda w, x: conv(x, w, stride=4), (4, 4, 3, f), CONV, image)
case(
    "patches by a product",
    lambda w, x: x.reshape(b, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, 48) @ w,
    (48, f),
    DENSE,
    image,
)
case("depthwise", lambda w, x: conv(x, w, 3), (3, 3, 1, 3), vector(0, 1, 2), image)
case("grouped", lambda w, x: conv(x, w, 2), (3, 3, 2, 8), NOTHING, f32(b, 5, 5, 4))
case("pointwise", lambda w, x: conv(x, w), (1, 1, 3, f), CONV, image)
case(
    "convolution in one dimension",
    lambda w, x: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    (3, d, f),
    MERGE,
    seq,
)
case(
    "causal depthwise by shifts",
    lambda w, x: sum(jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :t] * w[i] for i in range(3)),
    (3, d),
    vector(1),
    seq,
)
case(
    "standardized kernel",
    lambda w, x: conv(x, (w - w.mean((0, 1, 2))) / w.std((0, 1, 2))),
    (3, 3, 3, f),
    CONV,
    image,
)
case(
    "gain of a kernel",
    lambda w, x: conv(x, jnp.ones((3, 3, 3, 4)) * w),
    (1, 1, 1, 4),
    vector(0, 1, 2, 3),
    image,
)
case(
    "FlexiViT's resized kernel",
    lambda w, x: conv(x, jax.image.resize(w, (8, 8, 3, f), "bilinear"), stride=8),
    (4, 4, 3, f),
    CONV,
    image,
)
case(
    "steerable kernel",
    lambda w, x: conv(x, jnp.einsum("hwb,bio->hwio", jnp.ones((3, 3, 5)), w)),
    (5, 3, f),
    MERGE,
    image,
)
case(
    "blurred kernel",
    lambda w, x: conv(x, jnp.einsum("hg,gwio->hwio", jnp.ones((3, 3)), w)),
    (3, 3, 3, f),
    CONV,
    image,
)
case("inflated kernel", lambda w, x: conv(x, jnp.repeat(w, 3, 2)), (3, 3, 1, f), CONV, image)
case(
    "transposed convolution",
    lambda w, x: lax.conv_transpose(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    (3, 3, 3, f),
    CONV,
    image,
)
case(
    "masked convolution of PixelCNN",
    lambda w, x: conv(x, w * (np.arange(9) < 4).reshape(3, 3, 1, 1)),
    (3, 3, 3, f),
    CONV,
    image,
)
case(
    "Winograd's transformed kernel",
    lambda w, x: jnp.einsum(
        "buvc,uvcf->bf", x, jnp.einsum("uh,vw,hwcf->uvcf", jnp.ones((4, 3)), jnp.ones((4, 3)), w)
    ),
    (3, 3, 3, f),
    CONV,
    f32(b, 4, 4, 3),
)


@program(image, w=((3, 3, 3, f), CONV), g=((f,), vector(0)), b=((f,), vector(0)))
def conv_batch_norm(p, x):
    y = conv(x, p["w"])
    y = (y - y.mean((0, 1, 2))) * lax.rsqrt(y.var((0, 1, 2)) + 1e-5)
    return jax.nn.relu(y * p["g"] + p["b"])


@program(image, w=((3, 3, 3, f), CONV), squeeze=((f, 2), DENSE), excite=((2, f), DENSE))
def squeeze_and_excite(p, x):
    y = conv(x, p["w"])
    s = jax.nn.sigmoid(jax.nn.relu(y.mean((1, 2)) @ p["squeeze"]) @ p["excite"])
    return y * s[:, None, None]


# Structured and spectral layers.


@program(seq, log_dt=((d,), vector(0)), a=((d, k), vector(1)), c=((d, k), vector(1)))
def s4d(p, x):
    """Each channel has a filter of its own: nothing is summed across them, as in a depthwise."""
    dt_a = jnp.exp(p["log_dt"])[:, None] * -jnp.exp(p["a"])
    kernel = jnp.einsum("dk,dkl->dl", p["c"], jnp.exp(dt_a[:, :, None] * jnp.arange(t)))
    spectrum = jnp.fft.rfft(x, 2 * t, axis=1) * jnp.fft.rfft(kernel.T, 2 * t, axis=0)
    return jnp.fft.irfft(spectrum, axis=1)[:, :t]


@program(
    seq,
    a=((d, k), vector(0, 1)),
    b=((d, k), DENSE),
    c=((d, k), DENSE),
    dt=((d, d), DENSE),
    bias=((d,), vector(0)),
)
def mamba(p, x):
    dt = jax.nn.softplus(x @ p["dt"] + p["bias"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["a"]))
    drive = (dt * x)[..., None] * (x @ p["b"])[:, :, None]

    def step(state, inputs):
        decay, drive, c = inputs
        state = decay * state + drive
        return state, jnp.einsum("bdk,bk->bd", state, c)

    inputs = (decay, drive, x @ p["c"])
    inputs = jax.tree.map(lambda y: y.swapaxes(0, 1), inputs)
    return lax.scan(step, jnp.zeros((b, d, k)), inputs)[1]


@program(seq, mix=((d,), vector(0)), w=((d,), vector(0)), **dict.fromkeys("rkv", ((d, d), DENSE)))
def rwkv(p, x):
    shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :t]
    x = x * p["mix"] + shifted * (1 - p["mix"])
    r, k_, v_ = (x @ p[n] for n in "rkv")

    def step(state, kv):
        state = jnp.exp(-jnp.exp(p["w"])) * state + jnp.exp(kv[0]) * kv[1]
        return state, state

    states = lax.scan(step, jnp.zeros((b, d)), (k_.swapaxes(0, 1), v_.swapaxes(0, 1)))[1]
    return jax.nn.sigmoid(r) * states.swapaxes(0, 1)


case(
    "FNO",
    lambda w, x: jnp.fft.irfft(jnp.einsum("btd,tdf->btf", jnp.fft.rfft(x, axis=1), w), axis=1),
    (3, d, f),
    EXPERTS,
    seq,
)
case(
    "FNO, real and imaginary",
    lambda w, x: jnp.fft.irfft(
        jnp.einsum("btd,dft->btf", jnp.fft.rfft(x, axis=1), lax.complex(w[0], w[1])), axis=1
    ),
    (2, d, f, 3),
    matrix([1], [2]),
    seq,
)
case(
    "spectral filter",
    lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * w, axis=1),
    (3, d),
    vector(0, 1),
    seq,
)
case(
    "block-diagonal",
    lambda w, x: jnp.einsum("bni,nio->bno", x.reshape(b, 2, 3), w).reshape(b, -1),
    (2, 3, 4),
    EXPERTS,
    x,
)
case(
    "Monarch's first factor",
    lambda w, x: jnp.einsum("bni,nio->bon", x.reshape(b, 2, 3), w),
    (2, 3, 4),
    EXPERTS,
    x,
)
case(
    "Chebyshev graph convolution",
    lambda w, a, x: jnp.einsum("knm,mi,kio->no", jnp.stack([a, a @ a]), x, w),
    (2, d, f),
    MERGE,
    f32(v, v),
    f32(v, d),
)
case("graph convolution", lambda w, a, x: a @ (x @ w), (d, f), DENSE, f32(v, v), f32(v, d))
case("learned adjacency", lambda w, x: w @ x, (v, v), TRANSPOSED, f32(v, d))
case(
    "learned adjacency beside the given",
    lambda w, a, x: (w + a) @ x,
    (v, v),
    TRANSPOSED,
    f32(v, v),
    f32(v, d),
)


@program(f32(b, 4), g1=((2, 2, 3), matrix([0], [1, 2])), g2=((3, 2, 2), MERGE))
def tensor_train(p, x):
    y = jnp.einsum("bij,iar->bjar", x.reshape(b, 2, 2), p["g1"])
    return jnp.einsum("bjar,rjc->bac", y, p["g2"]).reshape(b, 4)


@program(f32(b, 6), a=((2, 3), DENSE), c=((3, 4), DENSE))
def kronecker(p, x):
    return jnp.einsum("bij,io,jp->bop", x.reshape(b, 2, 3), p["a"], p["c"])


@program(x, w=((d, d), DENSE), u=((d, d), DENSE))
def deq(p, x):
    def step(z):
        return jnp.tanh(z @ p["w"] + x @ p["u"])

    return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, step(c[1])), (0, x))[1]


@program(x, w=((d, d), DENSE), b=((d,), vector(0)))
def neural_ode(p, x):
    return lax.fori_loop(0, 4, lambda _, x: x + 0.1 * jnp.tanh(x @ p["w"] + p["b"]), x)


@program(x, layers=((3, d, d), EXPERTS), biases=((3, d), vector(1)))
def scanned_layers(p, x):
    return lax.scan(lambda x, p: (jnp.tanh(x @ p[0] + p[1]), None), x, (p["layers"], p["biases"]))[
        0
    ]


@program(x, layers=((3, d, d), EXPERTS), w=((d, d), DENSE))
def scanned_remat_layers(p, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w) @ p["w"], None))
    return lax.scan(body, x, p["layers"])[0]


@program(seq, **dict.fromkeys(("w", "u"), ((d, 4 * d), DENSE)), b=((4 * d,), vector(0)))
def lstm(p, x):
    def step(carry, x):
        hidden, cell = carry
        i, g, o, forget = jnp.split(x @ p["w"] + hidden @ p["u"] + p["b"], 4, -1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

    return lax.scan(step, (jnp.zeros((b, d)), jnp.zeros((b, d))), x.swapaxes(0, 1))[0]


@jax.custom_jvp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defjvp(lambda x, dx: (swish(x[0]), dx[0]))


@jax.custom_vjp
def quantize(w):
    return jnp.round(w)


quantize.defvjp(lambda w: (quantize(w), None), lambda _, g: (g,))

case("custom_jvp", lambda w, x: swish(x @ w), (d, f), DENSE, x)
case("custom_vjp on a weight", lambda w, x: x @ quantize(w), (d, f), DENSE, x)
case("remat", lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), (d, f), DENSE, x)
case(
    "cond",
    lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((b, f))),
    (d, f),
    DENSE,
    x,
)
case(
    "weights chosen by cond",
    lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w[0], lambda: w[1]),
    (2, d, f),
    EXPERTS,
    x,
)
case("gradient of the loss", lambda w, x: jax.grad(lambda w: square(x @ w))(w), (d, f), DENSE, x)
case(
    "value of a hessian product",
    lambda w, x: jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (x,))[1],
    (d, f),
    DENSE,
    x,
)
case(
    "per-example gradients",
    lambda w, x: jax.vmap(jax.grad(lambda w, x: square(x @ w)), (None, 0))(w, x),
    (d, f),
    DENSE,
    x,
)
case(
    "equinox dense",
    lambda w, x: jax.vmap(
        eqx.tree_at(
            lambda m: m.weight, eqx.nn.Linear(d, f, use_bias=False, key=jax.random.key(0)), w
        )
    )(x),
    (f, d),
    TRANSPOSED,
    x,
)


@program(seq, w=((d, f), DENSE), v=((f, d), DENSE))
def tensor_parallel(p, x):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, v, x):
        return lax.psum(jax.nn.relu(x @ w) @ v, "x")

    pad = jnp.pad(p["w"], ((0, 0), (0, 1))), jnp.pad(p["v"], ((0, 1), (0, 0)))
    specs = (P(None, "x"), P("x"), P())
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*pad, x)


# Whole models.


def transformer(p, tokens):
    x = p["e"][tokens] + p["pos"]
    y = norm(x)
    x = x + jax.nn.softmax((y @ p["q"]) @ (y @ p["k"]).mT) @ (y @ p["v"])
    x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return norm(x).mean(-2) @ p["head"]


TRANSFORMER = {
    "e": ((v, d), DENSE),
    "pos": ((t, d), vector(0, 1)),
    "up": ((d, f), DENSE),
    "down": ((f, d), DENSE),
    "head": ((d, 3), DENSE),
    **dict.fromkeys("qkv", ((d, d), DENSE)),
}


@program(tokens, **TRANSFORMER)
def transformer_of_a_batch(p, tokens):
    return transformer(p, tokens)


@program(i32(t), **TRANSFORMER)
def transformer_of_one_sequence(p, tokens):
    return transformer(p, tokens)


@program(tokens, **TRANSFORMER)
def transformer_by_vmap(p, tokens):
    return jax.vmap(transformer, (None, 0))(p, tokens)


@program(x, encoder=((d, k), DENSE), codes=((v, k), DENSE), decoder=((k, d), DENSE))
def vq_vae(p, x):
    z = x @ p["encoder"]
    q = p["codes"][jnp.argmin(((z[:, None] - p["codes"]) ** 2).sum(-1), -1)]
    straight = z + lax.stop_gradient(q - z)
    return square(straight @ p["decoder"] - x) + square(lax.stop_gradient(z) - q)


@program(seq, queries=((3, d), vector(0, 1)), q=((d, d), DENSE), k=((d, d), DENSE))
def detr_decoder(p, x):
    y = jnp.zeros((b, 3, d))
    for _ in range(2):
        y = y + jax.nn.softmax(((y + p["queries"]) @ p["q"]) @ (x @ p["k"]).mT) @ x
    return y


@program(seq, w1=((4, 8), DENSE), w2=((8, 9), DENSE), w3=((9, d), DENSE))
def hyena_filter(p, x):
    """A network of constant positions makes the filter."""
    filters = jnp.sin(jnp.sin(jnp.ones((t, 4)) @ p["w1"]) @ p["w2"]) @ p["w3"]
    spectrum = jnp.fft.rfft(x, 2 * t, axis=1) * jnp.fft.rfft(filters, 2 * t, axis=0)
    return jnp.fft.irfft(spectrum, axis=1)[:, :t]


@program(f32(b, h, t, t), w1=((2, 8), DENSE), w2=((8, h), DENSE))
def continuous_position_bias_of_swin(p, scores):
    table = jax.nn.relu(jnp.ones((2 * t - 1, 2)) @ p["w1"]) @ p["w2"]
    return jax.nn.softmax(scores + table[DISTANCES].transpose(2, 0, 1))


@program(x, r=((3, d), vector(0, 1)), s=((3, f), vector(0, 1)), w=((d, f), DENSE))
def batch_ensemble(p, x):
    return jnp.tanh(((x[None] * p["r"][:, None]) @ p["w"]) * p["s"][:, None])


@program(tokens, prompt=((3, d), vector(0, 1)), e=((v, d), DENSE), w=((d, f), DENSE))
def soft_prompt(p, tokens):
    prompt = jnp.broadcast_to(p["prompt"], (b, 3, d))
    return jnp.concatenate([prompt, p["e"][tokens]], 1) @ p["w"]


@program(seq, i32(b, 3), w=((d, d), DENSE), pos=((t, d), vector(0, 1)), u=((d, d), DENSE))
def masked_autoencoder(p, x, kept):
    return jnp.take_along_axis(x @ p["w"] + p["pos"], kept[..., None], 1) @ p["u"]


@program(i32(4, b, 8), f32(b, 8), tables=((4, v, 2), EXPERTS))
def hash_grids(p, corners, weights):
    rows = jax.vmap(lambda table, i: table[i])(p["tables"], corners)
    return jnp.einsum("lbcf,bc->blf", rows, weights)


@program(f32(b, v, d), e1=((v, k), TRANSPOSED), e2=((v, k), DENSE), w=((d, f), DENSE))
def adaptive_adjacency(p, x):
    return jax.nn.softmax(p["e1"] @ p["e2"].T) @ x @ p["w"]


@program(tokens, w=((e, v, d), EXPERTS))
def table_of_a_layer(p, tokens):
    return jnp.tanh(p["w"][1, tokens])


@program(i32(8, e), w=((e, v, d), EXPERTS))
def codebooks(p, codes):
    return jnp.tanh(p["w"][jnp.arange(e), codes]).sum(1)


@program(tokens, w=((3, v, d), EXPERTS))
def table_of_the_scanned_layer(p, tokens):
    start = jnp.zeros((b, t, d))
    return lax.scan(lambda x, i: (x + p["w"][i, tokens], None), start, jnp.arange(3))[0]


@program(tokens, w=((v, d), DENSE), u=((k, f), DENSE))
def first_features_of_a_row(p, tokens):
    return p["w"][tokens, :k] @ p["u"]


@program(i32(), w=((e, v, d), EXPERTS))
def one_row_of_a_layer(p, token):
    return jnp.tanh(p["w"][1, token])


@program(tokens, w=((v, 2, d), matrix([0], [2])), u=((d, f), DENSE))
def second_slot_of_a_row(p, tokens):
    return p["w"][tokens, 1] @ p["u"]


@program(i32(2, b), w=((8, v, d), matrix([0, 1], [2])))
def grid_of_two_data_indices(p, places):
    return jnp.tanh(p["w"][places[0], places[1]])


@program(i32(3, 8), w=((3, v), vector(1)))
def wide_part_of_each_field(p, ids):
    return jax.vmap(lambda w, i: w[i])(p["w"], ids).sum(0)


@program(i32(3, 8), w=((3, v), vector(1)))
def wide_part_by_take_along_axis(p, ids):
    return jnp.take_along_axis(p["w"], ids, 1).sum(0)


@program(x, w=((d, f), DENSE))
def product_masked_before_the_sum(p, x):
    return jnp.where(x[..., None] > 0, x[..., None] * p["w"], 0).sum(1)


@program(x, f32(b, d, f), w=((d, f), DENSE))
def product_with_data_added_before_the_sum(p, x, y):
    return (x[..., None] * p["w"] + y).sum(1)


@program(x, base=((d, f), DENSE), c=((d, f, 3), matrix([2], [1])))
def kolmogorov_arnold(p, x):
    bells = jnp.exp(-((x[..., None] - jnp.linspace(-1, 1, 3)) ** 2))
    splines = jnp.einsum("bdg,dfg->bdf", bells, p["c"])
    return (p["base"] * jax.nn.silu(x)[..., None] + splines).sum(1)


@program(x, f32(b, d, f), w=((d, f), vector(0, 1)))
def gain_of_features_with_data_added(p, x, y):
    return jnp.tanh(x[..., None] * p["w"] + y)


@program(x, r=((d, e), DENSE), w=((e, d, f), EXPERTS))
def experts_by_top_k(p, x):
    shares, chosen = lax.top_k(jax.nn.softmax(x @ p["r"]), 2)
    return jnp.einsum("bd,bdf->bf", x, jnp.einsum("bk,bkdf->bdf", shares, p["w"][chosen]))


@program(x, r=((d, e), DENSE), w=((e, d, f), EXPERTS))
def experts_straight_through(p, x):
    soft = jax.nn.softmax(x @ p["r"])
    hard = jax.nn.one_hot(soft.argmax(-1), e) + soft - lax.stop_gradient(soft)
    return jnp.einsum("bd,bdf->bf", x, jnp.einsum("be,edf->bdf", hard, p["w"]))


@program(tokens, q=((d,), vector(0)), w=((v, d), DENSE), u=((d, f), DENSE))
def pooled_embeddings(p, tokens):
    rows = p["w"][tokens]
    return jnp.einsum("bt,btd->bd", jax.nn.softmax(rows @ p["q"]), rows) @ p["u"]


def scanned(layer):
    """A layer of (params, x) over a stack of params."""

    @functools.wraps(layer)
    def layers(p, x):
        return lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]

    return layers


@program(x, log_dt=((3, d), vector(1)), a=((3, d, k), vector(2)), o=((3, d, d), EXPERTS))
@scanned
def steps_of_a_state_space(p, x):
    decay = jnp.exp(-jnp.exp(p["log_dt"])[:, None] * jnp.exp(p["a"]))
    return x * jnp.einsum("dk,dk->d", decay, decay) @ p["o"]


@program(x, g=((3, e), vector(1)), w=((3, e, d, d), matrix([2], [3])))
@scanned
def mixture_of_bases(p, x):
    return jnp.tanh(x @ jnp.einsum("e,eio->io", jax.nn.softmax(p["g"]), p["w"]))


@program(x, u=((3, d, 2), EXPERTS), s=((3, 2), vector(1)), v=((3, 2, d), EXPERTS))
@scanned
def singular_values(p, x):
    return jnp.tanh(x @ ((p["u"] * p["s"]) @ p["v"]))


@program(x, flat=((3, d * d + d), vector(1)))
@scanned
def flat_buffer_of_a_layer(p, x):
    return jnp.tanh(x @ p["flat"][: d * d].reshape(d, d) + p["flat"][d * d :])


@program(x, g=((3, d), vector(1)))
@scanned
def largest_gains(p, x):
    return x * lax.top_k(p["g"], d)[0]


case(
    "rows in the order of data",
    lambda w, s: jnp.tanh(w[jnp.argsort(s)]) @ jnp.ones((d, 2)),
    (v, d),
    DENSE,
    f32(v),
)
case(
    "weight put into a larger one",
    lambda w, x: x @ jnp.zeros((3, d, f)).at[0].set(w),
    (d, f),
    NOTHING,
    x,
)
case(
    "triangular solve",
    lambda w, x: jax.scipy.linalg.solve_triangular(w, x.T),
    (d, d),
    NOTHING,
    x,
)

# Weights cut into pieces that are scanned, mapped or unstacked.


@program(x, w=((d, v), DENSE))
def head_by_chunks_of_the_vocabulary(p, x):
    def add(total, chunk):
        return total + jnp.exp(x @ chunk.T).sum(-1), None

    return lax.scan(add, jnp.zeros(b), p["w"].T.reshape(3, 3, d))[0]


@program(x, up=((d, 8), DENSE), down=((8, d), DENSE))
def mlp_by_chunks_of_units(p, x):
    def add(total, chunk):
        up, down = chunk
        return total + jax.nn.gelu(x @ up) @ down, None

    chunks = p["up"].reshape(d, 4, 2).swapaxes(0, 1), p["down"].reshape(4, 2, d)
    return lax.scan(add, jnp.zeros((b, d)), chunks)[0]


case(
    "unstacked fused kernel",
    lambda w, x: [jnp.tanh(x @ part.T) for part in jnp.unstack(w.reshape(3, d, d))],
    (3 * d, d),
    TRANSPOSED,
    x,
)
case(
    "heads one by one",
    lambda w, x: lax.map(lambda head: jnp.tanh(x @ head), w.reshape(d, h, k).swapaxes(0, 1)),
    (d, h * k),
    DENSE,
    x,
)
case(
    "table by shards",
    lambda w, i: lax.map(lambda shard: jnp.tanh(shard[i % 3]), w.reshape(3, 3, d)),
    (v, d),
    DENSE,
    i32(b),
)


# Data that a scan or a map returns, or that is put together, varies along the new axis.


@program(f32(b, h, k), f32(3, k), bias=((h, k), vector(0, 1)))
def bias_of_mapped_samples(p, x, keys):
    return (lax.map(jnp.tanh, x) + p["bias"]) @ keys.T


def states_of(x):
    return lax.scan(lambda state, x: (jnp.tanh(state + x),) * 2, jnp.zeros(x.shape[1:]), x)[1]


@program(f32(t, b, d), f32(b, 4, d), pos=((t, d), vector(0, 1)))
def positions_of_recurrent_states(p, x, y):
    return (states_of(x).swapaxes(0, 1) + p["pos"]) @ y.mT


@program(f32(t, b, d), g=((t, d), vector(0, 1)))
def gain_of_recurrent_states(p, x):
    states = states_of(x) * p["g"][:, None]
    return states @ states.mT


@program(f32(t, b), w=((f, t), TRANSPOSED))
def dense_over_recurrent_states(p, x):
    return jnp.tanh((states_of(x).T[:, None] * p["w"]).sum(-1))


@program(seq, g=((3, d), vector(0, 1)))
def mix_of_stacked_layers(p, x):
    mixed = (jnp.stack([x, jnp.tanh(x), jnp.sin(x)]) * p["g"][:, None, None]).sum(0)
    return mixed @ mixed.mT


@program(f32(b), f32(b), w=((2, f), DENSE))
def dense_of_two_stacked_numbers(p, x, y):
    return jnp.tanh((jnp.stack([x, y], -1)[..., None] * p["w"]).sum(1))


@program(x, x, w=((2, d, f), EXPERTS))
def two_stacked_towers(p, x, y):
    return jnp.tanh((jnp.stack([x, y], 1)[..., None] * p["w"]).sum(2))


@program(f32(b, k), f32(b, k), g=((2, k), vector(0, 1)))
def gain_of_two_stacked_tokens(p, x, y):
    z = jnp.stack([x, y], 1) * p["g"]
    return jnp.einsum("bnk,bmk->bnm", z, z)


@program(f32(b), w=((t, d), vector(0, 1)), bias=((t, d), vector(0, 1)))
def scores_of_tokens_made_from_numbers(p, x):
    z = x[:, None, None] * p["w"] + p["bias"]
    return z @ z.mT


# Sums over a part of an axis, and over axes of the leaf itself.


case(
    "codebook by groups of shares",
    lambda w, x: (jax.nn.softmax(x).reshape(b, 2 * v, 1) * w).reshape(b, 2, v, k).sum(2),
    (2 * v, k),
    NOTHING,
    f32(b, 2, v),
)
case(
    "grouped product by a sum",
    lambda w, x: jnp.tanh((x.reshape(b, 2, 3, 1) * w.reshape(2, 3, f)).sum(2)),
    (d, f),
    NOTHING,
    x,
)
case("mean of biases", lambda w, x: jnp.tanh(x + w.mean(0)), (3, d), vector(0, 1), x)
case(
    "norms of rows as gains",
    lambda w, x: x * jnp.linalg.norm(w, axis=-1)[:, None],
    (h, k),
    vector(0, 1),
    f32(b, h, t),
)


@program(f32(b, h, t), q=((h, k), vector(0, 1)), k=((h, k), vector(0, 1)))
def lambda_of_differential_attention(p, x):
    return x * jnp.exp((p["q"] * p["k"]).sum(-1))[:, None]


# One entry beside the whole.


@program(tokens, f32(b, t), e=((v, d), DENSE), w=((d, f), DENSE))
def embedding_of_the_mask_token(p, tokens, mask):
    x = jnp.where(mask[..., None] > 0, p["e"][0], p["e"][tokens])
    return jnp.tanh(x @ p["w"])


@program(seq, pos=((1, t, d), vector(1, 2)), w=((d, f), DENSE))
def positions_of_class_and_patches(p, x):
    of_class, of_patches = p["pos"][:, 0], p["pos"][:, 1:]
    return norm(x + jnp.concatenate([of_class[:, None], 0.5 * of_patches], 1)) @ p["w"]


case(
    "probe of all layers",
    lambda w, x, probe: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), (w * probe).sum()),
    (2, d, d),
    EXPERTS,
    x,
    f32(2, d, d),
)
case(
    "learned activation of each channel",
    lambda w, x: jax.vmap(
        lambda x, values: jnp.interp(x, jnp.linspace(0, 1, 8), values), (1, 0), 1
    )(x, w),
    (d, 8),
    vector(1),
    x,
)


def sides(shape, reading):
    wide = [frozenset(axis for axis in side if shape[axis] > 1) for side in reading]
    return frozenset(filter(None, wide))


@pytest.mark.parametrize("name", TABLE)
def test_reading(name):
    fn, leaves, inputs = TABLE[name]
    params = {leaf: f32(*shape) for leaf, (shape, _) in leaves.items()}
    read = functools.partial(dimension_numbers_from, fn, params, *inputs)
    if any(right == NOTHING for _, right in leaves.values()):
        with pytest.raises(ValueError, match=r"cannot be read: .* at .*test_reading_table.py:\d+"):
            read()
        return
    for leaf, numbers in read().items():
        shape, right = leaves[leaf]
        assert isinstance(numbers, MuonDimensionNumbers)
        assert sides(shape, numbers) == sides(shape, right), (leaf, numbers, right)
        assert bool(numbers.reduction_axis) == bool(right[0]) or min(shape) == 1, (leaf, numbers)


def test_the_table_is_long():
    assert len(TABLE) >= 150
