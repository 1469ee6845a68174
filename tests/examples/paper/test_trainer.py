import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from examples import language, optimizers
from examples.paper import nano
from examples.paper.trainer import Trainer
from examples.text_data import training_batches, validation_batches


@pytest.mark.slow
def test_a_run_is_that_of_a_plain_loop():
    """The losses, with settings that the compiled program is given, and on both held-out sets."""
    config, corpus = nano.load_text("llama")
    small = dataclasses.replace(config, batch=4, sequence_length=16, steps=20)
    trainer = Trainer(small, corpus)
    trainer.run("adamw_warmup", {"learning_rate": 1e-2, "b2": 0.9, "warmup": 5})
    rate, b2, warmup = 1e-3, 0.99, 2
    settings = {"learning_rate": rate, "b2": b2, "warmup": warmup}
    run = trainer.run("adamw_warmup", settings)  # by what the first has compiled
    batches = trainer.batches(corpus.train, 3)
    found, found_losses, seconds = run.train(run.start(trainer.params(3)), batches)
    assert 0 < seconds < 100
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, 20)
    config = dataclasses.replace(small, seed=3)
    graph, params = nnx.split(language.make_model(config, corpus))
    params = nnx.as_pure(params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, 0.9, b2, weight_decay=0.1, mask=optimizers.is_decayed),
    )
    state, losses = optimizer.init(params), []

    @jax.jit
    def loss_and_grads(params, tokens):
        loss = lambda params: language.next_token_loss(nnx.merge(graph, params), tokens)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    for tokens in itertools.islice(training_batches(corpus.train, 16, 4, 3), 20):
        loss, grads = loss_and_grads(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(found_losses, losses, rtol=1e-4)
    held_out = corpus.validation[:1000]
    batches = validation_batches(held_out, 16, 4, 999 // 16 // 4)
    expected = np.mean([loss_and_grads(params, tokens)[0] for tokens in batches])
    np.testing.assert_allclose(trainer.evaluate(found, held_out), expected, rtol=1e-4)

    run = trainer.run("adamw_warmup", settings | {"learning_rate": 1e25})
    batches = trainer.batches(corpus.train, 0)
    failed, losses, _ = run.train(run.start(trainer.params(0)), batches)
    assert np.isnan(losses[-1])
    assert trainer.evaluate(failed, held_out) is None
