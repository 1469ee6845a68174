"""Short trainings of one model with many settings, which compile once for each optimizer."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import language, optimizers, training
from examples.text_data import Corpus, Windows, training_batches, validation_batches

State = tuple[Any, Any]  # params, and the state of an optimizer


class Trainer:
    """A model on a text, for runs of the length that its config says."""

    def __init__(self, config: language.Config, corpus: Corpus):
        self.config = config
        self._corpus = corpus
        model = language.make_model(self.config, self._corpus)
        self.numbers = language.numbers_of(model)
        self._graph, _, rest = nnx.split(model, nnx.Param, ...)
        self._rest = nnx.as_pure(rest)
        self._jitted_loss = jax.jit(self._loss)
        self._compiled: dict[str, tuple[Callable, Callable]] = {}

    def params(self, seed: int) -> Any:
        """The initial ones."""
        model = language.make_model(dataclasses.replace(self.config, seed=seed), self._corpus)
        return nnx.as_pure(nnx.state(model, nnx.Param))

    def batches(self, tokens: np.ndarray, seed: int) -> list[np.ndarray]:
        """Those of a run."""
        endless = training_batches(tokens, self.config.sequence_length, self.config.batch, seed)
        return list(itertools.islice(endless, self.config.steps))

    def run(self, name: str, settings: dict[str, Any]) -> "Run":
        """A run with an optimizer and its settings."""
        steps = self.config.steps
        config = dataclasses.replace(self.config, **settings)
        rates = jnp.asarray(optimizers.OPTIMIZERS[name].schedule(config, steps)(jnp.arange(steps)))
        # The warmup is in the rates.
        numbers = {key: jnp.asarray(value) for key, value in settings.items() if key != "warmup"}
        if name not in self._compiled:
            self._compiled[name] = self._compile(name, rates, numbers)
        return Run(*self._compiled[name], rates, numbers)

    def evaluate(self, state: State, tokens: np.ndarray) -> float | None:
        """The loss over all windows but for less than a batch, None for what is not finite."""
        length, batch = self.config.sequence_length, self.config.batch
        number = len(Windows(tokens, length)) // batch
        params = optimizers.evaluation_params(*state)
        batches = validation_batches(tokens, length, batch, number)
        return finite(np.mean([self._jitted_loss(params, tokens) for tokens in batches]))

    def _compile(
        self, name: str, rates: jax.Array, settings: dict[str, jax.Array]
    ) -> tuple[Callable, Callable]:
        """The first state of an optimizer, and an update, as functions of rates and settings."""
        fields = dataclasses.fields(optimizers.Settings)
        others = {field.name: getattr(self.config, field.name) for field in fields}

        def optimizer(rates: jax.Array, settings: dict[str, Any]) -> optax.GradientTransformation:
            made_of = optimizers.Settings(**others | settings)
            return optimizers.make_at(name, lambda count: rates[count], made_of, self.numbers)

        @jax.jit
        def init(params: Any, *of_run: Any) -> optax.OptState:
            return optimizer(*of_run).init(params)

        def update(state: State, tokens: jax.Array, *of_run: Any) -> tuple[State, jax.Array]:
            params, opt_state = state
            loss, grads = jax.value_and_grad(self._loss)(params, tokens)
            updates, opt_state = optimizer(*of_run).update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        params = self.params(0)
        state = params, init(params, rates, settings)
        tokens = np.zeros((self.config.batch, self.config.sequence_length + 1), np.int32)
        lowered = jax.jit(update, donate_argnums=0).lower(state, tokens, rates, settings)
        return init, lowered.compile()

    def _loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        return language.next_token_loss(nnx.merge(self._graph, params, self._rest), tokens)


class Run(NamedTuple):
    """A run with an optimizer."""

    init: Callable
    update: Callable
    rates: jax.Array  # of its steps
    settings: dict[str, jax.Array]

    def start(self, params: Any) -> State:
        """What it begins with, also in the middle."""
        return params, self.init(params, self.rates, self.settings)

    def train(
        self, state: State, batches: Sequence[np.ndarray], rates: jax.Array | None = None
    ) -> tuple[State, np.ndarray, float]:
        """The steps, with their rates or others, or those until the loss is not finite.

        Returns:
            The state, the losses, and the seconds of CPU time.
        """
        rates = self.rates if rates is None else rates
        losses = np.full(len(batches), np.nan)
        start = time.process_time()
        with training.stop_signal() as stopped:
            for i, tokens in enumerate(batches):
                state, losses[i] = self.update(state, tokens, rates, self.settings)
                if stopped():
                    raise training.Stopped("Stopped, and nothing kept of the run that was begun")
                if not math.isfinite(losses[i]):
                    break
        return state, losses, time.process_time() - start


def finite(value: Any) -> float | None:
    """A number for JSON."""
    return float(value) if math.isfinite(value) else None
