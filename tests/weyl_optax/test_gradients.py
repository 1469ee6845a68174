"""Derivatives of a norm, and through an update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, scale_by_weyl_bound, spectral_norm


def with_spectrum(seed, m, spectrum):
    """A matrix (m, n) of these singular values, and the u v^H of the first."""
    rng = np.random.default_rng(seed)
    n = len(spectrum)
    u, v = (np.linalg.qr(rng.normal(size=(size, n)))[0] for size in (m, n))
    return u * spectrum @ v.T, np.outer(u[:, 0], v[:, 0])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [5, 30])
def test_of_a_norm_at_a_gap_of_one_percent(n, transpose):
    a, expected = with_spectrum(0, 60, np.r_[1, np.linspace(0.99, 0.1, n - 1)])
    if transpose:
        a, expected = a.T, expected.T
    found = jax.grad(spectral_norm)(jnp.asarray(a, jnp.float32))
    assert np.linalg.norm(found - expected) < 1e-4


def test_of_a_norm_above_a_plateau():
    a, expected = with_spectrum(0, 60, np.r_[1, np.full(39, 0.99)])
    found = jax.grad(lambda a: spectral_norm(a, num_iters=600))(jnp.asarray(a, jnp.float32))
    assert np.linalg.norm(found - expected) < 1e-4


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_neither_overflows_nor_underflows(size):
    for n in (1, 5, 30):
        a, expected = with_spectrum(0, 60, np.linspace(1, 0.1, n))
        found = jax.grad(spectral_norm)(jnp.asarray(a * size, jnp.float32))
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_of_a_batch_with_named_axes_forward_and_in_reverse(x64):
    rng = np.random.default_rng(0)
    a, da = (jnp.asarray(rng.normal(size=(20, 3, 25))) for _ in range(2))
    norms = lambda a: spectral_norm(a, MuonDimensionNumbers(0, 2), num_iters=300)  # noqa: E731
    expected = np.zeros(3)
    for i in range(3):
        u, _, v = np.linalg.svd(a[:, i])
        expected[i] = u[:, 0] @ da[:, i] @ v[0]
    np.testing.assert_allclose(jax.jvp(norms, (a,), (da,))[1], expected, rtol=1e-9)
    (pulled,) = jax.vjp(norms, a)[1](jnp.arange(1.0, 4))
    np.testing.assert_allclose(jnp.sum(pulled * da), np.arange(1, 4) @ expected, rtol=1e-9)


def test_of_a_complex_norm(x64):
    rng = np.random.default_rng(0)
    a, da = (
        jnp.asarray(rng.normal(size=(20, 18)) + 1j * rng.normal(size=(20, 18))) for _ in range(2)
    )
    u, _, vh = np.linalg.svd(a)
    expected = np.real(u[:, 0].conj() @ da @ vh[0].conj())
    found = jax.jvp(lambda a: spectral_norm(a, num_iters=300), (a,), (da,))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (20, 30)])
def test_of_a_zero_matrix_is_zero(shape):
    np.testing.assert_array_equal(jax.grad(spectral_norm)(jnp.zeros(shape)), np.zeros(shape))


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.hessian(lambda a: spectral_norm(a.reshape(5, 4)))(jnp.arange(20.0))


PARAMS = {
    "matrix": (20, 30),
    "short": (6, 5),
    "bias": (7,),
    "frozen": (20, 30),
}


def loss_after(make, settings, params, grads):
    """The loss after three steps, as a function of what is learned about the optimizer."""
    solver = make(**settings)
    state = solver.init(params)
    for _ in range(3):
        updates, state = solver.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return sum(jnp.sum(jnp.sin(p)) for p in params.values())


def bounded_sgd(learning_rate, tau):
    return optax.chain(optax.sgd(learning_rate), scale_by_weyl_bound(tau))


def smooth_adamw2(learning_rate, tau):
    """Without an `eps_root`, the derivative of Adam itself is NaN at a zero gradient."""
    return adamw2(learning_rate, tau=tau, eps_root=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [smooth_adamw2, bounded_sgd])
@pytest.mark.parametrize("tau", [0.01, 1.0])  # bounded, and not
def test_through_an_update_equals_finite_differences(x64, make, tau):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in PARAMS.items()}
    grads = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in PARAMS.items()}
    grads["frozen"] = jnp.zeros(PARAMS["frozen"])

    def loss(learning_rate, tau, size):
        scaled = {name: g * size for name, g in grads.items()}
        return loss_after(make, {"learning_rate": learning_rate, "tau": tau}, params, scaled)

    point = (0.02, tau, 1.0)
    found = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, point))
    for i, derivative in enumerate(found):
        step = 1e-6 * point[i]
        high, low = (
            loss(*(x + sign * step * (i == j) for j, x in enumerate(point))) for sign in (1, -1)
        )
        expected = (high - low) / (2 * step)
        np.testing.assert_allclose(derivative, expected, rtol=2e-2, atol=1e-6)


@pytest.mark.slow
def test_through_an_update_with_a_zero_gradient_is_finite():
    """As it is through adamw, with an eps_root."""
    params = {name: jnp.ones(shape) for name, shape in PARAMS.items()}

    def loss(learning_rate, make):
        grads = jax.tree.map(jnp.zeros_like, params)
        settings = {"learning_rate": learning_rate, "eps_root": 1e-8}
        return loss_after(make, settings, params, grads)

    for make in (optax.adamw, adamw2):
        assert np.isfinite(jax.grad(loss)(0.1, make))
