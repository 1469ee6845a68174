"""The length and the angle of an update, against NumPy."""

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
@pytest.mark.parametrize("size", [1e-4, 1.0])
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


def test_a_weight_of_zeros_has_no_angle_and_a_reversed_one_a_half_turn():
    zero = update_sizes(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))
    assert [float(x) for x in zero.values()] == [2.0, 0.0]
    w = np.ones((2, 2), np.float32)
    _, angle = update_sizes(-3 * w, w).values()
    np.testing.assert_allclose(angle, np.pi, rtol=1e-6)
    with pytest.raises(ValueError, match="per must be one of"):
        update_sizes(w, w, per="row")
