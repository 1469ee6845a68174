"""The measurements against NumPy float64, and the propositions of the paper by sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from weyl_optax.dynamics import (
    CollapseMode,
    attention_entropy,
    collapse_mode,
    effective_rank,
    product_spectral_norm,
    qk_spectral_norm,
    relative_representation_change,
    spectral_energy_concentration,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def normal(rng):
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def qk_sigmas(query, key):
    """Of the full d x d products, by an exact SVD, (..., heads, d)."""
    product = np.einsum("...dnh,...enh->...nde", np.float64(query), np.float64(key))
    return np.linalg.svd(product, compute_uv=False)


def softmax(p):
    weights = np.exp(p - p.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def with_sigmas(rng, sigmas, d):
    """A d x d matrix with these singular values, and any vectors."""
    left, _ = np.linalg.qr(rng.normal(size=(d, len(sigmas))))
    right, _ = np.linalg.qr(rng.normal(size=(d, len(sigmas))))
    return left * sigmas @ right.T


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e18])
def test_concentration_and_norm_of_qk_are_those_of_the_full_product(scale, normal):
    # Heads of a broad and of a steep spectrum, in a stack of three layers.
    steep = np.geomspace(1, 1e-4, 8)
    query, key = scale * normal(3, 24, 2, 8), scale * normal(3, 24, 2, 8)
    query[:, :, 1] *= steep.astype(np.float32)
    key[:, :, 1] *= steep[::-1].astype(np.float32)
    sigmas = qk_sigmas(query / scale, key / scale)
    energy = np.cumsum(sigmas[..., :8] ** 2, -1) / np.sum(sigmas**2, -1, keepdims=True)
    for s in (1, 3, 8):
        found = spectral_energy_concentration(query, key, s)
        np.testing.assert_allclose(found, energy[..., s - 1], atol=1e-5)
    all_at_once = spectral_energy_concentration(query, key, np.arange(1, 9))
    np.testing.assert_allclose(all_at_once, energy, atol=1e-5)
    if scale < 1e18:  # beyond, the norm itself is out of range
        found = np.float64(qk_spectral_norm(query, key)) / np.float64(scale) ** 2
        expected = sigmas[..., 0] if scale == 1 else np.zeros(())
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_concentration_survives_kernels_whose_large_directions_do_not_meet():
    # From the Gram matrices in float32, the small direction of each would be lost.
    query = np.diag([1.0, 1e-4]).astype(np.float32)[:, None]
    key = np.diag([1e-4, 1.0]).astype(np.float32)[:, None]
    np.testing.assert_allclose(spectral_energy_concentration(query, key, 1), [0.5], atol=1e-6)
    np.testing.assert_allclose(qk_spectral_norm(query, key), [1e-4], rtol=1e-6)


def test_concentration_of_a_product_that_is_zero_is_nan_and_its_norm_zero(normal):
    query, key = np.zeros((4, 1, 2), np.float32), normal(4, 1, 2)
    assert np.isnan(spectral_energy_concentration(query, key, 1)).all()
    assert qk_spectral_norm(query, key) == 0


@pytest.mark.parametrize("shapes", [((2, 24, 6), (2, 6, 20)), ((8, 32), (32, 12))])
def test_norm_of_a_product(shapes, normal):
    first, second = (normal(*shape) for shape in shapes)
    expected = np.linalg.norm(np.float64(first) @ np.float64(second), 2, axis=(-2, -1))
    np.testing.assert_allclose(product_spectral_norm(first, second), expected, rtol=1e-4)


def test_entropy_and_effective_rank(rng):
    weights = softmax(3 * rng.normal(size=(2, 6, 10)))
    np.testing.assert_allclose(
        attention_entropy(weights), scipy.stats.entropy(weights, axis=-1).mean(-1), rtol=1e-5
    )
    sigmas = np.linalg.svd(weights, compute_uv=False)
    np.testing.assert_allclose(
        effective_rank(weights), np.exp(scipy.stats.entropy(sigmas, axis=-1)), rtol=1e-5
    )
    for size in (1e38, 1e-30):
        np.testing.assert_allclose(effective_rank(size * jnp.eye(6)), 6, rtol=1e-5)


def test_modes_of_the_matrices_of_appendix_p(rng):
    n = 16
    low_rank_only = np.full((n, n), 1 / n)
    sparse_only = np.eye(n)
    both = np.zeros((n, n))
    both[:, 3] = 1
    normal_map = softmax(2 * rng.normal(size=(n, n)))
    with_nan = np.where(sparse_only > 0, np.nan, normal_map)
    maps = np.stack([low_rank_only, sparse_only, both, normal_map, with_nan, 0 * both])
    modes = [CollapseMode(int(mode)) for mode in jax.jit(collapse_mode)(maps)]
    assert modes == [
        CollapseMode.LOW_RANK,
        CollapseMode.BENIGN,
        CollapseMode.MALIGNANT,
        CollapseMode.NORMAL,
        CollapseMode.UNDEFINED,
        CollapseMode.UNDEFINED,
    ]


@pytest.mark.parametrize("queries", [2, 4, 5, 12])
def test_modes_of_short_maps(queries):
    both, low_rank_only = np.zeros((queries, 40)), np.full((queries, 40), 1 / 40)
    both[:, 3] = 1
    assert collapse_mode(both) == CollapseMode.MALIGNANT
    assert collapse_mode(low_rank_only) == CollapseMode.LOW_RANK
    assert collapse_mode(np.eye(queries, 40)) == CollapseMode.BENIGN
    assert collapse_mode(both[:1]) == collapse_mode(both[:, 3:4]) == CollapseMode.UNDEFINED


def test_thresholds_of_modes_are_arguments():
    blocks = np.kron(np.eye(4), np.full((4, 4), 1 / 4))  # entropy log 4 of log 16, rank 4 of 16
    found = [
        int(collapse_mode(blocks, sparse_entropy=sparse, low_rank=rank))
        for sparse, rank in ((0.49, 0.24), (0.49, 0.26), (0.51, 0.24), (0.51, 0.26))
    ]
    assert [CollapseMode(mode).name for mode in found] == [
        "NORMAL",
        "LOW_RANK",
        "BENIGN",
        "MALIGNANT",
    ]


def test_relative_representation_change_is_that_of_a_small_step(normal):
    w, x = {"a": normal(6, 5), "b": normal(5, 4)}, normal(3, 6)
    step = {"a": normal(6, 5), "b": normal(5, 4)}

    def network(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"]

    def in_float64(w):
        return np.tanh(np.float64(x) @ w["a"]) @ w["b"]

    small = 1e-6
    moved = in_float64({k: np.float64(w[k]) + small * step[k] for k in w})
    start = in_float64({k: np.float64(w[k]) for k in w})
    expected = np.linalg.norm(moved - start) / np.linalg.norm(start) / small
    found = relative_representation_change(network, w, step, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_relative_representation_change_does_not_overflow(dtype):
    w, x = jnp.full((6, 70), 2, dtype), jnp.ones((50, 6), dtype)  # an output of norm 710
    found = relative_representation_change(lambda w, x: x @ w, w, 0.125 * w, x)
    assert float(found) == pytest.approx(0.125)


def jacobian(p_of, v):
    """The derivative of vec(P) by vec(V), both by columns."""

    def by_columns(matrix):
        return jnp.ravel(matrix, order="F")

    def of_columns(columns):
        return by_columns(p_of(columns.reshape(v.shape, order="F")))

    return jax.jacobian(of_columns)(by_columns(v))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_relative_representation_change_of_a_tiny_and_a_huge_step(size):
    change = relative_representation_change(
        lambda w, x: x @ w, jnp.eye(3), size * jnp.eye(3), jnp.ones((8, 3))
    )
    np.testing.assert_allclose(change, size, rtol=1e-5)


def test_relative_representation_change_of_low_precision_params_and_wide_updates():
    w, x = jnp.eye(3, dtype=jnp.bfloat16), jnp.ones((8, 3), jnp.bfloat16)
    change = relative_representation_change(lambda w, x: x @ w, w, -0.125 * jnp.eye(3), x)
    np.testing.assert_allclose(change, 0.125, rtol=1e-2)


def test_proposition_1(normal):
    """The Jacobians of P = X^T W_q^T W_k X, with the tokens in the columns of X."""
    x, query, key = normal(4, 3), normal(2, 4), normal(2, 4)
    qk, identity = query.T @ key, np.eye(3)

    def transposing(v):
        """K, which takes vec(V) to vec(V^T)."""
        return jacobian(jnp.transpose, v)

    cases = [
        (np.kron(x.T, x.T), lambda v: x.T @ v @ x, qk),
        (
            np.kron(x.T @ qk.T, identity) @ transposing(x) + np.kron(identity, x.T @ qk),
            lambda v: v.T @ qk @ v,
            x,
        ),
        (
            np.kron(x.T @ key.T, x.T) @ transposing(query),
            lambda v: x.T @ v.T @ key @ x,
            query,
        ),
        (np.kron(x.T, x.T @ query.T), lambda v: x.T @ query.T @ v @ x, key),
    ]
    for expected, p_of, v in cases:
        np.testing.assert_allclose(jacobian(p_of, v), expected, atol=1e-5)


def test_tokens_of_low_rank_give_a_jacobian_of_low_rank(normal):
    x = normal(5, 2) @ normal(2, 4)
    of_qk = jacobian(lambda v: x.T @ v @ x, normal(5, 5))
    assert np.linalg.matrix_rank(of_qk) == 2**2


def test_theorem_2_weyl_for_all_singular_values(rng):
    """sigma_{i+j-1}(A + B) <= sigma_i(A) + sigma_j(B)."""
    for _ in range(50):
        a, b = rng.normal(size=(2, 7, 5)) * rng.lognormal(size=(2, 1, 5))
        sums, of_a, of_b = (np.linalg.svd(m, compute_uv=False) for m in (a + b, a, b))
        for i in range(5):
            for j in range(5 - i):
                assert sums[i + j] <= of_a[i] + of_b[j] + 1e-12


def test_logits_of_a_token_with_itself_and_with_another(rng):
    """Propositions 3 and 4: E[x^T W x] = tr W, E[x^T W y] = 0, and their variances."""
    d, samples = 6, 400_000
    w = rng.normal(size=(d, d)) + np.eye(d)
    x, y = rng.normal(size=(2, samples, d))
    own, other = np.sum((x @ w) * x, -1), np.sum((x @ w) * y, -1)
    symmetric = (w + w.T) / 2
    own_variance, other_variance = 2 * np.sum(symmetric**2), np.sum(w**2)
    error = 5 / samples**0.5
    assert abs(own.mean() - np.trace(w)) < error * own_variance**0.5
    assert abs(other.mean()) < error * other_variance**0.5
    np.testing.assert_allclose(own.var(), own_variance, rtol=0.03)
    np.testing.assert_allclose(other.var(), other_variance, rtol=0.03)


def test_theorem_1_concentrated_and_large_spectra_give_malignant_maps(rng):
    """And the same energy spread over all directions does not."""
    d, n, d_q = 32, 48, 32
    found = {"concentrated": [], "spread": []}
    for _ in range(10):
        x = rng.normal(size=(n, 3)) @ rng.normal(size=(3, d)) / 3**0.5  # of low rank
        size = 300 * d**0.5
        concentrated = with_sigmas(rng, size * np.array([1.0, 0.1]), d)
        full = rng.normal(size=(n, d))
        spread = with_sigmas(rng, np.full(d, size / d), d)
        found["concentrated"].append(x @ concentrated @ x.T / d_q**0.5)
        found["spread"].append(full @ spread @ full.T / d_q**0.5)
    modes = {name: collapse_mode(softmax(np.stack(p))) for name, p in found.items()}
    assert (modes["concentrated"] == CollapseMode.MALIGNANT).all()
    assert not (modes["spread"] == CollapseMode.MALIGNANT).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qk_spectral_norm(np.ones((4, 2)), np.ones((4, 2))), r"\(\.\.\., d, heads"),
        (
            lambda: spectral_energy_concentration(np.ones((4, 2, 3)), np.ones((4, 2, 2)), 1),
            r"query has the shape \(4, 2, 3\) and key \(4, 2, 2\)",
        ),
        (
            lambda: spectral_energy_concentration(np.ones((4, 2, 3)), np.ones((4, 2, 3)), 0),
            "s must be at least 1, got 0",
        ),
        (lambda: product_spectral_norm(np.ones((4, 3)), np.ones((4, 3))), r"\(\.\.\., k, n\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
