"""The state of an optimizer lies where its params do."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, scale_by_weyl_bound, state_shardings

MESH = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"stack": P("y", "x"), "query": P(None, "x", "y"), "bias": P(("x", "y"))}
NUMBERS = {
    "stack": MuonDimensionNumbers(1, 2),
    "query": MuonDimensionNumbers(0, (1, 2)),
    "bias": MuonDimensionNumbers((), 0),
}
SOLVER = adamw2(1e-2, weight_dimension_numbers=NUMBERS)


def make_params():
    params = {
        "stack": jnp.ones((2, 64, 128)),
        "query": jnp.ones((64, 4, 32)),
        "bias": jnp.ones(16),
    }
    return jax.device_put(params, {name: NamedSharding(MESH, spec) for name, spec in SPECS.items()})


def test_a_moment_lies_as_its_param_and_a_block_as_its_own_axes():
    adam, bound, _ = state_shardings(SOLVER, make_params())
    assert adam.count == bound.bound_count == NamedSharding(MESH, P())
    for moments in (adam.mu, adam.nu):
        for name, spec in SPECS.items():
            ndim = {"stack": 3, "query": 3, "bias": 1}[name]
            assert moments[name].is_equivalent_to(NamedSharding(MESH, spec), ndim)
    for blocks in (bound.weight_block, bound.update_block):
        assert blocks["stack"].spec == P("y", "x", None)  # (2, 64, 8): the shorter side is 64
        assert blocks["query"].spec == P(None, None)  # (64, 8)
        assert blocks["bias"] is None
    for norms in (bound.sigma_weight, bound.sigma_update, bound.bound_scale):
        assert {name: norm.spec for name, norm in norms.items()} == {
            "stack": P("y"),
            "query": P(),
            "bias": P(),
        }


def test_shapes_are_enough():
    params = make_params()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    assert state_shardings(SOLVER, shapes) == state_shardings(SOLVER, params)


@pytest.mark.parametrize(
    "solver",
    [
        optax.adamw(1e-2),
        optax.lamb(1e-2),
        optax.contrib.muon(1e-2, muon_weight_dimension_numbers=NUMBERS | {"bias": None}),
        optax.MultiSteps(SOLVER, 2).gradient_transformation(),
        optax.chain(optax.scale_by_adam(), scale_by_weyl_bound(weight_dimension_numbers=NUMBERS)),
    ],
    ids=["adamw", "lamb", "muon", "multi_steps", "chain"],
)
def test_moments_of_any_optimizer(solver):
    params = make_params()
    shardings = state_shardings(solver, params)
    state = jax.jit(solver.init, out_shardings=shardings)(params)
    placed = {x.shape: x.sharding for x in params.values()}
    moments = [x for x in jax.tree.leaves(state) if x.shape in placed]
    assert moments
    for moment in moments:
        assert moment.sharding.is_equivalent_to(placed[moment.shape], moment.ndim)


def test_a_step_compiles_once_and_takes_the_same_memory_each_time():
    params = {"stack": make_params()["stack"]}
    solver = adamw2(1e-2, weight_dimension_numbers={"stack": NUMBERS["stack"]})
    shardings = state_shardings(solver, params)
    state = jax.jit(solver.init, out_shardings=shardings)(params)
    placed = jax.tree.map(lambda x: x.sharding, params)
    update = jax.jit(solver.update, donate_argnums=1, out_shardings=(placed, shardings))
    for _ in range(3):
        before = jax.tree.map(lambda x: x.sharding, state)
        _, state = update(params, state, params)
        assert before == jax.tree.map(lambda x: x.sharding, state)
    assert update._cache_size() == 1


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("jit_init", [False, True])
def test_no_moment_of_adamw2_is_ever_replicated(jit_init, dtype):
    solver = adamw2(1e-2, mu_dtype=dtype)
    params = {"w": jax.device_put(jnp.ones((8, 16)), NamedSharding(MESH, P("y", "x")))}
    init = jax.jit(solver.init, out_shardings=state_shardings(solver, params))
    state = (init if jit_init else solver.init)(params)
    _, new_state = jax.jit(solver.update)(params, state, params)
    for moment in ("mu", "nu"):
        assert optax.tree.get(state, moment)["w"].sharding.spec == P("y", "x")
        assert optax.tree.get(new_state, moment)["w"].sharding.spec == P("y", "x")


def test_params_on_no_mesh_or_on_two():
    with pytest.raises(ValueError, match="lie on no meshes"):
        state_shardings(SOLVER, {"w": jnp.ones(3)})
    params = make_params()
    other = jax.make_mesh((8,), ("z",), axis_types=(AxisType.Auto,))
    params["bias"] = jax.device_put(params["bias"], NamedSharding(other, P()))
    with pytest.raises(ValueError, match="lie on 2 meshes"):
        state_shardings(SOLVER, params)
