"""Sharpness against the exact Hessian of a small network, critical rates against a fine grid."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from weyl_optax.dynamics import adam_preconditioner, critical_learning_rate, sharpness


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (6, 12)), "bias": jnp.zeros(12)},
        "down": jax.random.normal(keys[1], (12, 3)),
    }


X, Y = jax.random.normal(jax.random.key(7), (32, 6)), jnp.arange(32) % 3


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    logits = hidden @ params["down"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def exact(params, preconditioner):
    flat, unravel = ravel_pytree(params)
    hessian = np.asarray(jax.hessian(lambda p: loss(unravel(p), (X, Y)))(flat), float)
    p = np.sqrt(np.asarray(ravel_pytree(preconditioner)[0], float))
    return np.linalg.eigvalsh(hessian / np.outer(p, p))[-1]


@pytest.mark.parametrize("seed", [0, 1])
def test_sharpness_is_the_largest_eigenvalue_of_the_hessian(seed):
    params = make_params(seed)
    found = jax.jit(lambda params: sharpness(loss, params, (X, Y)))(params)
    ones = jax.tree.map(jnp.ones_like, params)
    np.testing.assert_allclose(found, exact(params, ones), rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20, 1e30])
def test_sharpness_of_a_tiny_and_a_huge_loss(size):
    def bowl(w, scale):
        return size * jnp.sum(scale * w**2) / 2

    found = sharpness(bowl, jnp.ones(3), jnp.array([1.0, 5.0, 3.0]))
    np.testing.assert_allclose(found, 5 * size, rtol=1e-5)


def test_sharpness_after_adams_preconditioner():
    params, b1, b2, eps = make_params(), 0.9, 0.99, 1e-3
    solver = optax.adam(1e-2, b1, b2, eps)
    state = solver.init(params)
    squares = jax.tree.map(np.zeros_like, params)
    for _ in range(5):
        grads = jax.grad(loss)(params, (X, Y))
        squares = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, squares, grads)
        updates, state = solver.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda v: (1 - b1**5) * (np.sqrt(v / (1 - b2**5)) + eps), squares)
    found = adam_preconditioner(state, b1, b2, eps)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, expected)
    np.testing.assert_allclose(
        sharpness(loss, params, (X, Y), preconditioner=found), exact(params, expected), rtol=1e-4
    )


def test_sharpness_of_a_space_smaller_than_the_iterations_and_of_a_flat_loss():
    curvature = jnp.array([1.0, -7.0, 3.0, 2.0])
    quadratic = lambda w, _: jnp.sum(curvature * w**2) / 2  # noqa: E731
    np.testing.assert_allclose(sharpness(quadratic, jnp.ones(4), None), 3.0, rtol=1e-4)
    np.testing.assert_allclose(sharpness(lambda w, _: w.sum(), jnp.ones(4), None), 0.0)
    concave = lambda w, _: -jnp.sum(w**2)  # noqa: E731
    np.testing.assert_allclose(sharpness(concave, jnp.ones(4), None), -2.0, rtol=1e-4)


def test_sharpness_tells_where_gradient_descent_begins_to_diverge():
    """On a quadratic loss: 2 / rate, and (2 + 2 b) / rate with momentum."""
    curvature = jnp.array([1.0, 5.0, 3.0])
    quadratic = lambda w, _: jnp.sum(curvature * w**2) / 2  # noqa: E731
    measured = float(sharpness(quadratic, jnp.ones(3), None))
    for momentum in (0.0, 0.9):
        for factor, grows in ((0.98, False), (1.02, True)):
            rate = factor * (2 + 2 * momentum) / measured
            solver = optax.sgd(rate, momentum)
            w = jnp.ones(3)
            state = solver.init(w)
            for _ in range(400):
                updates, state = solver.update(curvature * w, state, w)
                w = w + updates
            assert (not jnp.linalg.norm(w) <= 1) == grows


@pytest.mark.parametrize("tolerance", [0.1, 0.01])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_critical_rate_is_that_of_a_fine_grid(kind, tolerance):
    params = make_params(3)
    grads = jax.grad(loss)(params, (X, Y))
    updates = jax.tree.map(lambda g: -g if kind == "sgd" else -jnp.sign(g), grads)
    find = jax.jit(
        lambda: critical_learning_rate(
            loss, params, updates, (X, Y), target=1e4, tolerance=tolerance
        )
    )
    rate, passes = find()
    before = float(loss(params, (X, Y)))
    rates = np.geomspace(1e-4, 1e3, 8001)
    after = np.asarray(
        jax.vmap(lambda r: loss(jax.tree.map(lambda p, u: p + r * u, params, updates), (X, Y)))(
            rates
        )
    )
    raises = int(np.argmax(after >= before))  # the first rate of the grid that does
    allowed = int(np.argmax(after > before * (1 + tolerance)))
    assert rates[raises - 1] <= float(rate) <= rates[allowed]
    assert int(passes) < 40


def test_a_target_below_the_critical_rate_is_the_rate_and_a_bad_direction_has_none():
    params = make_params()
    grads = jax.grad(loss)(params, (X, Y))
    down, up = jax.tree.map(lambda g: -g, grads), grads
    rate, passes = critical_learning_rate(loss, params, down, (X, Y), target=0.001)
    assert float(rate) == pytest.approx(0.001)
    assert int(passes) == 6  # before, and at 1, 2, 4, 8 and 10 times 1e-4
    rate, _ = critical_learning_rate(loss, params, up, (X, Y), target=1.0)
    assert float(rate) <= 1e-4
    nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    rate, _ = critical_learning_rate(loss, params, nan, (X, Y), target=1.0)
    assert float(rate) <= 1e-4


def test_a_start_above_the_critical_rate_is_halved():
    def bowl(w, _):
        return 5 * jnp.sum(w**2) / 2 + 1  # a step along -5 w is stable up to 2 / 5

    w = jnp.ones(3)
    rate, _ = critical_learning_rate(bowl, w, -5 * w, None, target=10.0, initial=1.0)
    assert float(rate) == pytest.approx(0.4, rel=1e-2)


def test_wrong_arguments_are_errors():
    params = make_params()
    with pytest.raises(ValueError, match="num_iters must be at least 1"):
        sharpness(loss, params, (X, Y), num_iters=0)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        sharpness(loss, params, (X, Y), num_iters=2.5)
    with pytest.raises(ValueError, match=r"no optax\.ScaleByAdamState"):
        adam_preconditioner(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="factor must be above 1"):
        critical_learning_rate(loss, params, params, (X, Y), target=1.0, factor=1.0)
    with pytest.raises(ValueError, match="initial must be above 0"):
        critical_learning_rate(loss, params, params, (X, Y), target=1.0, initial=0.0)
    with pytest.raises(ValueError, match="target must be at least 0"):
        critical_learning_rate(loss, params, params, (X, Y), target=-1.0)
    with pytest.raises(ValueError, match="needs floating params, and 'count' is int32"):
        sharpness(loss, params | {"count": jnp.arange(3)}, (X, Y))


def test_two_adams_are_not_taken_for_one():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    solver = optax.partition({"x": optax.adam(0.1), "y": optax.adam(0.2)}, {"a": "x", "b": "y"})
    with pytest.raises(KeyError, match="ScaleByAdamState"):
        adam_preconditioner(solver.init(params))


@pytest.mark.parametrize("two", [2, 2.0, np.full(3, 2)])
def test_a_preconditioner_may_be_a_number_for_a_leaf(two):
    curvature = jnp.array([1.0, 4.0, 9.0])
    quadratic = lambda p, _: jnp.sum(curvature * p["w"] ** 2) / 2  # noqa: E731
    found = sharpness(quadratic, {"w": jnp.ones(3)}, None, preconditioner={"w": two})
    np.testing.assert_allclose(found, 4.5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs floating params, and 'w' is complex64"):
        sharpness(quadratic, {"w": jnp.ones(3, jnp.complex64)}, None)


def test_params_in_bfloat16_have_the_sharpness_and_the_critical_rate_of_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    rounded = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected = exact(rounded, jax.tree.map(jnp.ones_like, rounded))
    found = sharpness(loss, params, (X, Y))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0.03)

    def quadratic(w, _):
        assert w.dtype == jnp.bfloat16
        return 5 * jnp.sum(w.astype(jnp.float32) ** 2) / 2 + 1

    w = jnp.ones(3, jnp.bfloat16)
    rate, _ = critical_learning_rate(quadratic, w, -5 * w, None, target=10.0)
    np.testing.assert_allclose(rate, 0.4, rtol=0.01)
