"""The files of a data set: which they are, and whether they are still the same."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

SAMPLE = 1000  # files whose content is in a fingerprint


def find(folder: Path) -> list[Path]:
    """All files in a folder, sorted; links to folders are followed."""
    found, seen = [], set()

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # by a link to a folder above it
            folders.clear()
        else:
            found += [file for name in names if (file := Path(parent, name)).is_file()]
        seen.add(real)
    return sorted(found)


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder on its way, is hidden."""
    return any(part.startswith(".") for part in path.parts)


def fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """Of the names and sizes of files in a folder, and of the content of some from all over."""
    files, digest = list(files), hashlib.blake2b(digest_size=16)
    step = -(-len(files) // SAMPLE)
    for i, file in enumerate(files):
        name = os.fsencode(file.relative_to(folder))
        digest.update(b"%s %d\n" % (name, file.stat().st_size))
        if i % step == 0:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
