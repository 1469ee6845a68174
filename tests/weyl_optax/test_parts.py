"""Fused leaves, of which each part is bounded by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from weyl_optax import (
    SplitDimensionNumbers,
    WeylBoundState,
    adamw2,
    bound_metrics,
    by_head,
    by_unit,
    scale_by_weyl_bound,
    spectral_norm,
    state_shardings,
    tabulate,
)
from weyl_optax.contrib import keep_norm

TAU = 0.1
# The shape of a leaf, and how it is read.
LEAVES = {
    "equal": ((24, 60), SplitDimensionNumbers(0, 1, 1, (20, 20, 20))),
    "unequal": ((24, 70), SplitDimensionNumbers(0, 1, 1, (40, 20, 10))),
    "stacked": ((3, 24, 70), SplitDimensionNumbers(-2, -1, -1, (40, 20, 10))),
    "heads": ((24, 8, 6), SplitDimensionNumbers(0, (1, 2), 1, (4, 3, 1))),
    "rows": ((60, 24), SplitDimensionNumbers(0, 1, 0, (36, 24))),
    "bias": ((3, 70), SplitDimensionNumbers((), 1, 1, (40, 20, 10))),
}


def leaf(name, seed=0):
    """Parts of other sizes, each with a singular value that stands out."""
    shape, numbers = LEAVES[name]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    reduction = [axis % len(shape) for axis in np.atleast_1d(numbers.reduction_axis).astype(int)]
    output = [axis % len(shape) for axis in np.atleast_1d(numbers.output_axis)]
    if reduction:
        x += 20 * np.ones(shape) * rng.choice([-1, 1], size=shape[-1])
    parts = np.split(x, np.cumsum(numbers.sizes)[:-1], numbers.split_axis)
    parts = [part * 0.1 * 3.0**i for i, part in enumerate(parts)]
    return parts, reduction, output


def fused(parts, name):
    axis = LEAVES[name][1].split_axis
    return {"w": jnp.concatenate([jnp.asarray(x, jnp.float32) for x in parts], axis)}


@pytest.mark.parametrize("name", LEAVES)
def test_each_part_is_bounded_by_its_own_exact_norm(name):
    numbers = LEAVES[name][1]
    weights, reduction, output = leaf(name)
    updates = leaf(name, seed=1)[0][::-1] if name == "equal" else leaf(name, seed=1)[0]
    solver = scale_by_weyl_bound(
        TAU, growth="exponential", min_std=0, weight_dimension_numbers=numbers
    )
    params = fused(weights, name)["w"]
    state = solver.init(params)
    found, state = jax.jit(solver.update)(fused(updates, name)["w"], state, params)
    expected, scales = [], []
    for w, u in zip(weights, updates, strict=True):
        norms = [reference.sigma(x, reduction, output) for x in (w, u)] if reduction else [
            np.linalg.norm(x, axis=-1, keepdims=True) for x in (w, u)
        ]  # fmt: skip
        scales.append(np.minimum(1, TAU * norms[0] / norms[1]))
        expected.append(scales[-1] * u)
    np.testing.assert_allclose(found, fused(expected, name)["w"], rtol=2e-3, atol=1e-6)
    for kept, scale in zip(state.bound_scale, scales, strict=True):
        np.testing.assert_allclose(kept.ravel(), scale.ravel(), rtol=2e-3)


@pytest.mark.parametrize("name", ["equal", "stacked", "heads"])
def test_a_fused_leaf_is_trained_as_its_parts_apart(name):
    shape, numbers = LEAVES[name]
    ends = np.cumsum(numbers.sizes)[:-1]
    weights, *_ = leaf(name)
    whole = fused(weights, name)
    apart = {"w": tuple(jnp.split(whole["w"], ends, numbers.split_axis))}
    entry = MuonDimensionNumbers(numbers.reduction_axis, numbers.output_axis)
    solvers = [
        adamw2(0.1, tau=TAU, weight_dimension_numbers={"w": x}, cap_rank=3)
        for x in (numbers, entry)
    ]
    states = [jax.jit(solver.init)(w) for solver, w in zip(solvers, (whole, apart), strict=True)]
    updates = [jax.jit(solver.update) for solver in solvers]
    for seed in range(3):
        g = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
        of_whole, states[0] = updates[0]({"w": g}, states[0], whole)
        g = {"w": tuple(jnp.split(g, ends, numbers.split_axis))}
        of_parts, states[1] = updates[1](g, states[1], apart)
        together = jnp.concatenate(of_parts["w"], numbers.split_axis)
        np.testing.assert_allclose(of_whole["w"], together, rtol=1e-4, atol=1e-5)
        whole, apart = (
            optax.apply_updates(w, u) for w, u in ((whole, of_whole), (apart, of_parts))
        )
    found, expected = map(bound_metrics, states)
    assert list(found) == list(expected)
    assert "w/0/scale" in found
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-3)


def test_what_units_and_heads_make_of_parts():
    params = {"attention": jnp.ones((24, 8, 6)), "mlp": jnp.ones((24, 60))}
    numbers = {
        "attention": SplitDimensionNumbers(0, (1, 2), 1, (4, 3, 1)),
        "mlp": SplitDimensionNumbers(0, 1, 1, (40, 20)),
    }
    assert by_head(numbers)["attention"] == MuonDimensionNumbers((0,), (2,))
    interleaved = {"attention": SplitDimensionNumbers(0, (1, 2), 2, (3, 3))}
    assert by_head(interleaved)["attention"] == SplitDimensionNumbers((0,), (2,), 2, (3, 3))
    assert by_unit(numbers)["mlp"] == MuonDimensionNumbers(0, ())
    rows = {"mlp": SplitDimensionNumbers(0, 1, 0, (12, 12))}
    assert by_unit(rows)["mlp"] == SplitDimensionNumbers(0, (), 0, (12, 12))
    assert tabulate(params, numbers).splitlines()[1:] == [
        "attention  (24, 8, 6)  1 matrix of 24 x 24, 1 matrix of 24 x 18, 1 matrix of 24 x 6",
        "mlp        (24, 60)    1 matrix of 24 x 40, 1 matrix of 24 x 20",
    ]


def test_norms_and_kept_norms_are_those_of_the_parts():
    weights, *_ = leaf("unequal")
    params, numbers = fused(weights, "unequal"), {"w": LEAVES["unequal"][1]}
    exact = [np.linalg.norm(w, 2) for w in weights]
    np.testing.assert_allclose(spectral_norm(params, numbers)["w"], exact, rtol=1e-4)
    solver = keep_norm(numbers, per="matrix")
    updates, _ = solver.update(params, solver.init(params), params)
    kept = np.split(np.asarray(params["w"] + updates["w"]), [40, 60], 1)
    for before, after in zip(weights, kept, strict=True):
        np.testing.assert_allclose(np.linalg.norm(after), np.linalg.norm(before), rtol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")])
def test_on_a_mesh(axis_type, spec):
    numbers = {"w": SplitDimensionNumbers(0, 1, 1, (40, 20, 20))}
    rng = np.random.default_rng(0)
    w = rng.normal(size=(24, 80)).astype(np.float32) * np.repeat([1, 2, 3], (40, 20, 20))
    solver = adamw2(0.1, tau=TAU, weight_dimension_numbers=numbers, cap_rank=3)
    expected, _ = solver.update({"w": w}, solver.init({"w": w}), {"w": w})
    mesh = jax.make_mesh((2,), ("x",), (axis_type,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
        shardings = state_shardings(solver, params)
        state = jax.jit(solver.init, out_shardings=shardings)(params)
        found, state = jax.jit(solver.update)(params, state, params)
        assert found["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-6)
        assert len(bound_metrics(state)) == 10


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (SplitDimensionNumbers(0, 1, 1, (40, 20)), r"leaf 'w' of shape \(24, 70\).*add up to 70"),
        (SplitDimensionNumbers(0, 1, 1, None), r"leaf 'w' of shape \(24, 70\).*add up to 70"),
        (SplitDimensionNumbers(0, 1, None, (40, 30)), "split_axis must be one of its"),
        (SplitDimensionNumbers(0, 1, 1, (80, -10)), "must be positive"),
        (SplitDimensionNumbers(0, 1, -1, (40, 30)), "written alike"),
        (SplitDimensionNumbers((), 1, 0, (12, 12)), "On a batch axis"),
        (SplitDimensionNumbers(0, 1, 2, (40, 30)), "axis 2 is out of bounds"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        tabulate({"w": jnp.ones((24, 70))}, {"w": numbers})


@pytest.mark.parametrize("name", ["unequal", "bias"])
def test_a_state_of_another_reading_is_refused(name):
    shape, split = LEAVES[name]
    params = {"w": jnp.ones(shape)}
    whole = MuonDimensionNumbers(split.reduction_axis, split.output_axis)
    other = split._replace(sizes=(60, 10))
    for old, new in [(whole, split), (split, whole), (other, split)]:
        old, new = (scale_by_weyl_bound(weight_dimension_numbers={"w": x}) for x in (old, new))
        with pytest.raises(ValueError, match="state was made for another reading"):
            new.update(params, old.init(params), params)


def test_params_are_not_found_in_the_state():
    params = {"w": jnp.ones((24, 70))}
    solver = scale_by_weyl_bound(weight_dimension_numbers={"w": LEAVES["unequal"][1]})
    found = optax.tree.map_params(
        solver, lambda x: "param", solver.init(params), transform_non_params=lambda x: "no"
    )
    assert isinstance(found, WeylBoundState)
    assert "param" not in jax.tree.leaves(found)
