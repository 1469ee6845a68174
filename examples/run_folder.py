"""The folder of a run: begun once, gone on with, and never lost or mixed."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from examples import processes, recorder

# Flags that say where a run is, and not what it is: they may change when it goes on.
WHERE = {"out", "resume", "mesh", *(field.name for field in dataclasses.fields(processes.Flags))}


def begin(flags: Any) -> None:
    """Begins or goes on with the folder of a run, and its `config.json`.

    A folder that has a checkpoint or a logged step is never begun anew.

    Args:
        flags: A dataclass with `out`, the folder, and `resume`.

    Raises:
        ValueError: If it would lose or mix runs.
    """
    folder, file = flags.out, flags.out / "config.json"
    config = {k: v for k, v in dataclasses.asdict(flags).items() if k not in WHERE}
    config = json.loads(json.dumps(config, default=str))
    check_folder(folder)
    has_run = any(any(folder.glob(pattern)) for pattern in OF_A_RUN)
    if flags.resume:
        if not file.exists() and not has_run:
            raise ValueError(f"--resume: {folder} has no run. Leave --resume out to begin one.")
        before = _read_config(file)
        if different := [key for key in config if config[key] != before.get(key)]:
            raise ValueError(
                f"--resume: {folder} was begun with other flags. Give "
                + " ".join(as_flag(key, before.get(key)) for key in different)
                + ", or another --out."
            )
    elif has_run:
        raise ValueError(f"{folder} has a run. Go on with --resume, or give another --out.")
    multihost_utils.sync_global_devices("all have looked")
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if not flags.resume:
            recorder.replace(file, json.dumps(config, indent=2) + "\n")


def as_flag(name: str, value: Any) -> str:
    """How a program is given a setting."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, list) else [value]
    return f"--{flag} {shlex.join(map(str, values))}"


# What a folder has in which something was trained: itself, or those of `tau_ablation` in it.
OF_A_RUN = [
    f"{inner}{name}" for inner in ("", "*/*/") for name in ("metrics.jsonl", "checkpoints/*/*")
]


def check_folder(folder: Path) -> None:
    """Raises ValueError where a path cannot be a folder of this machine."""
    if re.match(r"[a-z][a-z0-9]+:/", str(folder)):
        raise ValueError(f"--out {folder}: name a folder of this machine, or one that is mounted.")
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"--out {str(folder)!a}: name it in UTF-8.") from None
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file. Name a folder.")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"--resume: {file} is {'damaged' if file.exists() else 'gone'}. Write it anew, by the "
            "same command with another --out, and copy it here."
        )
    return config


_locks: list[Any] = []  # a lock ends with its object


def _lock(folder: Path) -> None:
    """Keeps a folder for this process, until that ends."""
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
        _locks.append(lock)
    except Timeout:
        raise ValueError(
            f"another process trains in {folder}. Wait for it, or give another --out."
        ) from None
