"""The small problems, against LAPACK in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from weyl_optax._jacobi import eigh
from weyl_optax._rayleigh_ritz import rayleigh_ritz

SPECTRA = {
    "random": lambda rng, n: rng.random(n),
    "signs": lambda rng, n: rng.normal(size=n),
    "graded": lambda rng, n: 10 ** rng.uniform(-8, 0, n),
    "equal": lambda rng, n: np.ones(n),
    "nearly equal": lambda rng, n: 1 + 1e-3 * rng.random(n),
    "rank one": lambda rng, n: np.eye(n)[0],
    "zero": lambda rng, n: np.zeros(n),
    "large": lambda rng, n: 1e30 * rng.random(n),
    "small": lambda rng, n: 1e-30 * rng.random(n),
}


def hermitian(spectrum, n, is_complex, num=20):
    """Matrices (n, n, num) of a spectrum, in float64."""
    rng = np.random.default_rng(n)
    draws = rng.normal(size=(num, n, n)) + 1j * is_complex * rng.normal(size=(num, n, n))
    q = np.linalg.qr(draws if is_complex else draws.real)[0]
    values = np.stack([SPECTRA[spectrum](rng, n) for _ in range(num)])
    return np.einsum("bij,bj,bkj->ikb", q, values, q.conj())


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenvalues_and_eigenvectors(spectrum, n, is_complex):
    a = hermitian(spectrum, n, is_complex)
    exact = np.linalg.eigvalsh(np.moveaxis(a, -1, 0)).T
    values, vectors = eigh(jnp.asarray(a, jnp.complex64 if is_complex else jnp.float32))
    assert values.dtype == jnp.float32
    size = np.abs(exact).max() or 1
    np.testing.assert_allclose(values[-1] / size, exact[-1] / size, rtol=5e-6, atol=1e-6)
    np.testing.assert_allclose(values / size, exact / size, atol=1e-5)
    vectors = np.asarray(vectors, np.complex128)
    gram = np.einsum("ijb,ikb->jkb", vectors.conj(), vectors)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(n)[..., None], gram.shape), atol=5e-6)
    again = np.einsum("ijb,jb,kjb->ikb", vectors, np.asarray(values, float), vectors.conj())
    np.testing.assert_allclose(again / size, a / size, atol=1e-4)


def test_in_float64(x64):
    a = hermitian("random", 16, is_complex=False)
    exact = np.linalg.eigvalsh(np.moveaxis(a, -1, 0)).T
    np.testing.assert_allclose(eigh(jnp.asarray(a))[0], exact, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_largest_norm_on_a_span_and_the_next_block(rank):
    """R of 9 vectors, of which only some are independent."""
    rng = np.random.default_rng(rank)
    a = rng.normal(size=(5, 40, 30))
    r = a @ rng.normal(size=(5, 30, rank)) @ rng.normal(size=(5, rank, 9))
    z = a.swapaxes(1, 2) @ r / 7
    grams = (jnp.asarray(x.swapaxes(1, 2) @ x, jnp.float32) for x in (r, z))
    sigma, rotation, nonzero = rayleigh_ritz(9, jnp.full(5, 7.0), *grams)

    span = np.linalg.svd(r)[0][:, :, :rank]
    image = a.swapaxes(1, 2) @ span
    np.testing.assert_allclose(sigma, np.linalg.norm(image, 2, axis=(1, 2)), rtol=2e-4)
    assert (nonzero.sum(1) == rank).all()
    assert nonzero[:, 9 - rank :].all()
    block = (z @ np.asarray(rotation, float))[:, :, 9 - rank :]
    np.testing.assert_allclose(
        block.swapaxes(1, 2) @ block, np.broadcast_to(np.eye(rank), (5, rank, rank)), atol=2e-3
    )
    np.testing.assert_allclose(
        np.linalg.norm(image.swapaxes(1, 2) @ block[..., -1:], axis=(1, 2)), sigma, rtol=2e-3
    )


def test_what_is_not_finite_is_nan_and_turns_nothing():
    gram = jnp.eye(9)[None].at[0, 0, 0].set(jnp.inf)
    sigma, rotation, nonzero = rayleigh_ritz(9, jnp.ones(1), gram, gram)
    assert jnp.isnan(sigma).all()
    assert not nonzero.any()
    assert jnp.isfinite(rotation).all()
