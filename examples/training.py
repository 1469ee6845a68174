"""What the training loops call: a step, a batch, a validation, and how a run stops."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

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


class Task(NamedTuple):
    """What is trained, and on what."""

    mesh: Mesh
    model: Any  # an nnx.Module, on the mesh
    numbers: Any  # how its leaves are read as matrices
    batches: grain.DatasetIterator  # micro-batches, of which each process has its rows
    loss: Callable[[Any, Any], jax.Array]  # of the model and a micro-batch
    run: dict[str, Any]  # its settings, and a fingerprint of its data


class Stopped(Exception):
    """The run was stopped by Ctrl-C (or SIGTERM), and is saved."""


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


def next_batch(task: Task, accumulate: int) -> Any:
    """The next batch, (micro-batches, rows, ...), with the rows over all devices."""
    with processes.deaf_children():  # the first batch starts the processes that read
        parts = [next(task.batches) for _ in range(accumulate)]
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
    return placement.place_batch(batch, task.mesh, P(None, *placement.ROWS))


def of_model(graph: nnx.GraphDef, mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function of a state, from one of the model, that each process can read."""

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def of_state(state: dict[str, Any], *inputs: Any) -> Any:
        return function(nnx.merge(graph, state["params"], state["rest"]), *inputs)

    return of_state


def make_validate(
    graph: nnx.GraphDef,
    mesh: Mesh,
    batches: Iterable[Any],
    evaluate: Callable[[Any, Any], dict[str, jax.Array]],
) -> Callable[[dict[str, Any]], dict[str, float]]:
    """The means over the validation batches, without dropout, as `val_<name>`.

    Args:
        graph: Of the model.
        mesh: That of the model.
        batches: Of each, a process has its rows.
        evaluate: Sums over a batch of a model, and their `count`.
    """
    evaluate_rows = placement.spread_rows(evaluate, mesh)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def evaluate_batch(state: dict[str, Any], batch: Any) -> dict[str, jax.Array]:
        params = optimizers.evaluation_params(state["params"], state["opt_state"])
        model = nnx.merge(graph, params, state["rest"])
        model.eval()
        return evaluate_rows(model, batch)

    def validate(state: dict[str, Any]) -> dict[str, float]:
        with processes.deaf_children():
            placed = (placement.place_batch(batch, mesh, placement.ROWS) for batch in batches)
            sums = [jax.device_get(evaluate_batch(state, batch)) for batch in placed]
        total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        count = total.pop("count")
        return {f"val_{name}": value / count for name, value in total.items()}

    return validate


def steps(recorder: Recorder, done: int, total: int) -> Iterator[int]:
    """The steps of a run that are left, with a progress bar, while its loss is finite."""
    name = recorder.name
    if 0 < done < total:
        same = recorder.was_on_same_devices
        how = "on the same devices, to the bit" if same else "on other devices, up to rounding"
        tqdm.write(f"{name} goes on after step {done} {how}.")
    hidden = not processes.is_first()
    with tqdm(
        total=total, initial=done, desc=name, unit="step", dynamic_ncols=True, disable=hidden
    ) as bar:
        for step in range(done + 1, total + 1):
            if recorder.diverged:
                break
            yield step
            bar.set_postfix(loss=recorder.loss, refresh=False)
            bar.update()


SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_received: ContextVar[list[int]] = ContextVar("received")


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C or SIGTERM came to any process; a second one is not held back.

    Within another one it tells too what came to that before. Orbax's `reached_preemption` needs
    JAX's distributed runtime, and does not see Ctrl-C.
    """
    received = _received.get([])
    token = _received.set(received)

    def receive(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, SIGNALS[number])

    # The handler is None where JAX, in several processes, has set one of its own.
    before = {
        number: signal.signal(number, default if received else receive) or signal.SIG_DFL
        for number, default in SIGNALS.items()
    }
    try:
        # Each process asks at each step, so that all stop at the same one.
        yield lambda: bool(multihost_utils.process_allgather(np.array(bool(received))).any())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.reset(token)
