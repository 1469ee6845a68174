"""On every mesh the numbers of one device, where the weights stay where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from benchmarks.sharding import collectives, largest
from weyl_optax import adamw2, bound_metrics, dynamics, scale_by_weyl_bound
from weyl_optax.contrib import rotate

SHAPES = {
    "stack": (4, 64, 128),
    "query": (64, 4, 24),
    "out": (4, 24, 64),
    "heads": (64, 4, 48),
    "short": (8, 40),
    "bias": (32,),
}
NUMBERS = {
    "stack": MuonDimensionNumbers(1, 2),
    "query": MuonDimensionNumbers(0, (1, 2)),
    "out": MuonDimensionNumbers((0, 1), 2),
    "heads": MuonDimensionNumbers(0, 2),  # each head is a matrix
    "short": MuonDimensionNumbers(0, 1),
    "bias": MuonDimensionNumbers((), 0),
}
LARGEST_BLOCK = 10 * 4 * 128  # vectors of a stack
SMALLEST_MATRIX = 64 * 4 * 24  # but for the short one, whose Gram matrix needs all of it

# Each column is a layout of the tree: every axis of every leaf is sharded in one of them.
SPECS = {
    "stack": [P("x"), P(None, "x"), P(None, None, "x"), P(None, "x", "y")],
    "query": [P("x"), P(None, "x"), P(None, None, "x"), P("y", "x")],
    "out": [P("x"), P(None, "x"), P(None, None, "x"), P("x", None, "y")],
    "heads": [P(None, "x"), P("x"), P(None, None, "y"), P(("x", "y"))],
    "short": [P("x"), P(None, "x"), P("x", "y"), P(None, ("x", "y"))],
    "bias": [P("x"), P("y"), P(("x", "y")), P()],
}


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def arrays(shapes, steps):
    """Params, and gradients for some steps."""
    trees = [
        {
            name: jax.random.normal(jax.random.key(8 * step + i), shape)
            for i, (name, shape) in enumerate(shapes.items())
        }
        for step in range(steps + 1)
    ]
    return jax.tree.map(lambda x: 0.1 * x, trees[0]), trees[1:]


def train(solver, params, grads):
    """A jitted step for each gradient: the updates, and the program of a step."""
    state = jax.jit(solver.init)(params)
    update = jax.jit(solver.update, donate_argnums=1)
    updates = []
    for g in grads:
        step, state = update(g, state, params)
        updates.append(step)
    return updates, update.lower(grads[0], state, params).compile().as_text()


SOLVER = adamw2(0.1, tau=0.01, weight_dimension_numbers=NUMBERS)
CAPPED = adamw2(0.1, tau=0.01, weight_dimension_numbers=NUMBERS, cap_rank=8)


@functools.cache
def unsharded(solver):
    return train(solver, *arrays(SHAPES, 2))[0]


def sharded_and_unsharded(solver, layout, axis_type):
    """Updates of both, leaf by leaf, whose shardings are checked; and the program of a step."""
    devices = mesh(axis_type)
    shardings = {name: NamedSharding(devices, specs[layout]) for name, specs in SPECS.items()}
    params, grads = arrays(SHAPES, 2)
    params, grads = jax.device_put((params, grads), (shardings, [shardings] * 2))
    with jax.set_mesh(devices):
        updates, text = train(solver, params, grads)
    pairs = []
    for found, wanted in zip(updates, unsharded(solver), strict=True):
        for name, sharding in shardings.items():
            assert found[name].sharding.is_equivalent_to(sharding, found[name].ndim)
            pairs.append((found[name], wanted[name]))
    return pairs, text


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", range(4))
def test_sharded_equals_unsharded_and_moves_no_weight(layout, axis_type):
    pairs, text = sharded_and_unsharded(SOLVER, layout, axis_type)
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-8)
    assert largest(collectives(text)) <= LARGEST_BLOCK < SMALLEST_MATRIX


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", range(4))
def test_a_cap_sharded_equals_unsharded(layout, axis_type):
    pairs, _ = sharded_and_unsharded(CAPPED, layout, axis_type)
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.slow
def test_leaves_of_one_shape_stay_as_they_are_divided():
    """One is divided along its rows, one along its columns: nothing but sums goes around."""
    layouts = {f"{i}/query": P(None, "x") for i in range(2)} | {
        f"{i}/out": P("x") for i in range(2)
    }
    params, grads = arrays(dict.fromkeys(layouts, (64, 64)), 1)
    devices = mesh(AxisType.Auto)
    shardings = {name: NamedSharding(devices, spec) for name, spec in layouts.items()}
    _, program = train(
        scale_by_weyl_bound(), *jax.device_put((params, grads), (shardings, [shardings]))
    )
    assert {moved.name for moved in collectives(program)} == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_uneven_sharding_equals_the_unsharded(axis):
    params, grads = arrays({"w": (3, 65, 131)}, 2)
    solver = adamw2(0.1, tau=0.01)
    expected, _ = train(solver, params, grads)
    sharding = NamedSharding(mesh(AxisType.Auto), P(*[None] * axis, "x"))

    @jax.jit
    def step(grads, state, params):
        grads, params = jax.lax.with_sharding_constraint((grads, params), sharding)
        return solver.update(grads, state, params)

    state = jax.jit(solver.init)(params)
    for g, wanted in zip(grads, expected, strict=True):
        updates, state = step(g, state, params)
        np.testing.assert_allclose(updates["w"], wanted["w"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("jit_init", [False, True])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x", "y")], ids=str)
def test_the_types_of_the_state_are_those_that_an_update_gives(spec, jit_init):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params = {"w": jax.device_put(jnp.ones((4, 64, 128)), spec)}
        for solver in (adamw2(0.1), optax.chain(optax.lion(0.1), scale_by_weyl_bound())):
            state = (jax.jit(solver.init) if jit_init else solver.init)(params)
            _, new = jax.jit(solver.update)(params, state, params)
            assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)


@pytest.mark.parametrize("scalars", [False, True])
def test_metrics_on_explicit_axes(scalars):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params = {"stack": jax.device_put(jnp.ones((4, 18, 20)), P("x")), "bias": jnp.ones(8)}
        solver = scale_by_weyl_bound()
        _, state = solver.update(params, solver.init(params), params)
        for collect in (bound_metrics, jax.jit(bound_metrics, static_argnames="scalars")):
            metrics = collect(state, scalars=scalars)
            name = "sigma_weight/max" if scalars else "stack/sigma_weight"
            np.testing.assert_allclose(metrics[name], np.sqrt(360), rtol=1e-6)
            assert metrics["bounded_fraction"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_an_ensemble_in_shard_map_equals_its_members(axis_type):
    """A member on each device, and a loop over the steps inside."""
    solver = adamw2(0.1, tau=0.01)
    params, grads = arrays({"w": (8, 40, 24)}, 3)
    grads = jnp.stack([g["w"] for g in grads], 1)

    def member(w, grads):
        def step(carry, g):
            params, state = carry
            updates, state = solver.update({"w": g}, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": w[0]}
        (params, _), _ = jax.lax.scan(step, (params, solver.init(params)), grads[0])
        return params["w"][None]

    devices = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    mapped = jax.shard_map(member, mesh=devices, in_specs=P("x"), out_specs=P("x"))
    found = jax.jit(mapped)(*jax.device_put((params["w"], grads), NamedSharding(devices, P("x"))))
    expected = jax.vmap(lambda w, g: member(w[None], g[None])[0])(params["w"], grads)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_data_parallel_in_shard_map_with_replicated_params():
    solver = adamw2(0.1, tau=0.01)
    params, (grads,) = arrays({"w": (8, 40, 24)}, 1)
    mean = {"w": grads["w"].mean(0)}
    params = {"w": params["w"][0]}
    devices = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def step(params, grads):
        grads = {"w": jax.lax.pmean(grads["w"][0], "x")}
        updates, state = solver.update(grads, solver.init(params), params)
        return updates, state

    mapped = jax.shard_map(step, mesh=devices, in_specs=(P(), P("x")), out_specs=P())
    updates, _ = jax.jit(mapped)(params, grads)
    expected, _ = solver.update(mean, solver.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pmap():
    solver = adamw2(0.1, tau=0.01)
    params, (grads,) = arrays({"w": (8, 40, 24)}, 1)
    state = jax.pmap(solver.init)(params)
    updates, _ = jax.pmap(solver.update)(grads, state, params)
    member = jax.tree.map(lambda x: x[3], (params, grads))
    expected, _ = solver.update(member[1], solver.init(member[0]), member[0])
    np.testing.assert_allclose(updates["w"][3], expected["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", [P("x"), P(None, "y"), P(None, None, "x")])
def test_eagerly_the_mesh_of_the_params_is_meant(spec):
    """Without a `jax.set_mesh`."""
    w = jax.random.normal(jax.random.key(0), (4, 16, 24))
    solver = optax.chain(
        adamw2(0.1, weight_dimension_numbers=MuonDimensionNumbers(1, 2)),
        rotate(0.1, MuonDimensionNumbers(1, 2)),
    )
    expected, _ = solver.update(w, solver.init(w), w)
    sharded = jax.device_put(w, NamedSharding(mesh(AxisType.Explicit), spec))
    updates, _ = solver.update(sharded, solver.init(sharded), sharded)
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-7)
    assert updates.sharding.is_equivalent_to(sharded.sharding, 3)


MEASURES = {
    "effective rank": (dynamics.effective_rank, (4, 16, 24)),
    "qk": (lambda w: dynamics.qk_spectral_norm(w, 2 * w), (4, 16, 2, 8)),
    "product": (lambda w: dynamics.product_spectral_norm(w, w.mT), (4, 16, 24)),
    "sharpness": (
        lambda w: dynamics.sharpness(lambda w, _: jnp.sum(jnp.tanh(w) ** 2), w, None),
        (4, 16, 24),
    ),
}


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, "y")])
@pytest.mark.parametrize("name", MEASURES)
def test_measures_on_explicit_axes(name, spec):
    measure, shape = MEASURES[name]
    w = 0.1 * jax.random.normal(jax.random.key(0), shape)
    sharded = jax.device_put(w, NamedSharding(mesh(AxisType.Explicit), spec))
    for run in (measure, jax.jit(measure)):
        np.testing.assert_allclose(run(sharded), measure(w), rtol=1e-4)
