"""Text as tokens, and batches of it from Grain."""

import codecs
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from grain.sharding import ShardOptions

from examples import files, shards

VALIDATION_SHARE = 0.1  # of a text, its end
GPT2_VOCAB_SIZE = 50257
HEADER = 256  # numbers of 32 bits: which kind, version, number of tokens
LLM_C_DTYPES = {20240520: np.uint16, 20240801: np.uint32}  # by kind
SPEEDRUN_TRAIN, SPEEDRUN_VALIDATION = "*_train_*.bin", "*_val_*.bin"  # 100 M tokens each
SPEEDRUN_VALIDATION_SIZE = 20 * 2**19 + 1  # the tokens that count, and a target for the last
CHUNK = 1 << 24  # tokens, or bytes of text
NAMED = 10  # files that are left out, of a folder
LOOKED_AT, MOST = 1 << 20, 0.9  # the numbers that say what a file has, and how many of them must
OTHER_DTYPES = (np.int64, np.float64, np.float32, np.float16)  # the wider first


class Corpus(NamedTuple):
    """Tokens to train on and tokens held out, 1-d arrays of uint8, uint16 or uint32."""

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    is_text: bool  # a token is a byte
    fingerprint: str  # of all tokens


def load_corpus(path: Path | None) -> Corpus:
    """Reads a corpus.

    Args:
        path: A text file in UTF-8, a folder of them, or a folder with nanoGPT's `train.bin`
            and `val.bin`: tokens of GPT-2's vocabulary, uint16 or uint32, with or without the
            header of llm.c. Or a folder with the files of the GPT-2 speedruns (modded-nanogpt's
            `fineweb_train_000001.bin` and so on), all of which are trained on, and of whose
            validation file the first 10,485,760 tokens count. By default, the modules of
            Python's standard library. What is left out of a folder is printed.

    Raises:
        ValueError: If there is nothing to read there, or if a token is outside of the vocabulary.
    """
    if path is None:
        modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
        return _from_text(sorted(modules))[0]
    if path.is_file() and path.suffix != ".bin":
        return _from_text([path])[0]
    if path.is_file() and path.match(SPEEDRUN_TRAIN):
        return _from_speedrun(path.parent)
    if path.is_file() and path.name == "train.bin":
        path = path.parent
    elif path.is_file():
        raise ValueError(f"--data {path}: name its folder. Its train.bin and val.bin are read.")
    if not path.is_dir():
        raise ValueError(f"--data {path}: no such file or folder.")
    if (path / "train.bin").is_file():
        return _from_bin(path)
    if any(path.glob(SPEEDRUN_TRAIN)):
        return _from_speedrun(path)
    return _from_folder(path)


def _from_folder(folder: Path) -> Corpus:
    """The text files of a folder. What is left out is printed."""
    found = files.find(folder)
    shown = [file for file in found if not files.is_hidden(file.relative_to(folder))]
    corpus, left_out = _from_text(shown)
    print(
        f"{folder}: {len(shown) - len(left_out)} text files, {len(left_out)} other files and "
        f"{len(found) - len(shown)} hidden ones left out"
    )
    for file, why in list(left_out.items())[:NAMED]:
        print(f"  {file.relative_to(folder)}: {why}")
    if len(left_out) > NAMED:
        print(f"  and {len(left_out) - NAMED} more")
    return corpus


def _from_text(paths: Sequence[Path]) -> tuple[Corpus, dict[Path, str]]:
    """The bytes of the files one after another, and why some are left out."""
    text, left_out = bytearray(), {}
    for path in paths:
        end = len(text)
        if end:
            text += b"\n"
        if why := _add(path, text):
            left_out[path] = why
            del text[end:]
    if not text:
        raise ValueError(
            "--data: no text there. Name a text file in UTF-8 (iconv converts others), or a folder "
            "that has some." + "".join(f" {path}: {why}." for path, why in [*left_out.items()][:1])
        )
    tokens = np.frombuffer(text, np.uint8)
    split = round(tokens.size * (1 - VALIDATION_SHARE))
    parts = tokens[:split], tokens[split:]
    return Corpus(*parts, vocab_size=256, is_text=True, fingerprint=_digest(*parts)), left_out


def _add(path: Path, text: bytearray) -> str | None:
    """Adds the bytes of a file to a text, or says why it is none."""
    if not path.exists():
        return "a link to nothing"
    decoder, start = codecs.getincrementaldecoder("utf-8")(), len(text)
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK)
            begin = len(text) - start - len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return f"not UTF-8 at byte {begin + error.start}"
            if b"\0" in chunk:
                return f"no text: byte {len(text) - start + chunk.index(0)} is zero"
            if not chunk:
                return None
            text += chunk


def _digest(*parts: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part.size}\n".encode())
        digest.update(part)
    return digest.hexdigest()


def _from_bin(folder: Path) -> Corpus:
    if not (folder / "val.bin").exists():
        raise ValueError(f"--data: {folder} has train.bin, but no val.bin beside it.")
    return _corpus(_tokens(folder / "train.bin"), _tokens(folder / "val.bin"))


def _from_speedrun(folder: Path) -> Corpus:
    train, validation = (
        [_tokens(file) for file in sorted(folder.glob(pattern))]
        for pattern in (SPEEDRUN_TRAIN, SPEEDRUN_VALIDATION)
    )
    if not validation:
        raise ValueError(f"--data: {folder} has no {SPEEDRUN_VALIDATION} beside the others.")
    return _corpus(np.concatenate(train), np.concatenate(validation)[:SPEEDRUN_VALIDATION_SIZE])


def _corpus(train: np.ndarray, validation: np.ndarray) -> Corpus:
    fingerprint = _digest(train, validation)
    return Corpus(train, validation, GPT2_VOCAB_SIZE, is_text=False, fingerprint=fingerprint)


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
    """The tokens of a file, by its header, or else by what its numbers look like."""
    size = file.stat().st_size
    with file.open("rb") as content:
        beginning = content.read(4096)
    header = np.fromfile(file, np.int32, HEADER)
    if header.size == HEADER and header[0] in LLM_C_DTYPES:
        dtype, version, number = LLM_C_DTYPES[int(header[0])], int(header[1]), int(header[2])
        if version != 1:
            raise ValueError(f"--data: {file} is of version {version}, and only 1 can be read.")
        if size != 4 * HEADER + number * np.dtype(dtype).itemsize:
            raise ValueError(
                f"--data: the header of {file} tells of {number} tokens, and the file has {size} "
                f"bytes, of which each token takes {np.dtype(dtype).itemsize}. It may be cut off."
            )
        return np.memmap(file, dtype, mode="r", offset=4 * HEADER)
    if what := "a NumPy file" * beginning.startswith(b"\x93NUMPY") or _text(beginning):
        raise _no_tokens(file, what)
    if size == 0 or size % 2:
        raise ValueError(
            f"--data: {file} has {size} bytes, not 2 (uint16) or 4 (uint32) for each token."
        )
    tokens = np.memmap(file, np.uint16, mode="r")
    some = np.asarray(tokens[:LOOKED_AT])
    if some.max() <= 3:
        return tokens
    for dtype in OTHER_DTYPES:
        if _most_are_ids(some[: some.size // 4 * 4].view(dtype)):
            raise _no_tokens(file, f"numbers of {np.dtype(dtype)}")
    # Of 32 bits the upper half is next to nothing.
    if np.mean(some[1::2] <= 3) > MOST and some[::2].max() > 3:
        if size % 4:
            raise ValueError(
                f"--data: {file} has {size} bytes, and looks like tokens of uint32, each of which "
                "takes 4. It may be cut off."
            )
        return np.memmap(file, np.uint32, mode="r")
    return tokens


def _no_tokens(file: Path, what: str) -> ValueError:
    return ValueError(
        f"--data: {file} is {what}, not tokens of uint16 or uint32. Write them by "
        f"np.asarray(tokens, np.uint16).tofile({file.name!r})."
    )


def _text(beginning: bytes) -> str:
    """What a file is that begins as text does: tokens below 256 have a byte of zero."""
    text = beginning.decode(errors="ignore")
    is_text = len(text.encode()) > len(beginning) - 4 and all(
        c.isprintable() or c.isspace() for c in text
    )
    return "text" * (is_text and len(text) > 0)


def _most_are_ids(values: np.ndarray) -> bool:
    """Whether numbers are whole and not negative, all but a few."""
    with np.errstate(all="ignore"):
        values = values.astype(np.float64)
        are_ids = (values >= 0) & (values < 2**31) & (values == np.floor(values))
    return values.size > 0 and bool(np.mean(are_ids) > MOST)


def split_test(corpus: Corpus) -> tuple[Corpus, np.ndarray]:
    """A corpus whose validation is half of what was held out, and a test set: the other half."""
    half = corpus.validation.size // 2
    return corpus._replace(validation=corpus.validation[:half]), corpus.validation[half:]


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
