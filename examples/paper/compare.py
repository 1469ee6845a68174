"""Compare optimizers by the protocol of docs/comparison.md."""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from filelock import FileLock
from flax import nnx
from scipy import stats

from examples import language, optimizers, plots, program, tables, training
from examples.paper import nano
from examples.text_data import (
    Windows,
    load_corpus,
    split_test,
    training_batches,
    validation_batches,
)

TUNING_SEED = 0  # the reported ones begin at 1
CLOSE = 0.05  # nats above the best trial
WIDER = 3.0
LIMITS = {"b1": 1.0, "b2": 1.0, "warmup": 0.9}  # of a range that is widened
POINTS = 20  # of a curve
AGAINST: tuple[optimizers.Name, ...] = ("adamw_warmup", "adamw2", "muon", "muon_bound")

Settings = dict[str, Any]  # of an optimizer: fields of optimizers.Settings
Ranges = Mapping[str, tuple[float, float]]
Loss = Callable[[Settings], float]
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tune every optimizer by the same number of trials, and train its best on fresh seeds.

    Every run is a line of one table. What the table has is not trained again: stop the
    program at any time and start it anew, or let several run at once: of two that come to the same
    run, one waits for the other.
    """

    model: Literal["llama", "llama-qk-norm", "gpt", "gpt-wide"] = "llama"
    """What to train."""
    steps: int = 800
    """Updates of a run."""
    runs: tuple[optimizers.Name, ...] = (
        "adamw_warmup", "adamw", "muon", "adamw2", "adamw2_cap", "muon_bound", "lion",
        "adamw2_warmup", "radam", "schedule_free", "muon_warmup", "scion", "normuon",
    )  # fmt: skip
    """The optimizers."""
    trials: int = 8
    """Trials of every optimizer in a round."""
    rounds: int = 2
    """Rounds of trials. After each, a range is widened where the best trial lies at its edge."""
    seeds: int = 5
    """Fresh seeds for the best settings."""
    rates: tuple[float, ...] = (0.1, 0.3, 3.0, 10.0)
    """Further peak rates of the best settings, relative to their own; on the seed of the tuning."""
    data: Path | None = None
    """The text; by default, Python's standard library."""
    table: Path = Path("examples/paper/results/comparison.jsonl")
    """The table of all runs."""
    out: Path = Path("runs/comparison")
    """The folder of the pictures."""
    report: bool = False
    """Only show what the table has."""


def prepare(flags: Flags) -> nano.Nano:
    """What to train, and on what.

    Raises:
        ValueError: If a flag is out of range.
    """
    if flags.steps < POINTS or not flags.runs:
        raise ValueError(f"--steps must be at least {POINTS}, and --runs has to name an optimizer.")
    if flags.trials < 1 or flags.rounds < 1 or flags.seeds < 2:
        raise ValueError("--trials and --rounds must be at least 1, and --seeds at least 2.")
    if "qk_clip" in flags.runs:
        raise ValueError("--runs qk_clip: it needs the logits of attention. Leave it out.")
    program.check_folder(flags.out)
    task = nano.load(flags.model)
    if flags.data is not None:
        task = task._replace(data=load_corpus(flags.data))
    flags.out.mkdir(parents=True, exist_ok=True)
    flags.table.parent.mkdir(parents=True, exist_ok=True)
    return task


def main(flags: Flags, task: nano.Nano) -> None:
    """Trains what the table has not, and shows it: tables and pictures."""
    runs = Runs(flags, task)
    if not flags.report:
        best, _ = tune({name: runs.loss(name, "tuning") for name in flags.runs}, flags)
        for seed, name in itertools.product(range(1, flags.seeds + 1), flags.runs):
            runs.loss(name, "report", TUNING_SEED + seed)(best[name])
        for factor, name in itertools.product(flags.rates, flags.runs):
            runs.loss(name, "rate")(at_rate(best[name], factor))
    print(report(runs, flags))
    curves = {name: lines for name in flags.runs if (lines := runs.of_best(name))}
    pictures = (
        plots.save(plots.learning_rate_sweep(by_rate(runs, flags)), flags.out / "rates.png"),
        plots.save(plots.by_steps_and_seconds(curves, flags.steps), flags.out / "seconds.png"),
    )
    print(f"\nPictures: {', '.join(map(str, pictures))}")


def tune(losses: Mapping[str, Loss], flags: Flags) -> tuple[dict[str, Settings], dict[str, Ranges]]:
    """The best settings of every optimizer, and the ranges after the last round.

    The optimizers take turns, so that a table that is cut short has as many trials of each.
    """
    ranges: dict[str, Ranges] = {name: optimizers.OPTIMIZERS[name].ranges for name in losses}
    tried: dict[str, list[Settings]] = {name: [] for name in losses}
    best = {}
    for r in range(flags.rounds):
        drawn = {
            name: draw(ranges[name], slice(r * flags.trials, (r + 1) * flags.trials), flags.steps)
            for name in losses
        }
        for i, name in itertools.product(range(flags.trials), losses):
            losses[name](drawn[name][i])
        for name, loss in losses.items():
            tried[name] += drawn[name]
            best[name] = min(tried[name], key=loss)
            if r + 1 < flags.rounds:
                ranges[name] = widen(ranges[name], best[name], flags.steps)
    return best, ranges


def draw(ranges: Ranges, which: slice, steps: int) -> list[Settings]:
    """Those points of a scrambled Halton sequence, log-uniform in the ranges."""
    points = stats.qmc.Halton(len(ranges), rng=0).random(which.stop)[which]
    low, high = np.log([_bounds(*item) for item in ranges.items()]).T
    return [
        {
            name: _setting(name, float(value), steps)
            for name, value in zip(ranges, np.exp(low + point * (high - low)), strict=True)
        }
        for point in points
    ]


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


def at_rate(settings: Settings, factor: float) -> Settings:
    """Settings at another peak rate."""
    return settings | {"learning_rate": float(f"{factor * settings['learning_rate']:.3g}")}


class Runs:
    """The runs of one model, length and text: those in the table, and those to come."""

    def __init__(self, flags: Flags, task: nano.Nano):
        self._flags = flags
        self._trainer = Trainer(task, flags.steps)
        text = "python" if flags.data is None else flags.data.name
        self._what = {
            "model": flags.model,
            "data": f"{text} {task.data.fingerprint}",
            "batch": task.config.batch,
            "steps": flags.steps,
        }
        self.lines = self._read()

    def loss(self, name: str, use: str, seed: int = TUNING_SEED) -> Loss:
        """The validation loss of an optimizer as a function of its settings, inf for none."""

        def loss(settings: Settings) -> float:
            run = self._what | {"optimizer": name, "use": use, "seed": seed, "settings": settings}
            found = self._found(run)
            if found is None and not self._flags.report:
                found = self._train_alone(run)
            return math.inf if found is None else _loss(found)

        return loss

    def of(self, name: str, use: str) -> list[Line]:
        """The lines of an optimizer that serve for something."""
        return [line for line in self.lines if (line["optimizer"], line["use"]) == (name, use)]

    def best(self, name: str) -> Line | None:
        """The best trial of an optimizer."""
        return min(self.of(name, "tuning"), key=_loss, default=None)

    def of_best(self, name: str) -> list[Line]:
        """The runs with the best settings on the fresh seeds, in their order."""
        best = self.best(name)
        lines = [line for line in self.of(name, "report") if line["settings"] == best["settings"]]
        return sorted(lines, key=lambda line: line["seed"])

    def _read(self) -> list[Line]:
        """The lines of the table that are whole, and of this model, length and text."""
        text = self._flags.table.read_text() if self._flags.table.exists() else ""
        lines = []
        for part in filter(None, text.splitlines()):
            try:
                lines.append(json.loads(part))
            except ValueError:
                print(f"{self._flags.table}: a damaged line is left out: {part[:40]}")
        return [line for line in lines if self._what.items() <= line.items()]

    def _found(self, run: Line) -> Line | None:
        return next((line for line in self.lines if run.items() <= line.items()), None)

    def _train_alone(self, run: Line) -> Line:
        """Trains where no other process does; what one did meanwhile is in the table."""
        digest = hashlib.blake2b(json.dumps(run).encode(), digest_size=8).hexdigest()
        with FileLock(self._flags.out / f".{digest}.lock"):
            self.lines = self._read()
            return self._found(run) or self._train(run)

    def _train(self, run: Line) -> Line:
        table = self._flags.table
        line = run | self._trainer.train(run["optimizer"], run["seed"], run["settings"])
        is_cut = table.exists() and not table.read_bytes().endswith(b"\n")
        with table.open("a") as file:
            file.write("\n" * is_cut + json.dumps(line) + "\n")
        self.lines.append(line)
        print(
            *(line[key] for key in ("optimizer", "use", "seed", "settings", "val_loss")), flush=True
        )
        return line


class Trainer:
    """Trains a model with any optimizer. Each is compiled once, whatever its settings."""

    def __init__(self, task: nano.Nano, steps: int):
        self._config = dataclasses.replace(task.config, steps=steps)
        self._corpus, self._test = split_test(task.data)
        model = language.make_model(self._config, self._corpus)
        self._numbers = language.numbers_of(model)
        self._graph, _, rest = nnx.split(model, nnx.Param, ...)
        self._rest = nnx.as_pure(rest)
        self._jitted_loss = jax.jit(self._loss)
        self._compiled: dict[str, tuple[Callable, Callable]] = {}

    def train(self, name: str, seed: int, settings: Settings) -> dict[str, Any]:
        """What the table has of a run: losses, None for what is not finite, and CPU seconds."""
        config = dataclasses.replace(self._config, **settings, seed=seed)
        batches = training_batches(
            self._corpus.train, config.sequence_length, config.batch, config.seed
        )
        batches = list(itertools.islice(batches, config.steps))
        schedule = optimizers.OPTIMIZERS[name].schedule(config, config.steps)
        of_run = (
            schedule(jnp.arange(config.steps)),
            {key: jnp.asarray(value) for key, value in settings.items() if key != "warmup"},
        )
        params = nnx.as_pure(nnx.state(language.make_model(config, self._corpus), nnx.Param))
        if name not in self._compiled:
            self._compiled[name] = self._compile(name, params, batches[0], of_run)
        init, update = self._compiled[name]
        state, losses, seconds = self._run(update, (params, init(params, *of_run)), batches, of_run)
        parts = np.array_split(losses, POINTS)
        return {
            "val_loss": self._evaluate(state, self._corpus.validation),
            "test_loss": self._evaluate(state, self._test),
            "train_losses": [_finite(np.mean(part)) for part in parts],
            "cpu_seconds": round(seconds, 2),
        }

    def _compile(
        self, name: str, params: Any, tokens: np.ndarray, of_run: Any
    ) -> tuple[Callable, Callable]:
        """The first state of an optimizer, and an update, as functions of the settings too."""

        def init(params: Any, *of_run: Any) -> optax.OptState:
            return self._optimizer(name, *of_run).init(params)

        def update(state: Any, tokens: jax.Array, *of_run: Any) -> tuple[Any, jax.Array]:
            params, opt_state = state
            loss, grads = jax.value_and_grad(self._loss)(params, tokens)
            updates, opt_state = self._optimizer(name, *of_run).update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        init = jax.jit(init).lower(params, *of_run).compile()
        state = params, init(params, *of_run)
        return init, jax.jit(update, donate_argnums=0).lower(state, tokens, *of_run).compile()

    def _run(
        self, update: Callable, state: Any, batches: Sequence[np.ndarray], of_run: Any
    ) -> tuple[Any, np.ndarray, float]:
        """All updates, or those until the loss is not finite."""
        losses = np.full(len(batches), np.nan)
        start = time.process_time()
        with training.stop_signal() as stopped:
            for i, tokens in enumerate(batches):
                state, losses[i] = update(state, tokens, *of_run)
                if stopped():
                    raise training.Stopped("Stopped, and nothing kept of the run that was begun")
                if not math.isfinite(losses[i]):
                    break
        return state, losses, time.process_time() - start

    def _optimizer(
        self, name: str, rates: jax.Array, settings: Settings
    ) -> optax.GradientTransformation:
        fields = dataclasses.fields(optimizers.Settings)
        others = {field.name: getattr(self._config, field.name) for field in fields}
        made_of = optimizers.Settings(**others | settings)
        return optimizers.make_at(name, lambda count: rates[count], made_of, self._numbers)

    def _loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        return language.next_token_loss(nnx.merge(self._graph, params, self._rest), tokens)

    def _evaluate(self, state: Any, tokens: np.ndarray) -> float | None:
        """The loss over all windows, but for what is less than a batch."""
        length, batch = self._config.sequence_length, self._config.batch
        number = len(Windows(tokens, length)) // batch
        params = optimizers.evaluation_params(*state)
        batches = validation_batches(tokens, length, batch, number)
        return _finite(np.mean([self._jitted_loss(params, tokens) for tokens in batches]))


def by_rate(runs: Runs, flags: Flags) -> plots.Losses:
    """The validation losses of the best settings over the peak rate, all else as it is."""
    found: plots.Losses = {}
    for name in flags.runs:
        if best := runs.best(name):
            at = [at_rate(best["settings"], factor) for factor in sorted({1.0, *flags.rates})]
            lines = [best, *runs.of(name, "rate")]
            by_rate = {
                line["settings"]["learning_rate"]: [_loss(line)]
                for settings in at
                for line in lines
                if line["settings"] == settings
            }
            found[name] = by_rate
    return found


def report(runs: Runs, flags: Flags) -> str:
    """The tables of docs/comparison.md: the losses, the differences, and how sensitive they are."""
    names = [name for name in flags.runs if runs.best(name)]
    return "\n\n".join(
        tables.layout(table(runs, flags, names)) for table in (_results, _differences, _sensitivity)
    )


def _results(runs: Runs, flags: Flags, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The best settings, and the test loss with them, the lowest first."""
    _, ranges = tune({name: runs.loss(name, "tuning") for name in names}, flags)
    rows = {}
    for name in names:
        best, lines = runs.best(name), runs.of_best(name)
        losses = [_test_loss(line) for line in lines]
        edges = at_edges(ranges[name], best["settings"], flags.steps)
        shown = ", ".join(
            f"{key} {value:g}{'!' if key in edges else ''}"
            for key, value in best["settings"].items()
        )
        cells = (
            optimizers.LABELS[name],
            _interval(losses) if losses else "-",
            str(len(losses)),
            str(len(runs.of(name, "tuning"))),
            f"{_loss(best):.3f}",
            shown,
        )
        rows[cells] = np.mean(losses) if losses else math.inf
    head = ("", "test loss", "seeds", "trials", "best trial", "its settings (! at an edge)")
    return [head, *sorted(rows, key=rows.__getitem__)]


def _differences(runs: Runs, flags: Flags, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Differences of test losses, paired over the seeds; a star where the interval has no zero."""
    head = ("test loss, less that of", *(optimizers.LABELS[name] for name in AGAINST))
    losses = {
        name: {line["seed"]: _test_loss(line) for line in runs.of_best(name)} for name in names
    }
    rows: list[tuple[str, ...]] = [head]
    for name in names:
        cells = []
        for other in AGAINST:
            seeds = losses[name].keys() & losses.get(other, {}).keys()
            apart = [losses[name][seed] - losses[other][seed] for seed in sorted(seeds)]
            cells.append(_interval(apart, sign="+") if name != other and apart else "")
        rows.append((optimizers.LABELS[name], *cells))
    return rows


def _sensitivity(runs: Runs, flags: Flags, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The share of close trials, the loss at other rates, and the CPU seconds of a run."""
    rates = sorted({1.0, *flags.rates})
    head = ("validation loss", "close trials", *(f"rate x {rate:g}" for rate in rates), "CPU s")
    rows: list[tuple[str, ...]] = [head]
    losses = by_rate(runs, flags)
    for name in names:
        best, trials = runs.best(name), [_loss(line) for line in runs.of(name, "tuning")]
        close = np.mean([loss <= _loss(best) + CLOSE for loss in trials])
        cells = []
        for rate in rates:
            at = losses[name].get(at_rate(best["settings"], rate)["learning_rate"])
            cells.append("" if at is None else f"{at[0]:.3f}")
        seconds = np.median([line["cpu_seconds"] for line in runs.of_best(name)] or [math.nan])
        rows.append((optimizers.LABELS[name], f"{close:.0%}", *cells, f"{seconds:.0f}"))
    return rows


def _interval(values: Sequence[float], sign: str = "") -> str:
    """Mean and 95 % interval of Student's t; with a sign, a star where it leaves out zero."""
    mean = np.mean(values)
    if len(values) < 2 or not np.isfinite(mean):
        return f"{mean:{sign}.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    star = "*" if sign and abs(mean) > half else ""
    return f"{mean:{sign}.3f} ± {half:.3f}{star}"


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _test_loss(line: Line) -> float:
    return math.inf if line["test_loss"] is None else line["test_loss"]


def _loss(line: Line) -> float:
    return math.inf if line["val_loss"] is None else line["val_loss"]


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
