import numpy as np
import pytest

from examples.paper import search

RANGES = {"learning_rate": (1e-3, 1e-1), "b2": (0.9, 0.999), "warmup": (0.02, 0.3)}


def test_trials_are_log_uniform_in_their_ranges():
    drawn = search.draw(RANGES, 0, 1000, steps=100_000)
    found = {name: np.array([settings[name] for settings in drawn]) for name in RANGES}
    for values, low, high in (
        (found["learning_rate"], 1e-3, 1e-1),
        (1 - found["b2"], 1e-3, 1e-1),
        (found["warmup"] / 100_000, 0.02, 0.3),
    ):
        place = np.log(values / low) / np.log(high / low)
        counts, _ = np.histogram(place, 10, (-1e-2, 1 + 1e-2))
        assert counts.sum() == 1000
        assert np.all(np.abs(counts - 100) < 15)
    assert all(isinstance(settings["warmup"], int) for settings in drawn)


def test_more_trials_begin_with_those_that_there_are():
    few, many = (search.draw(RANGES, 0, n, steps=100) for n in (8, 16))
    assert many[:8] == few
    assert search.draw(RANGES, 8, 16, steps=100) == many[8:]


def test_a_range_is_widened_where_the_best_lies_in_its_outer_tenth():
    settings = {"learning_rate": 0.09, "b2": 0.99, "warmup": 3}
    assert search.at_edges(RANGES, settings, 100) == {"learning_rate": 1}
    # 0.1 * log(100) from an end is a factor of 1.585.
    for rate, side in ((0.00158, -1), (0.00159, None), (0.0630, None), (0.0632, 1)):
        found = search.at_edges(RANGES, settings | {"learning_rate": rate}, 100)
        assert found.get("learning_rate") == side
    wider = search.widen(RANGES, {"learning_rate": 0.09, "b2": 0.905, "warmup": 2}, 100)
    assert wider["learning_rate"] == (1e-3, pytest.approx(0.3))
    assert wider["b2"] == pytest.approx((0.7, 0.999))
    assert wider["warmup"] == pytest.approx((0.02 / 3, 0.3))
    again = search.widen({"warmup": (0.02, 0.5)}, {"warmup": 48}, 100)
    assert again["warmup"] == (0.02, 0.9)


def test_optimizers_take_turns_and_have_as_many_trials_and_a_widened_one_finds_more():
    """The best rate of one lies above its range, of the other in the middle of it."""
    asked = []

    def loss_of(name, best):
        def loss(settings):
            asked.append((name, settings["learning_rate"]))
            return abs(np.log(settings["learning_rate"] / best))

        return loss

    losses = {"a": loss_of("a", 0.08), "b": loss_of("b", 3e-4)}
    ranges = {"a": {"learning_rate": (3e-4, 3e-2)}, "b": {"learning_rate": (3e-5, 3e-3)}}
    found = search.search(losses, ranges, trials=8, rounds=2, steps=100)
    first = list(dict.fromkeys(asked))[:16]
    assert [name for name, _ in first] == ["a", "b"] * 8
    assert len(found["a"].tried) == len(found["b"].tried) == 16
    assert set(asked) == {
        (name, settings["learning_rate"]) for name in found for settings in found[name].tried
    }
    assert found["a"].ranges["learning_rate"] == (3e-4, pytest.approx(0.09))
    assert found["b"].ranges == ranges["b"]
    assert found["a"].best["learning_rate"] > 0.03
    assert found["b"].best == min(found["b"].tried, key=losses["b"])


def test_of_a_search_that_was_cut_short_the_ranges_are_those_of_its_last_round():
    """The second round, whose ranges are wider, has no trial; of `b` there is none at all."""
    ranges = {name: {"learning_rate": (3e-4, 3e-2)} for name in "ab"}
    first = search.draw(ranges["a"], 0, 8, 100)

    def loss(settings):  # the higher the rate, the better
        return -settings["learning_rate"] if settings in first else None

    losses = {"a": loss, "b": lambda settings: None}
    found = search.search(losses, ranges, trials=8, rounds=2, steps=100)
    best = max(first, key=lambda settings: settings["learning_rate"])
    assert found == {"a": search.Search(best, first, ranges["a"])}
    assert search.at_edges(found["a"].ranges, best, 100) == {"learning_rate": 1}
