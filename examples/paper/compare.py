"""Compare optimizers by the protocol of docs/comparison.md."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from examples import optimizers, plots, program, run_folder
from examples.paper import comparison_tables, nano, problems, run_table
from examples.paper.comparison_tables import Tuned
from examples.paper.problems import Problem
from examples.paper.run_table import Line, RunTable, loss_of
from examples.paper.search import Search, Settings, search
from examples.paper.trainer import Trainer, finite

TUNING_SEED = 0  # the reported ones follow
RATES = (0.1, 0.3, 3.0, 10.0)  # relative to the best
POINTS = 20  # of the training loss in the table


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tune every optimizer by the same number of trials, and train its best on fresh seeds.

    Every run is a line of one table. What the table has is not trained again: stop the
    program at any time and start it anew, or let several run at once: of two that come to the same
    run, one waits for the other.
    """

    model: nano.Name = "llama"
    """What to train."""
    steps: int = 800
    """Updates of a run."""
    batch: int | None = None
    """Examples in a batch; by default, those of the model. Change --steps with it, for a run of
    as many."""
    runs: tuple[optimizers.Name, ...] = (
        "adamw_warmup", "adamw", "muon", "adamw2", "adamw2_cap", "muon_bound", "lion",
        "adamw2_warmup", "radam", "schedule_free", "muon_warmup", "scion", "normuon",
    )  # fmt: skip
    """The optimizers."""
    decay: optimizers.Decay = "cosine"
    """Of the rate, except for schedule-free."""
    trials: int = 8
    """Trials of every optimizer in a round."""
    rounds: int = 1
    """Rounds of trials. After each, a range is widened where the best trial lies at its edge."""
    seeds: int = 5
    """Fresh seeds for the best settings."""
    rates: bool = True
    """Train the best settings also at a tenth to ten times their peak rate."""
    data: Path | None = None
    """The text of a language model; by default, Python's standard library."""
    table: Path = Path("examples/paper/results/comparison.jsonl")
    """The table of all runs."""
    out: Path = Path("runs/comparison")
    """The folder of the pictures."""
    report: bool = False
    """Only show what the table has."""


def prepare(flags: Flags) -> Problem:
    """What to train.

    Raises:
        ValueError: If a flag is out of range, or if there is nothing to report.
    """
    if flags.steps < POINTS:
        raise ValueError(f"--steps must be at least {POINTS}.")
    program.check_lists(flags, "runs")
    if flags.trials < 1 or flags.rounds < 1 or flags.seeds < 2:
        raise ValueError("--trials and --rounds must be at least 1, and --seeds at least 2.")
    if "qk_clip" in flags.runs:
        raise ValueError("--runs qk_clip: it needs the logits of attention. Leave it out.")
    run_folder.check_folder(flags.out)
    lines = run_table.read(flags.table)
    changes = {"steps": flags.steps, "decay": flags.decay}
    if flags.batch is not None:
        changes["batch"] = flags.batch
    problem = problems.load(flags.model, flags.data, **changes)
    common = common_of(flags, problem).items()
    lines = [line for line in lines if common <= line.items() and line["use"] == "tuning"]
    if flags.report and not any(line["optimizer"] in flags.runs for line in lines):
        raise ValueError(
            f"{flags.table} has no trial of --runs with {flags.model} on {problem.data}, "
            f"{flags.steps} steps, batches of {problem.config.batch} and --decay {flags.decay}. "
            "The default text is the standard library of this Python, and differs from version to "
            "version. Train with examples.paper.compare without --report, or use the Python that "
            "the runs were made with."
        )
    return problem


def main(flags: Flags, problem: Problem) -> None:
    """Trains what the table has not, and shows it: tables and pictures."""
    runs = Runs(flags, problem)
    found = tune(runs, flags)
    for seed, name in itertools.product(fresh_seeds(flags), found):
        runs.get(name, "fresh", seed, found[name].best)
    if flags.rates:
        for factor, name in itertools.product(RATES, found):
            runs.get(name, "rate", TUNING_SEED, at_rate(found[name].best, factor))
    tuned = {name: gather(runs, name, search, flags) for name, search in found.items()}
    print(comparison_tables.report(tuned, flags.steps))
    losses = {
        name: {at["settings"]["learning_rate"]: [loss_of(at, "val_loss")] for _, at in t.rates}
        for name, t in tuned.items()
    }
    curves = {name: t.fresh for name, t in tuned.items() if t.fresh}
    pictures = (
        plots.save(plots.learning_rate_sweep(losses), flags.out / "rates.png"),
        plots.save(plots.by_steps_and_seconds(curves, flags.steps), flags.out / "seconds.png"),
    )
    print(f"\nPictures: {', '.join(map(str, pictures))}")


def tune(runs: "Runs", flags: Flags) -> dict[str, Search]:
    """The trials of every optimizer that has one."""
    return search(
        {name: runs.losses(name) for name in flags.runs},
        {name: optimizers.OPTIMIZERS[name].ranges for name in flags.runs},
        flags.trials,
        flags.rounds,
        flags.steps,
    )


def fresh_seeds(flags: Flags) -> range:
    """Those of the report."""
    return range(TUNING_SEED + 1, TUNING_SEED + 1 + flags.seeds)


def at_rate(settings: Settings, factor: float) -> Settings:
    """Settings at another peak rate."""
    return settings | {"learning_rate": float(f"{factor * settings['learning_rate']:.3g}")}


def gather(runs: "Runs", name: str, found: Search, flags: Flags) -> Tuned:
    """What there is of an optimizer."""
    trials = [runs.get(name, "tuning", TUNING_SEED, settings) for settings in found.tried]
    fresh = [runs.get(name, "fresh", seed, found.best) for seed in fresh_seeds(flags)]
    rates = RATES if flags.rates else ()
    at = [(f, runs.get(name, "rate", TUNING_SEED, at_rate(found.best, f))) for f in rates]
    at.append((1.0, runs.get(name, "tuning", TUNING_SEED, found.best)))
    return Tuned(
        found,
        [line for line in trials if line],
        [line for line in fresh if line],
        sorted((factor, line) for factor, line in at if line),
    )


def common_of(flags: Flags, problem: Problem) -> Line:
    """What the lines of all runs have in common."""
    return {
        "model": flags.model,
        "data": problem.data,
        "batch": problem.config.batch,
        "steps": problem.config.steps,
        "decay": problem.config.decay,
    }


class Runs:
    """The runs of one problem: those in the table, and those to come."""

    def __init__(self, flags: Flags, problem: Problem):
        self._is_report, self._problem = flags.report, problem
        self._table = RunTable(flags.table, common_of(flags, problem))

    def losses(self, name: str) -> Callable[[Settings], float | None]:
        """The validation loss of an optimizer's trials, None where a report finds none."""

        def loss(settings: Settings) -> float | None:
            line = self.get(name, "tuning", TUNING_SEED, settings)
            return line and loss_of(line, "val_loss")

        return loss

    def get(self, name: str, use: str, seed: int, settings: Settings) -> Line | None:
        """A run: found, or else trained, but for a report."""
        run = {"optimizer": name, "use": use, "seed": seed, "settings": settings}
        if self._is_report:
            return self._table.find(run)
        return self._table.get(run, lambda: self._result(**run))

    @functools.cached_property
    def _trainer(self) -> Trainer:
        return Trainer(self._problem)

    def _result(self, optimizer: str, seed: int, settings: Settings, **_: Any) -> Line:
        """What a run adds to its line, with None for what is not finite."""
        run = self._trainer.run(optimizer, settings)
        start, batches = run.start(self._trainer.params(seed)), self._trainer.batches(seed)
        state, losses, seconds = run.train(start, batches)
        return {
            "val_loss": self._trainer.evaluate(state, self._problem.validation),
            "test_loss": self._trainer.evaluate(state, self._problem.test),
            "train_losses": [finite(np.mean(part)) for part in np.array_split(losses, POINTS)],
            "cpu_seconds": round(seconds, 2),
        }


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
