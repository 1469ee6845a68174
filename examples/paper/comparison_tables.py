"""The tables of docs/comparison.md: losses, differences between them, how sensitive they are."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from examples import tables
from examples.optimizers import LABELS
from examples.paper.run_table import Line, loss_of
from examples.paper.search import Search, at_edges

CLOSE = 0.05  # nats above the best trial
AGAINST = ("adamw_warmup", "adamw2", "muon", "muon_bound")

Row = tuple[str, ...]


class Tuned(NamedTuple):
    """What there is of an optimizer."""

    search: Search
    trials: list[Line]
    fresh: list[Line]  # the best settings on the seeds of the report
    rates: list[tuple[float, Line]]  # the best settings at other rates, relative to their own


def report(tuned: Mapping[str, Tuned], steps: int) -> str:
    """The tables, of optimizers with a trial at least."""
    found = results(tuned, steps), differences(tuned), sensitivity(tuned)
    return "\n\n".join(tables.markdown(rows) for rows in found if len(rows[0]) > 1)


def results(tuned: Mapping[str, Tuned], steps: int) -> list[Row]:
    """The test loss of the best settings, the lowest first."""
    rows = []
    for name, t in tuned.items():
        best = t.search.best
        edges = at_edges(t.search.ranges, best, steps)
        shown = ", ".join(f"{key} {value:g}{'!' * (key in edges)}" for key, value in best.items())
        losses = [loss_of(line, "test_loss") for line in t.fresh]
        rows.append(
            (
                np.mean(losses) if losses else math.inf,
                LABELS[name],
                interval(losses) if losses else "",
                str(len(losses)),
                f"{_best(t):.3f}",
                str(len(t.trials)),
                shown,
            )
        )
    head = ("", "test loss", "seeds", "best trial", "trials", "its settings (! at an edge)")
    return [head, *(row[1:] for row in sorted(rows))]


def differences(tuned: Mapping[str, Tuned]) -> list[Row]:
    """Differences of test losses, paired over the seeds; an arrow where zero is outside."""
    losses = {
        name: {line["seed"]: loss_of(line, "test_loss") for line in t.fresh}
        for name, t in tuned.items()
    }
    against = [name for name in AGAINST if name in tuned]
    rows = [("test loss, less that of", *(LABELS[name] for name in against))]
    for name, of_seeds in losses.items():
        cells = []
        for other in against:
            seeds = sorted(of_seeds.keys() & losses[other].keys())
            apart = [of_seeds[seed] - losses[other][seed] for seed in seeds]
            cells.append(interval(apart, sign="+") if apart and name != other else "")
        rows.append((LABELS[name], *cells))
    return rows


def sensitivity(tuned: Mapping[str, Tuned]) -> list[Row]:
    """The share of close trials, and the loss at other rates."""
    factors = sorted({factor for t in tuned.values() for factor, _ in t.rates})
    factors = factors if len(factors) > 1 else []
    rows: list[Row] = [
        ("validation loss", "close trials", *(f"rate x {factor:g}" for factor in factors))
    ]
    for name, t in tuned.items():
        close = np.mean([loss_of(line, "val_loss") <= _best(t) + CLOSE for line in t.trials])
        at = {factor: f"{loss_of(line, 'val_loss'):.3f}" for factor, line in t.rates}
        rows.append((LABELS[name], f"{close:.0%}", *(at.get(factor, "") for factor in factors)))
    return rows


def interval(values: Sequence[float], sign: str = "") -> str:
    """Mean and 95 % interval of Student's t; with a sign, an arrow where it leaves out zero."""
    mean = np.mean(values)
    if len(values) < 2 or not np.isfinite(mean):
        return f"{mean:{sign}.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    arrow = " ↓" if mean < 0 else " ↑"
    return f"{mean:{sign}.3f} ± {half:.3f}{arrow * bool(sign and abs(mean) > half)}"


def _best(t: Tuned) -> float:
    return min(loss_of(line, "val_loss") for line in t.trials)
