"""Each leaf is read by the operation in which the traced program uses it."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from weyl_optax import dimension_numbers_from


def by_path(numbers):
    """Path -> (reduction axes, output axes), or None."""
    entries = jax.tree_util.tree_leaves_with_path(
        numbers, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): (
            numbers and tuple(numbers)
        )
        for path, numbers in entries
    }


def read(fn, params, *args, **kwargs):
    return by_path(dimension_numbers_from(fn, params, *args, **kwargs))


def reading(fn, shape, *args, **kwargs):
    """How one leaf of a shape is read."""
    numbers = dimension_numbers_from(fn, f32(*shape), *args, **kwargs)
    return numbers and tuple(numbers)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


VECTOR = ((), (0,))
DENSE = ((0,), (1,))
OUT_IN = ((1,), (0,))
STACKED_DENSE = ((1,), (2,))

# Name: shape of the leaf, the function, its inputs, the reading.
x = f32(2, 6)  # (batch, features)
OPERATIONS = {
    # Products.
    "matmul": ((6, 4), lambda w, x: x @ w, [x], DENSE),
    "matmul from the left": ((4, 6), lambda w, x: w @ x.T, [x], ((1,), (0,))),
    "matrix and vector": ((6, 1), lambda w, x: x @ w, [x], ((0,), (1,))),
    "dot with a vector": ((6,), lambda w, x: x @ w, [x], VECTOR),
    "heads": ((6, 2, 3), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), [x], ((0,), (1, 2))),
    "heads first": ((2, 6, 3), lambda w, x: jnp.einsum("bd,hdk->bhk", x, w), [x], ((1,), (0, 2))),
    "out": (
        (2, 3, 6),
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w),
        [f32(5, 2, 3)],
        ((0, 1), (2,)),
    ),
    "experts": (
        (5, 6, 4),
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, w),
        [f32(5, 2, 6)],
        STACKED_DENSE,
    ),
    "experts last": (
        (6, 4, 5),
        lambda w, x: jnp.einsum("ebd,dfe->ebf", x, w),
        [f32(5, 2, 6)],
        DENSE,
    ),
    "experts by vmap": (
        (6, 5, 4),
        lambda w, x: jax.vmap(jnp.dot, (0, 1))(x, w),
        [f32(5, 2, 6)],
        ((0,), (2,)),
    ),
    "ragged": (
        (2, 6, 4),
        lambda w, x, n: lax.ragged_dot(x, w, n),
        [f32(8, 6), i32(2)],
        STACKED_DENSE,
    ),
    "one-hot": ((9, 4), lambda w, t: jax.nn.one_hot(t, 9) @ w, [i32(3)], DENSE),
    # Layout on the way.
    "cast": ((6, 4), lambda w, x: x @ w.astype(jnp.bfloat16), [x], DENSE),
    "transposed": ((4, 6), lambda w, x: x @ w.T, [x], ((1,), (0,))),
    "merged": ((6, 2, 3), lambda w, x: x @ w.reshape(6, 6), [x], ((0,), (1, 2))),
    "split": ((6, 12), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(6, 3, 4)), [x], DENSE),
    "split and reduced": (
        (6, 4),
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w.reshape(2, 3, 4)),
        [f32(5, 2, 3)],
        DENSE,
    ),
    "regrouped": (
        (2, 6, 4),
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w.reshape(3, 4, 4)),
        [f32(5, 3, 4)],
        ((0, 1), (2,)),
    ),
    "no common factors": (
        (2, 3, 4),
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w.reshape(3, 2, 4)),
        [f32(5, 3, 2)],
        ((0, 1), (2,)),
    ),
    "axis of size 1": ((1, 6, 4), lambda w, x: x @ w[0], [x], STACKED_DENSE),
    "flipped": ((6, 4), lambda w, x: x @ jnp.flip(w, 0), [x], DENSE),
    "rolled": ((6, 4), lambda w, x: x @ jnp.roll(w, 2, 0), [x], DENSE),
    "repeated heads": (
        (6, 2, 3),
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, jnp.repeat(w, 2, 1)),
        [x],
        ((0,), (1, 2)),
    ),
    "repeated heads by an index": (
        (6, 2, 3),
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w[:, np.arange(4) // 2]),
        [x],
        ((0,), (1, 2)),
    ),
    "tiled": ((6, 4), lambda w, x: x @ jnp.tile(w, (1, 3)), [x], DENSE),
    "padded": ((5, 4), lambda w, x: x @ jnp.pad(w, ((0, 1), (0, 0))), [x], DENSE),
    "sliced qkv": ((6, 12), lambda w, x: (x @ w[:, :4], x @ w[:, 4:8], x @ w[:, 8:]), [x], DENSE),
    "split qkv": ((6, 12), lambda w, x: [x @ v for v in jnp.split(w, 3, 1)], [x], DENSE),
    "qkv by an index": ((6, 3, 4), lambda w, x: (x @ w[:, 0], x @ w[:, 1]), [x], ((0,), (2,))),
    "sliced by a loop": (
        (6, 12),
        lambda w, x: lax.map(lambda i: x @ lax.dynamic_slice(w, (0, 4 * i), (6, 4)), jnp.arange(3)),
        [x],
        DENSE,
    ),
    "stop_gradient": ((6, 4), lambda w, x: x @ lax.stop_gradient(w), [x], DENSE),
    "barrier": ((6, 4), lambda w, x: x @ lax.optimization_barrier((w, w))[0], [x], DENSE),
    "checkpoint_name": ((6, 4), lambda w, x: x @ checkpoint_name(w, "w"), [x], DENSE),
    "reduce_precision": ((6, 4), lambda w, x: x @ lax.reduce_precision(w, 5, 2), [x], DENSE),
    # Arithmetic on the way.
    "scaled": ((6, 4), lambda w, x: x @ (w / jnp.sqrt(6)), [x], DENSE),
    "masked": ((6, 6), lambda w, x: x @ jnp.tril(w), [x], DENSE),
    "where": ((6, 6), lambda w, x: x @ jnp.where(np.eye(6), 0, w), [x], DENSE),
    "row set to zero": ((6, 4), lambda w, x: x @ w.at[0].set(0), [x], DENSE),
    "standardized": ((6, 4), lambda w, x: x @ ((w - w.mean(0)) / w.std(0)), [x], DENSE),
    "symmetric": ((6, 6), lambda w, x: x @ (w + w.T), [x], DENSE),
    "concatenated": ((6, 4), lambda w, x: x @ jnp.concatenate([w, -w], 1), [x], DENSE),
    "an input's scale": ((6, 4), lambda w, x, s: x @ (w / s), [x, f32()], DENSE),
    "softmax": ((6, 4), lambda w, x: x @ jax.nn.softmax(w), [x], DENSE),
    "power iteration": (
        (6, 4),
        lambda w, x: x @ (w / jnp.linalg.norm(w @ (w.T @ jnp.ones(6)))),
        [x],
        DENSE,
    ),
    "penalty": (
        (6, 4),
        lambda w, x: jnp.sum(x @ w) + jnp.sum(w**2) + jnp.sum((w.T @ w) ** 2),
        [x],
        DENSE,
    ),
    # Elementwise.
    "bias": ((6,), lambda w, x: x + w, [x], VECTOR),
    "bias of heads": ((2, 3), lambda w, x: x + w, [f32(5, 2, 3)], ((), (0, 1))),
    "scale of heads": ((2, 1, 1), lambda w, x: x * w, [f32(5, 2, 3, 4)], ((), (0, 1, 2))),
    "scale": ((6,), lambda w, x: x * (1 + w), [x], VECTOR),
    "scale by einsum": ((6,), lambda w, x: jnp.einsum("bd,d->bd", x, w), [x], VECTOR),
    "outer product": ((6,), lambda w, x: jnp.einsum("b,d->bd", x, w), [f32(2)], VECTOR),
    "scalar": ((), lambda w, x: x * w, [x], ((), ())),
    "scalars": ((), lambda w, x: x * w, [f32()], ((), ())),
    "batch norm of constants": (
        (6,),
        lambda w, x: (x - 1.0) * (w * lax.rsqrt(jnp.ones(6))),
        [x],
        VECTOR,
    ),
    "class token": (
        (1, 1, 6),
        lambda w, x: jnp.concatenate([jnp.tile(w, (2, 1, 1)), x], 1),
        [f32(2, 5, 6)],
        ((), (0, 1, 2)),
    ),
    "token set": ((6,), lambda w, x: x.at[:, 0].set(w), [f32(2, 5, 6)], VECTOR),
    "mask token": ((6,), lambda w, x, m: jnp.where(m[:, None], w, x), [x, f32(2)], VECTOR),
    "padding": ((), lambda w, x: lax.pad(x, w, ((0, 1, 0), (0, 0, 0))), [x], ((), ())),
    "stacked with an input": ((6,), lambda w, x: jnp.stack([x[0], w]), [x], VECTOR),
    "position": ((9, 6), lambda w, x: x + w[:5], [f32(2, 5, 6)], ((), (0, 1))),
    "split position": (
        (9, 6),
        lambda w, x: x + w.reshape(9, 2, 3),
        [f32(2, 9, 2, 3)],
        ((), (0, 1)),
    ),
    # Lookups.
    "embedding": ((9, 6), lambda w, t: w[t], [i32(2, 5)], DENSE),
    "embedding of one token": ((9, 6), lambda w, t: w[t], [i32()], DENSE),
    "embedding by vmap": ((9, 6), jax.vmap(lambda w, t: w[t], (None, 0)), [i32(2)], DENSE),
    "embeddings by vmap": (
        (2, 9, 6),
        jax.vmap(lambda w, t: w[t]),
        [i32(2, 5)],
        STACKED_DENSE,
    ),
    "embeddings by vmap, side by side": (
        (9, 2, 6),
        jax.vmap(lambda w, t: jnp.take(w, t, axis=0), (1, 0)),
        [i32(2, 5)],
        ((0,), (2,)),
    ),
    "embedding by indices repeated over the features": (
        (9, 6),
        lambda w, t: jnp.take_along_axis(w, jnp.broadcast_to(t[:, None], (5, 6)), axis=0),
        [i32(5)],
        DENSE,
    ),
    "a roll of every row": (
        (6, 8),
        lambda w, x: x @ jax.vmap(jnp.roll)(w, jnp.arange(6)),
        [x],
        DENSE,
    ),
    "members that share an input, of experts": (
        (2, 5, 6, 4),
        lambda w, x, e: jax.vmap(lambda w, e: jnp.einsum("nd,ndf->nf", x, w[e]))(w, e),
        [x, i32(2, 2)],
        ((2,), (3,)),
    ),
    "members that share an input, of a stack": (
        (2, 5, 6, 4),
        lambda w, x: jax.vmap(lambda w, i: x @ w[i])(w, jnp.arange(2)),
        [x],
        ((2,), (0, 3)),
    ),
    "embedding by take": ((9, 6), lambda w, t: jnp.take(w, t, axis=0), [i32(2, 5)], DENSE),
    "embedding of heads": ((9, 2, 3), lambda w, t: w[t] * 2, [i32(2, 5)], ((0,), (1, 2))),
    "embedding, then attention": (
        (9, 2, 3),
        lambda w, t: jnp.einsum("thk,shk->hts", w[t], w[t]),
        [i32(5)],
        ((0,), (1, 2)),
    ),
    "features first": ((6, 9), lambda w, t: w[:, t], [i32(5)], ((1,), (0,))),
    "scaled embedding": ((9, 6), lambda w, t: (jnp.sqrt(6) * w)[t], [i32(5)], DENSE),
    "looked-up position": ((9, 6), lambda w, x: x + w[jnp.arange(5)], [f32(2, 5, 6)], DENSE),
    "relative position": (
        (9, 2),
        lambda w, x: x + w[np.arange(9).reshape(3, 3)].transpose(2, 0, 1),
        [f32(2, 3, 3)],
        DENSE,
    ),
    "one looked-up position": ((9, 6), lambda w, x: x + w[jnp.arange(1)], [f32(2, 1, 6)], DENSE),
    "position at a step": (
        (9, 6),
        lambda w, x, i: x + lax.dynamic_slice(w, (i, 0), (5, 6)),
        [f32(5, 6), i32()],
        DENSE,
    ),
    "tied": ((9, 6), lambda w, t: w[t] @ w.T, [i32(5)], DENSE),
    "experts by an index": (
        (5, 6, 4),
        lambda w, x, e: jnp.einsum("bd,bdf->bf", x, w[e]),
        [x, i32(2)],
        STACKED_DENSE,
    ),
    "two experts of each token by indices": (
        (5, 6, 4),
        lambda w, x, e: jnp.einsum("nd,nkdf->nkf", x, w[e]),
        [x, i32(2, 2)],
        STACKED_DENSE,
    ),
    "two experts of each token, summed": (
        (5, 6, 4),
        lambda w, x, e: jnp.einsum("nkd,nkdf->nf", x, w[e]),
        [f32(2, 2, 6), i32(2, 2)],
        STACKED_DENSE,
    ),
    "one expert by an index": ((5, 6, 4), lambda w, x, e: x @ w[e], [x, i32()], STACKED_DENSE),
    "experts by vmap and an index": (
        (5, 6, 4),
        lambda w, x, e: jax.vmap(lambda x, e: x @ lax.dynamic_index_in_dim(w, e, keepdims=False))(
            x, e
        ),
        [x, i32(2)],
        STACKED_DENSE,
    ),
    # Stacks.
    "scan": (
        (3, 6, 6),
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
        [x],
        STACKED_DENSE,
    ),
    "scan over axis 1": (
        (6, 3, 6),
        lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(w, 1, 0))[0],
        [x],
        ((0,), (2,)),
    ),
    "scan over a bias": (
        (3, 6),
        lambda w, x: lax.scan(lambda x, w: (x + w, None), x, w)[0],
        [x],
        ((), (1,)),
    ),
    "scan over one": (
        (1, 6),
        lambda w, x: lax.scan(lambda x, w: (x + w, None), x, w)[0],
        [x],
        ((), (1,)),
    ),
    "scan by an index": (
        (3, 6, 6),
        lambda w, x: lax.scan(lambda x, i: (x @ w[i], None), x, jnp.arange(3))[0],
        [x],
        STACKED_DENSE,
    ),
    "fori_loop": (
        (3, 6, 6),
        lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x),
        [x],
        STACKED_DENSE,
    ),
    "while_loop": (
        (3, 6, 6),
        lambda w, x, n: lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w[c[0]]), (0, x)
        )[1],
        [x, i32()],
        STACKED_DENSE,
    ),
    "nested scans": (
        (4, 6, 6),
        lambda w, x: lax.scan(
            lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w), x, w.reshape(2, 2, 6, 6)
        )[0],
        [x],
        STACKED_DENSE,
    ),
    "scanned twice": (
        (3, 6, 6),
        lambda w, x: lax.scan(lambda x, w: (x @ w, None), *lax.scan(lambda x, w: (x @ w, w), x, w))[
            0
        ],
        [x],
        STACKED_DENSE,
    ),
    "unrolled": (
        (3, 6, 6),
        lambda w, x: functools.reduce(lambda x, i: x @ w[i], range(3), x),
        [x],
        STACKED_DENSE,
    ),
    "unstacked": (
        (3, 6, 6),
        lambda w, x: functools.reduce(jnp.matmul, jnp.unstack(w), x),
        [x],
        STACKED_DENSE,
    ),
    "iterated": ((3, 6, 6), lambda w, x: functools.reduce(jnp.matmul, w, x), [x], STACKED_DENSE),
    "unrolled bias": ((3, 6), lambda w, x: x + w[0] + w[1] + w[2], [x], ((), (1,))),
    "selected layers": (
        (4, 6, 6),
        lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w[jnp.array([0, 2])])[0],
        [x],
        STACKED_DENSE,
    ),
    "recurrent": (
        (6, 6),
        lambda w, x: lax.scan(lambda h, x: (jnp.tanh(h @ w + x), None), jnp.zeros(6), x)[0],
        [x],
        DENSE,
    ),
    "recurrent bias": (
        (6,),
        lambda w, x: lax.scan(lambda h, x: (jnp.tanh(h + w) * x, None), jnp.zeros(6), x)[0],
        [x],
        VECTOR,
    ),
    # Nested calls.
    "jit": ((6, 4), lambda w, x: jax.jit(jnp.dot)(x, w), [x], DENSE),
    "remat": ((6, 4), lambda w, x: jax.checkpoint(jnp.dot)(x, w), [x], DENSE),
    "cond": (
        (6, 4),
        lambda w, x, b: lax.cond(b[0] > 0, lambda x: x @ w, lambda x: -(x @ w), x),
        [x, f32(1)],
        DENSE,
    ),
    "custom_jvp": ((6, 4), lambda w, x: x @ jax.nn.relu(w), [x], DENSE),
    # Convolutions.
    "conv": ((3, 3, 4, 8), lambda w, x: conv(x, w), [f32(1, 5, 5, 4)], ((0, 1, 2), (3,))),
    "conv to one channel": (
        (3, 3, 4, 1),
        lambda w, x: conv(x, w),
        [f32(1, 5, 5, 4)],
        ((0, 1, 2), (3,)),
    ),
    "depthwise": ((3, 3, 1, 8), lambda w, x: conv(x, w, 8), [f32(1, 5, 5, 8)], ((), (0, 1, 2))),
    "convs by vmap": (
        (2, 3, 3, 4, 8),
        lambda w, x: jax.vmap(conv)(x, w),
        [f32(2, 1, 5, 5, 4)],
        ((1, 2, 3), (4,)),
    ),
    "depthwise by vmap": (
        (2, 3, 3, 1, 8),
        lambda w, x: jax.vmap(lambda x, w: conv(x, w, 8))(x, w),
        [f32(2, 1, 5, 5, 8)],
        ((), (1, 2, 3)),
    ),
    "one kernel for all": (
        (3, 3, 4, 8),
        lambda w, x: jax.vmap(conv, (0, None))(x, w),
        [f32(2, 1, 5, 5, 4)],
        ((0, 1, 2), (3,)),
    ),
}


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    shape, fn, inputs, expected = OPERATIONS[name]
    assert reading(fn, shape, *inputs) == expected


def test_leaves_of_one_program():
    """Weight normalization and LoRA: each factor on its own."""

    def fn(p, x):
        w = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
        return x @ (w + p["alpha"] * p["a"] @ p["b"]) * (1 + p["scale"]) + p["bias"]

    shapes = {"v": (6, 4), "g": (4,), "a": (6, 2), "b": (2, 4), "alpha": (), "scale": (4,)}
    params = {name: f32(*shape) for name, shape in shapes.items()} | {"bias": f32(4)}
    assert read(fn, params, x) == {
        "v": DENSE,
        "g": VECTOR,
        "a": OUT_IN,
        "b": DENSE,
        "alpha": ((), ()),
        "scale": VECTOR,
        "bias": VECTOR,
    }


def test_latents_meet_weights_before_inputs():
    """Learned queries are a vector where they are added to the inputs, else a matrix."""

    def attend(p, x):
        return jax.nn.softmax((p["latents"] @ p["query"] + p["bias"]) @ x.T) @ x

    params = {"latents": f32(3, 6), "query": f32(6, 6), "bias": f32(6)}
    expected = {"latents": ((1,), (0,)), "query": DENSE, "bias": VECTOR}
    assert read(attend, params, x) == expected
    added = read(lambda p, x: p["latents"] + attend(p, x), params, x)
    assert added == expected | {"latents": ((), (0, 1))}


def test_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P("x"), check_vma=False
    )
    def fn(w, x):
        return x @ lax.all_gather(w, "x", axis=1, tiled=True)

    assert reading(fn, (6, 4), x) == DENSE


def test_arguments_that_are_no_arrays():
    def fn(params, x, *, mode, module, train):
        assert (mode, train) == ("linear", False)
        return params["activation"](module.apply({"params": params["dense"]}, x)), "aux"

    params = {"dense": {"kernel": f32(6, 4), "bias": f32(4)}, "activation": jnp.tanh, "none": None}
    params |= {"key": jax.random.key(0), "count": i32()}
    read_as = read(fn, params, x, mode="linear", module=nn.Dense(4), train=False)
    assert read_as == {
        "dense/kernel": DENSE,
        "dense/bias": VECTOR,
        "activation": None,
        "none": None,
        "key": None,
        "count": None,
    }


# Layers of frameworks. Name: the module, its input, the readings.

ATTENTION = {
    **{f"{name}/kernel": ((0,), (1, 2)) for name in ("query", "key", "value")},
    **{f"{name}/bias": ((), (0, 1)) for name in ("query", "key", "value")},
    "out/kernel": ((0, 1), (2,)),
    "out/bias": VECTOR,
}
NORM = {"scale": VECTOR, "bias": VECTOR}
LINEAR = {"kernel": DENSE, "bias": VECTOR}
CONV = {"kernel": ((0, 1, 2), (3,)), "bias": VECTOR}
DEPTHWISE = {"kernel": ((), (0, 1, 2)), "bias": VECTOR}
IMAGE = f32(2, 8, 8, 3)


def prefixed(name, readings):
    return {f"{name}/{path}": reading for path, reading in readings.items()}


def stacked(readings, axis=0):
    """With a batch axis at a position, which for -1 is the last."""

    def shift(axes, end):
        return tuple(i + (i >= (end if axis < 0 else axis)) for i in axes)

    return {
        path: tuple(shift(axes, 1 + max(reduction + output)) for axes in (reduction, output))
        for path, (reduction, output) in readings.items()
    }


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(9, 6, name="embed")
        return embed.attend(embed(tokens))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(6, name="query")(x), None


BLOCK = prefixed("attention", ATTENTION) | prefixed("norm", NORM) | prefixed("query", LINEAR)


class Stacked(nn.Module):
    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes, rngs = {"params": self.axis}, {"params": True}
        return nn.scan(block, axes, split_rngs=rngs, length=3)(name="layers")(x, None)[0]


LINEN = {
    "Dense": (nn.Dense(4), x, LINEAR),
    "DenseGeneral": (
        nn.DenseGeneral((2, 4), axis=(-2, -1)),
        f32(5, 2, 3),
        {"kernel": ((0, 1), (2, 3)), "bias": ((), (0, 1))},
    ),
    "DenseGeneral batch": (
        nn.DenseGeneral(4, batch_dims=(0,)),
        f32(5, 2, 3),
        {"kernel": STACKED_DENSE, "bias": ((), (0, 1))},
    ),
    "attention": (nn.MultiHeadDotProductAttention(2), f32(2, 5, 6), ATTENTION),
    "Conv": (nn.Conv(4, (3, 3)), IMAGE, CONV),
    "Conv depthwise": (nn.Conv(3, (3, 3), feature_group_count=3), IMAGE, DEPTHWISE),
    "ConvTranspose": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), IMAGE, CONV),
    "ConvTranspose, transposed": (
        nn.ConvTranspose(4, (3, 3), transpose_kernel=True),
        IMAGE,
        {"kernel": ((0, 1, 3), (2,)), "bias": VECTOR},
    ),
    "Embed": (nn.Embed(9, 6), i32(2, 5), {"embedding": DENSE}),
    "Embed tied": (Tied(), i32(2, 5), {"embed/embedding": DENSE}),
    "LayerNorm": (nn.LayerNorm(), x, NORM),
    "BatchNorm": (nn.BatchNorm(use_running_average=True), IMAGE, NORM),
    "GroupNorm": (nn.GroupNorm(3), x, NORM),
    "WeightNorm": (
        nn.WeightNorm(nn.Dense(4)),
        x,
        prefixed("layer_instance", LINEAR | {"kernel/scale": VECTOR}),
    ),
    "LSTM": (
        nn.RNN(nn.LSTMCell(4, name="cell")),
        f32(2, 5, 6),
        {
            **{f"cell/i{g}/kernel": DENSE for g in "ifgo"},
            **prefixed("cell", {f"h{g}/{n}": r for g in "ifgo" for n, r in LINEAR.items()}),
        },
    ),
    "scan": (Stacked(0), f32(2, 5, 6), prefixed("layers", stacked(BLOCK))),
    "scan over axis 1": (Stacked(1), f32(2, 5, 6), prefixed("layers", stacked(BLOCK, 1))),
    "scan over axis -1": (Stacked(-1), f32(2, 5, 6), prefixed("layers", stacked(BLOCK, -1))),
    "scan of remat": (Stacked(1, remat=True), f32(2, 5, 6), prefixed("layers", stacked(BLOCK, 1))),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module, inputs, expected = LINEN[name]
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    constants = {k: jax.tree.map(jnp.ones_like, v) for k, v in variables.items() if k != "params"}

    def fn(params, inputs):
        return module.apply({"params": params, **constants}, inputs)

    assert read(fn, variables["params"], inputs) == expected


def test_linen_boxes():
    init = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
    module = nn.Dense(4, kernel_init=init)
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert read(lambda p, x: module.apply({"params": p}, x), params, x) == LINEAR


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.dropout(nnx.gelu(self.up(self.norm(x)))))


PERCEPTRON = {
    "norm/scale": VECTOR,
    **prefixed("up", LINEAR),
    **prefixed("down", LINEAR),
    "down/lora/lora_a": DENSE,
    "down/lora/lora_b": DENSE,
}


class StackedMLP(nnx.Module):
    def __init__(self, rngs, *, scanned):
        self.scanned = scanned
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(MLP))(rngs)

    def __call__(self, x):
        if self.scanned:
            step = nnx.scan(
                lambda x, layer: nnx.remat(MLP.__call__)(layer, x),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            return step(x, self.layers)
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))(self.layers, x)


NNX = {
    "Linear": (lambda rngs: nnx.Linear(6, 4, rngs=rngs), x, LINEAR),
    "Einsum": (
        lambda rngs: nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs),
        f32(3, 5, 2),
        {"kernel": ((1,), (0, 2)), "bias": ((), (0, 1))},
    ),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs),
        f32(2, 5, 6),
        ATTENTION,
    ),
    "Conv": (lambda rngs: nnx.Conv(3, 4, (3, 3), rngs=rngs), IMAGE, CONV),
    "Conv depthwise": (
        lambda rngs: nnx.Conv(3, 3, (3, 3), feature_group_count=3, rngs=rngs),
        IMAGE,
        DEPTHWISE,
    ),
    "Embed": (lambda rngs: nnx.Embed(9, 6, rngs=rngs), i32(2, 5), {"embedding": DENSE}),
    "LayerNorm": (lambda rngs: nnx.LayerNorm(6, rngs=rngs), x, NORM),
    "BatchNorm": (lambda rngs: nnx.BatchNorm(6, rngs=rngs), x, NORM),
    "PReLU": (lambda rngs: nnx.PReLU(), x, {"negative_slope": ((), ())}),
    "MLP": (MLP, x, PERCEPTRON),
    "scan": (
        lambda rngs: StackedMLP(rngs, scanned=True),
        x,
        prefixed("layers", stacked(PERCEPTRON)),
    ),
}


def read_nnx(make, inputs):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Any(nnx.Param, nnx.LoRAParam), ...)
    return read(
        lambda params, *rest, x: nnx.merge(graphdef, params, *rest)(x), params, rest, x=inputs
    )


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, inputs, expected = NNX[name]
    assert read_nnx(make, inputs) == expected


def test_nnx_vmap_over_layers():
    """Biases are added to the whole stack, as one vector."""
    expected = prefixed("layers", stacked(PERCEPTRON))
    vectors = {k: ((), (0, *v[1])) for k, v in expected.items() if not v[0]}
    make = functools.partial(StackedMLP, scanned=False)
    assert read_nnx(make, f32(3, 2, 6)) == expected | vectors


def test_nnx_module_as_params():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    assert read(lambda model, x: model(x), model, x) == LINEAR


EQUINOX = {
    "MLP": (
        lambda key: eqx.nn.MLP(6, 4, 8, 1, key=key),
        x,
        {f"layers/{i}/{n}": r for i in (0, 1) for n, r in [("weight", OUT_IN), ("bias", VECTOR)]},
    ),
    "Conv2d": (
        lambda key: eqx.nn.Conv2d(3, 4, 3, key=key),
        f32(2, 3, 8, 8),
        {"weight": ((1, 2, 3), (0,)), "bias": ((), (0, 1, 2))},
    ),
    "Embedding": (lambda key: eqx.nn.Embedding(9, 6, key=key), i32(2), {"weight": DENSE}),
    "LayerNorm": (lambda key: eqx.nn.LayerNorm(6), x, {"weight": VECTOR, "bias": VECTOR}),
    "GRU": (
        lambda key: gru(key),
        f32(2, 6),
        {"weight_ih": OUT_IN, "weight_hh": OUT_IN, "bias": VECTOR, "bias_n": VECTOR},
    ),
}


def gru(key):
    class Cell(eqx.nn.GRUCell):
        def __call__(self, x):
            return super().__call__(x, jnp.zeros(4))

    return Cell(6, 4, key=key)


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(name):
    make, inputs, expected = EQUINOX[name]
    model = make(jax.random.key(0))
    numbers = read(lambda model, x: jax.vmap(model)(x), model, inputs)
    assert {path: r for path, r in numbers.items() if r is not None} == expected


def test_equinox_attention():
    model = eqx.nn.MultiheadAttention(2, 6, key=jax.random.key(0))
    numbers = read(lambda m, x: jax.vmap(lambda x: m(x, x, x))(x), model, f32(2, 5, 6))
    weights = [f"{name}_proj/weight" for name in ("query", "key", "value", "output")]
    assert {p: r for p, r in numbers.items() if r is not None} == dict.fromkeys(weights, OUT_IN)


def test_haiku():
    def forward(tokens):
        x = hk.Embed(9, 6)(tokens)
        x = x + hk.MultiHeadAttention(2, 3, model_size=6, w_init=hk.initializers.Constant(1))(
            x, x, x
        )
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Conv1D(4, 3)(hk.nets.MLP([8, 6])(x))

    model = hk.transform(forward)
    tokens = i32(2, 5)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    dense = {"w": DENSE, "b": VECTOR}
    attention = [f"multi_head_attention/{n}" for n in ("query", "key", "value", "linear")]
    layers = [*attention, "mlp/~/linear_0", "mlp/~/linear_1"]
    assert read(lambda p, t: model.apply(p, None, t), params, tokens) == {
        "embed/embeddings": DENSE,
        **{path: r for name in layers for path, r in prefixed(name, dense).items()},
        **prefixed("layer_norm", {"scale": VECTOR, "offset": VECTOR}),
        **prefixed("conv1_d", {"w": ((0, 1), (2,)), "b": VECTOR}),
    }


# Errors.


def test_overrides():
    def fn(params, x):
        return jnp.sort(params["a"]["w"]) @ x, params["a"]["b"] + x, params["b"]["b"] + x

    params = {"a": {"w": f32(4, 6), "b": f32(6)}, "b": {"b": f32(6)}, "c": f32(3)}
    matrix = MuonDimensionNumbers((1,), (0,))
    overrides = {"a/w": matrix, "a/*": None, "c": None}
    assert read(fn, params, f32(6), overrides=overrides) == {
        "a/w": ((1,), (0,)),
        "a/b": None,
        "b/b": VECTOR,
        "c": None,
    }
    with pytest.raises(ValueError, match=r"overrides has 'd/\*', which matches none .*'a/b'"):
        read(fn, params, f32(6), overrides={"d/*": None})


@pytest.mark.parametrize(
    ("shape", "fn", "inputs", "message"),
    [
        (
            (6, 6),
            lambda w, x: (x @ w, x + w[:2]),
            [x],
            "used in two ways: dot_general at .*test_traced.py.* as MuonDim.*, but add at",
        ),
        (
            (6, 6, 6),
            lambda w, x: (jnp.einsum("bd,dhk->bhk", x, w), jnp.einsum("bd,hdk->bhk", x, w)),
            [x],
            "used in two ways: dot_general .*, but dot_general",
        ),
        (
            (6, 6),
            lambda w, x: x @ jnp.linalg.qr(w)[0],
            [x],
            r"cannot be read: (geqrf|qr) at .*test_traced.py:\d+.* is an operation that cannot be",
        ),
        ((6, 6), lambda w, x: x, [x], "never meets an input. Let fn be the training loss"),
        ((6, 6), lambda w, x: x * w.sum(), [x], "mul at .* uses nothing but a statistic of it"),
        ((6, 6), lambda w, x: jnp.ones(6) + w, [x], "arrays that fn closes over are constants"),
        (
            (12, 4),
            lambda w, x: jnp.einsum("gbd,gdf->gbf", x, w.reshape(2, 6, 4)),
            [f32(2, 5, 6)],
            r"splits its axes \[0\]",
        ),
        (
            (3, 3, 2, 8),
            lambda w, x: conv(x, w, 2),
            [f32(1, 5, 5, 4)],
            r"a grouped convolution, which .*; MuonDim.*=\(\), output_axis=\(0, 1, 2\)\)",
        ),
        ((3, 3, 1, 8), lambda w, x: conv(x, w, 4), [f32(1, 5, 5, 4)], "a grouped convolution"),
    ],
)
def test_errors(shape, fn, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        dimension_numbers_from(
            lambda p, *args: fn(p["a"]["w"], *args), {"a": {"w": f32(*shape)}}, *inputs
        )
    assert f"The leaf 'a/w' of shape {shape}" in str(error.value)
    assert "overrides={'a/w': optax.contrib.MuonDimensionNumbers(" in str(error.value)


def test_all_errors_are_raised_at_once():
    with pytest.raises(ValueError, match=r"'a' of shape(?s:.*)'b' of shape"):
        dimension_numbers_from(lambda p, x: x, {"a": f32(2, 2), "b": f32(3, 3)}, x)
