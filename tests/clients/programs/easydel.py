"""EasyDeL: its Llama and its mixture of Qwen 3, in its own state and train step."""

import easydel
import jax
import jax.numpy as jnp
from easydel.trainers.trainer._fn import training_step
from flax import nnx
from jax.sharding import PartitionSpec
from table import DENSE, State, case, states, version

from weyl_optax import dimension_numbers_from

TOKENS = jnp.arange(1, 17).reshape(2, 8) % 11 + 1
BATCH = {"input_ids": TOKENS, "attention_mask": TOKENS * 0 + 1, "labels": TOKENS}
SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 8,
}


def causal_lm(model, uses):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch):
        module = nnx.merge(graphdef, params, rest)
        with model.mesh:
            return module.compute_loss(**batch)[1].loss

    def train(tx):
        start = model.to_state().init_tx(tx)

        @jax.jit
        def step(state):
            with model.mesh:
                return training_step(state, BATCH, None, None, PartitionSpec())[0]

        for state in states(start, step):
            yield State(state.graphstate, state.opt_state, tx)

    return dimension_numbers_from(loss, params, BATCH), params, uses, train


@case(f"EasyDeL {version('easydel')}, Llama")
def llama():
    config = easydel.LlamaConfig(**SIZES)
    model = easydel.LlamaForCausalLM(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    return causal_lm(model, {"*embedding": DENSE, "*kernel": DENSE})


@case("the same, Qwen 3 with experts")
def qwen():
    config = easydel.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    )
    model = easydel.Qwen3MoeForCausalLM(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    experts = {"*/experts/*/kernel": ((1,), (2,))}
    return causal_lm(model, experts | {"*embedding": DENSE, "*kernel": DENSE})
