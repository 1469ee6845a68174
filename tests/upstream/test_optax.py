"""The file that is offered to Optax: its own tests, and its numbers beside the library's."""

import doctest
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import weyl_optax
from upstream.optax import _weyl_bound

# As if Optax had it.
sys.modules["optax.contrib._weyl_bound"] = _weyl_bound
setattr(optax.contrib, "_weyl_bound", _weyl_bound)  # noqa: B010
# pytest collects a TestCase that it finds here.
ItsOwnTests = pytest.mark.slow(
    importlib.import_module("upstream.optax._weyl_bound_test").WeylBoundTest
)


def test_its_examples_run(monkeypatch):
    for name in ("adamw2", "scale_by_weyl_bound"):
        monkeypatch.setattr(optax.contrib, name, getattr(_weyl_bound, name), raising=False)
    found = doctest.testmod(_weyl_bound)
    assert found.attempted > 0
    assert found.failed == 0


def test_it_is_small_and_stands_alone():
    files = list(Path(_weyl_bound.__file__).parent.glob("*.py"))
    assert len(files) == 2
    for file in files:
        lines = file.read_text().splitlines()
        assert len(lines) <= 300
        assert max(map(len, lines)) <= 80
        assert "weyl_optax" not in file.read_text()


NUMBERS = {
    "small": MuonDimensionNumbers(0, 1),
    "large": MuonDimensionNumbers(0, 1),
    "heads": MuonDimensionNumbers(1, (2, 3)),  # stacked layers
    "bias": None,
}


def test_its_numbers_are_those_of_the_library():
    rng = np.random.default_rng(0)
    shapes = {"small": (40, 8), "large": (96, 48), "heads": (2, 32, 4, 6), "bias": (8,)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    schedule = optax.cosine_decay_schedule(0.3, 25)
    settings = {
        "learning_rate": schedule,
        "b2": 0.95,
        "weight_decay": 0.1,
        "mask": {"small": True, "large": True, "heads": False, "bias": False},
        "tau": 0.01,
        "min_std": 1e-3,
        "weight_dimension_numbers": NUMBERS,
    }
    of_library = weyl_optax.adamw2(growth="exponential", **settings)
    theirs = _weyl_bound.adamw2(**settings)

    # A gradient with a few directions that stand out, as those of a Transformer have.
    def loss(params):
        targets = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
        return sum(jnp.sum((params[name] - targets[name]) ** 2) for name in params)

    @jax.jit
    def step(carry):
        params, states = carry
        new_params, new_states = [], []
        for optimizer, p, state in zip((of_library, theirs), params, states, strict=True):
            updates, state = optimizer.update(jax.grad(loss)(p), state, p)
            new_params.append(optax.apply_updates(p, updates))
            new_states.append(state)
        return new_params, new_states

    carry = [params, params], [of_library.init(params), theirs.init(params)]
    for _ in range(20):
        before = carry[0]
        carry = step(carry)
        ours, others = (
            jax.tree.map(jnp.subtract, new, old) for new, old in zip(carry[0], before, strict=True)
        )
        # Exact norms, where a side is at most 8, and estimates elsewhere.
        np.testing.assert_allclose(ours["small"], others["small"], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(ours["bias"], others["bias"], rtol=1e-5)
        for name in ("large", "heads"):
            sizes = [np.linalg.norm(x[name]) for x in (ours, others)]
            assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
            difference = np.linalg.norm(ours[name] - others[name])
            assert difference < 0.03 * sizes[0]
