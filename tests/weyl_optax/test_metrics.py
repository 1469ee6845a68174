import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from weyl_optax import adamw2, bound_metrics, scale_by_weyl_bound

rule_1 = functools.partial(scale_by_weyl_bound, growth="exponential")


def test_measures_what_the_update_did():
    params = {"layers": {"w": jnp.stack([2 * jnp.eye(4), 3 * jnp.eye(4)])}, "b": jnp.ones(4)}
    updates = {"layers": {"w": jnp.stack([jnp.eye(4), 1e-3 * jnp.eye(4)])}, "b": jnp.zeros(4)}
    solver = optax.chain(optax.identity(), rule_1(0.01))
    _, state = solver.update(updates, solver.init(params), params)
    metrics = jax.jit(bound_metrics)(state)
    np.testing.assert_allclose(metrics["layers/w/sigma_weight"], [2, 3], rtol=1e-6)
    np.testing.assert_allclose(metrics["layers/w/sigma_update"], [1, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(metrics["layers/w/scale"], [0.02, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics["b/sigma_weight"], 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["bounded_fraction"], 1 / 3, rtol=1e-6)


def test_a_single_array_has_names_without_a_path():
    state = adamw2(0.1).init(jnp.eye(3))
    assert set(bound_metrics(state)) == {
        "sigma_weight",
        "sigma_update",
        "scale",
        "bounded_fraction",
    }


def test_a_state_without_a_bound_says_what_to_chain():
    with pytest.raises(ValueError, match=r"Chain weyl_optax\.scale_by_weyl_bound"):
        bound_metrics(optax.adam(0.1).init({"w": jnp.eye(3)}))


def test_scalars_for_a_logger():
    params = {"stack": jnp.stack([i * jnp.eye(4) for i in (1.0, 2.0, 6.0)]), "w": jnp.eye(3)}
    updates = {"stack": jnp.stack([jnp.eye(4)] * 3).at[2].multiply(1e-3), "w": jnp.eye(3)}
    solver = rule_1(0.5)
    _, state = solver.update(updates, solver.init(params), params)
    metrics = bound_metrics(state, scalars=True, prefix="optimizer/")
    assert all(value.shape == () for value in metrics.values())
    expected = {
        "sigma_weight/min": 1,
        "sigma_weight/median": 1.5,
        "sigma_weight/max": 6,
        "sigma_update/min": 1e-3,
        "sigma_update/median": 1,
        "sigma_update/max": 1,
        "scale/min": 0.5,
        "scale/median": 0.75,
        "scale/max": 1,
        "bounded_fraction": 0.5,
    }
    assert set(metrics) == {f"optimizer/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"optimizer/{name}"], value, rtol=1e-6)


def test_scalars_of_a_bound_without_matrices():
    found = bound_metrics(scale_by_weyl_bound().init({}), scalars=True)
    for name in ("min", "median", "max"):
        assert found[f"scale/{name}"] == 1
        assert np.isnan(found[f"sigma_weight/{name}"])
        assert np.isnan(found[f"sigma_update/{name}"])
    assert found["bounded_fraction"] == 0


def test_two_bounds_of_one_leaf_are_both_there():
    params = updates = {"w": jnp.eye(3)}
    solver = optax.chain(rule_1(0.5), rule_1(0.1))
    _, state = solver.update(updates, solver.init(params), params)
    metrics = bound_metrics(state)
    np.testing.assert_allclose(metrics["bound_0/w/scale"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["bound_1/w/scale"], 0.2, rtol=1e-6)
    assert len(metrics) == 8
    scalars = bound_metrics(state, scalars=True)
    assert len(scalars) == 20
    np.testing.assert_allclose(scalars["bound_1/scale/max"], 0.2, rtol=1e-6)


def test_two_bounds_of_different_leaves_need_no_names():
    params = updates = {"a": jnp.eye(3), "b": jnp.eye(3)}
    bounds = {name: rule_1(tau) for name, tau in (("x", 0.5), ("y", 2.0))}
    solver = optax.partition(bounds, {"a": "x", "b": "y"})
    _, state = solver.update(updates, solver.init(params), params)
    metrics = bound_metrics(state)
    np.testing.assert_allclose(metrics["a/scale"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["bounded_fraction"], 0.5)


@pytest.mark.parametrize("scalars", [False, True])
def test_eager_calls_move_nothing_to_the_device(scalars):
    params = {"stack": jnp.ones((2, 3, 3)), "b": jnp.ones(4)}
    solver = adamw2(0.1)
    state = solver.init(params)
    with jax.transfer_guard("disallow"):
        metrics = bound_metrics(state, scalars=scalars)
    assert float(metrics["bounded_fraction"]) == 0
