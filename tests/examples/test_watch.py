"""The 15 terms of every block, against an exact SVD and against a model unrolled by hand."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.gpt
import models.llama
import models.swin
import models.vit
from examples.language import next_token_loss
from examples.watch import watch
from models.gpt import GPT
from models.llama import Llama
from models.swin import Swin
from models.vit import ViT
from tests import numpy_layers

TERMS = {
    *("W_q", "W_k", "W_v", "W_o", "W_1", "W_2", "W_qW_k", "W_oW_v", "W_2W_1"),
    *("gamma_1", "beta_1", "gamma_2", "beta_2", "x", "grad_x"),
}
SMALL_GPT = models.gpt.Config(
    vocab_size=11, context_length=8, num_layers=2, num_heads=2, width=12, remat=True
)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 7))


def mean_square(model, images):
    return jnp.square(model(images)).mean()


@pytest.fixture(scope="module")
def gpt():
    model = numpy_layers.random_model(GPT, SMALL_GPT)
    return model, {k: float(v) for k, v in watch(model, TOKENS, next_token_loss).items()}


def test_terms_of_the_weights(gpt):
    model, found = gpt
    assert set(found) == {f"blocks/{block}/{term}" for block in range(2) for term in TERMS}
    for block in range(2):
        p = numpy_layers.block_of(numpy_layers.parameters(model)["blocks"], block)
        query, key, value = (
            p["attention"][name]["kernel"].reshape(12, 12) for name in ("query", "key", "value")
        )
        out = p["attention"]["out"]["kernel"].reshape(12, 12)
        up, down = p["mlp"]["up"]["kernel"], p["mlp"]["down"]["kernel"]
        matrices = {
            "W_q": query,
            "W_k": key,
            "W_v": value,
            "W_o": out,
            "W_1": up,
            "W_2": down,
            "W_qW_k": query @ key.T,
            "W_oW_v": value @ out,
            "W_2W_1": up @ down,
        }
        for term, matrix in matrices.items():
            np.testing.assert_allclose(
                found[f"blocks/{block}/{term}"], np.linalg.norm(matrix, 2), rtol=1e-5
            )
        for i, norm in ((1, p["attention_norm"]), (2, p["mlp_norm"])):
            for term, name in (("gamma", "scale"), ("beta", "bias")):
                np.testing.assert_allclose(
                    found[f"blocks/{block}/{term}_{i}"], np.linalg.norm(norm[name]), rtol=1e-5
                )


@pytest.mark.slow
def test_norms_at_the_inputs_are_those_of_a_model_unrolled_by_hand(gpt):
    model, found = gpt
    graph, stacked = nnx.split(model.blocks)
    blocks = [
        nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], nnx.as_pure(stacked))) for i in range(2)
    ]
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    x = model.token_embedding(inputs) + model.position_embedding(jnp.arange(6))

    def loss_from(block, x):
        for rest in blocks[block:]:
            x = rest(x)
        logits = model.token_embedding.attend(model.norm(x))
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()

    for block in range(2):
        gradient = jax.grad(loss_from, argnums=1)(block, x)
        np.testing.assert_allclose(found[f"blocks/{block}/x"], np.linalg.norm(x), rtol=1e-5)
        np.testing.assert_allclose(
            found[f"blocks/{block}/grad_x"], np.linalg.norm(gradient), rtol=1e-4
        )
        x = blocks[block](x)


def test_watching_leaves_the_model_as_it_was(gpt):
    model, _ = gpt
    fresh = numpy_layers.random_model(GPT, SMALL_GPT)
    assert nnx.split(model)[0] == nnx.split(fresh)[0]
    chex.assert_trees_all_equal(numpy_layers.parameters(model), numpy_layers.parameters(fresh))


def names(kind, config, batch, loss):
    """The keys, from the shapes alone."""
    return set(
        jax.eval_shape(lambda: watch(kind(config, rngs=nnx.Rngs(0)), jnp.asarray(batch), loss))
    )


def test_a_norm_without_a_bias_leaves_13_terms():
    gpt = dataclasses.replace(SMALL_GPT, use_bias=False)
    llama = models.llama.CONFIGS["llama-nano-qk-norm"]
    vit = dataclasses.replace(models.vit.CONFIGS["nano"], num_layers=2, norm="rms")
    images = np.ones((2, 8, 8, 1), np.float32)
    for found in (
        names(GPT, gpt, TOKENS, next_token_loss),
        names(Llama, llama, TOKENS, next_token_loss),
        names(ViT, vit, images, mean_square),
    ):
        expected = {term for term in TERMS if not term.startswith("beta")}
        assert len(expected) == 13
        assert found == {f"blocks/{block}/{term}" for block in range(2) for term in expected}


def test_every_stage_of_a_swin_is_watched():
    config = dataclasses.replace(models.swin.CONFIGS["flatten-nano"], depths=(1, 2))
    found = names(Swin, config, np.ones((2, 8, 8, 1), np.float32), mean_square)
    blocks = ("stages/0/blocks/0", "stages/1/blocks/0", "stages/1/blocks/1")
    assert found == {f"{block}/{term}" for block in blocks for term in TERMS}


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="Linear has no blocks to watch"):
        watch(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), np.ones((1, 2)), mean_square)
