"""MaxText: its layers, loss and train step, and its Muon numbers beside what its code multiplies.

Its package wants Python 3.12, for one statement in kernels that nothing here needs: an empty module
stands in for them, so that the rest is imported by an older Python, too.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from checks import axes, by_path
from flax import linen as nn
from flax.training.train_state import TrainState
from table import case, commit, sides, stand_in, states

from weyl_optax import dimension_numbers_from

stand_in("tensorflow", "maxtext.kernels.mhc", "maxtext.kernels.mhc.api")

from maxtext.configs import pyconfig  # noqa: E402
from maxtext.models import models  # noqa: E402
from maxtext.trainers.pre_train import train as trainer  # noqa: E402
from maxtext.utils import globals as maxtext_globals  # noqa: E402
from maxtext.utils import maxtext_utils, muon_utils  # noqa: E402

SIZES = {
    "base_emb_dim": 8,
    "base_mlp_dim": 12,
    "base_moe_mlp_dim": 12,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_num_decoder_layers": 3,
    "head_dim": 6,
    "vocab_size": 16,
    "max_target_length": 8,
    "per_device_batch_size": 2,
}
PLAIN = {
    "run_name": "tiny",
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "attention": "dot_product",
    "dtype": "float32",
    "enable_dropout": False,
    "skip_jax_distributed_system": True,
    "pure_nnx": False,
    "enable_nnx": False,
    "pure_nnx_decoder": False,
}
TOKENS = jnp.asarray(np.arange(1, 17).reshape(2, 8) % 11 + 1)
POSITIONS = jnp.broadcast_to(jnp.arange(8), (2, 8))
DATA = {
    f"{name}{suffix}": value
    for name in ("inputs", "targets")
    for suffix, value in (("", TOKENS), ("_position", POSITIONS), ("_segmentation", TOKENS * 0 + 1))
}
# Layers are scanned along axis 1.
USES = {
    "*embedding": ((0,), (1,)),
    "*/logits_dense/kernel": ((0,), (1,)),
    "*scale": ((), (0,)),
    "*/sinks": ((), (0,)),
    "*ttention/out/kernel": ((0, 2), (3,)),
    "*ttention/*/kernel": ((0,), (2, 3)),
    "*ttention/[qkv]*/bias": ((), (0, 2)),
    "*/w*_bias": ((), (2,)),
    "*/wi_?": ((2,), (3,)),  # of experts, which are axis 0
    "*/wo": ((2,), (3,)),
    "*/kernel": ((0,), (2,)),
    "*/bias": ((), (0,)),
}


def transformer(**overrides):
    file = os.path.join(maxtext_globals.MAXTEXT_PKG_DIR, "configs", "base.yml")
    settings = (PLAIN | SIZES | overrides).items()
    config = pyconfig.initialize(["", file, *(f"{name}={value}" for name, value in settings)])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh=mesh, quant=None)
    key = jax.random.key(0)
    variables = jax.jit(model.init)({"params": key, "dropout": key, "aqt": key}, TOKENS, POSITIONS)
    params = nn.unbox({"params": variables["params"]})

    def loss(params, data):
        return trainer.loss_fn(model, config, dict(data), key, params)[0]

    def train(tx):
        step = jax.jit(
            lambda state: trainer.train_step(model, config, None, None, state, dict(DATA), key)[0]
        )
        return states(TrainState.create(apply_fn=model.apply, params=params, tx=tx), step)

    numbers = dimension_numbers_from(loss, params, DATA)
    compare(params, numbers, muon_utils.get_transform_tree(params))
    return numbers, params, USES, train


def compare(params, numbers, muon):
    """Prints where MaxText's Muon numbers are not the matrices that its code multiplies by."""
    leaves, read, muon = by_path(params), axes(numbers), by_path(muon)
    for path, leaf in leaves.items():
        if path not in muon:
            continue
        theirs = tuple(tuple(i % leaf.ndim for i in side) for side in muon[path])
        if sides(leaf, theirs) != sides(leaf, read[path]):
            print(f"  {path} {leaf.shape}: Muon's numbers {theirs}, the product {read[path]}")


@case(f"MaxText ({commit(maxtext_globals.MAXTEXT_PKG_DIR)}), Llama, layers on axis 1")
def llama():
    return transformer()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "megablox": False}  # `ragged_dot`


@case("the same, Mixtral")
def mixtral():
    return transformer(decoder_block="mixtral", **EXPERTS)


@case("the same, Qwen 3 with experts")
def qwen():
    return transformer(decoder_block="qwen3_moe", **EXPERTS)


@case("the same, gpt-oss")
def gpt_oss():
    return transformer(decoder_block="gpt_oss", mlp_bias=True, attention_sink=True, **EXPERTS)
