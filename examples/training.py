"""The training loop of the examples: one run of one optimizer on one task."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples import optimizers, placement, processes
from examples.recorder import Recorder
from weyl_optax import state_shardings
from weyl_optax.dynamics import watch


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and on what."""

    mesh: Mesh
    model: nnx.Module  # on the mesh
    batches: grain.DatasetIterator  # micro-batches, of which each process has its rows
    loss: Callable[[nnx.Module, Any], jax.Array]  # of a batch
    validation: Iterable[Any]  # batches, of which each process has its rows
    evaluate: Callable[[nnx.Module, Any], dict[str, jax.Array]]  # sums over a batch, and "count"
    observe: Callable[[nnx.Module, optax.OptState], dict[str, jax.Array]]  # at logged steps
    # Largest logits over a batch, which the update of an optimizer may need (QK-Clip).
    max_logits: Callable[[nnx.Module, Any], dict[str, jax.Array]] | None = None
    snapshot: Callable[[nnx.Module], dict[str, jax.Array]] | None = None  # at watched steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to train, and how often to do what, in steps."""

    steps: int
    accumulate: int  # micro-batches of a step
    log_every: int
    validate_every: int
    save_every: int
    watch_every: int = 0  # 0 for never


class Stopped(Exception):
    """The run was stopped by Ctrl-C (or SIGTERM), and is saved."""


def train(
    name: str,
    task: Task,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    plan: Plan,
    folder: Path,
) -> nnx.Module:
    """Trains the model of a task to the end of the plan, and returns it.

    It starts from the newest checkpoint, if `folder` has one, and writes there:
    `metrics.jsonl`, in which each logged step is a line with this `run`;
    `checkpoints/<name>`; `tensorboard/<name>`; and `snapshots/<name>/<step>.npz`. A loss
    that is not finite ends the run. Several processes train together, and share the folder:
    they write a checkpoint together, and the first one all else.

    Raises:
        Stopped: After Ctrl-C, in any process, with everything saved.
    """
    loss_fn = placement.spread_rows(task.loss, task.mesh)
    graph, state, update = start(task.model, loss_fn, optimizer, task.max_logits)
    validate = _make_validate(graph, task)
    everywhere = NamedSharding(task.mesh, P())  # so that each process can read it

    def merge(state: dict[str, Any]) -> nnx.Module:
        return nnx.merge(graph, state["params"], state["rest"])

    @functools.partial(jax.jit, out_shardings=everywhere)
    def observe(state: dict[str, Any]) -> dict[str, jax.Array]:
        return task.observe(merge(state), state["opt_state"])

    @functools.partial(jax.jit, out_shardings=everywhere)
    def measure(state: dict[str, Any], batch: Any) -> dict[str, jax.Array]:
        terms = watch(merge(state), jax.tree.map(lambda x: x[0], batch), loss_fn)
        return {f"watch/{name}": value for name, value in terms.items()}

    snapshot = jax.jit(lambda state: task.snapshot(merge(state)), out_shardings=everywhere)

    with (
        contextlib.closing(task.batches),
        Recorder(folder, name, task.mesh) as recorder,
        _stop_signal() as stopped,
    ):
        step, state = recorder.restore(state, task.batches)
        if 0 < step < plan.steps:
            same = recorder.was_on_same_devices
            how = "on the same mesh, to the bit" if same else "on another mesh, up to rounding"
            tqdm.write(f"{name} goes on after step {step} {how}.")
        bar = tqdm(
            total=plan.steps,
            initial=step,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not processes.is_first(),
        )
        stopwatch = _Stopwatch()
        while step < plan.steps and not recorder.diverged:
            batch = next_batch(task, plan.accumulate)
            step += 1
            last = step == plan.steps
            terms = {}
            # Of the weights from which the step starts, as its loss.
            if plan.watch_every and (step % plan.watch_every == 0 or step == 1 or last):
                terms = jax.device_get(measure(state, batch))
                if task.snapshot:
                    recorder.save_snapshot(step, snapshot(state))
            state, loss = update(state, batch)
            bar.update()
            if step % plan.log_every == 0 or step == 1 or last or terms:
                loss = float(loss)
                metrics = {
                    "loss": loss,
                    "learning_rate": float(learning_rate(step - 1)),
                    **stopwatch.rate(step),
                    **observe(state),
                    **terms,
                }
                bar.set_postfix(loss=f"{loss:.3f}")
                if not math.isfinite(loss):
                    bar.write(f"{name}: the loss is {loss} at step {step}. This run ends here.")
                elif step % plan.validate_every == 0 or last:
                    metrics |= validate(state)
                recorder.write(step, metrics)
                stopwatch.restart(step)
            stop = stopped()
            if step % plan.save_every == 0 or last or recorder.diverged or stop:
                recorder.save(step, state, task.batches)
                stopwatch.restart(step)
            if stop and not last:
                bar.close()
                raise Stopped(f"{name} is saved at step {step}")
        bar.close()
    return merge(state)


def next_batch(task: Task, accumulate: int) -> Any:
    """The next batch, (micro-batches, rows, ...), with the rows over all devices."""
    parts = [next(task.batches) for _ in range(accumulate)]
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
    return placement.place_batch(batch, task.mesh, P(None, *placement.ROWS))


def start(
    model: nnx.Module,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    max_logits: Callable[[nnx.Module, Any], dict[str, jax.Array]] | None = None,
) -> tuple[nnx.GraphDef, dict[str, Any], Callable]:
    """What a training begins with.

    Returns:
        The graph of the model, the state, and `update(state, batch) -> (state, loss)`: a step
        of the optimizer on a batch, (micro-batches, rows, ...). It donates the state. Params
        and moments stay where the leaves of the model lie.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    init = jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params))
    state = {"params": params, "rest": rest, "opt_state": init(params)}
    shardings = jax.tree.map(lambda x: x.sharding, state)

    def loss_fn(params: Any, rest: Any, batch: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest)
        value = loss(model, batch)
        return value, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def update(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], jax.Array]:
        params = state["params"]

        def add_part(carry: Any, part: Any) -> tuple[Any, None]:
            total, grads, rest = carry
            (value, rest), new = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, part)
            grads = jax.lax.with_sharding_constraint(
                jax.tree.map(jnp.add, grads, new), shardings["params"]
            )
            return (total + value, grads, rest), None

        start = (jnp.zeros([]), jax.tree.map(jnp.zeros_like, params), state["rest"])
        (total, grads, rest), _ = jax.lax.scan(add_part, start, batch)
        accumulate = len(jax.tree.leaves(batch)[0])
        grads = jax.tree.map(lambda g: g / accumulate, grads)
        extra_args = {}
        if max_logits:
            model = nnx.merge(graph, params, state["rest"])
            model.eval()
            parts = jax.lax.map(functools.partial(max_logits, model), batch)
            extra_args = {"max_logits": jax.tree.map(lambda x: x.max(0), parts)}
        updates, opt_state = optimizer.update(grads, state["opt_state"], params, **extra_args)
        params = optax.apply_updates(params, updates)
        return {"params": params, "rest": rest, "opt_state": opt_state}, total / accumulate

    return graph, state, update


def _make_validate(graph: nnx.GraphDef, task: Task) -> Callable[[dict[str, Any]], dict[str, float]]:
    """The means over the validation batches, without dropout, as `val_<name>`."""
    evaluate_batch = placement.spread_rows(task.evaluate, task.mesh)

    @functools.partial(jax.jit, out_shardings=NamedSharding(task.mesh, P()))
    def evaluate(state: dict[str, Any], batch: Any) -> dict[str, jax.Array]:
        params = optimizers.evaluation_params(state["params"], state["opt_state"])
        model = nnx.merge(graph, params, state["rest"])
        model.eval()
        return evaluate_batch(model, batch)

    def validate(state: dict[str, Any]) -> dict[str, float]:
        batches = (
            placement.place_batch(batch, task.mesh, placement.ROWS) for batch in task.validation
        )
        sums = [jax.device_get(evaluate(state, batch)) for batch in batches]
        total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        count = total.pop("count")
        return {f"val_{name}": value / count for name, value in total.items()}

    return validate


class _Stopwatch:
    """Measures the speed since its last restart."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        self._start = step, time.perf_counter()

    def rate(self, step: int) -> dict[str, float]:
        """Nothing before the first restart: that time goes into compiling."""
        if self._start is None or self._start[0] == step:
            return {}
        return {
            "steps_per_second": (step - self._start[0]) / (time.perf_counter() - self._start[1])
        }


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C or SIGTERM came to any process; a second one is not held back."""
    received = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    # The handler is None where JAX, in several processes, has set one of its own.
    before = {
        number: signal.signal(number, receive) or signal.SIG_DFL
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        # Each process asks at each step, so that all stop at the same one.
        yield lambda: bool(multihost_utils.process_allgather(np.array(bool(received))).any())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
