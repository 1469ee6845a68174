"""Tunix: its Llama 3, Qwen 3 and Gemma 3, in its own trainer."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from table import DENSE, OUT, QUERY, State, case, version
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer

from weyl_optax.flax import dimension_numbers

TOKENS = np.arange(1, 17, dtype=np.int32).reshape(2, 8) % 11 + 1
BATCH = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
SIZES = {
    "num_layers": 1,
    "vocab_size": 16,
    "embed_dim": 8,
    "hidden_dim": 12,
    "num_heads": 4,
    "head_dim": 6,
    "num_kv_heads": 2,
}
USES = {
    "*/input_embedding": DENSE,
    "lm_head/w": DENSE,
    "*/[qkv]_proj/w": QUERY,
    "*/o_proj/w": OUT,
    "*/kernel": DENSE,
    # Gemma's
    "*/q_einsum/w": ((1,), (0, 2)),
    "*/kv_einsum/w": ((2,), (0, 1, 3)),
    "*/attn_vec_einsum/w": OUT,
    # Qwen's experts
    "*/mlp/*_proj": ((1,), (2,)),
}


def model_input(batch):
    length = batch.input_tokens.shape[1]
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), batch.input_tokens.shape),
        "attention_mask": jnp.tril(jnp.ones((length, length), bool))[None],
    }


def sft(model):
    def loss(model, batch):
        return peft_trainer._default_loss_fn(model, **model_input(batch))

    def train(tx):
        config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        trainer = peft_trainer.PeftTrainer(model, tx, config).with_gen_model_input_fn(model_input)
        for steps in itertools.count(1):
            params = nnx.as_pure(nnx.state(model, nnx.Param))
            yield State(params, nnx.as_pure(trainer.optimizer.opt_state), trainer.optimizer.tx)
            trainer.train([BATCH] * steps)  # it leaves out those that it has seen

    return dimension_numbers(loss, model, BATCH), nnx.state(model, nnx.Param), USES, train


@case(f"Tunix {version('google-tunix')}, Llama 3")
def llama():
    config = llama3.ModelConfig(**SIZES, rope_theta=10_000, norm_eps=1e-5)
    return sft(llama3.Llama3(config, rngs=nnx.Rngs(0)))


@case("the same, Qwen 3, tied embedding")
def qwen():
    config = qwen3.ModelConfig(**SIZES, rope_theta=10_000, norm_eps=1e-5, use_tied_embedding=True)
    return sft(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


@case("the same, Qwen 3, experts")
def qwen_with_experts():
    config = qwen3.ModelConfig(
        **SIZES, rope_theta=10_000, norm_eps=1e-5, num_experts=3, num_experts_per_tok=2
    )
    return sft(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


@case("the same, Gemma 3")
def gemma():
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    config = dataclasses.replace(
        gemma3.ModelConfig.gemma3_270m(), num_embed=16, param_dtype=jnp.float32, **sizes
    )
    return sft(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))
