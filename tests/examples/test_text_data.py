import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from grain.sharding import ShardOptions

from examples import text_data
from examples.shards import ALL_ROWS
from examples.text_data import Windows, load_corpus, training_batches, validation_batches


def test_the_default_is_the_standard_library():
    corpus = load_corpus(None)
    assert corpus.vocab_size == 256
    assert corpus.train.size > 1_000_000
    assert 0.09 < corpus.validation.size / corpus.train.size < 0.12
    assert b"import " in corpus.train.tobytes()


def test_a_text_file_is_split_at_nine_tenths(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(100))
    (tmp_path / "text").write_text(text)
    corpus = load_corpus(tmp_path / "text")
    assert corpus.train.tobytes().decode() == text[:90]
    assert corpus.validation.tobytes().decode() == text[90:]


def test_of_what_is_held_out_half_can_be_a_test_set(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(110))
    (tmp_path / "text").write_text(text)
    corpus, test = text_data.split_test(load_corpus(tmp_path / "text"))
    parts = [part.tobytes().decode() for part in (corpus.train, corpus.validation, test)]
    assert parts == [text[:99], text[99:104], text[104:]]


def test_a_folder_is_read_in_order_without_what_is_no_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("last")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "zeros").write_bytes(b"a\0b")
    corpus = load_corpus(tmp_path)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"first\nlast"


def test_nanogpt_tokens_are_mapped_not_read(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    for path in (tmp_path, tmp_path / "train.bin"):
        corpus = load_corpus(path)
        assert isinstance(corpus.train, np.memmap)
        assert (corpus.vocab_size, corpus.is_text) == (50257, False)
        np.testing.assert_array_equal(corpus.train, np.arange(1000))
        np.testing.assert_array_equal(corpus.validation, np.arange(50))


def test_a_file_of_tokens_is_not_another_that_lies_beside_it(tmp_path):
    for name in ("train.bin", "val.bin", "mine.bin"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / name)
    with pytest.raises(ValueError, match=r"mine\.bin: name its folder\. Its train\.bin and"):
        load_corpus(tmp_path / "mine.bin")


def test_what_is_neither_file_nor_folder():
    with pytest.raises(ValueError, match="--data /dev/null: no such file or folder"):
        load_corpus(Path("/dev/null"))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("has_header", [False, True])
def test_tokens_of_both_widths_with_and_without_a_header_are_the_same(tmp_path, dtype, has_header):
    kind = {np.uint16: 20240520, np.uint32: 20240801}[dtype]
    expected = {"train": np.arange(1000) * 50, "val": np.arange(1, 50)}
    for name, tokens in expected.items():
        header = np.zeros(256 * has_header, np.int32)
        header[:3] = (kind, 1, tokens.size)[: header.size]
        with (tmp_path / f"{name}.bin").open("wb") as file:
            file.write(header.tobytes() + tokens.astype(dtype).tobytes())
    corpus = load_corpus(tmp_path)
    assert isinstance(corpus.train, np.memmap)
    np.testing.assert_array_equal(corpus.train, expected["train"])
    np.testing.assert_array_equal(corpus.validation, expected["val"])
    if has_header:
        (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes()[:-4])
        with pytest.raises(ValueError, match=r"tells of 49 tokens.* It may be cut off"):
            load_corpus(tmp_path)


def write_speedrun(file, tokens, version=1):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, version, len(tokens)
    file.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def test_the_files_of_the_speedruns_are_one_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(text_data, "SPEEDRUN_VALIDATION_SIZE", 31)
    for i in (2, 1):  # written in another order than that of their names
        write_speedrun(tmp_path / f"fineweb_train_{i:06}.bin", np.arange(100) + 1000 * i)
    with pytest.raises(ValueError, match=r"has no \*_val_\*\.bin beside the others"):
        load_corpus(tmp_path)
    write_speedrun(tmp_path / "fineweb_val_000000.bin", np.arange(50))
    for path in (tmp_path, tmp_path / "fineweb_train_000001.bin"):
        corpus = load_corpus(path)
        expected = np.concatenate([np.arange(1000, 1100), np.arange(2000, 2100)])
        np.testing.assert_array_equal(corpus.train, expected)
        np.testing.assert_array_equal(corpus.validation, np.arange(31))
        assert (corpus.vocab_size, corpus.is_text) == (50257, False)
    # All that counts is in the validation, once: 3 batches of 2 windows of 5 tokens.
    batches = validation_batches(corpus.validation, 5, 2, 3)
    np.testing.assert_array_equal(np.concatenate(batches)[:, 0], np.arange(0, 30, 5))
    write_speedrun(tmp_path / "fineweb_train_000001.bin", np.arange(100), version=2)
    with pytest.raises(ValueError, match=r"000001\.bin is of version 2, and only 1 can be read"):
        load_corpus(tmp_path)


def test_a_token_outside_of_the_vocabulary_is_found_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_data, "CHUNK", 64)
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    tokens = np.arange(1000, dtype=np.uint16)
    tokens[777] = 60000
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin has the token 60000 at position 777"):
        load_corpus(tmp_path)
    np.array([1, 70000], np.uint32).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin has the token 70000 at position 1,"):
        load_corpus(tmp_path)


IDS = np.random.default_rng(0).integers(0, 50257, 5000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IDS.astype("<u4").tobytes()[:-2], r"19998 bytes, and looks like .*uint32.* be cut off"),
        (IDS.astype("<i8").tobytes(), "is numbers of int64, not tokens of uint16 or uint32"),
        (IDS.astype("<i8").tobytes()[:-2], "is numbers of int64"),
        (np.where(IDS % 50, IDS, -100).astype("<i8").tobytes(), "is numbers of int64"),
        (IDS.astype("<f2").tobytes(), r"is numbers of float16.* Write them by"),
        (IDS.astype("<f4").tobytes(), "is numbers of float32"),
        (IDS.astype("<f8").tobytes(), "is numbers of float64"),
        (np.r_[IDS, 300_000].astype("<u4").tobytes(), "has the token 300000 at position 5000"),
        ("Plain text — in UTF-8.\n".encode() * 300, "is text, not tokens"),
        (b"\x93NUMPY\x01\0" + IDS.astype("<u2").tobytes(), "is a NumPy file, not tokens"),
    ],
)
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_what_is_no_tokens_is_named(tmp_path, content, message, name):
    for file in ("train.bin", "val.bin"):
        IDS.astype(np.uint16).tofile(tmp_path / file)
    load_corpus(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"--data: .*{name}.*{message}"):
        load_corpus(tmp_path)


def test_the_fingerprint_is_that_of_all_tokens(tmp_path):
    def fingerprint():
        return load_corpus(tmp_path).fingerprint

    for file in ("train.bin", "val.bin"):
        IDS.astype(np.uint16).tofile(tmp_path / file)
    before = fingerprint()
    assert fingerprint() == before
    for file in ("train.bin", "val.bin"):
        for place in (0, 2500, 4999):
            changed = IDS.copy()
            changed[place] ^= 1
            changed.astype(np.uint16).tofile(tmp_path / file)
            assert fingerprint() != before
        IDS.astype(np.uint16).tofile(tmp_path / file)
    assert fingerprint() == before


TEXT = "The café served naïve quotes, and more. " * 3
BAD = {  # and at which byte
    "latin-1": (TEXT.encode("latin-1"), "not UTF-8 at byte 7"),
    "UTF-16": (TEXT.encode("utf-16"), "not UTF-8 at byte 0"),
    "UTF-16 without a mark": ("text".encode("utf-16-le"), "byte 1 is zero"),
    "GBK": ("训练数据。".encode("gbk"), "not UTF-8 at byte 2"),
    "one stray byte": (b"a" * 1000 + b"\x92" + b"a" * 1000, "not UTF-8 at byte 1000"),
    "one NUL": (b"a" * 1000 + b"\0" + b"a" * 1000, "byte 1000 is zero"),
    "a letter that is cut": (("a" * 127 + "é").encode()[:-1], "not UTF-8 at byte 127"),
}


@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("chunk", [64, 65, 1 << 24])
def test_a_text_that_is_not_utf_8_is_said_with_the_place(
    tmp_path, monkeypatch, capsys, content, why, chunk
):
    monkeypatch.setattr(text_data, "CHUNK", chunk)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"iconv.*bad\.txt: .*{why}"):
        load_corpus(tmp_path / "bad.txt")
    (tmp_path / "good.txt").write_text(TEXT)
    corpus = load_corpus(tmp_path)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == TEXT.encode()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}: 1 text files, 1 other files and 0 hidden ones left out"
    assert re.fullmatch(rf"  bad\.txt: .*{why}", said[1])


def test_hidden_files_are_left_out_and_links_are_followed(tmp_path, capsys):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for file in (".git/config", ".hidden.txt", "b/c/.d/e.txt", "a.txt", "b/z.txt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("linked")
    (folder / "link").symlink_to(elsewhere)
    (folder / "b" / "up").symlink_to(folder)
    (folder / "gone.txt").symlink_to(elsewhere / "absent.txt")
    corpus = load_corpus(folder)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"a.txt\nb/z.txt\nlinked"
    said = capsys.readouterr().out
    assert "3 text files, 1 other files and 3 hidden ones left out" in said
    assert "  gone.txt: a link to nothing\n" in said


def test_many_files_that_are_left_out_are_counted(tmp_path, capsys):
    for i in range(25):
        (tmp_path / f"{i:02}.bin").write_bytes(b"\xff")
    (tmp_path / "a.txt").write_text(TEXT)
    load_corpus(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert "1 text files, 25 other files" in said[0]
    assert [line[2:8] for line in said[1:11]] == [f"{i:02}.bin" for i in range(10)]
    assert said[11:] == ["  and 15 more"]


def test_bad_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_corpus(tmp_path / "absent")
    with pytest.raises(ValueError, match="no text there"):
        load_corpus(tmp_path)
    np.arange(3, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"no val\.bin beside it"):
        load_corpus(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val\.bin has 0 bytes"):
        load_corpus(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"\0\1\2")
    with pytest.raises(ValueError, match=r"val\.bin has 3 bytes"):
        load_corpus(tmp_path)
    np.array([7, 50257], np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(ValueError, match=r"val\.bin has the token 50257 at position 1, outside"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="too few for one window of 8"):
        Windows(np.zeros(8, np.uint8), 8)


def test_an_epoch_has_every_window_once_and_in_its_own_order():
    tokens = np.arange(33)
    first, second = itertools.islice(training_batches(tokens, 4, 8, seed=0), 2)
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 32, 4))
    assert (first != second).any()
    np.testing.assert_array_equal(first[:, 1:] - first[:, :-1], 1)  # inputs, then targets


def test_the_seed_orders_the_batches_and_the_iterator_can_be_saved():
    tokens = np.arange(1000)
    iterator, twin, other = (training_batches(tokens, 4, 8, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(next(iterator), next(twin))
    assert (next(twin) != next(other)).any()
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    fresh = training_batches(tokens, 4, 8, seed=0)
    fresh.set_state(state)
    np.testing.assert_array_equal([next(fresh) for _ in range(3)], expected)


def test_shards_put_together_are_the_whole_batches_at_the_same_place():
    tokens = np.arange(1000)
    shards = [ShardOptions(index, 2) for index in range(2)]
    whole, *parts = (training_batches(tokens, 4, 8, 0, shard) for shard in (ALL_ROWS, *shards))
    for _ in range(70):  # more than two epochs
        np.testing.assert_array_equal(np.concatenate([next(p) for p in parts]), next(whole))
    assert whole.get_state() == parts[0].get_state() == parts[1].get_state()
    whole, *parts = (validation_batches(tokens, 4, 6, 3, shard) for shard in (ALL_ROWS, *shards))
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_batches_of_one_are_endless_too():
    epochs = itertools.islice(training_batches(np.arange(9), 4, 1, seed=0), 6)
    np.testing.assert_array_equal(np.sort([int(b[0, 0]) for b in epochs]), [0, 0, 0, 4, 4, 4])


def test_validation_batches_come_from_all_over():
    batches = validation_batches(np.arange(4001), 4, 5, 3)
    assert [b.shape for b in batches] == [(5, 5)] * 3
    assert batches[0][0, 0] == 0
    assert batches[-1][-1, -1] == 4000
