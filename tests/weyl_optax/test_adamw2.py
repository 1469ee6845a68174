import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from optax.contrib import MuonDimensionNumbers

import weyl_optax

SHAPES = {
    "matrix": (20, 30),
    "vector": (7,),
    "scalar": (),
    "stack": (3, 14, 12),
    "query": (12, 3, 4),
    "out": (3, 4, 12),
    "conv": (3, 3, 4, 10),
    "heads": (10, 2, 11),
    "backwards": (11, 13),
}
AXES = {  # reduction, output
    "matrix": ((0,), (1,)),
    "vector": ((), (0,)),
    "scalar": ((), ()),
    "stack": ((1,), (2,)),
    "query": ((0,), (1, 2)),
    "out": ((0, 1), (2,)),
    "conv": ((0, 1, 2), (3,)),
    "heads": ((0,), (2,)),
    "backwards": ((1,), (0,)),
}


@pytest.mark.parametrize("growth", ["exponential", "linear"])  # the first is Algorithm 1
def test_follows_the_reference_for_100_steps(growth, x64):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    targets = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    schedule = optax.cosine_decay_schedule(0.1, 120)
    decayed = {"matrix", "stack", "query", "out"}
    settings = {"growth": growth, "max_std": 1.0, "tau": 0.02, "b1": 0.9, "b2": 0.99}
    expected = reference.AdamW2(
        weights, AXES, schedule=schedule, eps=1e-8, decay=0.1, decayed=decayed, **settings
    )
    solver = weyl_optax.adamw2(
        schedule,
        eps=0.0,
        eps_root=1e-8,
        weight_decay=0.1,
        mask={name: name in decayed for name in SHAPES},
        min_std=0.0,
        weight_dimension_numbers={n: MuonDimensionNumbers(*axes) for n, axes in AXES.items()},
        num_iters=60,
        **settings,
    )
    params = jax.tree.map(jnp.asarray, weights)
    state = solver.init(params)

    @jax.jit
    def step(params, state, noise):
        grads = jax.tree.map(lambda p, t, e: (p - t) * (1 + e), params, targets, noise)
        updates, state = solver.update(grads, state, params)
        return grads, optax.apply_updates(params, updates), state

    bounded = 0
    for _ in range(100):
        noise = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        grads, params, state = step(params, state, noise)
        expected.step({name: np.asarray(g) for name, g in grads.items()})
        bounded += float(weyl_optax.bound_metrics(state)["bounded_fraction"]) / 100
        for name in SHAPES:
            error = np.linalg.norm(params[name] - expected.weights[name])
            assert error <= 1e-5 * np.linalg.norm(expected.weights[name]), name
    assert 0.1 < bounded < 0.99  # both branches of the minimum were met


def test_is_adamw_where_the_bound_does_not_bind():
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.ones(8)}
    ours, theirs = weyl_optax.adamw2(1e-3, tau=1e3), optax.adamw(1e-3)
    ours_params = theirs_params = params
    ours_state, theirs_state = ours.init(params), theirs.init(params)
    for i in range(5):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i), params)
        updates, ours_state = ours.update(grads, ours_state, ours_params)
        ours_params = optax.apply_updates(ours_params, updates)
        updates, theirs_state = theirs.update(grads, theirs_state, theirs_params)
        theirs_params = optax.apply_updates(theirs_params, updates)
    for name in params:
        np.testing.assert_allclose(ours_params[name], theirs_params[name], rtol=1e-6)


def test_is_a_rename_away_from_adamw():
    ours = inspect.signature(weyl_optax.adamw2).parameters
    theirs = inspect.signature(optax.adamw).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    bound = inspect.signature(weyl_optax.scale_by_weyl_bound).parameters
    for name in list(ours)[len(theirs) :]:
        assert ours[name].default == bound[name].default


@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterov_and_mu_dtype_reach_adam(nesterov):
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}
    options = {"mu_dtype": jnp.bfloat16, "nesterov": nesterov, "b1": 0.8, "eps": 1e-3}
    grads = {"w": jax.random.normal(jax.random.key(1), (6, 6))}
    ours, theirs = weyl_optax.adamw2(1e-2, tau=1e3, **options), optax.adamw(1e-2, **options)
    ours_updates, state = ours.update(grads, ours.init(params), params)
    theirs_updates, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_allclose(ours_updates["w"], theirs_updates["w"], rtol=1e-6)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.bfloat16


def test_a_program_is_traced_alike_each_time_and_so_found_in_a_cache_of_compiled_programs():
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}

    def programs():
        solver = weyl_optax.adamw2(0.1)
        state = jax.eval_shape(solver.init, params)
        for function, args in ((solver.init, (params,)), (solver.update, (params, state, params))):
            yield jax.jit(function).lower(*args).as_text()

    assert list(programs()) == list(programs())
