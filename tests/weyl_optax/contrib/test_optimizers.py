"""GI-Adam, LionA, LionAR, the share of noise and the soft spectral clip against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from weyl_optax.contrib import (
    adamw_angle,
    catapult_schedule,
    gi_adamw,
    lion_a,
    lion_ar,
    scale_by_catapult,
    scale_by_gi_adam,
    scale_by_lion_a,
    scale_by_noise_share,
    soft_spectral_clip,
)


def gradients(steps, *shape):
    return np.random.default_rng(0).normal(size=(steps, *shape))


def run(solver, w, grads):
    """The updates, by a jitted step for each gradient."""
    w = jnp.asarray(w)
    state, update = solver.init(w), jax.jit(solver.update)
    for g in grads:
        updates, state = update(jnp.asarray(g), state, w)
        w = w + updates
        yield updates


@pytest.mark.parametrize("init_scale", [1.0, 3.0])
def test_gi_adamw_follows_the_formula_for_50_steps(init_scale, x64):
    grads, w = gradients(50, 4, 3), np.ones((4, 3))
    rate, b1, b2, eps, decay = 0.01, 0.9, 0.99, 1e-8, 0.1
    solver = gi_adamw(rate, b1, b2, eps, weight_decay=decay, init_scale=init_scale)
    m, v = np.zeros((4, 3)), init_scale * grads[0] ** 2
    for t, (updates, g) in enumerate(zip(run(solver, w, grads), grads, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        adam = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        expected = -rate * (adam + decay * w)
        np.testing.assert_allclose(updates, expected, rtol=1e-9, atol=1e-14)
        w = w + expected


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_gi_adam_is_adam_at_a_rate_that_warms_up(b2, x64):
    """With gradients of one size: sqrt(1 - b2^t) of Adam's updates, from the first one on."""
    signs = np.sign(gradients(50, 5))
    adam = run(optax.scale_by_adam(b2=b2, eps=0.0), np.ones(5), signs)
    ours = run(scale_by_gi_adam(b2=b2, eps=0.0), np.ones(5), signs)
    for t, (mine, theirs) in enumerate(zip(ours, adam, strict=True), 1):
        np.testing.assert_allclose(mine, np.sqrt(1 - b2**t) * theirs, rtol=1e-9)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_lion_a_follows_the_formula_for_50_steps(nesterov, correction, x64):
    grads, w = gradients(50, 4, 3), np.ones((4, 3))
    b, rate, decay = 0.95, 0.01, 0.1
    solver = lion_a(
        rate, b, weight_decay=decay, nesterov=nesterov, inverse_bias_correction=correction
    )
    m = np.zeros((4, 3))
    for t, (updates, g) in enumerate(zip(run(solver, w, grads), grads, strict=True), 1):
        m = b * m + (1 - b) * g
        sign = np.sign(b * m + (1 - b) * g if nesterov else m)
        size = np.sqrt((1 - b) / (1 + b)) * (1 - b**t if correction else 1)
        expected = -rate * (size * sign + decay * w)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)
        w = w + expected


def test_lion_a_has_the_size_of_adams_updates_on_noise():
    grads = gradients(300, 2000)
    *_, ours = run(scale_by_lion_a(0.9), np.ones(2000), grads)
    *_, adam = run(optax.scale_by_adam(0.9, 0.99), np.ones(2000), grads)
    rms = [np.sqrt(np.mean(np.square(u))) for u in (ours, adam)]
    np.testing.assert_allclose(rms[0], rms[1], rtol=0.05)


def test_lion_ar_turns_the_units_of_matrices_and_steps_like_lion_a_elsewhere(x64):
    rng = np.random.default_rng(1)
    w = {"kernel": rng.normal(size=(20, 30)), "bias": rng.normal(size=30)}
    schedule, b, decay = optax.cosine_decay_schedule(0.05, 60), 0.9, 0.4
    numbers = {"kernel": MuonDimensionNumbers(0, 1), "bias": MuonDimensionNumbers((), 0)}
    solver = lion_ar(schedule, b, weight_decay=decay, weight_dimension_numbers=numbers)
    params = jax.tree.map(jnp.asarray, w)
    state, update = solver.init(params), jax.jit(solver.update)
    size = np.linalg.norm(w["kernel"], axis=0)
    m, square = {name: np.zeros_like(x) for name, x in w.items()}, 0.0
    for t in range(1, 51):
        g = {name: rng.normal(size=x.shape) for name, x in w.items()}
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
        m = {name: b * m[name] + (1 - b) * g[name] for name in w}
        u = {
            name: -np.sqrt((1 - b) / (1 + b)) * np.sign(b * m[name] + (1 - b) * g[name])
            for name in w
        }
        rate = float(schedule(t - 1))
        w["bias"] = w["bias"] + rate * (1 - b**t) * u["bias"]
        kernel = w["kernel"]
        d = u["kernel"] - kernel * np.sum(u["kernel"] * kernel, 0) / size**2
        square = 0.9 * square + 0.1 * np.sum(d * d, 0)
        angle = np.sqrt(2 * rate * decay * (1 - b) / (1 + b)) * (1 - b**t)
        kernel = kernel + angle * size * d / np.sqrt(square / (1 - 0.9**t))
        w["kernel"] = kernel * size / np.linalg.norm(kernel, axis=0)
        np.testing.assert_allclose(adamw_angle(rate, decay, b) * (1 - b**t), angle, rtol=1e-6)
        for name in w:
            np.testing.assert_allclose(params[name], w[name], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_share_of_noise_does_not_depend_on_the_size_of_gradients(size):
    grads = np.float32(gradients(3, 16, 16))
    solver = scale_by_noise_share(optax.sgd(1.0))
    plain = run(solver, np.float32(grads[0]), grads)
    for found, expected in zip(run(solver, grads[0], size * grads), plain, strict=True):
        np.testing.assert_allclose(found / size, expected, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_share_of_noise_is_right_from_the_second_step(ratio):
    """Of many matrices: each is an estimate with an error, and their mean is not."""
    signal = ratio * np.random.default_rng(2).normal(size=(200, 16, 16))
    grads = signal + gradients(30, 200, 16, 16)
    solver = scale_by_noise_share(optax.sgd(1.0), 0.8)
    for t, (updates, g) in enumerate(zip(run(solver, signal, grads), grads, strict=True), 1):
        scale = np.linalg.norm(updates, axis=(1, 2)) / np.linalg.norm(g, axis=(1, 2))
        if t == 1:
            np.testing.assert_array_equal(scale, 0)
        elif t in (2, 5, 30):
            np.testing.assert_allclose(np.mean(scale**2), 1 / (1 + ratio**2), rtol=0.04)


def test_the_share_of_noise_follows_the_formula_and_scales_what_the_optimizer_makes(x64):
    grads, b = gradients(50, 4, 3) + 0.3, 0.9
    solver = scale_by_noise_share(optax.adam(0.1), b)
    adam = run(optax.adam(0.1), np.ones((4, 3)), grads)
    m, square = np.zeros((4, 3)), 0.0
    ours = run(solver, np.ones((4, 3)), grads)
    for t, (updates, plain, g) in enumerate(zip(ours, adam, grads, strict=True), 1):
        m, square = b * m + (1 - b) * g, b * square + (1 - b) * np.sum(g * g)
        mean, total = m / (1 - b**t), square / (1 - b**t)
        noise_only = (1 - b) / (1 + b) * (1 + b**t) / (1 - b**t)
        if t > 1:
            share = np.clip((total - np.sum(mean**2)) / (total * (1 - noise_only)), 0, 1)
            np.testing.assert_allclose(updates, np.sqrt(share) * plain, rtol=2e-6)


def test_a_gradient_that_is_not_finite_leaves_no_trace_in_the_share_of_noise():
    grads = jnp.asarray(gradients(4, 4, 3), jnp.float32)
    solver = scale_by_noise_share(optax.sgd(1.0))
    state = solver.init(grads[0])
    for g in grads[:3]:
        _, state = solver.update(g, state)
    before = state
    updates, state = solver.update(grads[3].at[0, 0].set(jnp.nan), state)
    assert jnp.isnan(updates).any()
    updates, found = solver.update(grads[3], state)
    expected, _ = solver.update(grads[3], before)
    np.testing.assert_array_equal(updates, expected)
    assert float(found.num_finite) == 4


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((12, 40), (0, 1)),
        ((40, 12), (0, 1)),
        ((12, 40), (1, 0)),
        ((3, 10, 14), (1, 2)),
        ((10, 3, 14), (0, 2)),
        ((12, 3, 4), (0, (1, 2))),
    ],
)
def test_the_soft_clip_is_that_of_singular_values(shape, numbers, size):
    u = size * gradients(1, *shape)[0]
    numbers = MuonDimensionNumbers(*numbers)
    solver = soft_spectral_clip(2.0, numbers)
    updates, _ = jax.jit(solver.update)(jnp.asarray(u, jnp.float32), solver.init(u))
    reduction, output = (np.atleast_1d(axes).tolist() for axes in numbers)
    batch = [axis for axis in range(len(shape)) if axis not in reduction + output]
    order = batch + reduction + output
    rows = int(np.prod([shape[axis] for axis in reduction]))
    matrices, found = (
        np.transpose(np.asarray(x, float), order).reshape(
            *[shape[axis] for axis in batch], rows, -1
        )
        for x in (u, updates)
    )
    left, sigma, right = np.linalg.svd(matrices, full_matrices=False)
    clipped = sigma / np.sqrt(1 + sigma**2 / 4)
    expected = left @ (clipped[..., None] * right)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.max(clipped))


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (128, 128)])
@pytest.mark.parametrize("max_norm", [0.1, 0.01])
def test_the_soft_clip_is_exact_far_above_its_norm(shape, max_norm):
    """As Adam's first update is: nearly of rank one, here up to 18,000 times above the norm."""
    rng = np.random.default_rng(0)
    rows, columns = (rng.normal(size=size) for size in shape)
    u = np.float32(np.sign(np.outer(rows, columns)) + 0.01 * rng.normal(size=shape))
    found, _ = soft_spectral_clip(max_norm).update(jnp.asarray(u), optax.EmptyState())
    left, sigma, right = np.linalg.svd(u.astype(float), full_matrices=False)
    expected = (left * (sigma / np.sqrt(1 + (sigma / max_norm) ** 2))) @ right
    assert np.linalg.norm(found - expected, 2) < 1e-3 * max_norm
    assert np.linalg.norm(np.asarray(found, float), 2) < max_norm * (1 + 1e-5)


def test_the_soft_clip_of_huge_updates_and_its_derivative_at_zero():
    u = jnp.asarray(gradients(1, 8, 12)[0], jnp.float32)
    found, _ = soft_spectral_clip(1e-20).update(u, optax.EmptyState())
    np.testing.assert_allclose(np.linalg.norm(np.asarray(found, float), 2), 1e-20, rtol=1e-3)
    solver = soft_spectral_clip(1.0)
    update = lambda u: solver.update(u, optax.EmptyState())[0]  # noqa: E731
    _, tangent = jax.jvp(update, (jnp.zeros_like(u),), (u,))
    np.testing.assert_allclose(tangent, u, rtol=1e-5)


def test_the_soft_clip_of_a_matrix_does_not_depend_on_its_stack():
    u = gradients(3, 32, 48).astype(np.float32)
    u[2] *= 1e-3
    solver = soft_spectral_clip(1.0, MuonDimensionNumbers(1, 2))
    with jax.numpy_rank_promotion("raise"):
        expected, _ = solver.update(jnp.asarray(u), optax.EmptyState())
        bad, _ = solver.update(jnp.asarray(u).at[1, 0, 0].set(jnp.nan), optax.EmptyState())
    assert jnp.isnan(bad[1]).any()
    np.testing.assert_array_equal(bad[jnp.array([0, 2])], expected[jnp.array([0, 2])])


def test_the_soft_clip_leaves_vectors_alone():
    grads = {"w": 100 * jnp.ones((8, 8)), "b": 100 * jnp.ones(8)}
    solver = soft_spectral_clip(1.0)
    updates, _ = solver.update(grads, solver.init(grads))
    np.testing.assert_array_equal(updates["b"], grads["b"])
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"], 2), 1, rtol=1e-3)


def test_the_catapult_schedule_is_the_end_of_a_linear_warmup():
    linear = optax.warmup_cosine_decay_schedule(0.0, 0.4, 40, 240)
    ours = catapult_schedule(0.1, 0.4, 40, 230)
    for count in (0, 1, 17, 29, 30):
        np.testing.assert_allclose(ours(count), linear(count + 10), rtol=1e-6)
    assert float(catapult_schedule(0.4, 0.1, 40, 200)(0)) == pytest.approx(0.1)
    np.testing.assert_allclose(catapult_schedule(0.4, 0.1, 40, 200)(100), 0.05, rtol=1e-6)


def test_the_persistent_catapult_raises_the_rate_only_when_the_loss_has_come_down():
    """Of a product of two weights, whose curvature falls as they come near to each other."""

    def loss(w):
        return (w[0] * w[1] - 1) ** 2 / 2

    target = 1.0
    solver = scale_by_catapult(target, initial=1e-3, tolerance=0.01)
    w = jnp.array([4.0, 1.0])
    state, update = solver.init(w), jax.jit(solver.update, static_argnames="value_fn")
    lowest, rates = np.inf, []
    for _ in range(60):
        value, grads = jax.value_and_grad(loss)(w)
        before = state
        updates, state = update(grads, state, w, value=value, value_fn=loss)
        rate = float(state.learning_rate)
        np.testing.assert_allclose(updates, -rate * grads, rtol=1e-6)
        if value < lowest and before.learning_rate < target:
            grid = np.geomspace(1e-3, target, 801)
            after = loss(np.asarray(w)[:, None] - grid * np.asarray(grads)[:, None])
            allowed = grid[after <= value * 1.011]
            assert rate <= max(float(before.learning_rate), allowed[-1]) * 1.02
            lowest = value
        else:
            assert rate == float(before.learning_rate)
        rates.append(rate)
        w = w + updates
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] <= target


def test_wrong_arguments_are_errors():
    w = jnp.ones(3)
    solver = scale_by_catapult(1.0)
    with pytest.raises(ValueError, match="value=loss, value_fn="):
        solver.update(w, solver.init(w), w)
    with pytest.raises(ValueError, match="init_scale must be at least 0"):
        scale_by_gi_adam(init_scale=-1.0)
    for max_norm in (-1.0, 0.0):
        with pytest.raises(ValueError, match="max_norm must be above 0"):
            soft_spectral_clip(max_norm)
    with pytest.raises(ValueError, match="max_norm must be below inf"):
        soft_spectral_clip(np.inf)
    for arguments in ({"learning_rate": -0.1}, {"learning_rate": 0.1, "weight_decay": -0.1}):
        with pytest.raises(ValueError, match=f"{list(arguments)[-1]} must be at least 0, got -0.1"):
            lion_ar(**arguments)
    with pytest.raises(ValueError, match="initial must be at least 0"):
        catapult_schedule(-0.1, 1.0, 10, 100)
    with pytest.raises(ValueError, match="decay_steps must be above 10, got 10"):
        catapult_schedule(0.1, 1.0, 10, 10)
    with pytest.raises(ValueError, match="initial must be above 0"):
        scale_by_catapult(1.0, initial=0)
    for b, message in ((0, "b must be above 0"), (1, "b must be below 1")):
        with pytest.raises(ValueError, match=message):
            scale_by_noise_share(optax.sgd(1.0), b)
    for b, message in ((-0.1, "b must be at least 0"), (1, "b must be below 1")):
        with pytest.raises(ValueError, match=message):
            lion_a(1.0, b)
