import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from weyl_optax import adamw2, bound_metrics, scale_by_weyl_bound


def test_measures_what_the_update_did():
    params = {"layers": {"w": jnp.stack([2 * jnp.eye(4), 3 * jnp.eye(4)])}, "b": jnp.ones(4)}
    updates = {"layers": {"w": jnp.stack([jnp.eye(4), 1e-3 * jnp.eye(4)])}, "b": jnp.zeros(4)}
    solver = optax.chain(optax.identity(), scale_by_weyl_bound(0.01))
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
