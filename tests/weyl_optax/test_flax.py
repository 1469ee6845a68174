"""The params of an NNX model are read as its call uses them, whatever else the model holds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from weyl_optax import SplitDimensionNumbers, tabulate
from weyl_optax.flax import dimension_numbers

TOKENS = jnp.arange(6).reshape(2, 3)
VECTOR = MuonDimensionNumbers((), (0,))
MATRIX = MuonDimensionNumbers((0,), (1,))


class Model(nnx.Module):
    """With batch statistics, dropout, the state of a generator, and a table used twice."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs))
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, tokens):
        x = self.dropout(self.norm(self.embed(tokens)))
        step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.embed.attend(step(x, self.layers))


def loss(model, tokens):
    return jnp.mean(model(tokens) ** 2)


def test_a_model_with_state_is_read_and_stays_as_it_is():
    model = Model(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngKey))))
    numbers = dimension_numbers(loss, model, TOKENS)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngKey))), before
    )
    assert tabulate(nnx.state(model, nnx.Param), numbers) == (
        "path                shape      read as\n"
        "embed/embedding     (7, 8)     1 matrix of 7 x 8\n"
        "layers/bias         (3, 8)     3 vectors of 8\n"
        "layers/kernel       (3, 8, 8)  3 matrices of 8 x 8\n"
        "layers/lora/lora_a  (3, 8, 2)  3 matrices of 8 x 2\n"
        "layers/lora/lora_b  (3, 2, 8)  3 matrices of 2 x 8\n"
        "norm/bias           (8,)       1 vector of 8\n"
        "norm/scale          (8,)       1 vector of 8"
    )


def test_shapes_do_and_so_does_the_call():
    model = Model(nnx.Rngs(0))
    shapes = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    numbers = dimension_numbers(Model.__call__, shapes, tokens)
    assert numbers == dimension_numbers(loss, model, TOKENS)


def test_the_variables_that_are_trained():
    numbers = dimension_numbers(loss, Model(nnx.Rngs(0)), TOKENS, wrt=nnx.LoRAParam)
    stacked = MuonDimensionNumbers((1,), (2,))
    lora = {"lora_a": stacked, "lora_b": stacked}
    assert nnx.to_pure_dict(numbers) == {"layers": {"lora": lora}}


def test_a_cache():
    model = nnx.MultiHeadAttention(2, 8, decode=True, use_bias=False, rngs=nnx.Rngs(0))
    model.init_cache((2, 3, 8))
    numbers = dimension_numbers(nnx.MultiHeadAttention.__call__, model, jnp.ones((2, 1, 8)))
    heads, out = MuonDimensionNumbers((0,), (1, 2)), MuonDimensionNumbers((0, 1), (2,))
    assert {name: layer["kernel"] for name, layer in numbers.items()} == {
        "query": heads,
        "key": heads,
        "value": heads,
        "out": out,
    }


def test_keyword_arguments_and_overrides():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))

    def fn(model, x, *, q_only):
        return x @ jnp.linalg.qr(model.kernel[...])[0] + model.bias[...] if q_only else model(x)

    x = jnp.ones((2, 6))
    assert dimension_numbers(fn, model, x, q_only=False) == {"kernel": MATRIX, "bias": VECTOR}
    with pytest.raises(ValueError, match=r"'kernel' of shape \(6, 4\) cannot be read: .*test_f"):
        dimension_numbers(fn, model, x, q_only=True)
    numbers = dimension_numbers(fn, model, x, q_only=True, overrides={"k*": None})
    assert numbers == {"kernel": None, "bias": VECTOR}


def test_the_parts_of_a_fused_layer():
    def gated(model, x):
        gate, up = jnp.split(model(x), 2, -1)
        return nnx.silu(gate) * up

    numbers = dimension_numbers(
        gated, nnx.Linear(6, 16, rngs=nnx.Rngs(0)), jnp.ones((2, 6)), by_part=True
    )
    assert numbers == {
        "kernel": SplitDimensionNumbers((0,), (1,), 1, (8, 8)),
        "bias": SplitDimensionNumbers((), (0,), 0, (8, 8)),
    }


def test_a_linen_module_in_nnx():
    x = jnp.ones((1, 4))
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(nn.Dense(8), rngs=nnx.Rngs(0)), x)
    numbers = dimension_numbers(nnx.bridge.ToNNX.__call__, model, x)
    assert numbers == {"kernel": MATRIX, "bias": VECTOR}


@pytest.mark.parametrize("model", [TOKENS, {"kernel": jnp.ones((4, 4))}])
def test_what_is_no_module_is_an_error(model):
    with pytest.raises(ValueError, match=r"must be an nnx.Module, .*dimension_numbers_from\(loss"):
        dimension_numbers(loss, model, TOKENS)
