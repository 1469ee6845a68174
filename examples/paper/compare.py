"""Compare the optimizers, each tuned by the same rule, over seeds."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from filelock import FileLock

from examples import language, optimizers, plots, program, results, tables
from examples.paper import nano
from examples.text_data import load_corpus

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECADES = (1e-3, 1e-2, 1e-1)

Settings = dict[str, Any]  # of an optimizer: fields of optimizers.Settings


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tune every optimizer on one seed, and train with its best settings on others.

    Every run is a line of one table. What the table has is not trained again: stop the
    program at any time and start it anew, or let several run at once: of two that come to the same
    run, one waits for the other.
    """

    model: nano.Name = "gpt"
    """What to train: a GPT on text, or one of twice its width, or a ViT or a Swin on digits."""
    steps: int = 200
    """Updates of a run."""
    runs: tuple[optimizers.Name, ...] = tuple(optimizers.OPTIMIZERS)  # type: ignore[assignment]
    """The optimizers."""
    seeds: int = 3
    """Seeds of the best settings. They are tuned on the first, which is 0."""
    data: Path | None = None
    """The text of the GPT; by default, Python's standard library."""
    table: Path = Path("examples/paper/results/compare.jsonl")
    """The table of all runs."""
    out: Path = Path("runs/compare")
    """The folder of the picture, and of the runs until they are done."""
    report: bool = False
    """Only show what the table has."""


def prepare(flags: Flags) -> nano.Nano:
    """What to train.

    Raises:
        ValueError: If a flag is out of range.
    """
    if flags.steps < 10 or not flags.runs:
        raise ValueError("--steps must be at least 10, and --runs has to name an optimizer.")
    program.check_folder(flags.out)
    task = nano.load(flags.model)
    if flags.data is not None:
        if not isinstance(task.config, language.Config):
            raise ValueError(f"--data is the text of a GPT, and --model is {flags.model}.")
        task = task._replace(data=load_corpus(flags.data))
        language.check_length(task.config, task.data)
    if flags.table.is_dir():
        raise ValueError(f"--table {flags.table} is a folder. Name a file.")
    flags.table.parent.mkdir(parents=True, exist_ok=True)
    (flags.out / ".locks").mkdir(parents=True, exist_ok=True)
    return task


def main(flags: Flags, task: nano.Nano) -> None:
    """Trains what the table has not, and shows it: a table and a picture."""
    runs = Runs(flags, task)
    if not flags.report:
        trained = [name for name in flags.runs if (flags.model, name) != ("swin", "qk_clip")]
        if len(trained) < len(flags.runs):
            print("qk_clip needs the logits of a GPT or a ViT, and is left out.")
        best = {name: search(grid(name, flags.steps), runs.of(name)) for name in trained}
        for name, settings in best.items():
            for seed in range(1, flags.seeds):
                runs.of(name, seed)(settings)
    print(report(runs.lines))
    losses = {name: losses_by_rate(runs.lines, name) for name in names(runs.lines)}
    pictures = (
        plots.save(plots.learning_rate_sweep(losses), flags.out / "compare.png"),
        plots.save(plots.with_and_without(losses), flags.out / "bound.png"),
    )
    print(f"\nPictures: {', '.join(map(str, pictures))}")


def search(grid: Mapping[str, Sequence[Any]], loss: Callable[[Settings], float]) -> Settings:
    """The best settings.

    They are tuned from the best of three decades of rates; and if a rate near those that are found
    is better, from there on.
    """
    middle = {name: values[len(values) // 2] for name, values in grid.items()}
    best = min([middle | {"learning_rate": rate} for rate in DECADES], key=loss)
    while True:
        tuned = tune(grid, loss, best)
        rates = [tuned | {"learning_rate": rate} for rate in near(tuned["learning_rate"])]
        best = min([tuned, *rates], key=loss)
        if best == tuned:
            return best


def tune(
    grid: Mapping[str, Sequence[Any]], loss: Callable[[Settings], float], start: Settings
) -> Settings:
    """The best settings, by coordinate descent on a grid.

    Each setting in turn moves to its better neighbour as long as that lowers the loss, until
    none does.
    """
    best = start
    moved = True
    while moved:
        moved = False
        for name, values in grid.items():
            while True:
                i = values.index(best[name])
                beside = [best | {name: values[j]} for j in (i - 1, i + 1) if 0 <= j < len(values)]
                better = min(beside, key=loss, default=best)
                if not loss(better) < loss(best):
                    break
                best, moved = better, True
    return best


def grid(name: str, steps: int) -> dict[str, Sequence[Any]]:
    """What is tuned of an optimizer, and the values that it may take."""
    tuned = {"learning_rate": RATES} | optimizers.OPTIMIZERS[name].tuned
    if "warmup" in tuned:
        tuned["warmup"] = tuple(round(share * steps) for share in tuned["warmup"])
    return tuned


def near(rate: float) -> Sequence[float]:
    """A rate of the grid, and two to its either side."""
    i = RATES.index(rate)
    return RATES[max(0, i - 2) : i + 3]


class Runs:
    """The runs of one model, length and text: those in the table, and those to come."""

    def __init__(self, flags: Flags, task: nano.Nano):
        self._flags, self._task = flags, task
        self._what = {
            "model": flags.model,
            "data": None if flags.data is None else f"{flags.data.name} {task.data.fingerprint}",
            "steps": flags.steps,
        }
        self.lines = self._read()

    def of(self, name: str, seed: int = 0) -> Callable[[Settings], float]:
        """The validation loss of an optimizer as a function of its settings, inf for none."""

        def loss(settings: Settings) -> float:
            run = self._what | {"optimizer": name, "seed": seed, "settings": settings}
            run = json.loads(json.dumps(run))  # as it is in the table
            return _loss(self._found(run) or self._train_alone(run, settings))

        return loss

    def _read(self) -> plots.Lines:
        """The lines of the table that are whole, and of this model, length and text."""
        text = self._flags.table.read_text(errors="replace") if self._flags.table.exists() else ""
        lines = []
        for part in filter(None, text.splitlines()):
            try:
                lines.append(json.loads(part))
            except ValueError:
                print(f"{self._flags.table}: a damaged line is left out: {part[:40]}")
        return [line for line in lines if self._what.items() <= line.items()]

    def _found(self, run: dict[str, Any]) -> dict[str, Any] | None:
        return next((line for line in self.lines if run.items() <= line.items()), None)

    def _train_alone(self, run: dict[str, Any], settings: Settings) -> dict[str, Any]:
        """Trains where no other process does; what one did meanwhile is in the table."""
        parts = [*self._what.values(), run["optimizer"], run["seed"], *settings.values()]
        folder = self._flags.out / "-".join(map(str, parts)).replace(" ", "")
        with FileLock(self._flags.out / ".locks" / folder.name):
            self.lines = self._read()
            return self._found(run) or self._train(run, settings, folder)

    def _train(self, run: dict[str, Any], settings: Settings, folder: Path) -> dict[str, Any]:
        """Trains in a folder of its own, which goes when the run is a line of the table."""
        flags, name, seed = self._flags, run["optimizer"], run["seed"]
        config = dataclasses.replace(
            self._task.config,
            **settings,
            seed=seed,
            steps=flags.steps,
            log_every=max(1, flags.steps // 20),
            validate_every=flags.steps,
        )
        folder.mkdir(exist_ok=True)
        self._task.train(name, config, self._task.data, folder, norms=False)
        summary = results.summarize(folder, name)
        kept = ("val_loss", "val_accuracy", "train_loss", "diverged_at")
        line = run | {key: summary[key] for key in kept if key in summary}
        is_cut = flags.table.exists() and not flags.table.read_bytes().endswith(b"\n")
        with flags.table.open("a") as file:
            file.write("\n" * is_cut + json.dumps(line) + "\n")
        self.lines.append(line)
        shutil.rmtree(folder)
        return line


def names(lines: plots.Lines) -> list[str]:
    """The optimizers of some lines of the table, in the order of the comparison."""
    found = {line["optimizer"] for line in lines}
    return [name for name in optimizers.OPTIMIZERS if name in found]


def best_settings(lines: plots.Lines, name: str) -> Settings:
    """Those with the lowest loss on the first seed."""
    return min(_on_first_seed(lines, name), key=_loss)["settings"]


def losses_by_rate(lines: plots.Lines, name: str) -> dict[float, list[float]]:
    """The losses over the peak rate, all else as in the best settings: first the first seed's."""
    best = best_settings(lines, name)
    found = {rate: _losses(lines, name, best | {"learning_rate": rate}) for rate in RATES}
    return {rate: losses for rate, losses in found.items() if losses}


def report(lines: plots.Lines) -> str:
    """A line per optimizer: its best settings, and the losses with them over the seeds."""
    rows = [("", "best settings", "validation loss, mean ± standard deviation", "seeds")]
    for name in names(lines):
        best = best_settings(lines, name)
        losses = _losses(lines, name, best)
        spread = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
        settings = ", ".join(f"{key} {_short(value)}" for key, value in best.items())
        mean = f"{np.mean(losses):.3f}{spread}"
        rows.append((optimizers.LABELS[name], settings, mean, str(len(losses))))
    return tables.layout(rows)


def _on_first_seed(lines: plots.Lines, name: str) -> plots.Lines:
    return [line for line in lines if line["optimizer"] == name and line["seed"] == 0]


def _losses(lines: plots.Lines, name: str, settings: Settings) -> list[float]:
    """Those with some settings, in the order of the seeds."""
    found = [line for line in lines if line["optimizer"] == name and line["settings"] == settings]
    return [_loss(line) for line in sorted(found, key=lambda line: line["seed"])]


def _loss(line: Mapping[str, Any]) -> float:
    return math.inf if line["val_loss"] is None else line["val_loss"]


def _short(value: Any) -> str:
    return (
        "(" + ", ".join(map(_short, value)) + ")"
        if isinstance(value, (list, tuple))
        else f"{value:g}"
    )


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
