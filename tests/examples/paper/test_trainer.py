import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from examples import language, optimizers, training, vision
from examples.paper import nano, problems
from examples.paper.trainer import Trainer
from examples.text_data import training_batches, validation_batches


@pytest.mark.slow
def test_a_run_is_that_of_a_plain_loop():
    """The losses, with settings that the compiled program is given, and on both held-out sets."""
    *_, config, corpus = nano.load("llama")
    corpus = corpus._replace(validation=corpus.validation[:2000])
    small = dataclasses.replace(config, batch=4, sequence_length=16, steps=20)
    problem = problems.of_text(small, corpus, "python")
    trainer = Trainer(problem)
    trainer.run("adamw_warmup", {"learning_rate": 1e-2, "b2": 0.9, "warmup": 5})
    rate, b2, warmup = 1e-3, 0.99, 2
    settings = {"learning_rate": rate, "b2": b2, "warmup": warmup}
    run = trainer.run("adamw_warmup", settings)  # by what the first has compiled
    batches = trainer.batches(3)
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
    halves = corpus.validation[:1000], corpus.validation[1000:]
    for batches, tokens in zip((problem.validation, problem.test), halves, strict=True):
        expected = np.mean(
            [
                loss_and_grads(params, x)[0]
                for x in validation_batches(tokens, 16, 4, 999 // 16 // 4)
            ]
        )
        np.testing.assert_allclose(trainer.evaluate(found, batches), expected, rtol=1e-4)

    run = trainer.run("adamw_warmup", settings | {"learning_rate": 1e25})
    batches = trainer.batches(0)
    failed, losses, _ = run.train(run.start(trainer.params(0)), batches)
    assert np.isnan(losses[-1])
    assert trainer.evaluate(failed, problem.test) is None


@pytest.mark.slow
def test_images_have_a_test_set_of_their_own_and_train_as_a_plain_loop():
    problem = problems.load("vit", steps=20, batch=16)
    images = nano.load("vit").data
    held_out = images.validation
    for part, start in ((problem.validation, 0), (problem.test, len(held_out) // 2)):
        shown = [image for batch in part for image in batch["image"][batch["weight"] > 0]]
        expected = [np.asarray(held_out[start + i].image)[..., None] for i in range(len(shown))]
        np.testing.assert_array_equal(shown, expected)
    assert len(shown) == len(held_out) - len(held_out) // 2

    trainer = Trainer(problem)
    run = trainer.run("adamw2", {"learning_rate": 0.01, "tau": 0.1})
    state, losses, _ = run.train(run.start(trainer.params(2)), trainer.batches(2))
    config = dataclasses.replace(problem.config, seed=2, learning_rate=0.01, tau=0.1)
    task = vision.make_task(config, images)
    optimizer, _ = optimizers.make("adamw2", config, 20, task.numbers)
    graph, plain, update = training.start(task.model, task.loss, optimizer)
    expected = []
    for _ in range(20):
        plain, loss = update(plain, training.next_batch(task, 1))
        expected.append(float(loss))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    pixels = np.stack([np.asarray(held_out[i].image)[..., None] for i in range(len(held_out))])
    labels = np.array([held_out[i].label for i in range(len(held_out))])
    logits = nnx.merge(graph, plain["params"], plain["rest"])(vision.normalize(images, pixels))
    all_losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    half = len(held_out) // 2
    found = trainer.evaluate(state, problem.test)
    np.testing.assert_allclose(found, np.mean(all_losses[half:]), rtol=1e-3)
