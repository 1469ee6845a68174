"""Times of several calls in one run, and a table of them."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax


def seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each call, the calls taking turns, after one that does not count."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Prints rows as a table, and writes them as JSON."""
    cells = [list(rows[0])] + [
        [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{out}")
