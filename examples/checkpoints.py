"""The checkpoints of a run, of which a damaged one is passed over for the one before."""

import contextlib
import errno
import gc
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

from examples import processes

# In the folder of a checkpoint, written last: its run, its step, and the digests of its files.
LABEL = "digests.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNFINISHED = "it was not saved to its end"
_NONE, _REFUSED = -1, -2  # in place of the step of a checkpoint


class Damaged(Exception):
    """No checkpoint of a run is whole, or one is not of this run."""


class Checkpoints:
    """The two newest checkpoints of a run, each in a folder named for its step.

    Each has a tree of arrays, and whatever else is JSON. Several processes save and restore
    together.

    Args:
        folder: That of the checkpoints.
        run: What tells this run from others, JSON. Each checkpoint says it of itself; its `data`
            is a fingerprint.

    Raises:
        Damaged: If there are checkpoints, and none of them is whole, or the newest is not of this
            run or not of the step for which it is named.
    """

    def __init__(self, folder: Path, run: dict[str, Any]):
        self._run = json.loads(json.dumps(run, default=str))
        step, refusal = _NONE, "The first process says why it cannot go on."
        if processes.is_first():
            try:
                step = _newest(folder, self._run)
            except Damaged as error:
                step, refusal = _REFUSED, str(error)
        # All come to the same one; an error comes to all.
        step = int(multihost_utils.broadcast_one_to_all(np.array(step)))
        if step == _REFUSED:
            raise Damaged(refusal)
        self.latest_step = None if step == _NONE else step
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def close(self) -> None:
        self._manager.close()

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The arrays of the newest checkpoint, like `state`, and all else that it has."""
        saved = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(
                    jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
                ),
                rest=ocp.args.JsonRestore(),
            ),
        )
        return saved["state"], saved["rest"]

    def save(self, step: int, state: Any, rest: dict[str, Any]) -> None:
        """Adds a checkpoint, and removes all but the two newest.

        Raises:
            OSError: If there is no space for it, or files may not be as large.
        """
        with _quiet():
            try:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), rest=ocp.args.JsonSave(rest)
                    ),
                )
            except Exception as error:  # of TensorStore, which has one kind for all
                number = next((n for n in NO_SPACE if os.strerror(n) in str(error)), None)
                if number is None:
                    raise
                error.__traceback__ = None
                time.sleep(1)  # until what Orbax had begun has failed too
                gc.collect()
                raise OSError(number, os.strerror(number), str(self._folder)) from None
        if processes.is_first():
            folder = self._folder / str(step)
            label = {"run": self._run, "step": step, "files": _digests(folder)}
            (folder / LABEL).write_text(json.dumps(label))
        multihost_utils.sync_global_devices("the checkpoint is whole")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what threads of Orbax and TensorStore print of an error that is raised here too."""
    logging.disable()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _newest(folder: Path, run: dict[str, Any]) -> int:
    """The step of the newest checkpoint that is whole. Newer ones are renamed."""
    damages = []
    for step in sorted((int(f.name) for f in folder.glob("*") if f.name.isdigit()), reverse=True):
        damage = _damage(folder / str(step))
        if damage is None:
            _check_label(folder / str(step), run)
            return step
        damages.append(damage)
        renamed = f"damaged-{len(list(folder.glob('damaged-*')))}-{step}"
        (folder / str(step)).rename(folder / renamed)
        tqdm.write(f"{folder / str(step)} is not whole: {damage}. It is now {renamed}.")
    # A run that was killed in its first save has had no checkpoint yet.
    if damages in ([], [UNFINISHED]):
        return _NONE
    raise Damaged(
        f"none of the checkpoints in {folder} is whole. They were renamed to damaged-*. "
        "Go on with --resume to train this run from its start."
    )


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        label = json.loads((folder / LABEL).read_text())
        found = _digests(folder)
    except (FileNotFoundError, ValueError):
        return UNFINISHED
    except OSError as error:
        return f"it cannot be read ({error})"
    if not (
        isinstance(label, dict)
        and label.keys() == {"run", "step", "files"}
        and isinstance(label["run"], dict)
        and isinstance(label["files"], dict)
    ):
        return f"{LABEL} does not say what was saved"
    expected = label["files"]
    for file in expected | found:
        if found.get(file) != expected.get(file):
            how = "differs from what was saved" if file in found else "is missing"
            return f"{file} {how if file in expected else 'was not saved with it'}"
    return None


def _check_label(folder: Path, run: dict[str, Any]) -> None:
    """Raises Damaged where a checkpoint says that it is another one."""
    label = json.loads((folder / LABEL).read_text())
    if str(label["step"]) != folder.name:
        raise Damaged(f"{folder} is the checkpoint of step {label['step']}: name it so again.")
    if label["run"] == run:
        return
    names = [name for name in run | label["run"] if run.get(name) != label["run"].get(name)]
    if "data" in names:
        raise Damaged(
            f"the data are not those on which {folder.parent.name} was trained up to step "
            f"{label['step']} in {folder.parent}. Put those back, or give another --out."
        )
    how = ", ".join(f"{name} {label['run'].get(name)}, not {run.get(name)}" for name in names)
    raise Damaged(
        f"{folder} is the checkpoint of another run, with {how}. Put back the one that was there, "
        "or remove it to go on from the one before."
    )


def _digests(folder: Path) -> dict[str, str]:
    """The checksum of every file."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != LABEL:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b")
            digests[path.relative_to(folder).as_posix()] = digest.hexdigest()[:32]
    return digests
