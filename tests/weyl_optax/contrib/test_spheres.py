"""`keep_norm` and `rotate`: weights on the spheres on which they began."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from weyl_optax.contrib import adamw_angle, keep_norm, lion_a, lion_ar, rotate

SHAPES = {"kernel": (20, 30), "stack": (3, 14, 12), "query": (12, 3, 4), "out": (3, 4, 12)}
NUMBERS = {
    "kernel": MuonDimensionNumbers(0, 1),
    "stack": MuonDimensionNumbers(1, 2),
    "query": MuonDimensionNumbers(0, (1, 2)),
    "out": MuonDimensionNumbers((0, 1), 2),
    "bias": MuonDimensionNumbers((), 0),
    "free": None,
}
# The axes over which a norm is taken.
AXES = {
    "unit": {"kernel": 0, "stack": 1, "query": 0, "out": (0, 1)},
    "matrix": {"kernel": (0, 1), "stack": (1, 2), "query": (0, 1, 2), "out": (0, 1, 2)},
}
OTHERS = {"bias": (7,), "free": (5, 6)}


def random_trees(number):
    rng = np.random.default_rng(0)
    return [
        {name: rng.normal(size=shape) for name, shape in (SHAPES | OTHERS).items()}
        for _ in range(number)
    ]


def norm(x, axes):
    return np.sqrt(np.sum(x * x, axis=axes, keepdims=True))


def tangent(u, w, axes):
    return u - w * np.sum(u * w, axis=axes, keepdims=True) / norm(w, axes) ** 2


@pytest.mark.parametrize("per", AXES)
def test_keep_norm_follows_the_formula_for_50_steps(per, x64):
    weights, *steps = random_trees(51)
    solver = keep_norm(NUMBERS, per=per)
    params = jax.tree.map(jnp.asarray, weights)
    state, update = solver.init(params), jax.jit(solver.update)
    for u in steps:
        u = {name: 0.3 * x for name, x in u.items()}
        updates, state = update(u, state, params)
        params = optax.apply_updates(params, updates)
        for name, axes in AXES[per].items():
            moved = weights[name] + tangent(u[name], weights[name], axes)
            weights[name] = moved * norm(weights[name], axes) / norm(moved, axes)
            np.testing.assert_allclose(params[name], weights[name], rtol=1e-9, atol=1e-12)
        for name in OTHERS:
            np.testing.assert_array_equal(updates[name], u[name])


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("per", AXES)
def test_rotate_follows_rotational_equilibrium_for_50_steps(per, decay, x64):
    weights, *steps = random_trees(51)
    start = {name: w.copy() for name, w in weights.items()}
    schedule = optax.cosine_decay_schedule(0.2, 60)
    solver = rotate(schedule, NUMBERS, per=per, decay=decay)
    params = jax.tree.map(jnp.asarray, weights)
    state, update = solver.init(params), jax.jit(solver.update)
    squares = dict.fromkeys(SHAPES, 0.0)
    for t, u in enumerate(steps, 1):
        updates, state = update(u, state, params)
        params = optax.apply_updates(params, updates)
        for name, axes in AXES[per].items():
            w, size = weights[name], norm(start[name], axes)
            d = tangent(u[name], w, axes)
            squares[name] = decay * squares[name] + (1 - decay) * norm(d, axes) ** 2
            average = np.sqrt(squares[name] / (1 - decay**t))
            moved = w + float(schedule(t - 1)) * size * d / average
            weights[name] = moved * size / norm(moved, axes)
            np.testing.assert_allclose(params[name], weights[name], rtol=1e-9, atol=1e-12)
        for name in OTHERS:
            np.testing.assert_array_equal(updates[name], u[name])


def test_rotate_is_the_update_of_adamh_but_for_the_part_along_the_weight():
    """That of Levanter's `AdamHConfig`, of an update that is orthogonal to the weight."""
    w, u = jax.random.normal(jax.random.key(0), (2, 24, 16))
    u = u - w * jnp.vdot(u, w) / jnp.vdot(w, w)
    moved = w - 0.1 * u * jnp.linalg.norm(w) / jnp.linalg.norm(u)
    expected = moved * jnp.linalg.norm(w) / jnp.linalg.norm(moved)
    solver = optax.chain(optax.scale(-1.0), rotate(0.1, per="matrix", decay=0.0))
    updates, _ = solver.update(u, solver.init(w), w)
    np.testing.assert_allclose(w + updates, expected, atol=1e-6)


def test_the_angle_to_which_adamw_settles_on_noise():
    """A scale-invariant weight, so that gradients are orthogonal to it, and of size 1 / |w|."""
    solver = optax.adamw(0.02, 0.9, 0.99, weight_decay=0.5)
    shape, axes = (2000, 16), 0

    def step(carry, key):
        w, state = carry
        g = jax.random.normal(key, shape)
        size = jnp.linalg.norm(w, axis=axes, keepdims=True)
        g = (g - w * jnp.sum(g * w, axis=axes, keepdims=True) / size**2) / size
        updates, state = solver.update(g, state, w)
        new = w + updates
        cosine = jnp.sum(w * new, axis=axes) / (size[0] * jnp.linalg.norm(new, axis=axes))
        # 1 - cos loses all digits of a small angle; the sine does not.
        sine = jnp.linalg.norm(new / jnp.linalg.norm(new, axis=axes) - cosine * w / size, axis=axes)
        return (new, state), jnp.mean(jnp.square(jnp.arctan2(sine, cosine)))

    w = jax.random.normal(jax.random.key(1), shape)
    keys = jax.random.split(jax.random.key(0), 1500)
    _, squares = jax.jit(lambda w: jax.lax.scan(step, (w, solver.init(w)), keys))(w)
    expected = adamw_angle(0.02, 0.5, 0.9)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(squares[-300:])), expected, rtol=0.02)


def test_rotate_turns_by_that_angle_from_the_first_steps():
    w = jax.random.normal(jax.random.key(1), (2000, 16))
    solver = optax.chain(optax.sgd(1.0), rotate(0.05))
    state, update = solver.init(w), jax.jit(solver.update)
    angles = []
    for key in jax.random.split(jax.random.key(0), 100):
        updates, state = update(jax.random.normal(key, w.shape), state, w)
        new = w + updates
        chord = jnp.linalg.norm(updates, axis=0) / jnp.linalg.norm(w, axis=0)
        angles.append(2 * jnp.arcsin(chord / 2))
        w = new
    np.testing.assert_allclose(jnp.mean(jnp.stack(angles)), 0.05, rtol=0.02)


TRANSFORMS = {"keep_norm": keep_norm, "rotate": functools.partial(rotate, 0.1)}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_unit_of_zeros_is_left_to_the_optimizer_and_moves_on(make):
    w = jnp.zeros((4, 3)).at[:, 1].set(2.0)
    solver = make()
    state = solver.init(w)
    for _ in range(3):
        u = jnp.full_like(w, 0.5).at[0].set(-0.5)
        updates, state = solver.update(u, state, w)
        w = w + updates
        assert jnp.isfinite(w).all()
    np.testing.assert_allclose(jnp.linalg.norm(w[:, 1]), 4.0, rtol=1e-6)
    np.testing.assert_allclose(w[:, [0, 2]], 1.5 * np.array([[-1], [1], [1], [1]]).repeat(2, 1))


def test_lion_ar_takes_a_unit_of_zeros_by_lion_as_step():
    w = jax.random.normal(jax.random.key(0), (6, 4)).at[:, 2].set(0)
    grads = jax.random.normal(jax.random.key(1), (6, 4))
    updates = []
    for make in (lion_ar, functools.partial(lion_a, nesterov=True, inverse_bias_correction=True)):
        solver = make(1e-3, 0.98, weight_decay=0.0)
        update, _ = solver.update(grads, solver.init(w), w)
        updates.append(update[:, 2])
    assert (updates[0] != 0).all()
    np.testing.assert_allclose(*updates, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-28, 1e-20, 1e20, 1e28])
def test_updates_and_weights_of_any_size(scale):
    w, u = (np.random.default_rng(i).normal(size=(5, 3)).astype(np.float32) for i in range(2))
    params, updates = {"w": jnp.asarray(w)}, {"w": jnp.asarray(scale * u)}
    for solver in (rotate(0.1), rotate(0.1, decay=0.0)):
        turned, _ = solver.update(updates, solver.init(params), params)
        after = w + np.asarray(turned["w"])
        np.testing.assert_allclose(np.linalg.norm(after, axis=0), np.linalg.norm(w, axis=0), 1e-5)
        cosine = np.sum(after * w, axis=0) / np.sum(w * w, axis=0)
        np.testing.assert_allclose(np.arccos(cosine), np.arctan(0.1), rtol=1e-3)
    params = {"w": jnp.asarray(w / scale)}
    kept, _ = keep_norm().update({"w": u / scale}, keep_norm().init(params), params)
    after = np.linalg.norm((w + scale * np.asarray(kept["w"], np.float64)), axis=0)
    np.testing.assert_allclose(after, np.linalg.norm(w, axis=0), rtol=1e-5)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_an_update_that_is_not_finite_is_seen_and_forgotten(make):
    w = jax.random.normal(jax.random.key(0), (6, 5))
    u = 0.1 * jax.random.normal(jax.random.key(1), (6, 5))
    solver = make()
    state = solver.init(w)
    _, state = solver.update(u, state, w)
    expected_after_one, other = solver.update(2 * u, state, w)
    expected, _ = solver.update(2 * u, other, w)
    for bad in (jnp.nan, jnp.inf):
        updates, after = solver.update((2 * u).at[0, 2].set(bad), state, w)
        assert not jnp.isfinite(updates[:, 2]).any()
        assert jnp.isfinite(updates[:, :2]).all()
        found, _ = solver.update(2 * u, after, w)
        np.testing.assert_allclose(found[:, 2], expected_after_one[:, 2], rtol=1e-5)
        np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=1e-5)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_zero_update_stays_zero_and_low_precision_stays_on_its_sphere(make):
    w = jax.random.normal(jax.random.key(0), (64, 8)).astype(jnp.bfloat16)
    solver = make()
    state = solver.init(w)
    updates, _ = solver.update(jnp.zeros_like(w), state, w)
    np.testing.assert_array_equal(updates, jnp.zeros_like(w))
    start = jnp.linalg.norm(w.astype(jnp.float32), axis=0)
    for key in jax.random.split(jax.random.key(1), 100):
        u = 0.1 * jax.random.normal(key, w.shape, jnp.bfloat16)
        updates, state = solver.update(u, state, w)
        assert updates.dtype == jnp.bfloat16
        w = w + updates
    np.testing.assert_allclose(jnp.linalg.norm(w.astype(jnp.float32), axis=0), start, rtol=0.01)


def test_the_norm_of_weights_loaded_after_init_counts():
    solver = keep_norm()
    state = solver.init(jax.ShapeDtypeStruct((4, 3), jnp.float32))
    w = jax.random.normal(jax.random.key(0), (4, 3))
    updates, _ = solver.update(jnp.ones((4, 3)), state, w)
    np.testing.assert_allclose(
        jnp.linalg.norm(w + updates, axis=0), jnp.linalg.norm(w, axis=0), rtol=1e-6
    )


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="per must be one of 'unit', 'matrix', got 'row'"):
        keep_norm(per="row")
    with pytest.raises(ValueError, match="angle must be at least 0"):
        rotate(-0.1)
    with pytest.raises(ValueError, match="decay must be below 1"):
        rotate(0.1, decay=1.0)
    w = jnp.ones((4, 3))
    for solver in (keep_norm(), rotate(0.1)):
        with pytest.raises(ValueError, match="needs the params"):
            solver.update(w, solver.init(w))


@pytest.mark.parametrize("shape", [(1, 8), (3, 1, 8)])
def test_a_unit_with_one_input_is_left_to_the_optimizer(shape):
    params, grads = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    alone = {"adam": optax.adam(0.1), "lion_a": lion_a(0.1, weight_decay=0.0)}
    for name, solver in (
        ("adam", optax.chain(alone["adam"], keep_norm())),
        ("adam", optax.chain(alone["adam"], rotate(0.1))),
        ("lion_a", lion_ar(0.1)),
    ):
        expected, _ = alone[name].update(grads, alone[name].init(params), params)
        found, _ = solver.update(grads, solver.init(params), params)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert float(jnp.abs(found).min()) > 0
