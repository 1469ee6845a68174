"""The figures of `gpu_hour.sh` that are there, as a page of Markdown."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHOWN = {
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "max_qk_sigma": "largest norm of W_q W_k^T",
    "steps_per_second": "steps per second",
    "diverged_at": "diverged at",
}
SETTINGS = ("model", "dtype", "steps", "batch", "sequence_length", "learning_rate", "warmup")


def table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Rows as Markdown, with the columns of the first."""
    columns = list(rows[0])
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell(row.get(column)) for column in columns)} |"


def cell(value: Any) -> str:
    """A number with three digits, and nothing for none."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def part(folder: Path) -> Iterable[str]:
    """The section of a part, if it has figures."""
    yield f"## {folder.name}" + ("" if (folder / "done").exists() else " (not finished)")
    yield ""
    if (file := folder / "table.json").exists():
        yield from table(json.loads(file.read_text()))
    if (file := folder / "run" / "summary.json").exists():
        summary = json.loads(file.read_text())
        yield ", ".join(f"{name} {summary['config'][name]}" for name in SETTINGS)
        yield ""
        yield from table(
            [
                {"optimizer": name} | {title: run.get(key) for key, title in SHOWN.items()}
                for name, run in summary["runs"].items()
            ]
        )
    yield ""


def main(out: Path) -> None:
    """Writes `page.md`."""
    lines = ["# An hour on a GPU", "", (out / "machine.txt").read_text()]
    for folder in sorted(out.glob("[0-9]_*")):
        lines += part(folder)
    (out / "page.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
