"""Sweep the peak learning rate: AdamW² beside other ways to do without warmup."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from examples import language, optimizers, plots, program, results
from examples.text_data import Corpus


@dataclasses.dataclass(frozen=True)
class Flags(language.Config):
    """Train the nano GPT with every optimizer at every peak learning rate."""

    runs: tuple[optimizers.Name, ...] = tuple(optimizers.LABELS)  # type: ignore[assignment]
    """The optimizers."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """The peak learning rates, in place of --learning-rate."""
    out: Path = Path("runs/lr_sweep")
    """The folder of the sweep."""
    resume: bool = False
    """Go on with the sweep in that folder."""


def main(flags: Flags, corpus: Corpus) -> None:
    """Trains, and shows the table and the picture, also of an unfinished sweep."""
    runs: dict[str, Any] = {name: {} for name in flags.runs}
    for rate in flags.rates:
        config = dataclasses.replace(flags, learning_rate=rate)
        for name in flags.runs:
            folder = flags.out / f"{rate:g}"
            folder.mkdir(exist_ok=True)
            language.train(name, config, corpus, folder)
            runs[name][f"{rate:g}"] = results.summarize(folder, name)
            results.write_summary(flags.out, runs)
    losses = {
        name: {float(rate): run["val_loss"] for rate, run in by_rate.items()}
        for name, by_rate in runs.items()
    }
    print(table(losses))
    picture = plots.save(plots.learning_rate_sweep(losses), flags.out / "lr_sweep.png")
    print(f"\nPicture: {picture}")


def table(losses: dict[str, dict[float, float | None]]) -> str:
    """Validation losses, a line per optimizer, and how much they vary."""
    rates = list(next(iter(losses.values())))
    width = max(map(len, optimizers.LABELS.values()))
    rows = [f"{'validation loss':{width}}" + "".join(f"{rate:>9g}" for rate in rates)]
    for name, by_rate in losses.items():
        cells = [f"{'-' if loss is None else format(loss, '.3f'):>9}" for loss in by_rate.values()]
        rows.append(f"{optimizers.LABELS[name]:{width}}" + "".join(cells))
    return "\n".join(rows)


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), language.prepare, main)
