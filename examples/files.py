"""The files of a data set: which they are, and whether they are still the same."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SAMPLE = 1000  # files that are looked into


def find(folder: Path) -> list[Path]:
    """All files in a folder, sorted, and links to nothing; links to folders are followed."""
    found, seen = [], set()

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # by a link to a folder above it
            folders.clear()
        else:
            paths = [Path(parent, name) for name in names]
            found += [path for path in paths if path.is_file() or not path.exists()]
        seen.add(real)
    return sorted(found)


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder on its way, is hidden."""
    return any(part.startswith(".") for part in path.parts)


def sample(files: Sequence[T]) -> Sequence[T]:
    """Some of many files, from all over."""
    return files[:: max(1, -(-len(files) // SAMPLE))]


def fingerprint(folder: Path, files: Sequence[Path]) -> str:
    """Of the names and sizes of files in a folder, and of the content of a sample of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        name = os.fsencode(file.relative_to(folder))
        digest.update(b"%s %d\n" % (name, file.stat().st_size))
    for file in sample(files):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
