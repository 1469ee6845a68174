"""The state of the sister papers' optimizers goes wherever an optimizer's state goes."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from weyl_optax import contrib, scale_by_weyl_bound, state_shardings

NUMBERS = {
    "stack": MuonDimensionNumbers(1, 2),
    "query": MuonDimensionNumbers(0, (1, 2)),
    "bias": MuonDimensionNumbers((), 0),
}
SHAPES = {"stack": (4, 16, 24), "query": (16, 4, 8), "bias": (8,)}


def behind_adam(transform):
    return optax.chain(optax.adam(0.01), transform)


SOLVERS = {
    "gi_adamw": contrib.gi_adamw(0.01),
    "lion_a": contrib.lion_a(0.01),
    "lion_ar": contrib.lion_ar(0.01, weight_dimension_numbers=NUMBERS),
    "keep_norm": behind_adam(contrib.keep_norm(NUMBERS)),
    "rotate": behind_adam(contrib.rotate(0.01, NUMBERS, per="matrix")),
    "noise_share": contrib.scale_by_noise_share(optax.adam(0.01), weight_dimension_numbers=NUMBERS),
    "soft_clip": optax.chain(
        optax.scale_by_adam(), contrib.soft_spectral_clip(1.0, NUMBERS), optax.scale(-0.01)
    ),
}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def arrays(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def train(solver, params, grads, state=None):
    """Params and state after a jitted step for each gradient, which donates both."""

    @jax.jit
    def step(params, state, grads):
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(solver.init)(params) if state is None else state
    for g in grads:
        params, state = step(params, state, g)
    return params, state


GRADS = [arrays(seed) for seed in range(1, 5)]


@solvers
def test_a_state_that_was_made_eagerly_can_be_donated(solver):
    params = arrays(0)
    found = train(solver, params, GRADS[:2], solver.init(params))
    expected = train(solver, params, GRADS[:2])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)


@solvers
def test_map_params_and_abstract_init_and_a_pickled_state(solver):
    params = arrays(0)
    _, state = train(solver, params, GRADS[:2])
    specs = {"stack": P("x"), "query": P("y"), "bias": P("z")}
    mapped = optax.tree.map_params(
        solver, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    places = {x for x in jax.tree.leaves(mapped, is_leaf=is_spec) if is_spec(x)}
    assert places <= {P(), *specs.values()}
    abstract = jax.eval_shape(solver.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for restored in (
        pickle.loads(pickle.dumps(state)),
        serialization.from_bytes(solver.init(params), serialization.to_bytes(state)),
    ):
        jax.tree.map(np.testing.assert_array_equal, restored, state)


@solvers
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_numbers_on_a_mesh_are_those_of_one_device(solver, axis_type):
    params = arrays(0)
    expected, _ = train(solver, params, GRADS)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {"stack": P("y", "x"), "query": P("x", "y"), "bias": P("x")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params, *grads = jax.device_put([params, *GRADS], [shardings] * 5)
    state = jax.jit(solver.init, out_shardings=state_shardings(solver, params))(params)
    found, _ = train(solver, params, grads, state)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert found[name].sharding.is_equivalent_to(shardings[name], found[name].ndim)


@pytest.mark.slow
@solvers
def test_with_the_bound_behind_it_no_norm_grows_by_more_than_tau(solver):
    params = jax.tree.map(lambda x: 0.02 * x, arrays(0))
    tau = 1e-3
    both = optax.chain(solver, scale_by_weyl_bound(tau, weight_dimension_numbers=NUMBERS))
    norm = lambda tree: np.linalg.norm(np.asarray(tree["stack"], float), 2, (1, 2))  # noqa: E731
    after, state = params, None
    for g in GRADS:
        before = norm(after)
        after, state = train(both, after, [g], state)
        assert (norm(after) <= before * (1 + 1.01 * tau)).all()
    assert not np.allclose(norm(after), norm(params), rtol=1e-5)


@solvers
def test_multi_steps_masked_and_updates_that_are_none(solver):
    params = arrays(0)
    twice = optax.MultiSteps(solver, 2)
    halves, _ = train(twice, params, [GRADS[0], GRADS[0], GRADS[1], GRADS[1]])
    whole, _ = train(solver, params, GRADS[:2])
    for name in SHAPES:
        np.testing.assert_allclose(halves[name], whole[name], rtol=1e-5, atol=1e-6)
    masked = optax.masked(solver, {"stack": True, "query": True, "bias": False})
    found, _ = train(masked, params, GRADS[:1])
    np.testing.assert_allclose(found["bias"], params["bias"] + GRADS[0]["bias"], rtol=1e-6)
