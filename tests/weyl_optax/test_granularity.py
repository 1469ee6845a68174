import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from weyl_optax import adamw2, bound_metrics, by_head, by_unit, scale_by_weyl_bound, tabulate
from weyl_optax.flax import dimension_numbers

rule_1 = functools.partial(scale_by_weyl_bound, growth="exponential")

TAU = 0.1


def moved(numbers, params, updates):
    """The params after one bounded step, in float64."""
    bound = rule_1(TAU, weight_dimension_numbers=numbers)
    bounded, _ = bound.update(updates, bound.init(params), params)
    return jax.tree.map(lambda w, u: np.float64(w) + np.float64(u), params, bounded)


@pytest.fixture
def attention():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"query": (12, 3, 20), "out": (3, 20, 12), "bias": (3, 20)}
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    # The heads, and the units, want steps of very different sizes.
    sizes = jnp.array([1.0, 10.0, 1e-3])
    updates = {
        "query": 50 * jax.random.normal(next(keys), (12, 3, 20)) * sizes[:, None],
        "out": 50 * jax.random.normal(next(keys), (3, 20, 12)) * sizes[:, None, None],
        "bias": 50 * jax.random.normal(next(keys), (3, 20)) * sizes[:, None],
    }
    numbers = {
        "query": MuonDimensionNumbers(0, (1, 2)),
        "out": MuonDimensionNumbers((-3, -2), -1),
        "bias": MuonDimensionNumbers((), (0, 1)),
    }
    return params, updates, numbers


def test_units_are_the_columns_and_each_moves_by_at_most_tau_of_its_own_norm(attention):
    params, updates, numbers = attention
    after = moved(by_unit(numbers), params, updates)
    for name, axes in (("query", 0), ("out", (0, 1)), ("bias", (0, 1))):
        w, u = np.float64(params[name]), np.float64(updates[name])
        norms = [np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (w, u)]
        expected = w + u * np.minimum(1, TAU * norms[0] / norms[1])
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6)


def test_heads_are_matrices_and_each_grows_by_at_most_tau(attention):
    params, updates, numbers = attention
    after = moved(by_head(numbers, "*"), params, updates)
    for name, head in (("query", 1), ("out", 0), ("bias", 0)):
        for i in range(3):
            w, u, found = (
                np.take(np.float64(tree[name]), i, axis=head) for tree in (params, updates, after)
            )
            sigma = [np.linalg.norm(x, 2) for x in (w, u)]
            expected = w + u * min(1, TAU * sigma[0] / sigma[1])
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_units_do_not_guarantee_is_as_much_as_the_docstring_says():
    """Units that all move alike: the spectral norm grows by tau |W|_F / |W|_2."""
    w, u = jnp.eye(9), jnp.ones((9, 9)) * 100
    after = moved(by_unit(), w, u)
    growth = np.linalg.norm(after, 2) / np.linalg.norm(w, 2) - 1
    assert TAU < growth <= TAU * np.linalg.norm(w) / np.linalg.norm(w, 2) * (1 + 1e-6)
    np.testing.assert_allclose(growth, 3 * TAU, rtol=1e-5)


def test_units_grow_linearly_from_the_usual_size_of_a_column_on():
    w = 0.02 * jax.random.normal(jax.random.key(0), (64, 9))
    bound = scale_by_weyl_bound(TAU, weight_dimension_numbers=by_unit())
    state, update = bound.init(w), jax.jit(bound.update)
    most = TAU * 0.02 * (8 + 1)  # of an (m, 1) Gaussian matrix
    for _ in range(60):
        before = np.linalg.norm(w, axis=0)
        updates, state = update(1e3 * w, state, w)
        w = w + updates
        expected = before + np.minimum(TAU * before, most)
        np.testing.assert_allclose(np.linalg.norm(w, axis=0), expected, rtol=1e-5)


def test_a_function_that_is_injected_as_a_schedule_is_an_error():
    params = {"w": jnp.ones((8, 12))}
    solver = optax.inject_hyperparams(adamw2)(0.1, weight_dimension_numbers=by_unit())
    with pytest.raises(ValueError, match=r'static_args=\("weight_dimension_numbers",\)'):
        solver.init(params)
    make = optax.inject_hyperparams(adamw2, static_args=("weight_dimension_numbers",))
    solver = make(0.1, weight_dimension_numbers=by_unit())
    _, state = solver.update(params, solver.init(params), params)
    assert bound_metrics(state)["w/scale"].shape == (12,)


def test_specifications_of_every_kind_are_refined():
    tree = {"a": MuonDimensionNumbers(0, 1), "b": None, "c": MuonDimensionNumbers((), 0)}
    units = {"a": MuonDimensionNumbers(0, ()), "b": None, "c": MuonDimensionNumbers((), 0)}
    assert by_unit(tree) == units
    assert by_unit(lambda params: tree)(None) == units
    masked = tree | {"d": optax.MaskedNode()}
    assert by_unit(masked) == units | {"d": optax.MaskedNode()}
    assert by_unit(MuonDimensionNumbers(0, 1)) == MuonDimensionNumbers(0, ())
    params = {"a": jnp.ones((3, 4, 5)), "c": jnp.ones(2), "n": jnp.arange(3)}
    assert tabulate(params, by_unit()) == (
        "path  shape      read as\n"
        "a     (3, 4, 5)  15 vectors of 4\n"
        "c     (2,)       1 vector of 2\n"
        "n     (3,)       unbounded"
    )
    heads = {
        "attn": {"q": MuonDimensionNumbers(0, (1, 2))},
        "conv": MuonDimensionNumbers((0, 1), 2),
    }
    finer = {"attn": {"q": MuonDimensionNumbers((0,), (2,))}, "conv": heads["conv"]}
    assert by_head(heads) == finer
    assert by_head(heads | {"d": optax.MaskedNode()}, "*attn*") == finer | {"d": optax.MaskedNode()}
    assert by_head(lambda params: heads)(None) == finer


def test_heads_of_a_flax_model_and_none_where_there_are_none():
    model = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    numbers = dimension_numbers(nnx.MultiHeadAttention.__call__, model, jnp.ones((2, 5, 16)))
    table = tabulate(params, by_head(numbers))
    assert table.count("4 matrices of 16 x 4") == 3
    assert "4 matrices of 4 x 16" in table
    assert table.count("4 vectors of 4") == 3
    with pytest.raises(ValueError, match=r"no leaf with an axis of heads at the paths .*attn"):
        by_head({"w": MuonDimensionNumbers(0, (1, 2))})
    with pytest.raises(ValueError, match="no leaf with an axis of heads"):
        by_head({"attn": MuonDimensionNumbers(0, 1)})


def test_a_function_that_leaves_its_one_leaf_unbounded_leaves_it_so():
    numbers = by_unit(lambda params: None)
    assert numbers(jnp.ones((4, 3))) is None
    solver = scale_by_weyl_bound(1e-9, weight_dimension_numbers=numbers)
    updates, _ = solver.update(jnp.ones((4, 3)), solver.init(jnp.ones((4, 3))), jnp.ones((4, 3)))
    np.testing.assert_array_equal(updates, jnp.ones((4, 3)))
