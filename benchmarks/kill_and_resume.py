"""Harm trainings at random moments, go on with them, and compare them to one that ran through."""

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import tyro
from PIL import Image

from benchmarks import measure
from examples import recorder

TIMEOUT = 60.0  # seconds in which all processes must end after a harm
BEGUN = "held out."  # what the programs print as they begin
GO_ON = re.compile(r"go on with the same command and --resume\.", re.IGNORECASE)
COMMON = "--runs adamw2 --log-every 1 --validate-every 4 --save-every 2 --steps 12".split()
PROGRAMS = {
    "train_gpt": "--batch 4 --sequence-length 16 --validation-batches 1 --dropout 0.1".split(),
    "train_vit": "--batch 8 --workers 2".split(),
}


def kill(processes: list[subprocess.Popen[bytes]], chance: random.Random) -> None:
    """Kills one of the processes, where they are several; as the kernel does for want of memory."""
    chance.choice(processes).kill()


def kill_reader(processes: list[subprocess.Popen[bytes]], chance: random.Random) -> None:
    """Kills a process that reads images, once there is one."""
    (program,) = processes
    while program.poll() is None:
        if readers := _readers(program.pid):
            os.kill(chance.choice(readers), signal.SIGKILL)
            return
        time.sleep(0.05)


def _readers(program: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):  # of what ends meanwhile
        for children in Path(f"/proc/{program}/task").glob("*/children"):
            for pid in children.read_text().split():
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


def press_ctrl_c(processes: list[subprocess.Popen[bytes]], chance: random.Random) -> None:
    """Sends SIGINT to a process and all that it has started, as a terminal does."""
    del chance
    os.killpg(processes[0].pid, signal.SIGINT)


class Case(NamedTuple):
    """What is harmed, and how."""

    program: Literal["train_gpt", "train_vit"]
    harm: Callable[[list[subprocess.Popen[bytes]], random.Random], None]
    number: int = 1  # of processes
    says: bool = True  # what to do, as the kernel lets it


Name: TypeAlias = Literal["gpt_killed", "vit_killed", "ctrl_c", "reader_killed", "partner_killed"]
CASES: dict[Name, Case] = {
    "gpt_killed": Case("train_gpt", kill, says=False),
    "vit_killed": Case("train_vit", kill, says=False),
    "ctrl_c": Case("train_vit", press_ctrl_c),
    "reader_killed": Case("train_vit", kill_reader),
    "partner_killed": Case("train_gpt", kill, number=2),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Harm `train_gpt`, and `train_vit` with worker processes, again and again."""

    cases: tuple[Name, ...] = tuple(CASES)
    """What is killed; or Ctrl-C; a partner is one of two processes."""
    harms: int = 40
    """How often in each case."""
    seed: int = 0
    """Of the moments."""
    out: Path = Path("runs/benchmarks/kill_and_resume")
    """The folder of the runs, and of the table."""


def make_images(folder: Path) -> None:
    """Noise in the layout of ImageNet."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 16), ("val", 4)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


class Training:
    """The processes of a training, each in a group of its own, with what they say."""

    def __init__(self, case: Case, out: Path, images: Path):
        arguments = [*COMMON, *PROGRAMS[case.program], "--out", str(out)]
        if case.program == "train_vit":
            arguments += ["--data", str(images)]
        if (out / "config.json").exists():
            arguments.append("--resume")
        if case.number > 1:
            with socket.create_server(("localhost", 0)) as free:
                port = free.getsockname()[1]
            arguments += ["--coordinator", f"localhost:{port}"]
            arguments += ["--num-processes", str(case.number)]
        self._says = case.says
        self._outputs = [out.parent / f"output-{i}.txt" for i in range(case.number)]
        self.processes = []
        for i, output in enumerate(self._outputs):
            own = ["--process-id", str(i)] * (case.number > 1)
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", f"examples.{case.program}", *arguments, *own],
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )
            self.processes.append(process)

    def wait(self, seconds: float) -> bool:
        """Whether all processes end in time."""
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def wait_until_begun(self) -> None:
        while BEGUN not in self._outputs[0].read_text(errors="replace") and not self.wait(0.05):
            pass

    @property
    def is_finished(self) -> bool:
        return all(process.returncode == 0 for process in self.processes)

    def says_what_to_do(self) -> bool:
        """Whether each process that was not killed, nor finished, ended with our line alone."""
        texts = [
            output.read_text(errors="replace")
            for process, output in zip(self.processes, self._outputs, strict=True)
            if process.returncode not in (0, -signal.SIGKILL)
        ]
        return all(GO_ON.search(text) and "Traceback" not in text for text in texts)

    def end(self) -> int:
        """Ends what is left after some time, and tells how many groups had something left."""
        end, left = time.monotonic() + TIMEOUT, 0
        for process in self.processes:
            self.wait(end - time.monotonic())
            while _is_there(process.pid) and time.monotonic() < end:
                time.sleep(0.1)
            if _is_there(process.pid):
                left += 1
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return left


def _is_there(group: int) -> bool:
    """Whether any process of a group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def record(out: Path) -> list[dict[str, Any]]:
    """The logged steps, without their speed."""
    return [
        {key: value for key, value in line.items() if key != "steps_per_second"}
        for line in recorder.read_metrics(out, "adamw2")
    ]


def harm_again_and_again(name: Name, flags: Flags) -> dict[str, Any]:
    """A row of the table."""
    case, chance = CASES[name], random.Random(flags.seed)
    folder = flags.out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_images(folder / "images")
    duration = 0.0
    for whole in ("whole", "timed"):  # the second finds its programs compiled
        training, start = Training(case, folder / whole, folder / "images"), time.monotonic()
        if case.says:
            training.wait_until_begun()
            start = time.monotonic()
        training.wait(3600)
        duration = time.monotonic() - start
        if training.end() or not training.is_finished:
            raise SystemExit(f"error: a training failed that nobody harmed: see {folder}.")
    expected = record(folder / "whole")

    counts = dict.fromkeys(("harms", "finished", "equal to the bit", "processes left"), 0)
    silent = 0
    while counts["harms"] < flags.harms or (folder / f"run-{counts['finished']}").exists():
        out = folder / f"run-{counts['finished']}"
        training = Training(case, out, folder / "images")
        if case.says:  # Python itself answers Ctrl-C while it imports
            training.wait_until_begun()
        is_last = counts["harms"] >= flags.harms
        is_harmed = not training.wait(3600 if is_last else chance.uniform(0, 1.2 * duration))
        if is_harmed:
            case.harm(training.processes, chance)
            counts["harms"] += 1
        counts["processes left"] += training.end()
        if training.is_finished:
            counts["finished"] += 1
            counts["equal to the bit"] += record(out) == expected
        elif not is_harmed:
            raise SystemExit(f"error: a training failed that nobody harmed: see {folder}.")
        elif case.says and not training.says_what_to_do():
            silent += 1
            for i in range(case.number):
                shutil.copy(folder / f"output-{i}.txt", folder / f"silent-{silent}-{i}.txt")
    return {"case": name, **counts, "without our line": silent if case.says else "-"}


def main(flags: Flags) -> None:
    """Prints the table."""
    rows = []
    for name in flags.cases:
        rows.append(harm_again_and_again(name, flags))
        measure.report(rows, flags.out / "table.json")


if __name__ == "__main__":
    main(tyro.cli(Flags))
