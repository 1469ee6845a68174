"""What came out of the runs in a folder: summary, table, pictures, and what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from examples import optimizers, plots, recorder, tables

COLUMNS = {
    "val_loss": "validation loss",
    "val_accuracy": "validation accuracy",
    "max_qk_sigma": "largest |WqWk^T|",
    "steps_per_second": "steps per second",
}


def summarize(folder: Path, name: str) -> dict[str, Any]:
    """The result of a run, from its logged steps."""
    lines = recorder.read_metrics(folder, name)
    last = lines[-1]
    losses = [line["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    rates = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
    sigmas = [sigma for line in lines for sigma in line.get("qk_sigma", []) if sigma is not None]
    return {
        "val_loss": None,
        **{key: value for key, value in last.items() if key.startswith("val_")},
        "train_loss": None if last["loss"] is None else float(np.mean(losses)),
        "max_qk_sigma": max(sigmas, default=None),
        "steps_per_second": float(np.median(rates)) if rates else None,
        "diverged_at": last["step"] if last["loss"] is None else None,
    }


def write_summary(folder: Path, runs: dict[str, Any]) -> None:
    """Writes `summary.json`."""
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({"config": config, "runs": runs}, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n")


def table(runs: dict[str, Any]) -> str:
    """A line for each run."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in r for r in runs.values())}
    rows = [["", *columns.values()]]
    for name, run in runs.items():
        cells = {key: "-" if run.get(key) is None else f"{run[key]:.3f}" for key in columns}
        if run["diverged_at"] is not None:
            cells["val_loss"] = f"diverged at {run['diverged_at']}"
        rows.append([optimizers.LABELS[name], *cells.values()])
    return tables.layout(rows)


def verdict(runs: dict[str, Any], config: Any, key: str) -> str:
    """What a figure of the summary says of AdamW²."""
    title = COLUMNS[key]
    ours = runs.get("adamw2", {}).get(key)
    if ours is None:
        return f"AdamW² has no {title} to compare."
    sentences = []
    for name in ("adamw", "adamw_warmup"):
        if name in runs:
            theirs = runs[name].get(key)
            if theirs is None:
                how = "where"
            else:
                how = f"{abs(ours - theirs):.3f} {'below' if ours < theirs else 'above'}"
            warmup = f"with {config.warmup} steps of warmup" if "warmup" in name else "without"
            sentences.append(f"{how} AdamW {warmup}{' diverged' if theirs is None else ''}")
    return (
        f"At a learning rate of {config.learning_rate:g} from the first step, AdamW² reaches a "
        f"{title} of {ours:.3f}" + "".join(f", {s}" for s in sentences) + "."
    )


def report(flags: Any, judged_by: str) -> None:
    """Prints the table of a finished folder and what it says, and draws its pictures."""
    runs = json.loads((flags.out / "summary.json").read_text())["runs"]
    lines = {name: recorder.read_metrics(flags.out, name) for name in runs}
    pictures = [
        plots.save(plots.loss(lines), flags.out / "loss.png"),
        plots.save(plots.qk_sigma(lines), flags.out / "qk_sigma.png"),
    ]
    if "adamw2" in runs:
        figure = plots.learning_rates(lines["adamw2"])
        pictures.append(plots.save(figure, flags.out / "learning_rates.png"))
    print(table(runs))
    if "adamw2" in runs:
        print(verdict(runs, flags, judged_by))
    print("\nPictures: " + ", ".join(map(str, pictures)))
