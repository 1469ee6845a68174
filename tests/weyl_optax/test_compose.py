"""The bound inside everything that Optax, Flax and JAX put around an optimizer."""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, bound_metrics, dimension_numbers_from, scale_by_weyl_bound
from weyl_optax.flax import dimension_numbers

rule_1 = functools.partial(scale_by_weyl_bound, growth="exponential")

PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (24, 20)),
    "stack": jax.random.normal(jax.random.key(1), (3, 18, 20)),
    "b": jnp.ones(5),
}
GRADS = jax.tree.map(lambda x: 10 * jnp.cos(7 * x), PARAMS)


def steps(solver, params=PARAMS, grads=GRADS, count=3):
    """Jitted steps with a donated state; the last updates, and the state."""
    update = jax.jit(solver.update, donate_argnums=1)
    state = solver.init(params)
    for _ in range(count):
        updates, state = update(grads, state, params)
    assert update._cache_size() == 1  # nothing was compiled twice
    return updates, state


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-7), a, b)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1.0),
        optax.lion(0.1),
        optax.adamw(0.1),
        optax.radam(0.1),
        optax.adafactor(0.1),
        optax.contrib.schedule_free_adamw(0.1),
    ],
)
def test_after_any_optimizer_the_norm_grows_by_at_most_tau(optimizer):
    updates, _ = steps(optax.chain(optimizer, scale_by_weyl_bound(0.01, num_iters=40)))
    for name in ("w", "stack"):
        before = np.linalg.norm(PARAMS[name], 2, axis=(-2, -1))
        after = np.linalg.norm(PARAMS[name] + updates[name], 2, axis=(-2, -1))
        step = np.linalg.norm(updates[name], 2, axis=(-2, -1))
        assert (step <= 0.01 * before * (1 + 1e-5)).all()
        assert (after <= 1.01 * before * (1 + 1e-5)).all()


def test_masked():
    mask = {"w": True, "stack": False, "b": False}
    updates, state = steps(optax.masked(scale_by_weyl_bound(0.01), mask))
    expected, _ = steps(scale_by_weyl_bound(0.01))
    assert_close(updates, GRADS | {"w": expected["w"]})
    assert set(bound_metrics(state)) == {
        "w/sigma_weight",
        "w/sigma_update",
        "w/scale",
        "bounded_fraction",
    }


def test_masked_with_a_specification_of_the_whole_tree():
    numbers = {
        "w": MuonDimensionNumbers(),
        "stack": MuonDimensionNumbers(1, 2),
        "b": MuonDimensionNumbers((), 0),
    }
    mask = {"w": True, "stack": False, "b": True}
    solver = scale_by_weyl_bound(0.01, weight_dimension_numbers=numbers)
    updates, _ = steps(optax.masked(solver, mask))
    expected, _ = steps(solver)
    assert_close(updates, expected | {"stack": GRADS["stack"]})


@pytest.mark.slow
def test_partition():
    solver = optax.partition(
        {"ours": adamw2(0.1, tau=0.01), "theirs": optax.adamw(0.1)},
        {"w": "ours", "stack": "ours", "b": "theirs"},
    )
    updates, state = steps(solver)
    ours, _ = steps(adamw2(0.1, tau=0.01))
    theirs, _ = steps(optax.adamw(0.1))
    assert_close(updates, ours | {"b": theirs["b"]})
    assert "stack/scale" in bound_metrics(state)
    assert "b/scale" not in bound_metrics(state)


@pytest.mark.slow
def test_inject_hyperparams_with_all_defaults():
    updates, state = steps(optax.inject_hyperparams(adamw2)(learning_rate=0.1))
    assert_close(updates, steps(adamw2(0.1))[0])
    names = {"learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"}
    assert set(state.hyperparams) == names | {"tau", "min_std", "max_std", "num_iters"}
    updates, _ = steps(optax.inject_hyperparams(scale_by_weyl_bound)())
    assert_close(updates, steps(scale_by_weyl_bound())[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", 0.05),
        ("learning_rate", 0.01),
        ("weight_decay", 0.5),
        ("min_std", 10.0),
        ("num_iters", 30),
    ],
)
def test_inject_hyperparams_of_every_number(name, value):
    solver = optax.inject_hyperparams(scale_by_weyl_bound)()
    state = solver.init(PARAMS)
    dtype = state.hyperparams[name].dtype
    state.hyperparams[name] = jnp.asarray(value, dtype)
    others = jax.tree.map(lambda g: jnp.sin(5 * g), GRADS)  # for which one iteration is not all

    def last(solver, state):
        _, state = jax.jit(solver.update)(GRADS, state, PARAMS)
        return jax.jit(solver.update)(others, state, PARAMS)[0]

    updates = last(solver, state)
    plain, default = scale_by_weyl_bound(**{name: value}), scale_by_weyl_bound()
    assert_close(updates, last(plain, plain.init(PARAMS)))
    change = np.abs(updates["w"] / last(default, default.init(PARAMS))["w"] - 1).max()
    assert change > (0.01 if name == "num_iters" else 0.1)


def test_inject_hyperparams_of_schedules():
    schedule = optax.linear_schedule(0.01, 0.1, 2)
    solver = optax.inject_hyperparams(scale_by_weyl_bound)(tau=schedule)
    assert_close(steps(solver)[0], steps(scale_by_weyl_bound(schedule))[0])


def test_multi_steps():
    inner = adamw2(0.1, tau=0.01)
    solver = optax.MultiSteps(inner, every_k_schedule=2)
    update = jax.jit(solver.update)
    state = solver.init(PARAMS)
    for _ in range(2):
        updates, state = update(GRADS, state, PARAMS)
    assert_close(updates, steps(inner, count=1)[0])
    assert bound_metrics(state)["bounded_fraction"] > 0


def test_apply_if_finite():
    solver = optax.apply_if_finite(adamw2(0.1, tau=0.01), max_consecutive_errors=3)
    update = jax.jit(solver.update)
    state = solver.init(PARAMS)
    updates, state = update(jax.tree.map(lambda g: g * jnp.nan, GRADS), state, PARAMS)
    assert_close(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, state = update(GRADS, state, PARAMS)
    assert_close(updates, steps(adamw2(0.1, tau=0.01), count=1)[0])


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(x))


def test_nnx_optimizer():
    model, x = TwoLayers(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 8))
    numbers = dimension_numbers(TwoLayers.__call__, model, x)
    solver = adamw2(0.1, tau=0.01, weight_dimension_numbers=numbers)
    optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)
    before = nnx.as_pure(jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return nnx.as_pure(nnx.state(grads, nnx.Param))

    grads = step(model, optimizer)
    updates, _ = solver.update(grads, solver.init(before), before)
    after = optax.apply_updates(before, updates)
    assert_close(nnx.as_pure(nnx.state(model, nnx.Param)), after, rtol=1e-4)
    metrics = bound_metrics(optimizer.opt_state)
    assert metrics["attention/query/kernel/scale"].shape == ()
    assert metrics["bounded_fraction"] > 0.5


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


def test_linen_train_state():
    model, x = Dense(), jnp.ones((2, 8))
    params = model.init(jax.random.key(0), x)["params"]
    solver = adamw2(0.1, tau=0.01)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=solver)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.sum((state.apply_fn({"params": params}, x) - 1) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    new = step(state)
    kernel, moved = params["Dense_0"]["kernel"], new.params["Dense_0"]["kernel"]
    growth = np.linalg.norm(moved, 2) / np.linalg.norm(kernel, 2)
    assert growth <= 1.01 * (1 + 1e-5)
    assert np.abs(moved - kernel).max() > 0
    assert bound_metrics(new.opt_state)["Dense_0/kernel/scale"] < 1


def test_linen_boxed_parameters():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(4, kernel_init=init)(x)

    x = jnp.ones((2, 8))
    params = Boxed().init(jax.random.key(0), x)["params"]
    numbers = dimension_numbers_from(lambda p, x: Boxed().apply({"params": p}, x), params, x)
    updates, state = steps(adamw2(0.1, weight_dimension_numbers=numbers), params, params)
    assert isinstance(updates["Dense_0"]["kernel"], nn.Partitioned)
    assert "Dense_0/kernel/scale" in bound_metrics(state)


class Layer(NamedTuple):
    """As Equinox filters a module: arrays, and None for everything else."""

    weight: jax.Array | None
    activation: None
    bias: jax.Array | None


def test_none_leaves():
    params = [Layer(PARAMS["w"], None, None), Layer(None, None, PARAMS["b"])]
    grads = [Layer(GRADS["w"], None, None), Layer(None, None, GRADS["b"])]
    numbers = [Layer(MuonDimensionNumbers(), None, None), Layer(None, None, None)]
    expected, _ = steps(adamw2(0.1))
    for spec in (None, numbers):
        updates, _ = steps(adamw2(0.1, weight_dimension_numbers=spec), params, grads)
        assert_close(updates[0].weight, expected["w"])
        assert updates[0].bias is None
        assert updates[1].weight is None


def test_empty_trees():
    for empty in ({}, [], ()):
        updates, state = steps(adamw2(0.1), empty, empty)
        assert updates == empty
        assert bound_metrics(state) == {"bounded_fraction": 0}


def test_scalars_vectors_zero_sizes_and_integers():
    params = {
        "scalar": jnp.float32(2.0),
        "vector": jnp.ones(4),
        "empty": jnp.ones((0, 4)),
        "empty_batch": jnp.ones((0, 3, 3)),
        "row": jnp.ones((1, 6)),
        "zero": jnp.zeros((6, 5)),
    }
    updates, state = steps(rule_1(0.5), params, jax.tree.map(lambda x: 8 * x, params))
    np.testing.assert_allclose(updates["scalar"], 1.0)
    np.testing.assert_allclose(updates["vector"], 0.5 * np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(updates["row"], 0.5 * np.ones((1, 6)), rtol=1e-6)
    np.testing.assert_array_equal(updates["zero"], np.zeros((6, 5)))
    assert updates["empty"].shape == (0, 4)
    assert state.bound_scale["empty"] is None
    # Exact without a block.
    assert [state.weight_block[name] for name in ("vector", "scalar", "row")] == [None] * 3


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    rng = np.random.default_rng(0)
    w, u = (rng.normal(size=(2, 24, 20)) + 1j * rng.normal(size=(2, 24, 20)) for _ in range(2))
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        w, u = w.real, u.real
    params, updates = {"w": jnp.asarray(w, dtype)}, {"w": jnp.asarray(u, dtype)}
    bounded, state = steps(scale_by_weyl_bound(0.01, num_iters=40), params, updates)
    assert bounded["w"].dtype == dtype
    assert state.sigma_weight["w"].dtype == jnp.float32
    kept = np.asarray(params["w"].astype(jnp.complex64))
    norms = np.linalg.norm(kept, 2, axis=(-2, -1))
    np.testing.assert_allclose(state.sigma_weight["w"], norms, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_double_precision_stays_double(x64, dtype):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(24, 20)) + (dtype == jnp.complex128) * 1j * rng.normal(size=(24, 20))
    w = w.astype(dtype) if dtype == jnp.complex128 else w.real
    params = {"w": jnp.asarray(w)}
    bounded, state = steps(scale_by_weyl_bound(0.01, num_iters=60), params, params)
    assert bounded["w"].dtype == dtype
    assert state.sigma_weight["w"].dtype == jnp.float64
    np.testing.assert_allclose(state.sigma_weight["w"], np.linalg.norm(w, 2), rtol=1e-12)


def test_mixed_dtypes_in_one_tree(x64):
    params = {
        "half": jnp.ones((18, 32), jnp.bfloat16),
        "single": jnp.ones((18, 32), jnp.float32),
        "double": jnp.ones((18, 32), jnp.float64),
    }
    bounded, state = steps(scale_by_weyl_bound(0.01), params, params)
    for name in params:
        np.testing.assert_allclose(state.sigma_weight[name], 24, rtol=1e-6)
        assert bounded[name].dtype == params[name].dtype


def test_updates_of_another_dtype_than_params():
    params = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    updates, state = steps(scale_by_weyl_bound(0.01, num_iters=20), params, {"w": GRADS["w"]})
    assert updates["w"].dtype == jnp.float32
    norm = np.linalg.norm(GRADS["w"], 2)
    np.testing.assert_allclose(state.sigma_update["w"], norm, rtol=1e-3)


def test_scan_equals_a_loop():
    solver = adamw2(0.1, tau=0.01)

    @jax.jit
    def loop(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = solver.update(GRADS, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    scanned, _ = loop(PARAMS, solver.init(PARAMS))
    params, state = PARAMS, solver.init(PARAMS)
    for _ in range(3):
        updates, state = solver.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(scanned, params)


@pytest.mark.slow
def test_vmap_over_an_ensemble_equals_its_members():
    solver = adamw2(0.1, tau=0.01)
    sizes = jnp.array([1.0, 0.1, 10.0])
    ensemble = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, PARAMS))(sizes)
    grads = jax.vmap(lambda s: jax.tree.map(lambda x: x / s, GRADS))(sizes)
    state = jax.vmap(solver.init)(ensemble)
    updates, _ = jax.jit(jax.vmap(solver.update))(grads, state, ensemble)
    for i in range(3):
        member, member_grads = jax.tree.map(lambda x, i=i: x[i], (ensemble, grads))
        expected, _ = solver.update(member_grads, solver.init(member), member)
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), expected)


def test_eval_shape_of_init_is_the_shape_of_init():
    solver = adamw2(0.1)
    abstract = jax.eval_shape(solver.init, PARAMS)
    concrete = solver.init(PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)


@pytest.mark.slow
def test_update_keeps_the_shapes_and_dtypes_of_the_state():
    for dtype in DTYPES:
        params = {"w": jnp.ones((3, 9, 6), dtype), "b": jnp.ones(2, dtype)}
        solver = adamw2(0.1)
        state = solver.init(params)
        _, new = solver.update(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


def test_no_two_leaves_of_the_state_share_a_buffer():
    params = {
        "a": jnp.ones((20, 20)),
        "b": jnp.ones((20, 20)),
        "c": jnp.ones((2, 20, 20)),
        "d": jnp.ones(5),
    }
    for init in (scale_by_weyl_bound().init, jax.jit(scale_by_weyl_bound().init)):
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(init(params)) if x.size]
        assert len(set(pointers)) == len(pointers)


def test_the_state_is_small():
    """Below 2 % of Adam's two moments, for the matrices of GPT-2 small."""
    shapes = {
        "token": (50257, 768),
        "position": (1024, 768),
        **dict.fromkeys(("query", "key", "value"), (12, 768, 12, 64)),
        "out": (12, 12, 64, 768),
        "up": (12, 768, 3072),
        "down": (12, 3072, 768),
    }
    numbers = {name: MuonDimensionNumbers(len(s) - 2, len(s) - 1) for name, s in shapes.items()}
    numbers |= {name: MuonDimensionNumbers(1, (2, 3)) for name in ("query", "key", "value")}
    numbers["out"] = MuonDimensionNumbers((1, 2), 3)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    solver = scale_by_weyl_bound(weight_dimension_numbers=numbers)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(jax.eval_shape(solver.init, params)) < 0.02 * 2 * size(params)


def test_a_cap_on_boxed_masked_and_frozen_leaves():
    model = nnx.Linear(40, 30, rngs=nnx.Rngs(0))
    boxed = nnx.state(model, nnx.Param)
    mask = lambda params: jax.tree.map(lambda x: x.ndim == 2, params)  # noqa: E731
    solver = adamw2(0.1, cap_rank=4, cap_mask=mask)
    plain = nnx.to_pure_dict(boxed)
    expected, _ = solver.update(plain, solver.init(plain), plain)
    found, state = jax.jit(solver.update)(boxed, jax.jit(solver.init)(boxed), boxed)
    np.testing.assert_allclose(found["kernel"][...], expected["kernel"], rtol=1e-4, atol=1e-6)
    assert jax.tree.leaves(optax.tree.get(state, "update_block"))[0].shape == (12, 30)

    kernels = optax.masked(solver, {"kernel": True, "bias": False})
    found, _ = kernels.update(plain, kernels.init(plain), plain)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4, atol=1e-6)
    bound = scale_by_weyl_bound(cap_rank=4, cap_mask=mask)
    frozen = plain | {"bias": None}
    found, _ = bound.update(frozen, bound.init(plain), plain)
    assert found["bias"] is None
