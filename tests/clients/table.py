"""A row of the table in docs/clients.md: how a model is read, and 20 steps of its training."""

import collections
import fnmatch
import importlib.machinery
import importlib.metadata
import pathlib
import subprocess
import sys
import tempfile
import traceback
from unittest import mock

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from checks import TAU, assert_bounded, axes, by_path

from weyl_optax import adamw2

STEPS = 20

VECTOR = ((), (0,))
DENSE = ((0,), (1,))
QUERY = ((0,), (1, 2))
OUT = ((0, 1), (2,))
CONV = ((0, 1, 2), (3,))

# What is read of a state of training: Flax's `TrainState` is one, too.
State = collections.namedtuple("State", "params opt_state tx")


def states(state, step):
    """A training: the state at the start, and after each step."""
    while True:
        yield state
        state = step(state)


def plain_training(loss, params, *inputs):
    """For a client without a train step that can be imported: Optax's own."""

    def train(tx):
        @jax.jit
        def step(params, opt_state):
            grads = jax.grad(loss)(params, *inputs)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return states(
            State(params, tx.init(params), tx),
            lambda state: State(*step(state.params, state.opt_state), tx),
        )

    return train


def case(client):
    """Prints the row of a client. The function that it decorates makes its numbers and training.

    It returns `numbers`, as the program is read; the `params`; how its code uses them, a reading
    for every pattern of paths, but of vectors; and `train`, which is given an optimizer, and
    yields the state at the start and after each step.
    """

    def print_row(make):
        cells = ["-", "-"]
        try:
            numbers, params, uses, train = make()
            cells = counts(numbers, params, uses)
            cells.append(run(numbers, train))
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            cells.append(f"{type(error).__name__}: {said[0]}")
        print(f"| {client} | {' | '.join(cells)} |", flush=True)

    return print_row


def stand_in(*modules):
    """For what a client imports and only needs to fetch data or to log."""
    importlib.import_module("flax.io")  # would take a stand-in for TensorFlow
    for module in modules:
        sys.modules[module] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(module, None))


def version(package):
    return importlib.metadata.version(package)


def commit(folder):
    """That of the clone in which a folder lies."""
    command = ["git", "-C", folder, "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def counts(numbers, params, uses):
    """How many leaves are read as they are used: from the loss, and by their ranks."""
    leaves = by_path(params)
    read = axes(numbers)
    right, right_by_rank = 0, 0
    for path, leaf in leaves.items():
        used = sides(leaf, use_of(path, leaf, uses))
        every = tuple(range(leaf.ndim))
        by_rank = (every[-2:-1], every[-1:]) if leaf.ndim > 1 else ((), every)
        right_by_rank += sides(leaf, by_rank) == used
        if sides(leaf, read[path]) == used:
            right += 1
        else:
            print(f"  {path} {leaf.shape}: read as {read[path]}, used as {used}", flush=True)
    return [f"{right} of {len(leaves)}", str(right_by_rank)]


def use_of(path, leaf, uses):
    if leaf.ndim < 2:
        return (), tuple(range(leaf.ndim))
    for pattern, use in uses.items():
        if fnmatch.fnmatch(path, pattern):
            return use
    raise LookupError(f"nothing says how {path!r} of shape {leaf.shape} is used")


def sides(leaf, reading):
    """The same for a matrix and its transpose, and whatever role axes of size 1 have."""
    wide = [frozenset(axis for axis in side if leaf.shape[axis] > 1) for side in reading]
    if not all(wide):
        return frozenset([frozenset().union(*wide)])
    return frozenset(wide)


def run(numbers, train):
    """Takes the steps: all are bounded, and the state is mapped and restored."""
    states = train(adamw2(0.1, tau=TAU, weight_dimension_numbers=numbers))
    readings, before = axes(numbers), host(next(states))
    for _ in range(STEPS):
        state = next(states)
        after = host(state)
        assert_bounded(before, after, readings)
        before = after
    assert_maps(state)
    assert_restores(state)
    return f"{STEPS} steps"


def host(state):
    """The params of a state, whose buffers the next step may donate."""
    return jax.tree.map(np.array, by_path(state.params))


def assert_maps(state):
    """`optax.tree.map_params` pairs the params with both moments, and with gradients if kept."""
    n, shapes = len(by_path(state.params)), []
    optax.tree.map_params(
        state.tx,
        lambda *pair: shapes.append([x.shape for x in pair]),
        state.opt_state,
        state.params,
    )
    assert all(moment == param for moment, param in shapes), "map_params pairs other leaves"
    assert len(shapes) in (2 * n, 3 * n), f"{len(shapes)} pairs for {n} params"


def assert_restores(state):
    """A checkpoint of Orbax gives the state of the optimizer back."""
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = pathlib.Path(folder) / "state"
        checkpointer.save(path, state.opt_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, state.opt_state)
    assert jax.tree.structure(restored) == jax.tree.structure(state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored, state.opt_state)
