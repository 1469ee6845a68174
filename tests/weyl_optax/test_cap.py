"""The cap on the leading singular values of an update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, scale_by_weyl_bound

RANK = 8


def cap(rank=RANK, numbers=None):
    """The cap alone, of an update with params of its shapes."""
    solver = scale_by_weyl_bound(jnp.inf, cap_rank=rank, weight_dimension_numbers=numbers)

    def update(updates, state):
        return solver.update(updates, state, jax.tree.map(jnp.ones_like, updates))

    return optax.GradientTransformation(solver.init, update)


def with_values(seed, shape, values):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in shape)
    return jnp.asarray(u * values @ v.T, jnp.float32)


def capped(u, rank=RANK):
    """By an exact SVD in float64."""
    left, sigma, right = np.linalg.svd(np.float64(u), full_matrices=False)
    return left * np.minimum(sigma, sigma[..., rank - 1 : rank])[..., None, :] @ right


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_equals_the_exact_cap(shape, size):
    u = with_values(0, shape, np.geomspace(50, 1, 40))
    solver = cap()
    state = solver.init({"w": u})
    update = jax.jit(solver.update)
    for _ in range(3):
        found, state = update({"w": size * u}, state)
        np.testing.assert_allclose(found["w"] / size, capped(u), atol=2e-4)
    norm = np.linalg.norm(capped(u), 2)
    np.testing.assert_allclose(state.sigma_update["w"] / size, norm, rtol=0.02)


@pytest.mark.parametrize(
    ("reduction", "output"),
    [((1,), (2, 3)), ((1, 2), (3,)), ((0,), (2,)), ((2, 3), (1,)), ((0, 1, 2), (3,))],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_of_every_reading_and_dtype(reduction, output, dtype):
    rng = np.random.default_rng(0)
    u = rng.normal(size=(20, 20, 20, 20)) * np.geomspace(1, 10, 20)
    if dtype == jnp.complex64:
        u = u + 1j * rng.normal(size=u.shape)
    u = jnp.asarray(u, dtype)
    solver = cap(2, MuonDimensionNumbers(reduction, output))
    found, _ = jax.jit(solver.update)(u, solver.init(u))
    assert found.dtype == dtype
    u, found = (
        reference.as_matrices(np.asarray(x.astype(jnp.complex64), np.complex128), reduction, output)
        for x in (u, found)
    )
    tolerance = 0.02 if dtype == jnp.bfloat16 else 2e-3
    left, values, right = np.linalg.svd(u, full_matrices=False)
    wanted = (left * np.minimum(values, values[..., 1:2])[..., None, :]) @ right
    np.testing.assert_allclose(found, wanted, atol=tolerance * values.max())


def test_a_drifting_update_is_capped_by_one_iteration_a_step():
    u = np.asarray(with_values(0, (60, 40), np.geomspace(50, 1, 40)))
    rng = np.random.default_rng(1)
    solver = cap()
    state = solver.init({"w": jnp.asarray(u)})
    for _ in range(20):
        u = u + 0.05 * rng.normal(size=u.shape)
        found, state = solver.update({"w": jnp.asarray(u, jnp.float32)}, state)
        level = np.linalg.svd(u, compute_uv=False)[RANK - 1]
        assert np.linalg.norm(np.float64(found["w"]), 2) < 1.01 * level


def test_what_is_left_as_it_is():
    updates = {"vector": jnp.ones(40), "short": jnp.ones((16, 40)), "out": jnp.ones((40, 40))}
    solver = cap(RANK, {"vector": None, "short": MuonDimensionNumbers(0, 1), "out": None})
    found, state = solver.update(updates, solver.init(updates))
    for name, u in updates.items():
        np.testing.assert_array_equal(found[name], u)
    assert not jax.tree.leaves(state.update_block)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_low_rank_is_lowered_a_hundredfold_at_most(rank):
    u = with_values(0, (60, 40), np.geomspace(50, 10, rank)) if rank else jnp.zeros((60, 40))
    solver = cap()
    found, _ = solver.update({"w": u}, solver.init({"w": u}))
    if rank < 2:
        np.testing.assert_allclose(found["w"], 0.01 * u, atol=1e-3)
    largest = np.linalg.norm(np.float64(found["w"]), 2)
    np.testing.assert_allclose(largest, 0.5 if rank else 0, rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_nan_and_forgotten(bad):
    good = jnp.stack([with_values(i, (60, 40), np.geomspace(50, 1, 40)) for i in range(2)])
    solver = cap(RANK, MuonDimensionNumbers(1, 2))
    _, state = solver.update(good, solver.init(good))
    found, after = solver.update(good.at[1, 3, 4].set(bad), state)
    np.testing.assert_array_equal(found[1], jnp.zeros((60, 40)).at[3, 4].set(np.nan))
    np.testing.assert_allclose(found[0], capped(good[0]), atol=2e-4)
    np.testing.assert_array_equal(after.update_block[1], state.update_block[1])
    found, _ = solver.update(good, after)
    np.testing.assert_allclose(found, capped(good), atol=2e-4)


def test_a_few_directions_no_longer_set_the_step():
    u = {"w": with_values(0, (60, 40), np.r_[np.full(2, 100.0), np.full(38, 1.0)])}
    params = {"w": 0.02 * jnp.ones((60, 40))}
    steps = []
    for rank in (None, RANK):
        solver = scale_by_weyl_bound(0.01, cap_rank=rank)
        found, _ = solver.update(u, solver.init(params), params)
        steps.append(np.linalg.svd(np.float64(found["w"]), compute_uv=False))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=0.05)  # as much as the bound allows
    assert steps[1][-1] > 90 * steps[0][-1]


def test_the_norm_is_that_of_the_capped_update():
    """Also where the block lags behind, so that this norm is far above the level."""
    rng = np.random.default_rng(0)
    u = np.asarray(
        with_values(0, (96, 64), np.r_[np.geomspace(1000, 20, 8), np.linspace(15, 1, 56)])
    )
    turn = np.linalg.qr(np.eye(64) + 0.2 * rng.normal(size=(64, 64)))[0]
    solver = cap()
    state, update = solver.init(jnp.asarray(u)), jax.jit(solver.update)
    for step in range(30):
        u = u @ turn
        found, state = update(jnp.asarray(u, jnp.float32), state)
        norm = np.linalg.norm(np.float64(found), 2)
        assert 0.93 * norm < state.sigma_update < 1.15 * norm
        assert step < 5 or norm > 1.2 * 20


def test_adamw2_takes_a_rank_and_a_mask():
    params = {"w": jnp.ones((40, 30)), "embedding": jnp.ones((40, 30)), "b": jnp.ones(30)}
    mask = {"w": True, "embedding": False, "b": False}
    solver = adamw2(0.1, cap_rank=4, cap_mask=mask)
    state = solver.init(params)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    _, state = jax.jit(solver.update)(grads, state, params)
    shapes = jax.tree.map(jnp.shape, optax.tree.get(state, "update_block"))
    assert shapes == {"w": (12, 30), "embedding": (8, 30), "b": None}
    plain = adamw2(0.1)
    adam, _ = plain.update(grads, plain.init(params), params)
    found, _ = solver.update(grads, solver.init(params), params)
    np.testing.assert_array_equal(found["embedding"], adam["embedding"])


def test_under_inject_hyperparams():
    params = {"w": jnp.ones((40, 30))}
    make = optax.inject_hyperparams(adamw2, static_args=("cap_rank",))
    solver = make(0.1, cap_rank=4)
    solver.update(params, solver.init(params), params)
    with pytest.raises(ValueError, match=r'static_args=\("cap_rank", "cap_mask"\)'):
        optax.inject_hyperparams(adamw2)(0.1, cap_rank=4).init(params)


@pytest.mark.parametrize("rank", [0, 1, -1, 2.5, True])
def test_a_wrong_rank(rank):
    with pytest.raises(ValueError, match="cap_rank must be None or a Python int of at least 2"):
        scale_by_weyl_bound(cap_rank=rank)


def test_a_mask_is_a_tree_a_prefix_or_a_function():
    params = {"a": {"w": jnp.ones((40, 30)), "v": jnp.ones((40, 30))}, "b": jnp.ones((40, 30))}
    whole = {"a": {"w": True, "v": True}, "b": False}
    for mask in (whole, {"a": True, "b": False}, lambda params: whole):
        state = scale_by_weyl_bound(cap_rank=4, cap_mask=mask).init(params)
        sizes = jax.tree.map(lambda x: x.shape[0], state.update_block)
        assert sizes == {"a": {"w": 12, "v": 12}, "b": 8}
    all_of_them = scale_by_weyl_bound(cap_rank=4).init(params)
    assert {x.shape[0] for x in jax.tree.leaves(all_of_them.update_block)} == {12}
    with pytest.raises(ValueError, match="cap_mask does not fit the params"):
        scale_by_weyl_bound(cap_rank=4, cap_mask={"a": True}).init(params)


def test_a_derivative_is_an_error_and_not_a_wrong_number():
    u = with_values(0, (60, 40), np.geomspace(50, 1, 40))
    solver = cap()
    state = solver.init(u)
    with pytest.raises(NotImplementedError, match="A spectral cap has no derivative"):
        jax.grad(lambda u: jnp.sum(solver.update(u, state)[0]))(u)


def test_the_cap_alone_moves_a_weight_of_zeros():
    params = {"w": jnp.zeros((40, 30)), "b": jnp.zeros(30)}
    u = {"w": with_values(0, (40, 30), np.geomspace(50, 1, 30)), "b": jnp.ones(30)}
    solver = scale_by_weyl_bound(jnp.inf, min_std=0, cap_rank=RANK)
    found, _ = solver.update(u, solver.init(params), params)
    np.testing.assert_allclose(found["w"], capped(u["w"]), atol=2e-4)
    np.testing.assert_array_equal(found["b"], u["b"])
