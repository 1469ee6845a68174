"""The checkpoints of a run, of which a damaged one is passed over for the one before."""

import errno
import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

from examples import processes

DIGESTS = "digests.json"  # in the folder of a checkpoint, written last: of its other files
UNFINISHED = "it was not saved to its end"
_NONE, _NONE_WHOLE = -1, -2  # in place of the step of a checkpoint


class Damaged(Exception):
    """No checkpoint of a run is whole."""


class Checkpoints:
    """The two newest checkpoints of a run, each in a folder named for its step.

    Each has a tree of arrays, and whatever else is JSON. Several processes save and restore
    together.

    Raises:
        Damaged: If there are checkpoints, and none of them is whole.
    """

    def __init__(self, folder: Path):
        step = _NONE
        if processes.is_first():
            step = _pass_over_damaged(folder)
        # All come to the same one; an error comes to all.
        step = int(multihost_utils.broadcast_one_to_all(np.array(step)))
        if step == _NONE_WHOLE:
            raise Damaged(
                f"none of the checkpoints in {folder} is whole. They were renamed to damaged-*. "
                "Go on with --resume to train this run from its start."
            )
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
            OSError: If there is no space for it.
        """
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), rest=ocp.args.JsonSave(rest)
                ),
            )
        except Exception as error:  # of TensorStore, which has one kind for all
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            error.__traceback__ = None
            gc.collect()  # of what Orbax had begun, which else complains when the program ends
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder)) from None
        if processes.is_first():
            folder = self._folder / str(step)
            (folder / DIGESTS).write_text(json.dumps(_digests(folder)))
        multihost_utils.sync_global_devices("the checkpoint is whole")


def _pass_over_damaged(folder: Path) -> int:
    """The step of the newest checkpoint that is whole. Newer ones are renamed."""
    damages = []
    for step in sorted((int(f.name) for f in folder.glob("*") if f.name.isdigit()), reverse=True):
        damage = _damage(folder / str(step))
        if damage is None:
            return step
        damages.append(damage)
        renamed = f"damaged-{len(list(folder.glob('damaged-*')))}-{step}"
        (folder / str(step)).rename(folder / renamed)
        tqdm.write(f"{folder / str(step)} is not whole: {damage}. It is now {renamed}.")
    # A run that was killed in its first save has had no checkpoint yet.
    return _NONE if damages in ([], [UNFINISHED]) else _NONE_WHOLE


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        expected = json.loads((folder / DIGESTS).read_text())
        found = _digests(folder)
    except (FileNotFoundError, ValueError):
        return UNFINISHED
    except OSError as error:
        return f"it cannot be read ({error})"
    for file in expected:
        if found.get(file) != expected[file]:
            return f"{file} {'differs from what was saved' if file in found else 'is missing'}"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """The checksum of every file."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != DIGESTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b")
            digests[path.relative_to(folder).as_posix()] = digest.hexdigest()[:32]
    return digests
