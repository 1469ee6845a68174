"""What a run does that is disturbed in the middle, with warmup and without."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

from examples import optimizers, program, tables
from examples.paper import compare, problems, run_table
from examples.paper.comparison_tables import interval
from examples.paper.run_table import Line, RunTable
from examples.paper.search import Settings
from examples.paper.trainer import Trainer, finite
from examples.text_data import load_corpus

GARBAGE = 10  # batches


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train with the best settings that `compare` has found, and disturb the runs.

    What the table has is not trained again.
    """

    runs: tuple[optimizers.Name, ...] = (
        "adamw_warmup", "adamw", "adamw2", "adamw2_cap", "muon", "muon_bound",
    )  # fmt: skip
    """The optimizers."""
    steps: int = 800
    """Updates of a run, as in the comparison."""
    rounds: int = 2
    """Rounds of trials in the comparison from which the settings come."""
    seeds: int = 3
    """Seeds, from 1 on."""
    comparison: Path = compare.Flags.table
    """The table of the comparison."""
    table: Path = Path("examples/paper/results/disturbances.jsonl")
    """The table of these runs."""


def prepare(flags: Flags) -> dict[str, Settings]:
    """The settings of every optimizer.

    Raises:
        ValueError: If a flag is out of range, or if the comparison has no trial of an optimizer.
    """
    if flags.seeds < 2:
        raise ValueError("--seeds must be at least 2.")
    program.check_lists(flags, "runs")
    of = compare.Flags(
        steps=flags.steps,
        rounds=flags.rounds,
        runs=flags.runs,
        table=flags.comparison,
        report=True,
    )
    run_table.read(flags.table)  # which checks it
    runs = compare.Runs(of, compare.prepare(of))
    found = {name: search.best for name, search in compare.tune(runs, of).items()}
    if missing := [name for name in flags.runs if name not in found]:
        raise ValueError(f"{flags.comparison} has no trial of {', '.join(missing)}.")
    return found


def main(flags: Flags, settings: dict[str, Settings]) -> None:
    """Trains what the table has not, and shows it."""
    disturbed = Disturbed(flags.steps)
    cases: dict[str, Callable[[str, Settings, int], Line]] = {
        "undisturbed": disturbed.undisturbed,
        "a fresh state in the middle": disturbed.restart,
        f"{GARBAGE} batches of garbage": disturbed.garbage,
        "ten times the rate": disturbed.ten_times_the_rate,
        "then another text": disturbed.another_text,
    }
    table = RunTable(flags.table, disturbed.described())
    losses: dict[tuple[str, str], list[float]] = {}
    for seed, case, name in itertools.product(range(1, flags.seeds + 1), cases, flags.runs):
        run = {"optimizer": name, "case": case, "seed": seed, "settings": settings[name]}
        line = table.get(run, lambda: cases[case](name, settings[name], seed))  # noqa: B023
        losses.setdefault((case, name), []).append(run_table.loss_of(line, "test_loss"))
    rows = [("test loss", *cases)]
    for name in flags.runs:
        cells = (interval(losses[case, name]) for case in cases)
        rows.append((optimizers.LABELS[name], *cells))
    print(tables.markdown(rows))


class Disturbed:
    """Runs of the small Llama, and the test loss at their end."""

    def __init__(self, steps: int):
        problem, self._half = problems.load("llama", steps=steps), steps // 2
        other = dataclasses.replace(problem.config, steps=self._half)
        headers = load_corpus(Path(np.get_include()))
        self._trainer = Trainer(problem)
        self._later = Trainer(problems.of_text(other, headers, "numpy"))

    def described(self) -> Line:
        """What all runs have in common."""
        problem = self._trainer.problem
        return {
            "model": "llama",
            "data": problem.data,
            "other": self._later.problem.data,
            "batch": problem.config.batch,
            "steps": problem.config.steps,
        }

    def undisturbed(self, name: str, settings: Settings, seed: int) -> Line:
        """A plain run."""
        return self._train(name, settings, self._trainer.batches(seed), seed)

    def ten_times_the_rate(self, name: str, settings: Settings, seed: int) -> Line:
        """A plain run at too large a rate."""
        return self.undisturbed(name, compare.at_rate(settings, 10.0), seed)

    def garbage(self, name: str, settings: Settings, seed: int) -> Line:
        """Random tokens in some batches in the middle."""
        batches = self._trainer.batches(seed)
        rng = np.random.default_rng(seed)
        for i in range(self._half, self._half + GARBAGE):
            batches[i] = rng.integers(0, 256, batches[i].shape, np.int32)
        return self._train(name, settings, batches, seed)

    def restart(self, name: str, settings: Settings, seed: int) -> Line:
        """The optimizer begins anew in the middle, with a shorter warmup if it has one."""
        run, batches = self._trainer.run(name, settings), self._trainer.batches(seed)
        state, *_ = run.train(run.start(self._trainer.params(seed)), batches[: self._half])
        rates = jnp.roll(run.rates, -self._half)
        if "warmup" in settings:
            rates *= jnp.minimum(1.0, jnp.arange(len(rates)) / halved(settings)["warmup"])
        params = optimizers.evaluation_params(*state)
        state, *_ = run.train(run.start(params), batches[self._half :], rates)
        return {"test_loss": self._trainer.evaluate(state, self._trainer.problem.test)}

    def another_text(self, name: str, settings: Settings, seed: int) -> Line:
        """After the run, half of one on NumPy's C headers at the full rate, with a fresh state."""
        run = self._trainer.run(name, settings)
        state, *_ = run.train(run.start(self._trainer.params(seed)), self._trainer.batches(seed))
        run = self._later.run(name, halved(settings))
        params = optimizers.evaluation_params(*state)
        state, *_ = run.train(run.start(params), self._later.batches(seed))
        return {"test_loss": self._later.evaluate(state, self._later.problem.test)}

    def _train(self, name: str, settings: Settings, batches: list[np.ndarray], seed: int) -> Line:
        run = self._trainer.run(name, settings)
        state, losses, _ = run.train(run.start(self._trainer.params(seed)), batches)
        return {
            "test_loss": self._trainer.evaluate(state, self._trainer.problem.test),
            "highest": finite(np.max(losses[self._half :])),
        }


def halved(settings: Settings) -> Settings:
    """The settings for a run of half the length: of a warmup, the same share of it."""
    return {
        key: max(1, value // 2) if key == "warmup" else value for key, value in settings.items()
    }


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
