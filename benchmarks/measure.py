"""Times of several calls in one run, and a table of them."""

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from examples import tables

# Of glibc's `mallopt`: one arena, no mmap, nothing given back below 2 GB, a GB more at a time.
KEEP = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0),
        "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**30)}  # fmt: skip


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, as far as the C library can.

    A training step has memory free when it comes to the optimizer, where the activations were.
    By itself, an update that needs memory in between would pay the operating system for fresh
    pages in every call, which on a CPU can be as much as the update itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in KEEP.values() if mallopt else ():
        mallopt(option, value)


def seconds(calls: Mapping[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """The median time of each call.

    They take turns until `budget` seconds are over. The first round, which compiles, does
    not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, num_rounds = time.perf_counter(), 0
    while num_rounds < 2 or time.perf_counter() - begin < budget:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
        num_rounds += 1
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Prints rows as a table, and writes them as JSON."""
    if not rows:
        raise SystemExit("error: nothing to measure: name at least one.")
    columns = list(rows[0])
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    print(tables.layout([columns, *cells]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{out}")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
