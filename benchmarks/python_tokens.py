"""A text of tokens without a download: the Python files of the environment, word by word.

It is real text, over a vocabulary as large as that of GPT-2, and differs with what is installed:
what is trained on it on one machine can be compared, and nothing else.
"""

import dataclasses
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

VOCAB_SIZE = 50257  # that of GPT-2
HEADER = (20240520, 1)  # of the GPT-2 speedruns: which kind, version, and then how many tokens
WORD = re.compile(r" ?[A-Za-z]+|[0-9]|\s+|[^\w\s]|\w")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Write train.bin and val.bin, a tenth of all tokens, as the GPT-2 speedruns do."""

    out: Path
    """The folder."""
    megabytes: float = 120.0
    """Text to read, if there is as much."""


def texts(most: float) -> Iterator[str]:
    """The files of the standard library, and then of what is installed, up to some bytes."""
    for kind in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(kind)).rglob("*.py")):
            if kind == "stdlib" and "site-packages" in file.parts:
                continue
            text = file.read_text(errors="ignore")
            if (most := most - len(text)) < 0:
                return
            yield text


def write(file: Path, tokens: np.ndarray) -> None:
    """Writes tokens behind a header."""
    header = np.zeros(256, np.int32)
    header[:3] = *HEADER, tokens.size
    file.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def main(flags: Flags) -> None:
    """Writes the files, and prints how much is in them."""
    counts: Counter[str] = Counter()
    for text in texts(1e6 * flags.megabytes):
        counts.update(WORD.findall(text))
    rare = VOCAB_SIZE - 1  # one token for all words that have none
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(rare))}
    parts = [
        np.array([ids.get(word, rare) for word in WORD.findall(text)], np.uint16)
        for text in texts(1e6 * flags.megabytes)
    ]
    # Every tenth file is held out, from all over.
    flags.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (
        ("val", parts[9::10]),
        ("train", [part for i, part in enumerate(parts) if i % 10 != 9]),
    ):
        tokens = np.concatenate(chosen)
        write(flags.out / f"{name}.bin", tokens)
        print(f"{flags.out / name}.bin: {tokens.size:,} tokens, {len(ids):,} words")


if __name__ == "__main__":
    main(tyro.cli(Flags))
