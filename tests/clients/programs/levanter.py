"""Levanter: its Llama and Mixtral with layers that are scanned, and the step of its trainer."""

import os

import equinox as eqx
import haliax
import jax
import jax.numpy as jnp
import levanter
from checks import by_path
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample, compute_next_token_loss
from levanter.models.mixtral import MixtralConfig
from levanter.optim import MuonConfig
from levanter.trainer_state import TrainerState
from table import State, case, commit, states

from weyl_optax import dimension_numbers_from

SIZES = {
    "seq_len": 8,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
}
# Layers are axis 0; a linear layer has its output first, and experts their input.
USES = {
    "*token_embeddings/*": ((0,), (1,)),
    "*lm_head/*": ((0,), (1,)),
    "*/self_attn/q_proj/weight/*": ((4,), (1, 2, 3)),
    "*/self_attn/[kv]_proj/weight/*": ((3,), (1, 2)),
    "*/self_attn/o_proj/weight/*": ((2, 3), (1,)),
    "*/experts/*": ((2,), (3,)),
    "*/mlp/*": ((1,), (2,)),
    "*/gate/weight/*": ((1,), (2,)),
    "*norm*": ((), (1,)),
}


# Its experts are routed under `shard_map`.
jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)))


def language_model(config):
    vocabulary = haliax.Axis("vocab", 16)
    model = config.model_type.init(vocabulary, config, key=jax.random.key(0))
    tokens = haliax.named(jnp.arange(1, 9) % 11 + 1, config.Pos)
    batch = LmExample.causal(tokens)
    params, fixed = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, example):
        return (
            compute_next_token_loss(
                eqx.combine(params, fixed),
                example,
                reduction=None,  # its mean takes a mask of floats, an error with JAX 0.10
            )
            .mean()
            .scalar()
        )

    def train(tx):
        start = TrainerState.init(tx, model, key=jax.random.key(0))

        @eqx.filter_jit
        def step(state):
            grads = jax.grad(loss)(eqx.filter(state.model, eqx.is_inexact_array), batch)
            return state.take_step(grads, key=state.training_key)[0]

        for state in states(start, step):
            yield State(eqx.filter(state.model, eqx.is_inexact_array), state.opt_state, tx)

    compare(params)
    return dimension_numbers_from(loss, params, batch), params, USES, train


def compare(params):
    """Prints the matrices that Levanter's Muon leaves to Adam."""
    labels = MuonConfig().create_mask(params)
    left = [path for path, label in by_path(labels).items() if label == "adamw"]
    print(f"  Muon leaves to Adam: {', '.join(left)}")


@case(f"Levanter ({commit(os.path.dirname(levanter.__file__))}), Llama")
def llama():
    return language_model(LlamaConfig(**SIZES))


@case("the same, Mixtral")
def mixtral():
    return language_model(MixtralConfig(**SIZES, n_routed_experts=4, num_experts_per_tok=2))
