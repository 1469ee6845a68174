"""What the benchmarks compare, and how they count."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from benchmarks import estimator_accuracy, measure, peers, scaling, trees
from benchmarks.updates import Update


@pytest.fixture
def matrices():
    return np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)


@pytest.mark.parametrize(
    ("norms", "tolerance"),
    [
        (peers.exact_svd, 1e-6),
        (estimator_accuracy.exact, 1e-6),
        (peers.cold_power_iterations(200), 1e-4),
        (peers.cold_power_iterations(3), 0.3),
        (peers.optax_power_iteration, 0.3),
    ],
)
def test_norms_of_the_peers(norms, tolerance, matrices):
    exact = np.linalg.norm(np.float64(matrices), 2, axis=(1, 2))
    below = 1 - norms(jnp.asarray(matrices)) / exact
    assert (below > -1e-6).all()
    assert (below < tolerance).all()


def test_bound_by_the_exact_norm_is_algorithm_1(matrices):
    numbers = {"w": MuonDimensionNumbers(1, 2)}
    weights, updates = {"w": jnp.asarray(matrices)}, {"w": jnp.asarray(900 * matrices)}
    bounded, _ = peers.bound_by(peers.exact_svd, numbers).update(
        updates, optax.EmptyState(), weights
    )
    # rate * 900 > tau, so that the step is tau times as large as the weight
    np.testing.assert_allclose(peers.RATE * bounded["w"], peers.TAU * matrices, rtol=1e-5)


def test_unstacked_layers_are_the_same_matrices():
    tree = trees.gpt2_small()
    apart = trees.unstacked(tree)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(t.shapes)) for t in (tree, apart)]
    assert sizes[0] == sizes[1] == 124_439_808
    query = apart.shapes["blocks"]["11"]["attention"]["query"]["kernel"]
    assert query.shape == (768, 12, 64)
    assert apart.numbers["blocks"]["11"]["attention"]["query"]["kernel"] == MuonDimensionNumbers(
        (0,), (1, 2)
    )


@pytest.mark.parametrize("name", peers.OPTIMIZERS)
def test_every_optimizer_takes_a_step_on_a_small_tree(name):
    shapes = {"w": jax.ShapeDtypeStruct((2, 12, 8), np.float32)}
    tree = trees.Tree(shapes, {"w": MuonDimensionNumbers(1, 2)})
    params, grads = trees.fill(tree, 0), trees.fill(tree, 1)
    optimizer = peers.OPTIMIZERS[name](tree.numbers)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert jnp.isfinite(updates["w"]).all()
    assert float(jnp.vdot(updates["w"], grads["w"])) < 0  # downhill


def test_an_update_goes_on_from_its_state():
    shapes = {"w": jax.ShapeDtypeStruct((12, 8), np.float32)}
    tree = trees.Tree(shapes, {"w": MuonDimensionNumbers(0, 1)})
    params, grads = trees.fill(tree, 0), trees.fill(tree, 1)
    optimizer = optax.sgd(1e-3, momentum=0.9)
    own, state = Update(optimizer, tree, grads), optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        found, _ = own.step()
        np.testing.assert_allclose(found["w"], updates["w"], rtol=1e-6)
    assert own.state_bytes == 4 * 12 * 8


def test_kinds_of_weights():
    kinds = {
        "blocks/attention/query/kernel": "attention",
        "blocks/mlp/down/kernel": "mlp",
        "position_embedding": "other",
    }
    assert {path: estimator_accuracy.kind(path) for path in kinds} == kinds


def test_too_few_steps_say_what_to_write():
    with pytest.raises(SystemExit, match="--steps 20: it must be at least 21"):
        estimator_accuracy.main(estimator_accuracy.Flags(steps=20))


def test_slope():
    assert scaling.slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_seconds_and_report(tmp_path, capsys):
    calls = []
    found = measure.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0)
    assert calls == ["a", "b", "a", "b"]  # in turns; the first of each does not count
    assert all(seconds >= 0 for seconds in found.values())
    rows = [{"name": "x", "ms": 1.23456}, {"name": "floor"}]
    measure.report(rows, tmp_path / "new" / "table.json")
    assert json.loads((tmp_path / "new" / "table.json").read_text()) == rows
    assert "x      1.23" in capsys.readouterr().out
