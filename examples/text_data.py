"""Text as tokens, and batches of it from Grain."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from grain.sharding import ShardOptions

from examples import shards

VALIDATION_SHARE = 0.1  # of a text, its end
GPT2_VOCAB_SIZE = 50257
HEADER = 256  # numbers of 32 bits: which kind, version, number of tokens
LLM_C_DTYPES = {20240520: np.uint16, 20240801: np.uint32}  # by kind
CHUNK = 1 << 24  # tokens


class Corpus(NamedTuple):
    """Tokens to train on and tokens held out, 1-d arrays of uint8, uint16 or uint32."""

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    is_text: bool  # a token is a byte


def load_corpus(path: Path | None) -> Corpus:
    """Reads a corpus.

    Args:
        path: A text file, a folder of text files, or a folder with nanoGPT's `train.bin`
            and `val.bin`: tokens of GPT-2's vocabulary, uint16 or uint32, with or without the
            header of llm.c. By default, the modules of Python's standard library.

    Raises:
        ValueError: If there is nothing to read there, or if a token is outside of the vocabulary.
    """
    if path is None:
        modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
        return _from_text(sorted(modules))
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder.")
    if path.is_file() and path.suffix != ".bin":
        return _from_text([path])
    folder = path if path.is_dir() else path.parent
    if (folder / "train.bin").exists():
        return _from_bin(folder)
    if path.is_file():
        raise ValueError(f"--data {path}: {folder} has no train.bin beside it.")
    return _from_text(sorted(p for p in path.rglob("*") if p.is_file()))


def _from_text(paths: list[Path]) -> Corpus:
    """The bytes of the files one after another, those that are no UTF-8 text left out."""
    texts = [text for text in (path.read_bytes() for path in paths) if _is_text(text)]
    tokens = np.frombuffer(b"\n".join(texts), np.uint8)
    if tokens.size == 0:
        raise ValueError("--data: no text there. Name a text file, or a folder that has some.")
    split = round(tokens.size * (1 - VALIDATION_SHARE))
    return Corpus(tokens[:split], tokens[split:], vocab_size=256, is_text=True)


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _from_bin(folder: Path) -> Corpus:
    if not (folder / "val.bin").exists():
        raise ValueError(f"--data: {folder} has train.bin, but no val.bin beside it.")
    train, validation = (_tokens(folder / name) for name in ("train.bin", "val.bin"))
    return Corpus(train, validation, GPT2_VOCAB_SIZE, is_text=False)


def _tokens(file: Path) -> np.ndarray:
    """The tokens of a file, mapped, and all of them looked at."""
    tokens = _mapped(file)
    for start in range(0, tokens.size, CHUNK):
        outside = np.flatnonzero(tokens[start : start + CHUNK] >= GPT2_VOCAB_SIZE)
        if outside.size:
            position = start + int(outside[0])
            raise ValueError(
                f"--data: {file} has the token {tokens[position]} at position {position}, outside "
                f"of GPT-2's vocabulary of {GPT2_VOCAB_SIZE}. It may be text of another tokenizer."
            )
    return tokens


def _mapped(file: Path) -> np.ndarray:
    size = file.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(
            f"--data: {file} has {size} bytes, not 2 (uint16) or 4 (uint32) for each token."
        )
    header = np.fromfile(file, np.int32, HEADER)
    if header.size == HEADER and header[0] in LLM_C_DTYPES:
        dtype, number = LLM_C_DTYPES[int(header[0])], int(header[2])
        if size != 4 * HEADER + number * np.dtype(dtype).itemsize:
            raise ValueError(
                f"--data: the header of {file} tells of {number} tokens, and the file has {size} "
                f"bytes, of which each token takes {np.dtype(dtype).itemsize}. It may be cut off."
            )
        return np.memmap(file, dtype, mode="r", offset=4 * HEADER)
    tokens = np.memmap(file, np.uint16, mode="r")
    # Of 32 bits the upper half is next to nothing, in every token.
    lower, upper = tokens[:CHUNK:2], tokens[1:CHUNK:2]
    if size % 4 == 0 and upper.max() <= 3 < lower.max():
        return np.memmap(file, np.uint32, mode="r")
    return tokens


class Windows(grain.sources.RandomAccessDataSource):
    """The consecutive windows of `length` tokens of a corpus, each with the token after it."""

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens, self._length = tokens, length
        if len(self) < 1:
            raise ValueError(
                f"The text has {tokens.size} tokens, too few for one window of {length} and the "
                "token after it. Give more text, or a smaller --sequence-length."
            )

    def __len__(self) -> int:
        return (self._tokens.size - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._length
        return np.asarray(self._tokens[start : start + self._length + 1], np.int32)


def training_batches(
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    seed: int,
    shard: ShardOptions = shards.ALL_ROWS,
) -> grain.DatasetIterator:
    """Endless batches (batch_size, length + 1), every epoch in an order of its own.

    A shard has its rows of every batch, see `shards.batch`.
    """
    windows = grain.MapDataset.source(Windows(tokens, length))
    shuffled = windows.seed(seed).shuffle().repeat()
    return iter(shards.batch(shuffled, batch_size, shard).to_iter_dataset())


def validation_batches(
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    num_batches: int,
    shard: ShardOptions = shards.ALL_ROWS,
) -> list[np.ndarray]:
    """Batches (batch_size, length + 1), always the same, from all over the tokens.

    A shard has its rows of every batch.
    """
    windows = Windows(tokens, length)
    places = np.linspace(0, len(windows) - 1, num_batches * batch_size).astype(int)
    rows = np.stack([windows[i] for i in places])
    shares = rows.reshape(num_batches, shard.shard_count, -1, length + 1)
    return list(shares[:, shard.shard_index])
