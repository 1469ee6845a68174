"""Each layer's kernel is read as the matrix that it multiplies its inputs by."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from weyl_optax import tabulate
from weyl_optax.flax import dimension_numbers


def readings(params, numbers):
    """Path -> how it is read, from the table."""
    rows = [row.split(maxsplit=1) for row in tabulate(params, numbers).splitlines()[1:]]
    return {path: rest.rpartition(")")[2].strip() for path, rest in rows}


def nnx_readings(model, *wrt):
    return readings(nnx.state(model, *(wrt or (nnx.Param,))), dimension_numbers(model, *wrt))


class Scale(nnx.Module):
    """A layer of the user's own, as LayerScale."""

    def __init__(self, rngs):
        self.gamma = nnx.Param(jnp.ones(6))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 4, rngs=rngs)
        self.general = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs)
        self.heads = nnx.LinearGeneral(6, 4, batch_axis={0: 3}, rngs=rngs)
        self.einsum = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs)
        self.experts = nnx.Einsum("etd,edf->etf", (5, 6, 7), (5, 7), rngs=rngs)
        self.conv = nnx.Conv(3, 10, kernel_size=(5, 5), rngs=rngs)
        self.conv1d = nnx.Conv(3, 10, kernel_size=(5,), rngs=rngs)
        self.depthwise = nnx.Conv(10, 10, (5, 5), feature_group_count=10, rngs=rngs)
        self.up = nnx.ConvTranspose(3, 10, kernel_size=(2, 2), rngs=rngs)
        self.up_t = nnx.ConvTranspose(10, 3, (2, 2), transpose_kernel=True, rngs=rngs)
        self.embed = nnx.Embed(20, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(6, rngs=rngs)
        self.prelu = nnx.PReLU()
        self.position = nnx.Param(jnp.ones((9, 6)))
        self.scale = Scale(rngs)


LAYERS = {
    "linear/kernel": "1 matrix of 6 x 4",
    "linear/bias": "1 vector of 4",
    "general/kernel": "1 matrix of 6 x 20",
    "general/bias": "1 vector of 20",
    "heads/kernel": "3 matrices of 6 x 4",
    "heads/bias": "3 vectors of 4",
    "einsum/kernel": "1 matrix of 2 x 32",
    "einsum/bias": "1 vector of 32",
    "experts/kernel": "5 matrices of 6 x 7",
    "experts/bias": "5 vectors of 7",
    "conv/kernel": "1 matrix of 75 x 10",
    "conv/bias": "1 vector of 10",
    "conv1d/kernel": "1 matrix of 15 x 10",
    "conv1d/bias": "1 vector of 10",
    "depthwise/kernel": "10 vectors of 25",
    "depthwise/bias": "1 vector of 10",
    "up/kernel": "1 matrix of 12 x 10",
    "up/bias": "1 vector of 10",
    "up_t/kernel": "1 matrix of 40 x 3",
    "up_t/bias": "1 vector of 3",
    "embed/embedding": "1 matrix of 20 x 6",
    **{f"attention/{n}/kernel": "1 matrix of 6 x 6" for n in ("query", "key", "value", "out")},
    **{f"attention/{n}/bias": "1 vector of 6" for n in ("query", "key", "value", "out")},
    "norm/scale": "1 vector of 6",
    "norm/bias": "1 vector of 6",
    "batch_norm/scale": "1 vector of 6",
    "batch_norm/bias": "1 vector of 6",
    "prelu/negative_slope": "1 scalar",
    "position": "1 matrix of 9 x 6",
    "scale/gamma": "1 vector of 6",
}


def test_nnx_layers():
    assert nnx_readings(Layers(nnx.Rngs(0))) == LAYERS


def test_nnx_layers_stacked_by_vmap():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return Layers(rngs)

            self.layers = make(rngs)

    read = nnx_readings(Stacked(nnx.Rngs(0)))
    for path, reading in LAYERS.items():
        count, _, rest = reading.partition(" ")
        rest = rest.replace("matrix", "matrices").replace("vector ", "vectors ")
        rest = rest.replace("scalar", "scalars")
        if path == "position":  # no layer of Flax tells that its first axis is a batch axis
            rest = "matrices of 9 x 6"
        assert read[f"layers/{path}"] == f"{3 * int(count)} {rest}"


def test_nnx_lora_parameters_alone():
    model = nnx.LoRALinear(12, 10, lora_rank=2, rngs=nnx.Rngs(0))
    assert nnx_readings(model, nnx.LoRAParam) == {
        "lora/lora_a": "1 matrix of 12 x 2",
        "lora/lora_b": "1 matrix of 2 x 10",
    }


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 6)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.LayerNorm()(x)
        x = nn.DenseGeneral((2, 4), name="split")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="merge")(x)
        x = nn.Conv(3, (2,))(x)
        x = nn.Conv(3, (2,), use_bias=False)(x)
        x = nn.Conv(4, (3, 3))(x[..., None])
        return nn.Dense(9, use_bias=False)(x)


LINEN = {
    "Embed_0/embedding": "1 matrix of 7 x 6",
    **{f"attention/{n}/kernel": "1 matrix of 6 x 6" for n in ("query", "key", "value", "out")},
    **{f"attention/{n}/bias": "1 vector of 6" for n in ("query", "key", "value", "out")},
    "LayerNorm_0/scale": "1 vector of 6",
    "LayerNorm_0/bias": "1 vector of 6",
    "split/kernel": "1 matrix of 6 x 8",
    "split/bias": "1 vector of 8",
    "merge/kernel": "1 matrix of 8 x 5",
    "merge/bias": "1 vector of 5",
    "Conv_0/kernel": "1 matrix of 10 x 3",
    "Conv_0/bias": "1 vector of 3",
    "Conv_1/kernel": "1 matrix of 6 x 3",
    "Conv_2/kernel": "1 matrix of 9 x 4",
    "Conv_2/bias": "1 vector of 4",
    "Dense_0/kernel": "1 matrix of 4 x 9",
}


def linen_params(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def test_linen_names():
    params = linen_params(Linen(), jnp.ones((2, 5), int))
    assert readings(params, dimension_numbers(params)) == LINEN


def test_linen_attention_alone():
    params = linen_params(nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((2, 5, 6)))
    read = readings(params, dimension_numbers(params))
    assert read == {
        **{f"{n}/kernel": "1 matrix of 6 x 6" for n in ("query", "key", "value", "out")},
        **{f"{n}/bias": "1 vector of 6" for n in ("query", "key", "value", "out")},
    }


def test_linen_blocks_stacked_by_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.LayerNorm()(x)
            y = nn.MultiHeadDotProductAttention(2, name="attention")(y)
            y = nn.Dense(24, name="up")(y)
            return x + nn.Dense(6, use_bias=False, name="down")(y), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = linen_params(stack, jnp.ones((2, 5, 6)), None)
    assert readings(params, dimension_numbers(params)) == {
        "LayerNorm_0/scale": "3 vectors of 6",
        "LayerNorm_0/bias": "3 vectors of 6",
        **{
            f"attention/{n}/kernel": "3 matrices of 6 x 6" for n in ("query", "key", "value", "out")
        },
        **{f"attention/{n}/bias": "3 vectors of 6" for n in ("query", "key", "value", "out")},
        "up/kernel": "3 matrices of 6 x 24",
        "up/bias": "3 vectors of 24",
        "down/kernel": "3 matrices of 24 x 6",
    }


def test_a_linen_kernel_whose_name_does_not_tell_is_an_error():
    for params in (
        {"projection": {"kernel": jnp.ones((6, 2, 4))}},
        {"norm": {"scale": jnp.ones(6)}, "projection": {"kernel": jnp.ones((6, 2, 4))}},
        {"layers": {"kernel": jnp.ones((3, 6, 6)), "bias": jnp.ones((3, 6))}},
    ):
        with pytest.raises(ValueError, match="kernel' \\(rank 3\\) does not tell how to read it"):
            dimension_numbers(params)


def test_axes_are_counted_from_the_front():
    model = nnx.LinearGeneral(6, (2, 3), rngs=nnx.Rngs(0))
    numbers = dimension_numbers(model)
    assert numbers["kernel"] == MuonDimensionNumbers((0,), (1, 2))
    assert numbers["bias"] == MuonDimensionNumbers((), (0, 1))
