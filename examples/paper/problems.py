"""What optimizers are compared on: a model, and data in three parts."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from examples import language, program, vision
from examples.image_data import Images
from examples.paper import nano
from examples.text_data import (
    Corpus,
    Windows,
    load_corpus,
    split_test,
    training_batches,
    validation_batches,
)


class Problem(NamedTuple):
    """A model, a training set, a validation set and a test set."""

    config: program.Config
    make_model: Callable[[int], nnx.Module]  # from a seed
    numbers_of: Callable[[Any], Any]  # how the leaves of the model are read as matrices
    loss: Callable[[Any, Any], jax.Array]  # of the model and a batch to train on
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]  # loss and count of a held-out batch
    batches: Callable[[int], Iterable[Any]]  # endless, from a seed
    validation: list[Any]  # batches
    test: list[Any]
    data: str  # their name and fingerprint


def load(name: nano.Name, data: Path | None = None, **changes: Any) -> Problem:
    """A nano model on its data, or on another text.

    Args:
        name: Of the model.
        data: The text, see `load_corpus`.
        changes: To the config of the model.

    Raises:
        ValueError: If a change is out of range, if the text cannot be read or is too short, or
            if a text is given for a model of images.
    """
    model = nano.load(name)
    config = dataclasses.replace(model.config, **changes)
    if isinstance(config, language.Config):
        corpus = model.data if data is None else load_corpus(data)
        return of_text(config, corpus, "python" if data is None else data.name)
    if data is not None:
        raise ValueError(f"--data {data}: {name} trains on digits. Leave --data out.")
    return of_images(config, model.data, "digits")


def of_text(config: language.Config, corpus: Corpus, name: str) -> Problem:
    """A language model. The second half of the held-out tokens is the test set.

    There are as many held-out batches as the whole windows fill.

    Raises:
        ValueError: If a part of the text is too short for a batch.
    """
    language.check_length(config, corpus)
    fingerprint = corpus.fingerprint
    corpus, test = split_test(corpus)
    length, batch = config.sequence_length, config.batch

    def make_model(seed: int) -> nnx.Module:
        return language.make_model(dataclasses.replace(config, seed=seed), corpus)

    def held_out(tokens: np.ndarray) -> list[np.ndarray]:
        number = len(Windows(tokens, length)) // batch
        if number < 1:
            raise ValueError(
                f"The text has {tokens.size} tokens for validation or the test, too few for a "
                f"batch of {batch} sequences of {length}. Give more text, or a smaller --batch."
            )
        return validation_batches(tokens, length, batch, number)

    return Problem(
        config,
        make_model,
        language.numbers_of,
        language.next_token_loss,
        language.evaluate,
        lambda seed: training_batches(corpus.train, length, batch, seed),
        held_out(corpus.validation),
        held_out(test),
        f"{name} {fingerprint}",
    )


def of_images(config: vision.Config, images: Images, name: str) -> Problem:
    """A classifier of digits. The second half of the held-out digits is the test set."""
    parts = images.validation.halves()
    validation, test = (dataclasses.replace(images, validation=part) for part in parts)

    def with_seed(seed: int) -> vision.Config:
        return dataclasses.replace(config, seed=seed)

    return Problem(
        config,
        lambda seed: vision.make_model(with_seed(seed), images),
        vision.numbers_of,
        functools.partial(vision.loss, images),
        functools.partial(vision.evaluate, images),
        lambda seed: vision.training_set(with_seed(seed), images),
        list(vision.held_out(config, validation)),
        list(vision.held_out(config, test)),
        f"{name} {images.fingerprint}",
    )
