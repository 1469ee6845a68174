"""The state is a tree like the params, and goes wherever an optimizer's state goes."""

import dataclasses
import pickle
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization, traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from weyl_optax import (
    WeylBoundState,
    adamw2,
    bound_metrics,
    scale_by_weyl_bound,
    state_shardings,
)
from weyl_optax.flax import dimension_numbers

FIELDS = (
    "weight_block", "update_block", "sigma_weight", "sigma_update",
    "bound_scale",
)  # fmt: skip


class Attention(NamedTuple):
    query: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    value: Any
    bias: Any


def array(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


TREES = {
    "array": array(0, 20, 24),
    "dict": {"a": {"kernel": array(0, 2, 20, 24), "bias": array(1, 24)}, "t": jnp.float32(1.0)},
    "list": [array(0, 20, 24), [array(1, 7)], ()],
    "named tuple": {"attn": Attention(array(0, 20, 24), array(1, 20, 24))},
    "dataclass": Layer(array(0, 20, 24), None),
    "keys with a slash": {"a/b": array(0, 20, 24), "c": array(1, 3)},
    "equinox": eqx.filter(eqx.nn.MLP(4, 4, 20, 2, key=jax.random.key(0)), eqx.is_array),
    "masked": {"a": array(0, 20, 24), "b": optax.MaskedNode()},
    "nothing": {},
}


def bound_state(state) -> WeylBoundState:
    is_bound = lambda x: isinstance(x, WeylBoundState)  # noqa: E731
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=is_bound) if is_bound(x)]
    return found


@pytest.mark.parametrize("name", TREES)
def test_every_field_has_the_structure_of_the_params(name):
    params = TREES[name]
    solver = scale_by_weyl_bound(0.01)
    state = solver.init(params)
    updates, new = jax.jit(solver.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for before, after in zip(state, new, strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
    for field in ("sigma_weight", "sigma_update", "bound_scale"):
        assert jax.tree.structure(getattr(new, field)) == jax.tree.structure(params)
    none = lambda x: x is None  # noqa: E731
    blocks = jax.tree.structure(new.weight_block, is_leaf=none)
    assert blocks == jax.tree.structure(params, is_leaf=none)


def wrap(transform):
    numbers = {"a": MuonDimensionNumbers(), "b": MuonDimensionNumbers((), 0)}
    by_params = lambda params: {"a": MuonDimensionNumbers(), "b": None}  # noqa: E731
    decayed = lambda params: jax.tree.map(lambda p: jnp.ndim(p) > 1, params)  # noqa: E731
    mask = {"a": True, "b": False}
    return {
        "alone": transform(),
        "specification": transform(weight_dimension_numbers=numbers),
        "callable": transform(weight_dimension_numbers=by_params),
        "mask": transform(weight_decay=0.1, mask=mask),
        "callable mask": transform(weight_decay=0.1, mask=decayed),
        "chain": optax.chain(optax.clip(1.0), transform()),
        "MultiSteps": optax.MultiSteps(transform(), 2).gradient_transformation(),
        "inject_hyperparams": optax.inject_hyperparams(adamw2)(0.1),
        "masked": optax.masked(transform(), mask),
        "callable masked": optax.masked(transform(), decayed),
        "partition": optax.partition(
            {"ours": transform(), "theirs": optax.adamw(0.1)}, {"a": "ours", "b": "theirs"}
        ),
    }


WRAPPED = wrap(lambda **options: adamw2(0.1, **options))


@pytest.mark.parametrize("name", WRAPPED)
def test_map_params_hands_moments_to_f_and_the_bounds_arrays_to_g(name):
    params = {"a": array(0, 20, 24), "b": array(1, 7)}
    solver, specs = WRAPPED[name], {"a": P("x", None), "b": P(None)}
    state = solver.init(params)
    places = optax.tree.map_params(
        solver,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    for moment in ("mu", "nu"):
        found = optax.tree.get_all_with_path(places, moment)
        assert found
        for _, tree in found:
            assert {s for s in jax.tree.leaves(tree, is_leaf=is_spec) if is_spec(s)} <= {
                P("x", None),
                P(None),
            }
            assert P("x", None) in jax.tree.leaves(tree, is_leaf=is_spec) or name == "partition"
    for field in FIELDS:
        assert getattr(bound_state(places), field) == P()

    # A state can be placed by it.
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), places, is_leaf=is_spec)
    placed = jax.jit(solver.init, out_shardings=shardings)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), placed, state)


@pytest.mark.parametrize("name", ["array", "dict", "list", "named tuple", "equinox", "nothing"])
def test_abstract_params(name):
    solver, params = adamw2(0.1), TREES[name]
    abstract = jax.eval_shape(lambda: params)
    state, wanted = solver.init(abstract), solver.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(state) == shapes(wanted)
    updates, _ = solver.update(params, state, params)
    for u in jax.tree.leaves(updates):
        assert np.isfinite(u).all()


def boxed(mesh_names=("in", "out")):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), mesh_names)
            return nn.Dense(24, kernel_init=init)(x)

    return Boxed().init(jax.random.key(0), jnp.ones((2, 20)))["params"]


def test_boxes_stay_on_the_updates_and_off_the_state():
    params = boxed()
    solver = adamw2(0.1, tau=0.01)
    updates, state = jax.jit(solver.update)(params, solver.init(params), params)
    plain = nn.unbox(params)
    expected, _ = solver.update(plain, solver.init(plain), plain)
    assert isinstance(updates["Dense_0"]["kernel"], nn.Partitioned)
    found = updates["Dense_0"]["kernel"].value
    np.testing.assert_allclose(found, expected["Dense_0"]["kernel"], rtol=1e-5)
    # The names of a kernel's axes are not those of a block's.
    specs = bound_state(nn.get_partition_spec(state))
    assert specs.weight_block["Dense_0"]["kernel"] == P()


def test_nnx_variables_with_sharding_names():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((1, 1), ("in", "out"), axis_types=axis_types)):
        model = nnx.Linear(20, 24, kernel_init=init, rngs=nnx.Rngs(0))
        numbers = dimension_numbers(nnx.Linear.__call__, model, jnp.ones((2, 20)))
        solver = adamw2(0.1, tau=0.01, weight_dimension_numbers=numbers)
        optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)
    specs = nnx.get_partition_spec(nnx.state(optimizer))["opt_state"]
    assert specs[0]["mu"]["kernel"].get_value() == P("in", "out")
    assert specs[1]["weight_block"]["kernel"].get_value() == P()


def test_a_whole_equinox_model_as_params():
    model = eqx.nn.MLP(4, 4, 20, 2, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(4)) ** 2))(model)
    solver = adamw2(0.1, tau=0.01, weight_decay=0.1)
    state = solver.init(arrays)
    updates, _ = eqx.filter_jit(solver.update)(grads, state, model)
    expected, _ = solver.update(grads, state, arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)
    assert updates.activation is None
    eqx.apply_updates(model, updates)


def test_an_update_of_none_leaves_its_leaf_and_its_state_alone():
    params = {"a": array(0, 20, 24), "b": array(1, 20, 24), "c": array(2, 5)}
    solver = scale_by_weyl_bound(0.01)
    state = solver.init(params)
    updates, new = solver.update(params | {"b": None}, state, params)
    assert updates["b"] is None
    expected, wanted = solver.update(params, state, params)
    np.testing.assert_array_equal(updates["a"], expected["a"])
    for field in FIELDS:
        jax.tree.map(
            np.testing.assert_array_equal, getattr(new, field)["b"], getattr(state, field)["b"]
        )
        jax.tree.map(
            np.testing.assert_array_equal, getattr(new, field)["a"], getattr(wanted, field)["a"]
        )


def trained(params, steps=3):
    solver = adamw2(0.1, tau=0.01)
    state = solver.init(params)
    for _ in range(steps):
        _, state = jax.jit(solver.update)(params, state, params)
    return solver, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


SERIALIZED = ["array", "dict", "list", "named tuple", "keys with a slash", "masked"]


@pytest.mark.parametrize("name", SERIALIZED)
def test_flax_serialization_to_the_bit(name):
    solver, state = trained(TREES[name])
    target = solver.init(jax.tree.map(jnp.zeros_like, TREES[name]))
    assert_same(serialization.from_bytes(target, serialization.to_bytes(state)), state)
    as_dict = serialization.to_state_dict(state)
    assert_same(serialization.from_state_dict(target, as_dict), state)
    if name != "keys with a slash":  # a flattened dict cannot tell such a key
        flat = traverse_util.flatten_dict(as_dict, sep="/", keep_empty_nodes=True)
        nested = traverse_util.unflatten_dict(flat, sep="/")
        assert_same(serialization.from_state_dict(target, nested), state)


@pytest.mark.parametrize("name", SERIALIZED)
def test_pickle_to_the_bit(name):
    _, state = trained(TREES[name])
    assert_same(pickle.loads(pickle.dumps(state)), state)


@pytest.mark.slow
def test_orbax_from_eight_devices_to_four_and_to_one(tmp_path):
    def sharded(tree, count):
        mesh = jax.make_mesh(
            (count,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
        )
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P(*["x"] * (x.ndim > 1)))), tree
        )

    params = {"stack": array(0, 8, 40, 24), "b": array(1, 24)}
    solver, _ = trained(params)
    state = solver.init(sharded(params, 8))
    _, state = jax.jit(solver.update)(sharded(params, 8), state, sharded(params, 8))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    for count in (8, 4, 1):
        placed = sharded(params, count)
        target = jax.jit(solver.init, out_shardings=state_shardings(solver, placed))(placed)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "state", target)
        assert_same(restored, state)
        updates, _ = jax.jit(solver.update)(
            sharded(params, count), restored, sharded(params, count)
        )
        expected, _ = solver.update(params, jax.device_get(state), params)
        np.testing.assert_allclose(updates["stack"], expected["stack"], rtol=1e-5)


def test_metrics_of_an_nnx_optimizer_are_arrays_that_do_not_change():
    model = nnx.Linear(20, 24, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamw2(0.1, tau=0.01), wrt=nnx.Param)
    seen = []
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jnp.cos(i + x), nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        seen.append(bound_metrics(optimizer.opt_state))
    norms = [metrics["kernel/sigma_weight"] for metrics in seen]
    assert all(type(x) is type(jnp.ones(())) for x in norms)
    assert len({f"{x:.6f}" for x in norms}) == 3
    restored = {"optimizer": nnx.to_pure_dict(nnx.state(optimizer))}
    for state in (nnx.state(optimizer), restored):
        jax.tree.map(np.testing.assert_array_equal, bound_metrics(state), seen[-1])


def test_metrics_outlive_a_donated_state():
    params = {"w": array(0, 20, 24)}
    solver = adamw2(0.1)
    update = jax.jit(solver.update, donate_argnums=1)
    _, state = update(params, solver.init(params), params)
    metrics = bound_metrics(state)
    update(params, state, params)
    assert np.isfinite(metrics["w/sigma_weight"])


def test_no_field_has_the_name_of_one_of_optax():
    """So that `optax.tree.get` finds one, and `optax.tree.set` sets no other."""
    modules = (optax, optax.transforms, optax.contrib, optax.schedules)
    kinds = {
        x
        for module in modules
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, tuple) and hasattr(x, "_fields")
    }
    assert len(kinds) > 40
    theirs = {field for kind in kinds for field in kind._fields}
    assert {"count", "mu", "scale"} <= theirs
    assert not theirs & set(WeylBoundState._fields)


def test_reduce_on_plateau_finds_its_own_scale():
    params = {"w": jnp.ones((20, 24))}
    solver = optax.chain(adamw2(1e-2), optax.contrib.reduce_on_plateau(patience=1))
    state = solver.init(params)
    _, state = solver.update(params, state, params, value=1.0)
    assert optax.tree.get(state, "scale") == 1
    assert optax.tree.get(optax.tree.set(state, scale=0.5), "scale") == 0.5


READINGS = {
    "whole": MuonDimensionNumbers(0, (1, 2)),
    "heads": MuonDimensionNumbers(0, 2),
    "out": MuonDimensionNumbers((0, 1), 2),
    "units": MuonDimensionNumbers((), 0),
    "unbounded": None,
}


def with_a_new_bound(solver, params, state):
    """What the message of a state that does not fit says to write."""
    return jax.tree.map(
        lambda new, old: new if isinstance(new, WeylBoundState) else old,
        solver.init(params),
        state,
        is_leaf=lambda x: isinstance(x, WeylBoundState),
    )


@pytest.mark.parametrize("after", [name for name in READINGS if name != "unbounded"])
@pytest.mark.parametrize("before", READINGS)
def test_a_state_that_was_made_for_another_reading(before, after):
    params = {"q": array(0, 64, 32, 4)}
    old, new = (adamw2(0.1, weight_dimension_numbers={"q": READINGS[x]}) for x in (before, after))
    _, state = old.update(params, old.init(params), params)
    if before != after:
        with pytest.raises(ValueError, match=r"'q' of shape \(64, 32, 4\) is read as matrices"):
            new.update(params, state, params)
        state = with_a_new_bound(new, params, state)
    updates, state = new.update(params, state, params)
    assert optax.tree.get(state, "mu")["q"].shape == params["q"].shape
    assert np.isfinite(updates["q"]).all()


def test_a_state_of_other_params_or_of_another_dtype(x64):
    solver = adamw2(0.1)
    params = {"w": jnp.ones((60, 40), jnp.float32)}
    state = solver.init(params)
    for other, message in (
        ({"w": params["w"].astype(jnp.float64)}, r"'w' .* in float64, .* of float32\. Make"),
        (params | {"b": jnp.ones(40)}, "state was made for other params: .*. Make the bound's"),
    ):
        bound = state[1]
        with pytest.raises(ValueError, match=message):
            scale_by_weyl_bound().update(other, bound, other)


def test_a_state_of_another_rank():
    params = {"w": jnp.ones((60, 40))}
    state = adamw2(0.1, cap_rank=4).init(params)
    solver = adamw2(0.1, cap_rank=8)
    with pytest.raises(ValueError, match=r"The leaf 'w' .* with a cap of rank 8, and the state"):
        solver.update(params, state, params)
    solver.update(params, with_a_new_bound(solver, params, state), params)
