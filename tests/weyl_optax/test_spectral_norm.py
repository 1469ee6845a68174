import functools
import string

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from optax.contrib import MuonDimensionNumbers

from weyl_optax import scale_by_weyl_bound, spectral_norm
from weyl_optax._norms.orthogonal_iteration import Labels
from weyl_optax._reading.specification import resolve_dimension_numbers


@st.composite
def leaves(draw):
    """A shape of rank 0 to 4, and its axes dealt out to batch, reduction and output."""
    shape = draw(st.lists(st.sampled_from([1, 2, 5, 18]), min_size=0, max_size=4))
    roles = draw(st.lists(st.sampled_from("bro"), min_size=len(shape), max_size=len(shape)))
    axes = {role: [i for i, r in enumerate(roles) if r == role] for role in "ro"}
    order = {role: tuple(draw(st.permutations(axes[role]))) for role in "ro"}
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32", "complex64"]))
    seed = draw(st.integers(0, 2**16))
    return tuple(shape), order["r"], order["o"], dtype, seed


@given(leaves())
@settings(max_examples=60, deadline=None)
def test_equals_the_exact_norm_for_any_shape_axes_and_dtype(leaf):
    shape, reduction, output, dtype, seed = leaf
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0)
    x = jnp.asarray(x, dtype)
    found = spectral_norm(x, MuonDimensionNumbers(reduction, output), num_iters=40)
    kept = np.asarray(x.astype(jnp.complex64), np.complex128)
    exact = reference.sigma(kept, reduction, output).squeeze((*reduction, *output))
    assert found.shape == exact.shape
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=2e-4)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_rank_deficient_matrices(rank):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 40))
    found = spectral_norm(jnp.asarray(x, jnp.float32), num_iters=60)
    np.testing.assert_allclose(found, np.linalg.norm(x, 2), rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("side", [1000, 4096, 100_000])
def test_matrices_of_few_directions_whose_sums_all_round_alike(rank, side):
    """The Gram matrix of their images has eigenvalues of zero, which rounding makes negative."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.choice([-1, 1], size=(side, rank)) @ rng.normal(size=(rank, 40)))
    for transposed in (x, x.T):
        found = spectral_norm(transposed, num_iters=16)
        np.testing.assert_allclose(found, np.linalg.norm(np.float64(x), 2), rtol=5e-3)


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e12])
def test_ill_conditioned_matrices(condition):
    rng = np.random.default_rng(0)
    q1, q2 = np.linalg.qr(rng.normal(size=(2, 50, 50)))[0]
    x = q1 * np.geomspace(1, 1 / condition, 50) @ q2.T
    found = spectral_norm(jnp.asarray(x, jnp.float32), num_iters=40)
    np.testing.assert_allclose(found, 1, rtol=1e-5)


@given(st.integers(0, 2**16), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_is_never_above_the_exact_norm(seed, num_iters):
    x = np.random.default_rng(seed).normal(size=(70, 50)).astype(np.float32)
    assert spectral_norm(jnp.asarray(x), num_iters=num_iters) <= np.linalg.norm(x, 2) * (1 + 1e-5)


def test_no_iteration_is_an_error():
    with pytest.raises(ValueError, match="num_iters must be at least 1, got 0"):
        spectral_norm(jnp.eye(3), num_iters=0)


def test_gives_none_for_a_leaf_with_nothing_to_measure():
    tree = {"w": jnp.eye(3), "steps": jnp.arange(3), "empty": jnp.ones((0, 3))}
    norms = spectral_norm(tree)
    np.testing.assert_allclose(norms["w"], 1, rtol=1e-6)
    assert norms["steps"] is None
    assert norms["empty"] is None


@pytest.mark.parametrize(
    ("shape", "reduction", "output"),
    [
        ((12, 768, 12, 64), (1,), (2, 3)),
        ((12, 12, 64, 768), (1, 2), (3,)),
        ((12, 768, 3072), (1,), (2,)),
        ((12, 3072, 768), (1,), (2,)),
        ((3, 3, 64, 128), (0, 1, 2), (3,)),
    ],
)
def test_neither_product_transposes_or_reshapes_a_weight(shape, reduction, output):
    numbers = MuonDimensionNumbers(reduction, output)
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = Labels.of(resolve_dimension_numbers(w, numbers))
    sizes = dict(zip(string.ascii_lowercase, shape, strict=False), y=8)
    block, image = (
        jax.ShapeDtypeStruct(tuple(sizes[x] for x in side), jnp.float32)
        for side in (labels.block, labels.image)
    )
    products = (
        (f"{labels.leaf},{labels.block}->{labels.image}", (w, block)),
        (f"{labels.image},{labels.leaf}->{labels.block}", (image, w)),
    )
    for expression, operands in products:
        jaxpr = jax.make_jaxpr(lambda a, b, e=expression: jnp.einsum(e, a, b))(*operands)
        assert [eqn.primitive.name for eqn in _flat(jaxpr.jaxpr)] == ["dot_general"], jaxpr


def _flat(jaxpr):
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if inner is None:
            yield eqn
        else:
            yield from _flat(inner.jaxpr)


@pytest.mark.parametrize("side", [2, 16])
def test_a_short_side_is_exact_in_one_iteration(side):
    x = np.random.default_rng(0).normal(size=(3, side, 70)).astype(np.float32)
    for a in (x, x.swapaxes(1, 2)):
        found = spectral_norm(jnp.asarray(a), num_iters=1)
        np.testing.assert_allclose(found, np.linalg.norm(np.float64(a), 2, axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_layers_alike_are_traced_and_lowered_once(platform):
    def lowered(num_layers):
        layer = {"w": jnp.ones((24, 20)), "short": jnp.ones((12, 20)), "b": jnp.ones(20)}
        tree = {f"layer{i}": layer for i in range(num_layers)}
        solver = scale_by_weyl_bound()
        traced = jax.jit(solver.update).trace(tree, solver.init(tree), tree)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    one, five = lowered(1), lowered(5)
    for operation in ("stablehlo.dot_general", "stablehlo.while", "stablehlo.reduce"):
        assert one.count(operation) == five.count(operation)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_small_problems_of_all_layers_are_solved_at_once(platform):
    """In batches; a CPU is given one matrix at a time."""
    tree = {str(i): jnp.ones((24, i + 20)) for i in range(5)}
    solver = scale_by_weyl_bound()
    traced = jax.jit(solver.update).trace(tree, solver.init(tree), tree)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("tensor<10x9x9xf32>") > 0


def test_a_norm_that_the_dtype_has_not_is_infinite_and_takes_no_step():
    u = 3e37 * np.sign(np.random.default_rng(0).normal(size=(17, 300))).astype(np.float32)
    assert np.isinf(spectral_norm(u))  # 2e39
    params = jnp.ones((17, 300))
    bounded, _ = scale_by_weyl_bound().update(u, scale_by_weyl_bound().init(params), params)
    np.testing.assert_array_equal(bounded, np.zeros_like(u))


def test_layers_apart_have_the_norms_of_their_own_matrices():
    rng = np.random.default_rng(0)
    layers = {
        f"layer{i}": {"w": 10.0 ** (8 * i) * rng.normal(size=(2, 40, 30)), "v": rng.normal(size=30)}
        for i in range(-2, 3)
    }
    found = spectral_norm(jax.tree.map(jnp.float32, layers), num_iters=200)
    exact = jax.tree.map(
        lambda x: np.linalg.norm(x, 2, axis=(-2, -1) if x.ndim > 1 else -1), layers
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, exact)
