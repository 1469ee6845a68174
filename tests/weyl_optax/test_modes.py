"""JAX's strict modes, and odd leaves: what adamw takes, the bound takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from weyl_optax import adamw2, bound_metrics, scale_by_weyl_bound, spectral_norm

rule_1 = functools.partial(scale_by_weyl_bound, growth="exponential")

MODES = {
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": lambda: jax.disable_jit(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "leak checks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
}
ODD_DTYPES = [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn]


def tree(dtype):
    rng = np.random.default_rng(0)
    shapes = {"stack": (2, 20, 24), "scalar": ()}
    return {name: jnp.asarray(rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}


PARAMS = {
    "float32": tree(jnp.float32),
    "complex": tree(jnp.complex64),
    "short": jnp.arange(10.0).reshape(2, 5),
    "zero": jnp.zeros((20, 24)),
}
ODD_PARAMS = {jnp.dtype(dtype).name: tree(dtype) for dtype in ODD_DTYPES}


modes = pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=[pytest.mark.slow] * (m != "no rank promotion")) for m in MODES],
)


@modes
def test_modes(mode):
    trained = {
        optax.chain(optax.sgd(0.1), scale_by_weyl_bound(0.01)): PARAMS | ODD_PARAMS,
        scale_by_weyl_bound(0.01, min_std=0.0): PARAMS,
    }
    if mode != "strict promotion":  # which Adam does not take
        trained[adamw2(optax.cosine_decay_schedule(0.1, 9), weight_decay=0.1)] = PARAMS
    with MODES[mode]():
        for solver, params in trained.items():
            updates_of = [jax.jit(solver.update)]
            if params is not PARAMS and mode != "disable_jit":  # under which they are the same
                updates_of.append(solver.update)
            for update in updates_of:
                state = solver.init(params)
                for _ in range(2):
                    updates, state = update(params, state, params)
                for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
                    assert u.dtype == p.dtype
                    assert jnp.all(jnp.isfinite(u))
                bound_metrics(state, scalars=True)
        spectral_norm(PARAMS | ODD_PARAMS)


@modes
def test_zero_updates(mode):
    params = PARAMS["float32"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    with MODES[mode]():
        for solver in (scale_by_weyl_bound(), scale_by_weyl_bound(min_std=0.0)):
            for weights in (params, zeros):
                updates, _ = solver.update(zeros, solver.init(weights), weights)
                for u in updates.values():
                    np.testing.assert_array_equal(u, np.zeros(u.shape))


def test_float8_is_bounded():
    w = tree(jnp.float8_e4m3fn)
    solver = scale_by_weyl_bound(0.01)
    _, state = solver.update(w, solver.init(w), w)
    exact = np.linalg.norm(np.asarray(w["stack"].astype(jnp.float32)), 2, axis=(1, 2))
    np.testing.assert_allclose(state.sigma_weight["stack"], exact, rtol=1e-3)
    assert state.sigma_weight["stack"].dtype == jnp.float32


def test_python_numbers_are_scalars():
    params = {"temperature": 2.0, "steps": 3}
    solver = scale_by_weyl_bound(0.01)
    updates, state = solver.update({"temperature": 5.0, "steps": 0}, solver.init(params), params)
    np.testing.assert_allclose(updates["temperature"], 0.01 * 1.0, rtol=1e-6)  # of one, at most
    assert state.bound_scale["steps"] is None


def test_hyperparameters_of_a_low_precision():
    """`inject_hyperparams` gives them the dtype of the params."""
    params = {"w": jnp.ones((20, 24), jnp.bfloat16)}
    solver = optax.inject_hyperparams(rule_1)(0.01)
    updates, state = jax.jit(solver.update)(params, solver.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    norm = np.linalg.norm(np.asarray(updates["w"].astype(jnp.float32)), 2)
    np.testing.assert_allclose(norm, 0.01 * np.sqrt(480), rtol=1e-2)
    assert state.hyperparams["tau"].dtype == jnp.bfloat16
