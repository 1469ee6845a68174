"""A table of runs, a line each, that several programs can fill at once, and go on with."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of a table that have the loss of a run; none where there is no table yet.

    Raises:
        ValueError: If it is something else.
    """
    if path.is_dir():
        raise ValueError(f"--table {path} is a folder. Name a file.")
    parts = path.read_text(errors="replace").splitlines() if path.exists() else []
    lines = []
    for part in filter(None, parts):
        try:
            line = json.loads(part)
        except ValueError:
            line = None
        if isinstance(line, dict) and any(key.endswith("_loss") for key in line):
            lines.append(line)
        else:
            print(f"{path}: a damaged line is left out: {part[:40]}")
    if any(not part.startswith("{") for part in parts if part) and not lines:
        raise ValueError(f"--table {path} is no table of runs. Name another file.")
    return lines


def loss_of(line: Line, key: str) -> float:
    """A loss of a line, inf where it was not finite."""
    return math.inf if line[key] is None else line[key]


class RunTable:
    """The lines of a table that have something in common.

    Args:
        path: Of the table, a JSON object a line. Beside it is a folder for the locks of runs that
            are being trained, in which they stay.
        common: What the lines have in common.
    """

    def __init__(self, path: Path, common: Line):
        self._path, self._locks, self._common = path, path.with_suffix(".locks"), common
        self._lines = self._read()

    def find(self, run: Line) -> Line | None:
        """The line of a run, by what describes it."""
        described = (self._common | run).items()
        return next((line for line in self._lines if described <= line.items()), None)

    def get(self, run: Line, train: Callable[[], Line]) -> Line:
        """The line of a run: found, or with what `train` adds to it.

        Where another process is training it, this waits for that.
        """
        if found := self.find(run):
            return found
        digest = hashlib.blake2b(json.dumps(self._common | run).encode(), digest_size=8)
        self._locks.mkdir(parents=True, exist_ok=True)
        with FileLock(self._locks / digest.hexdigest()):
            self._lines = self._read()
            return self.find(run) or self._add(run | train())

    def _read(self) -> list[Line]:
        return [line for line in read(self._path) if self._common.items() <= line.items()]

    def _add(self, line: Line) -> Line:
        line = self._common | line
        is_cut = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write("\n" * is_cut + json.dumps(line) + "\n")
        self._lines.append(line)
        print(*(value for value in line.values() if not isinstance(value, list)), flush=True)
        return line
