"""NanoDO: its model and its trainer, with another optimizer, and its params in boxes or not."""

from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import nanodo
import numpy as np
from jax.experimental import mesh_utils
from table import DENSE, OUT, QUERY, case, commit, stand_in, states

from weyl_optax import dimension_numbers_from

stand_in("tensorflow_datasets", "clu.metric_writers", "clu.periodic_actions")

from nanodo import model_factory, train  # noqa: E402
from nanodo.configs import default  # noqa: E402

TOKENS = np.arange(1, 33).reshape(4, 8) % 11 + 1
USES = {
    "*embed/embedding": DENSE,
    "*/query/kernel": QUERY,
    "*/key/kernel": QUERY,
    "*/value/kernel": QUERY,
    "*/attn_out_proj/kernel": OUT,
    "*/Dense_*/kernel": DENSE,
}


def train_nanodo(fsdp_enabled):
    config = default.get_config()
    config.update(log_internal_metrics=False)
    config.model = ml_collections.ConfigDict(
        {
            "D": 8,
            "H": 2,
            "L": 8,
            "N": 2,
            "F": 12,
            "dtype": "float32",
            "fsdp_enabled": fsdp_enabled,
            "remat": False,
        }
    )
    mesh = jax.sharding.Mesh(mesh_utils.create_device_mesh((1,)), ("data",))
    model, get_loss_fn = model_factory.get_model_and_loss(config, vocab_size=16)
    params = model.init(jax.random.key(0), jnp.asarray(TOKENS))["params"]

    def loss(params, tokens):
        return get_loss_fn(tokens, model.apply, config)(params)[0]

    def train_it(tx):
        with mock.patch.object(train.optimizer, "_get_base_optimizer", return_value=tx):
            shardings, state = train._init_train_state(config, model, jax.random.key(0), mesh)
        trainer = train.Trainer(config, state, mesh, shardings, get_loss_fn)

        def step(_):
            trainer.do_step(1, jnp.asarray(TOKENS))
            return trainer.state

        trainer.init_metrics = {}
        return states(trainer.state, step)

    return dimension_numbers_from(loss, params, jnp.asarray(TOKENS)), params, USES, train_it


@case(f"NanoDO ({commit(nanodo.__path__[0])})")
def plain():
    return train_nanodo(fsdp_enabled=False)


@case("the same, in `Partitioned`")
def boxed():
    return train_nanodo(fsdp_enabled=True)
