from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from examples.paper import disturbances

STEPS = 40


class Run:
    """Records what it is trained with."""

    rates = jnp.arange(STEPS, dtype=jnp.float32)

    def __init__(self, calls, name, settings):
        self.calls, self.of = calls, (name, settings)

    def start(self, params):
        return params, "fresh"

    def train(self, state, batches, rates=None):
        self.calls.append((self.of, state, np.array(batches), rates))
        return (("trained", state[0]), "used"), np.full(len(batches), 2.0), 1.0


@pytest.fixture
def disturbed():
    calls = []
    made = disturbances.Disturbed.__new__(disturbances.Disturbed)
    made._half, made.calls = STEPS // 2, calls
    made._trainer, made._later = (
        SimpleNamespace(
            run=lambda name, settings: Run(calls, name, settings),
            params=lambda seed: f"params {seed}",
            batches=lambda seed, n=number: [np.full((2, 9), 1000 + i) for i in range(n)],
            evaluate=lambda state, batches: (state, batches),
            problem=SimpleNamespace(test=test),
        )
        for number, test in ((STEPS, "test"), (STEPS // 2, "other"))
    )
    return made


def test_a_restart_has_a_fresh_state_and_the_rates_go_on(disturbed):
    for settings in ({"learning_rate": 1.0}, {"learning_rate": 1.0, "warmup": 8}):
        line = disturbed.restart("adamw", settings, 3)
        (_, first, before, rates), (_, second, after, later) = disturbed.calls[-2:]
        assert (first, rates) == (("params 3", "fresh"), None)
        assert second == (("trained", "params 3"), "fresh")
        np.testing.assert_array_equal(before[:, 0, 0], 1000 + np.arange(20))
        np.testing.assert_array_equal(after[:, 0, 0], 1020 + np.arange(20))
        expected = np.arange(20.0, 40.0)
        if "warmup" in settings:
            expected[:4] *= [0, 0.25, 0.5, 0.75]
        np.testing.assert_allclose(later[:20], expected)
        assert line["test_loss"][1] == "test"


def test_half_of_a_warmup_of_one_step_is_one_step(disturbed):
    disturbed.restart("adamw", {"learning_rate": 1.0, "warmup": 1}, 3)
    np.testing.assert_allclose(disturbed.calls[-1][3][:4], [0, 21, 22, 23])


def test_garbage_is_ten_batches_in_the_middle(disturbed):
    disturbed.garbage("adamw", {"learning_rate": 1.0}, 3)
    batches = disturbed.calls[-1][2]
    is_garbage = (batches < 256).all((1, 2))
    np.testing.assert_array_equal(np.flatnonzero(is_garbage), 20 + np.arange(10))
    assert len(np.unique(batches[is_garbage])) > 50


def test_ten_times_the_rate_is_that(disturbed):
    disturbed.ten_times_the_rate("adamw", {"learning_rate": 0.02, "b2": 0.9}, 3)
    assert disturbed.calls[-1][0] == ("adamw", {"learning_rate": 0.2, "b2": 0.9})


def test_another_text_begins_with_what_was_trained(disturbed):
    line = disturbed.another_text("adamw", {"learning_rate": 1.0, "warmup": 30}, 3)
    (_, _, whole, _), (of, state, half, rates) = disturbed.calls
    assert of == ("adamw", {"learning_rate": 1.0, "warmup": 15})
    assert (len(whole), len(half), rates) == (40, 20, None)
    assert state == (("trained", "params 3"), "fresh")
    assert line["test_loss"][1] == "other"
