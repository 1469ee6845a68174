"""What a run leaves on disk: a line for each logged step, TensorBoard, snapshots, checkpoints."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import Summary, scalar
from tqdm import tqdm

from examples import processes
from examples.checkpoints import Checkpoints

Line = dict[str, Any]
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a NaN is said once, by us


class Recorder:
    """The record of one run in a folder, which several runs may share.

    It writes `metrics.jsonl`, in which each logged step is a line with this `run`;
    `checkpoints/<name>`; `tensorboard/<name>`; and `snapshots/<name>/<step>.npz`. Where
    several processes train, they write a checkpoint together, and the first one all else.

    Args:
        folder: Of the record.
        name: Of the run in it.
        mesh: On which it trains.
        run: What a checkpoint says of itself beside its name, see `Checkpoints`.
    """

    def __init__(self, folder: Path, name: str, mesh: Mesh, run: dict[str, Any]):
        self.name = name
        self._file = folder / "metrics.jsonl"
        self._snapshots = folder / "snapshots" / name
        self._checkpoints = Checkpoints(folder / "checkpoints" / name, {"run": name} | run)
        self._devices = _describe(mesh)
        if processes.is_first():
            # Not its SummaryWriter: where the disk is full, the thread of that ends, and all wait.
            board = folder / "tensorboard" / name
            board.mkdir(parents=True, exist_ok=True)
            self._board = EventsWriter(str(board / "events"))
        self._last: Line | None = None  # of the lines of this run
        self._logged = 0  # how many they are
        self._since: tuple[int, float] | None = None  # the step and the time of the last record
        self.diverged = False
        self.was_on_same_devices = True  # the checkpoint that was restored

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoints.close()
        if processes.is_first():
            self._board.close()

    def restore(self, state: Any, batches: grain.DatasetIterator) -> tuple[int, Any]:
        """The newest checkpoint, or step 0; and a record that ends there."""
        step = self._checkpoints.latest_step or 0
        if step:
            state, rest = self._checkpoints.restore(state)
            batches.set_state(rest["batches"])
            self._last, self._logged = rest["last"], rest["logged"]
            self.diverged = self._last is not None and self._last["loss"] is None
            self.was_on_same_devices = rest["devices"] == self._devices
        if processes.is_first():
            self._end_record_at(step)
        multihost_utils.sync_global_devices("the record ends at the checkpoint")
        return step, state

    def _end_record_at(self, step: int) -> None:
        """Drops what is damaged, and this run's lines after a step; its last line is kept."""
        lines, damaged = _read(self._file)
        if damaged:
            tqdm.write(f"{self._file}: {damaged} damaged lines are left out.")
        kept = [line for line in lines if line["run"] != self.name or line["step"] <= step]
        if step == 0 and kept != lines:
            tqdm.write(f"{self.name} has logged steps and has no checkpoint: it begins again.")
        found = sum(line["run"] == self.name for line in kept)
        if found < self._logged:
            tqdm.write(
                f"{self._file}: of {self._logged} lines of {self.name} up to step {step}, "
                f"{self._logged - found} are gone."
            )
        if self._last is not None and self._last not in kept:
            kept.append(self._last)
            found += 1
        self._logged = found
        if damaged or kept != lines:
            replace(self._file, "".join(json.dumps(line) + "\n" for line in kept))

    @property
    def loss(self) -> str:
        """That of the last line, for the progress bar."""
        return "-" if self._last is None or self.diverged else f"{self._last['loss']:.3f}"

    def speed(self, step: int) -> dict[str, float]:
        """Steps in a second since the last record; nothing before, when programs compile."""
        if self._since is None or self._since[0] == step:
            return {}
        since, start = self._since
        return {"steps_per_second": (step - since) / (time.perf_counter() - start)}

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Saves a checkpoint."""
        rest = {
            "batches": batches.get_state(),
            "last": self._last,
            "logged": self._logged,
            "devices": self._devices,
        }
        self._checkpoints.save(step, state, rest)
        self._since = step, time.perf_counter()

    def save_snapshot(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Saves arrays of a watched step."""
        if not processes.is_first():
            return
        self._snapshots.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self._snapshots / f"{step}.npz", **jax.device_get(arrays))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds a line, with null for what is not finite."""
        loss = metrics["loss"]
        self.diverged = not math.isfinite(loss)
        if self.diverged:
            tqdm.write(f"{self.name}: the loss is {loss} at step {step}. This run ends here.")
        line, summary = {"run": self.name, "step": step}, Summary()
        for key, value in metrics.items():
            line[key] = jax.tree.map(_finite_or_none, np.asarray(value, float).tolist())
            for place, number in np.ndenumerate(value):
                summary.MergeFrom(scalar("/".join([key, *map(str, place)]), float(number)))
        self._last = line
        self._logged += 1
        if processes.is_first():
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._board.flush()
        self._since = step, time.perf_counter()


def _describe(mesh: Mesh) -> dict[str, Any]:
    """All that the order of a sum depends on: XLA divides it among the cores of a CPU too."""
    kind = mesh.devices.flat[0].device_kind
    # macOS does not bind a process to cores.
    bound = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "kind": f"{kind}, {len(bound(0))} cores" if kind == "cpu" else kind,
    }


def read_metrics(folder: Path, name: str) -> list[Line]:
    """The logged steps of a run, in order."""
    return [line for line in _read(folder / "metrics.jsonl")[0] if line["run"] == name]


def _read(file: Path) -> tuple[list[Line], int]:
    """The lines of a record, and how many others it has, which are damaged."""
    if not file.exists():
        return [], 0
    texts = file.read_text(errors="replace").splitlines()
    lines = [line for line in map(_parsed, texts) if line is not None]
    return lines, len(texts) - len(lines)


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_line = isinstance(line, dict) and {"run", "step", "loss"} <= line.keys()
    return line if is_line else None


def replace(file: Path, text: str) -> None:
    """Writes a whole file, or leaves the one that is there."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
