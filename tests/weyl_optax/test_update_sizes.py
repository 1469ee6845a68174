"""The length and the angle of an update, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from weyl_optax.dynamics import update_sizes

NUMBERS = {
    "stack": MuonDimensionNumbers(1, 2),
    "query": MuonDimensionNumbers(0, (1, 2)),
    "bias": MuonDimensionNumbers((), 0),
    "free": None,
}
SHAPES = {"stack": (3, 8, 6), "query": (8, 2, 5), "bias": (7,), "free": (4, 4)}
AXES = {
    "matrix": {"stack": (1, 2), "query": (0, 1, 2), "bias": (0,)},
    "unit": {"stack": (1,), "query": (0,), "bias": (0,)},
}


@pytest.mark.parametrize("per", AXES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e25])
def test_update_sizes_are_those_of_the_definition(per, size):
    rng = np.random.default_rng(0)
    params, updates = (
        {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
        for scale in (1, size)
    )
    found = update_sizes(
        {k: np.float32(v) for k, v in updates.items()},
        {k: np.float32(v) for k, v in params.items()},
        NUMBERS,
        per=per,
    )
    names = {f"{name}/{kind}" for name in AXES[per] for kind in ("l2", "angle")}
    assert set(found) == names
    for name, axes in AXES[per].items():
        w, u = params[name], updates[name]
        new = w + u
        norm = lambda x, axes=axes: np.sqrt(np.sum(x * x, axis=axes))  # noqa: E731
        np.testing.assert_allclose(found[f"{name}/l2"], norm(u), rtol=1e-5)
        chord = new / np.expand_dims(norm(new), axes) - w / np.expand_dims(norm(w), axes)
        angle = 2 * np.arcsin(norm(chord) / 2)
        np.testing.assert_allclose(found[f"{name}/angle"], angle, rtol=1e-4)


def test_the_angle_of_a_step_that_rounding_would_hide():
    w, u = (np.random.default_rng(i).normal(size=(5, 3)) for i in range(2))
    found = update_sizes({"w": np.float32(1e-25 * u)}, {"w": np.float32(w)})
    across = u - np.sum(u * w) / np.sum(w * w) * w
    np.testing.assert_allclose(found["w/l2"], 1e-25 * np.linalg.norm(u), rtol=1e-5)
    expected = 1e-25 * np.linalg.norm(across) / np.linalg.norm(w)
    np.testing.assert_allclose(found["w/angle"], expected, rtol=1e-5)


def test_a_weight_of_zeros_has_no_angle_and_a_reversed_one_a_half_turn():
    zero = update_sizes(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))
    assert [float(x) for x in zero.values()] == [2.0, 0.0]
    w = np.ones((2, 2), np.float32)
    _, angle = update_sizes(-3 * w, w).values()
    np.testing.assert_allclose(angle, np.pi, rtol=1e-6)
    with pytest.raises(ValueError, match="per must be one of"):
        update_sizes(w, w, per="row")


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32")])
def test_low_precision_does_not_overflow_or_promote(dtypes):
    """A sum of 1,000 products of 80 and 80 is above the largest number of float16."""
    u, w = (np.zeros((1000, 2)), np.full((1000, 2), 80.0))
    u[:500] = 80.0
    u, w = (jnp.asarray(x, dtype) for x, dtype in zip((u, w), dtypes, strict=True))
    with jax.numpy_dtype_promotion("strict"):
        found = update_sizes({"w": u}, {"w": w}, per="unit")
    # (2, 1) against (1, 1), each half of the vector.
    np.testing.assert_allclose(found["w/angle"], np.arccos(3 / np.sqrt(10)), rtol=1e-5)
    np.testing.assert_allclose(found["w/l2"], 80 * np.sqrt(500), rtol=1e-5)
