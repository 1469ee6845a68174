"""Quasi-random search, in rounds after which ranges are widened where the best lies at an edge."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

WIDER = 3.0
LIMITS = {"b1": 1.0, "b2": 1.0, "warmup": 0.9}  # of a range that is widened

Settings = dict[str, Any]  # of an optimizer, by their names
Ranges = Mapping[str, tuple[float, float]]  # the warmup's in shares of a run


class Search(NamedTuple):
    """The trials of an optimizer."""

    best: Settings
    tried: list[Settings]
    ranges: Ranges  # of its last round


def search(
    losses: Mapping[str, Callable[[Settings], float | None]],
    ranges: Mapping[str, Ranges],
    trials: int,
    rounds: int,
    steps: int,
) -> dict[str, Search]:
    """Trials of several optimizers, by their names: of those that have one.

    They take turns, so that what is cut short has as many trials of each.

    Args:
        losses: Of their settings; None for a trial that is not to be made, nor counted.
        ranges: Of their settings, in the first round.
        trials: Of each, in a round.
        rounds: After each, ranges are widened.
        steps: Of a run.
    """
    found: dict[str, Search] = {}
    ranges = dict(ranges)
    for last in range(trials, rounds * trials + 1, trials):
        drawn = {name: draw(ranges[name], last - trials, last, steps) for name in losses}
        for i, name in itertools.product(range(trials), losses):
            losses[name](drawn[name][i])
        for name, loss in losses.items():
            if new := [settings for settings in drawn[name] if loss(settings) is not None]:
                tried = found[name].tried + new if name in found else new
                found[name] = Search(min(tried, key=loss), tried, ranges[name])
                ranges[name] = widen(ranges[name], found[name].best, steps)
    return found


def draw(ranges: Ranges, start: int, stop: int, steps: int) -> list[Settings]:
    """Those points of a scrambled Halton sequence, log-uniform in the ranges."""
    points = stats.qmc.Halton(len(ranges), rng=0).random(stop)[start:]
    low, high = np.log([_bounds(*item) for item in ranges.items()]).T
    return [
        {
            name: _setting(name, float(value), steps)
            for name, value in zip(ranges, np.exp(low + point * (high - low)), strict=True)
        }
        for point in points
    ]


def at_edges(ranges: Ranges, settings: Settings, steps: int) -> dict[str, int]:
    """Which settings lie in the outer tenth of their range: -1 at its low end, 1 at its high."""
    found = {}
    for name, range_ in ranges.items():
        low, high = np.log(_bounds(name, range_))
        place = (np.log(_searched(name, settings[name], steps)) - low) / (high - low)
        if not 0.1 <= place <= 0.9:
            found[name] = -1 if place < 0.1 else 1
    return found


def widen(ranges: Ranges, settings: Settings, steps: int) -> Ranges:
    """The ranges, wider where settings lie at an edge."""
    wider = dict(ranges)
    for name, side in at_edges(ranges, settings, steps).items():
        low, high = _bounds(name, ranges[name])
        if side < 0:
            low = low / WIDER
        else:
            high = min(high * WIDER, LIMITS.get(name, math.inf))
        wider[name] = (1 - high, 1 - low) if name in ("b1", "b2") else (low, high)
    return wider


def _searched(name: str, value: float, steps: int) -> float:
    """What is log-uniform: 1 - b of a decay rate, and the share of a run that is warmup."""
    if name in ("b1", "b2"):
        return 1 - value
    return value / steps if name == "warmup" else value


def _bounds(name: str, range_: tuple[float, float]) -> list[float]:
    """The least and the most of what is log-uniform."""
    return sorted(_searched(name, value, 1) for value in range_)


def _setting(name: str, value: float, steps: int) -> float:
    if name in ("b1", "b2"):
        return round(1 - value, 5)
    return max(1, round(value * steps)) if name == "warmup" else float(f"{value:.3g}")
