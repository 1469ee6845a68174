"""The examples of Flax: their models, losses and train steps, in tiny configurations."""

import functools
import importlib
import os
import sys

import jax
import jax.numpy as jnp
import optax
from flax import jax_utils, nnx
from flax.training.train_state import TrainState
from table import (
    CONV,
    DENSE,
    OUT,
    QUERY,
    State,
    case,
    commit,
    stand_in,
    states,
    version,
)

from weyl_optax import dimension_numbers_from
from weyl_optax.flax import dimension_numbers

stand_in("tensorflow", "tensorflow_datasets", "tensorflow_text", "cv2", "grain")
stand_in("gymnasium", "gymnasium.spaces", "gymnasium.spaces.box")
stand_in("clu.metric_writers", "clu.periodic_actions", "clu.deterministic_data")
stand_in("flax.metrics.tensorboard", "PIL")

EXAMPLES = os.environ["SOURCES"]
EMBEDDING = {"*embedding": DENSE}
ATTENTION = {
    "*/query/kernel": QUERY,
    "*/key/kernel": QUERY,
    "*/value/kernel": QUERY,
    "*/out/kernel": OUT,
    "*/[qkv]*/bias": ((), (0, 1)),
}
TRANSFORMER = EMBEDDING | ATTENTION | {"*/kernel": DENSE}
CONVOLUTIONS = {"*onv*/kernel": CONV, "*/kernel": DENSE}
TOKENS = jnp.arange(1, 13).reshape(2, 6) % 11 + 1
RATE = optax.constant_schedule(0.1)


def example(name, *modules):
    """Modules of an example, which are all imported by the same names."""
    folder = os.path.join(EXAMPLES, name)
    for file in os.listdir(folder):
        sys.modules.pop(file.removesuffix(".py"), None)
    sys.path.insert(0, folder)
    imported = [importlib.import_module(module) for module in modules]
    sys.path.remove(folder)
    return imported


def pmapped(state, train_step, *inputs):
    """A step that is written for `pmap` over the axis `batch`, on one device."""
    step = jax.pmap(train_step, axis_name="batch", devices=jax.devices()[:1])
    inputs = jax.tree.map(lambda x: jnp.asarray(x)[None], inputs)

    def one_step(state):
        state, *_ = step(jax_utils.replicate(state), *inputs)
        return jax_utils.unreplicate(state)

    return states(state, one_step)


# Of the Transformers in lm1b, wmt and nlp_seq.
SIZES = {
    "emb_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "qkv_dim": 8,
    "mlp_dim": 12,
    "max_len": 6,
}


def language_model(**config):
    train, models = example("lm1b", "train", "models")
    config = models.TransformerConfig(
        vocab_size=13, output_vocab_size=13, deterministic=True, **SIZES, **config
    )
    model = models.TransformerLM(config)
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)
        total, weight = train.compute_weighted_cross_entropy(logits, tokens)
        return total / weight

    def train_it(tx):
        step = jax.jit(
            functools.partial(
                train.train_step,
                config=config,
                learning_rate_fn=RATE,
                dropout_rng=jax.random.key(0),
            )
        )
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        return states(state, lambda state: step(state, {"inputs": TOKENS})[0])

    return dimension_numbers_from(loss, params, TOKENS), params, TRANSFORMER, train_it


@case(f"Flax {version('flax')}, its examples ({commit(EXAMPLES)}), lm1b")
def lm1b():
    return language_model()


@case("the same, tied embedding")
def lm1b_tied():
    return language_model(logits_via_embedding=True)


@case("Flax examples, wmt, shared embedding")
def wmt():
    train, models = example("wmt", "train", "models")
    config = models.TransformerConfig(
        vocab_size=13,
        output_vocab_size=13,
        share_embeddings=True,
        logits_via_embedding=True,
        **SIZES,
        deterministic=True,
    )
    model = models.Transformer(config)
    params = model.init(jax.random.key(0), TOKENS, TOKENS)["params"]

    def loss(params, inputs, targets):
        logits = model.apply({"params": params}, inputs, targets)
        total, weight = train.compute_weighted_cross_entropy(logits, targets)
        return total / weight

    def train_it(tx):
        def step(state, tokens):
            batch = {"inputs": tokens, "targets": tokens}
            return train.train_step(state, batch, config, RATE, dropout_rng=jax.random.key(0))

        state = train.TrainState.create(
            apply_fn=model.apply, params=params, tx=tx, dynamic_scale=None
        )
        return pmapped(state, step, TOKENS)

    return dimension_numbers_from(loss, params, TOKENS, TOKENS), params, TRANSFORMER, train_it


@case("Flax examples, nlp_seq")
def nlp_seq():
    train, models = example("nlp_seq", "train", "models")
    model = models.Transformer(
        models.TransformerConfig(
            vocab_size=13,
            output_vocab_size=5,
            **SIZES,
        )
    )
    params = model.init(jax.random.key(0), inputs=TOKENS, train=False)["params"]
    tags = TOKENS % 5

    def loss(params, inputs, targets, key):
        logits = model.apply({"params": params}, inputs=inputs, train=True, rngs={"dropout": key})
        total, weight = train.compute_weighted_cross_entropy(logits, targets)
        return total / weight

    def train_it(tx):
        def step(state, inputs, targets):
            batch = {"inputs": inputs, "targets": targets}
            return train.train_step(state, batch, model, RATE, jax.random.key(0))

        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        return pmapped(state, step, TOKENS, tags)

    numbers = dimension_numbers_from(loss, params, TOKENS, tags, jax.random.key(0))
    return numbers, params, TRANSFORMER, train_it


@case("Flax examples, seq2seq (LSTM)")
def seq2seq():
    train, models, pipeline = example("seq2seq", "train", "models", "input_pipeline")
    table = pipeline.CharacterTable("0123456789+= ", 3)
    model = models.Seq2seq(
        teacher_force=False, hidden_size=8, eos_id=table.eos_id, vocab_size=table.vocab_size
    )
    params = train.get_initial_params(model, jax.random.key(0), table)
    batch = table.get_batch(4)

    def loss(params, query, answer, key):
        logits, _ = model.apply({"params": params}, query, answer, rngs={"lstm": key})
        labels = answer[:, 1:]
        lengths = pipeline.get_sequence_lengths(labels, table.eos_id)
        return train.cross_entropy_loss(logits, labels, lengths)

    def train_it(tx):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        key = jax.random.key(0)
        return states(state, lambda state: train.train_step(state, batch, key, table.eos_id)[0])

    inputs = batch["query"], batch["answer"], jax.random.key(0)
    return dimension_numbers_from(loss, params, *inputs), params, {"*/kernel": DENSE}, train_it


@case("Flax examples, vae")
def vae():
    train, models = example("vae", "train", "models")
    key, images = jax.random.key(0), jax.random.uniform(jax.random.key(1), (4, 784))
    model = models.model(20)
    params = model.init(key, images, key)["params"]

    def loss(params, images, key):
        reconstructed, mean, logvar = model.apply({"params": params}, images, key)
        return train.compute_metrics(reconstructed, images, mean, logvar)["loss"]

    def train_it(tx):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        step = jax.jit(functools.partial(train.train_step, latents=20))
        return states(state, lambda state: step(state, images, key))

    return dimension_numbers_from(loss, params, images, key), params, {"*/kernel": DENSE}, train_it


@case("Flax examples, ppo")
def ppo():
    train, models = example("ppo", "ppo_lib", "models")
    model = models.ActorCritic(num_outputs=4)
    params = train.get_initial_params(jax.random.key(0), model)
    screens = jax.random.uniform(jax.random.key(1), (2, 84, 84, 4), maxval=255)
    ones = jnp.ones(2)
    batch = screens, jnp.arange(2), -ones, ones, jnp.arange(2.0)
    weights = {"clip_param": 0.1, "vf_coeff": 0.5, "entropy_coeff": 0.01}

    def loss(params, batch):
        return train.loss_fn(params, model.apply, batch, **weights)

    def train_it(tx):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        return states(state, lambda state: train.train_step(state, batch, 2, **weights)[0])

    return dimension_numbers_from(loss, params, batch), params, CONVOLUTIONS, train_it


def resnet(block):
    train, models = example("imagenet", "train", "models")
    model = models.ResNet(
        stage_sizes=[1, 1],
        block_cls=getattr(models, block),
        num_filters=8,
        num_classes=train.NUM_CLASSES,
    )
    params, batch_stats = train.initialized(jax.random.key(0), 32, model)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    labels = jnp.arange(2)

    def loss(params, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(variables, images, mutable=["batch_stats"])
        return train.cross_entropy_loss(logits, labels)

    def loss_of_devices(params, images, labels):
        losses = jax.vmap(loss, (None, 0, 0), axis_name="batch")(params, images, labels)
        return losses.mean()

    def train_it(tx):
        def step(state, images, labels):
            return train.train_step(state, {"image": images, "label": labels}, RATE)

        state = train.TrainState.create(
            apply_fn=model.apply,
            params=params,
            tx=tx,
            batch_stats=batch_stats,
            dynamic_scale=None,
        )
        return pmapped(state, step, images, labels)

    numbers = dimension_numbers_from(loss_of_devices, params, images[None], labels[None])
    return numbers, params, CONVOLUTIONS, train_it


@case("Flax examples, imagenet ResNet, basic block")
def basic_block():
    return resnet("ResNetBlock")


@case("the same, bottleneck block")
def bottleneck_block():
    return resnet("BottleneckResNetBlock")


def gemma(num_kv_heads):
    train, transformer, configs = example("gemma", "train", "transformer", "transformer_cfg")
    config = transformer.TransformerConfig.from_dict(
        num_layers=2,
        num_embed=13,
        embed_dim=8,
        hidden_dim=12,
        num_heads=2,
        head_dim=4,
        num_kv_heads=num_kv_heads,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[configs.AttentionType.GLOBAL] * 2,
    )
    model = transformer.Transformer(config, rngs=nnx.Rngs(0))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    batch = {"inputs": TOKENS, "inputs_position": positions, "targets": TOKENS}
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())

    def loss(model, tokens, positions):
        mask = transformer.make_causal_attn_mask(tokens > 0)
        logits, _ = model(tokens, positions=positions, attention_mask=mask, cache=None)
        return train.compute_weighted_cross_entropy(logits, tokens).mean()

    def train_it(tx):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(train.nnx_train_step)

        def state():
            params = nnx.as_pure(nnx.state(model, nnx.Param))
            return State(params, nnx.as_pure(optimizer.opt_state), tx)

        def one_step(_):
            step(model, optimizer, nnx.Rngs(0), batch, metrics)
            return state()

        return states(state(), one_step)

    uses = {
        "embedder/embedding": DENSE,
        "*/attn_vec_einsum/kernel": OUT,
        "*/q_einsum/kernel": ((1,), (0, 2)),
        "*/*kv_einsum/kernel": ((2,), (0, 1, 3)),
        "*/kernel": DENSE,
    }
    numbers = dimension_numbers(loss, model, TOKENS, positions)
    return numbers, nnx.state(model, nnx.Param), uses, train_it


@case("Flax examples, Gemma (NNX), one key head")
def gemma_with_one_key_head():
    return gemma(1)


@case("the same, as many key heads as query heads")
def gemma_with_all_key_heads():
    return gemma(2)
