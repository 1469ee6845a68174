"""Short trainings of one problem with many settings, compiled once for each optimizer."""

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

from examples import optimizers, training
from examples.paper.problems import Problem

State = tuple[Any, Any]  # params, and the state of an optimizer
NOTHING_KEPT = "Stopped, and nothing kept of the run that was begun"


class Trainer:
    """Trains the model of a problem, for as many steps as its config says."""

    def __init__(self, problem: Problem):
        self.problem = problem
        model = problem.make_model(0)
        self.numbers = problem.numbers_of(model)
        self._graph, _, rest = nnx.split(model, nnx.Param, ...)
        self._rest = nnx.as_pure(rest)
        self._evaluate = jax.jit(
            lambda params, batch: problem.evaluate(self._merged(params), batch)
        )
        self._compiled: dict[str, tuple[Callable, Callable]] = {}

    def params(self, seed: int) -> Any:
        """The initial ones."""
        return nnx.as_pure(nnx.state(self.problem.make_model(seed), nnx.Param))

    def batches(self, seed: int) -> list[Any]:
        """Those of a run."""
        return list(itertools.islice(self.problem.batches(seed), self.problem.config.steps))

    def run(self, name: str, settings: dict[str, Any]) -> "Run":
        """A run with an optimizer and its settings."""
        steps = self.problem.config.steps
        config = dataclasses.replace(self.problem.config, **settings)
        rates = jnp.asarray(optimizers.OPTIMIZERS[name].schedule(config, steps)(jnp.arange(steps)))
        # The warmup is in the rates.
        numbers = {key: jnp.asarray(value) for key, value in settings.items() if key != "warmup"}
        if name not in self._compiled:
            self._compiled[name] = self._compile(name, rates, numbers)
        return Run(*self._compiled[name], rates, numbers)

    def evaluate(self, state: State, batches: Sequence[Any]) -> float | None:
        """The loss over held-out batches, None for what is not finite."""
        params = optimizers.evaluation_params(*state)
        found = [jax.device_get(self._evaluate(params, batch)) for batch in batches]
        return finite(sum(x["loss"] for x in found) / sum(x["count"] for x in found))

    def _compile(
        self, name: str, rates: jax.Array, settings: dict[str, jax.Array]
    ) -> tuple[Callable, Callable]:
        """The first state of an optimizer, and an update, as functions of rates and settings."""
        fields = dataclasses.fields(optimizers.Settings)
        others = {field.name: getattr(self.problem.config, field.name) for field in fields}

        def optimizer(rates: jax.Array, settings: dict[str, Any]) -> optax.GradientTransformation:
            made_of = optimizers.Settings(**others | settings)
            return optimizers.make_at(name, lambda count: rates[count], made_of, self.numbers)

        @jax.jit
        def init(params: Any, *of_run: Any) -> optax.OptState:
            return optimizer(*of_run).init(params)

        def update(state: State, batch: Any, *of_run: Any) -> tuple[State, jax.Array]:
            params, opt_state = state
            loss, grads = jax.value_and_grad(self._loss)(params, batch)
            updates, opt_state = optimizer(*of_run).update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        params, batch = self.params(0), next(iter(self.problem.batches(0)))
        state = params, init(params, rates, settings)
        lowered = jax.jit(update, donate_argnums=0).lower(state, batch, rates, settings)
        return init, lowered.compile()

    def _loss(self, params: Any, batch: Any) -> jax.Array:
        return self.problem.loss(self._merged(params), batch)

    def _merged(self, params: Any) -> nnx.Module:
        return nnx.merge(self._graph, params, self._rest)


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
        self, state: State, batches: Sequence[Any], rates: jax.Array | None = None
    ) -> tuple[State, np.ndarray, float]:
        """The steps, with their rates or others, or those until the loss is not finite.

        Returns:
            The state, the losses, and the seconds of CPU time.
        """
        rates = self.rates if rates is None else rates
        losses = np.full(len(batches), np.nan)
        start = time.process_time()
        with training.stop_signal() as stopped:
            for i, batch in enumerate(batches):
                state, losses[i] = self.update(state, batch, rates, self.settings)
                if stopped():
                    raise training.Stopped(NOTHING_KEPT)
                if not math.isfinite(losses[i]):
                    break
        return state, losses, time.process_time() - start


def finite(value: Any) -> float | None:
    """A number for JSON."""
    return float(value) if math.isfinite(value) else None
