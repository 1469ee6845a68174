"""Whether runs reach the target of the GPT-2 speedruns: over their seeds, at each validation."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import tyro
from tyro.conf import Positional

from examples import recorder, tables

DEVIATION = 0.0013  # of a run's loss, as the optimization track assumes it
# Flags that do not change a loss.
HOW = {"runs", "log_every", "save_every", "watch"}
LEAST = 0.004  # of (target - mean) sqrt(runs): 3.08 deviations, p = 0.001


@dataclasses.dataclass(frozen=True)
class Flags:
    """Test the validation losses of run folders, one a seed, against a target."""

    folders: Positional[tuple[Path, ...]]
    """Of examples.train_gpt; all that were run, none left out."""
    run: str = "adamw2"
    """The optimizer in them."""
    target: float = 3.28
    """Of the loss, in nats per token."""


class Row(NamedTuple):
    """The losses after a step that all runs have validated."""

    step: int
    mean: float
    statistic: float  # (target - mean) sqrt(runs)
    z_test: float  # p of a mean below the target, with the deviation that the track assumes
    t_test: float  # the same with that of the runs; NaN for one run

    @property
    def passes(self) -> bool:
        """By the rule of the optimization track."""
        return self.statistic >= LEAST


def test(losses: dict[int, np.ndarray], target: float) -> list[Row]:
    """A row for each step, from the losses of all runs."""
    rows = []
    for step, values in sorted(losses.items()):
        statistic = (target - values.mean()) * math.sqrt(values.size)
        rows.append(
            Row(
                step,
                float(values.mean()),
                float(statistic),
                float(scipy.stats.norm.sf(statistic / DEVIATION)),
                _t_test(values, target),
            )
        )
    return rows


def _t_test(values: np.ndarray, target: float) -> float:
    if values.size < 2:
        return math.nan
    result: Any = scipy.stats.ttest_1samp(values, target, alternative="less")
    return float(result.pvalue)


def read(folders: tuple[Path, ...], run: str) -> dict[int, np.ndarray]:
    """The losses of all folders, by the steps that all of them have validated.

    Raises:
        ValueError: If a folder has no validated step of the run, if no step is common, or if the
            runs differ in anything but their seeds.
    """
    if not folders:
        raise ValueError("Name at least one folder of examples.train_gpt.")
    check_seeds(folders)
    found = []
    for folder in folders:
        lines = recorder.read_metrics(folder, run)
        by_step = {
            line["step"]: math.inf if line["val_loss"] is None else line["val_loss"]
            for line in lines
            if "val_loss" in line
        }
        if not by_step:
            raise ValueError(f"{folder} has no validation of {run}. Name another --run or folder.")
        found.append(by_step)
    if not (steps := set.intersection(*map(set, found))):
        raise ValueError("The runs have no validated step in common: give all the same steps.")
    return {step: np.array([by_step[step] for by_step in found]) for step in steps}


def check_seeds(folders: tuple[Path, ...]) -> None:
    """Raises ValueError where runs differ in more than their seeds, or not in these."""
    of_seed: dict[Any, Path] = {}
    configs = []
    for folder in folders:
        try:
            config = json.loads((folder / "config.json").read_text())
            seed = config.pop("seed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{folder} has no config.json with a seed. Name folders of examples.train_gpt."
            ) from None
        if seed in of_seed:
            raise ValueError(
                f"{of_seed[seed]} and {folder} both have --seed {seed}. Give each run once."
            )
        of_seed[seed] = folder
        configs.append(config)
        keys = (config.keys() | configs[0].keys()) - HOW
        if different := sorted(key for key in keys if config.get(key) != configs[0].get(key)):
            raise ValueError(f"{folder} and {folders[0]} differ in {', '.join(different)}.")


def main(flags: Flags) -> None:
    """Prints the table, and the first step that passes."""
    try:
        rows = test(read(flags.folders, flags.run), flags.target)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    head = ["step", "mean", "(target - mean) sqrt(n)", "p, z-test", "p, t-test"]
    cells = [
        [f"{r.step}", f"{r.mean:.5f}", f"{r.statistic:.5f}", f"{r.z_test:.2g}", f"{r.t_test:.2g}"]
        for r in rows
    ]
    print(tables.layout([head, *cells]))
    first = next((row.step for row in rows if row.passes), None)
    print(
        f"\n{len(flags.folders)} runs of {flags.run}: "
        + (
            f"a loss of {flags.target} is reached after {first} steps (statistic at least {LEAST})."
            if first is not None
            else f"a loss of {flags.target} is not reached with a statistic of at least {LEAST}."
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
