"""Kill trainings at random moments, go on with them, and compare them to one that ran through."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from benchmarks import measure
from examples import recorder

TIMEOUT = 20.0  # seconds in which the workers of a killed process must end


@dataclasses.dataclass(frozen=True)
class Flags:
    """Kill `train_gpt`, and `train_vit` with worker processes, with SIGKILL."""

    programs: tuple[Literal["train_gpt", "train_vit"], ...] = ("train_gpt", "train_vit")
    """What is killed."""
    kills: int = 40
    """How often each is killed."""
    seed: int = 0
    """Of the moments."""
    out: Path = Path("runs/benchmarks/kill_and_resume")
    """The folder of the runs, and of the table."""


COMMON = "--runs adamw2 --log-every 1 --validate-every 4 --save-every 2 --steps 12".split()


def command(program: str, data: Path) -> list[str]:
    """A training of some seconds that saves every other step."""
    own = {
        "train_gpt": "--batch 4 --sequence-length 16 --validation-batches 1 --dropout 0.1".split(),
        "train_vit": ["--batch", "8", "--data", str(data), "--workers", "2"],
    }[program]
    return [sys.executable, "-m", f"examples.{program}", *COMMON, *own]


def make_images(folder: Path) -> None:
    """Noise in the layout of ImageNet."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 16), ("val", 4)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def run(arguments: list[str], out: Path, seconds: float | None) -> tuple[bool, bool]:
    """Begins a training, or goes on with it, and kills it.

    Returns:
        Whether it ended by itself before, and whether all of its workers have ended.
    """
    resume = ["--resume"] if (out / "config.json").exists() else []
    with (out.parent / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [*arguments, "--out", str(out), *resume],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        if process.wait(seconds) != 0:
            raise SystemExit(f"A training failed: see {out.parent / 'output.txt'}.")
        is_finished = True
    except subprocess.TimeoutExpired:
        is_finished = False
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return is_finished, wait_for_workers(process.pid)


def wait_for_workers(group: int) -> bool:
    """Whether all processes of a group end in time."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    os.killpg(group, signal.SIGKILL)
    return False


def record(out: Path) -> list[dict[str, Any]]:
    """The logged steps, without their speed."""
    return [
        {key: value for key, value in line.items() if key != "steps_per_second"}
        for line in recorder.read_metrics(out, "adamw2")
    ]


def main(flags: Flags) -> None:
    """Prints the table."""
    moments = random.Random(flags.seed)
    rows = []
    for program in flags.programs:
        folder = flags.out / program
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_images(folder / "images")
        arguments = command(program, folder / "images")
        for out in ("whole", "timed"):  # the second finds its programs compiled
            start = time.monotonic()
            run(arguments, folder / out, None)
            duration = time.monotonic() - start
        expected = record(folder / "whole")

        finished = True
        counts = dict.fromkeys(("kills", "finished", "equal to the bit", "workers left"), 0)
        while counts["kills"] < flags.kills or not finished:
            out = folder / f"killed-{counts['finished']}"
            is_last = counts["kills"] == flags.kills
            finished, ended = run(
                arguments, out, None if is_last else moments.uniform(0, 1.2 * duration)
            )
            counts["workers left"] += not ended
            if finished:
                counts["finished"] += 1
                counts["equal to the bit"] += record(out) == expected
            else:
                counts["kills"] += 1
        rows.append({"program": program, **counts})
    measure.report(rows, flags.out / "table.json")


if __name__ == "__main__":
    main(tyro.cli(Flags))
