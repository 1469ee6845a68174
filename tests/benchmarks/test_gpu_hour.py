"""The hour on a GPU, in tiny sizes without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_page, python_tokens
from examples.text_data import load_corpus

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_hour.sh"


def run(out, *flags, **env):
    return subprocess.run(
        [SCRIPT, *flags],
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable, "XLA_FLAGS": ""} | env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_part_leaves_its_figures_and_is_not_run_again(tmp_path):
    first = run(tmp_path, "--dry")
    assert first.returncode == 0, first.stderr
    parts = ["1_update", "3_step", "4_train_paper_rate", "8_llama_qk_norm"]
    assert sorted(p.parent.name for p in tmp_path.glob("*/done")) == [*parts, "tokens"]
    page = (tmp_path / "page.md").read_text()
    assert page in first.stdout
    for name in parts:
        assert f"## {name}\n" in page
        (figures,) = [*(tmp_path / name).glob("table.json"), *(tmp_path / name).glob("run/summ*")]
        assert json.loads(figures.read_text())
    (tmp_path / "tokens" / "done").unlink()  # as if it had been killed
    again = run(tmp_path, "--dry")
    begun = [line for line in again.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert len(begun) == 1
    assert "tokens: benchmarks.python_tokens" in begun[0]
    assert (tmp_path / "page.md").read_text() == page


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    result = run(tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "No GPU here" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_page_has_what_is_there(tmp_path):
    (tmp_path / "machine.txt").write_text("1 x a GPU\n")
    rows = [{"tree": "t", "ms": 1.23456, "state": 1.5}, {"tree": "floor", "ms": 2.0}]
    for name in ("1_update", "2_killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "1_update" / "table.json").write_text(json.dumps(rows))
    (tmp_path / "1_update" / "done").touch()
    gpu_page.main(tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "1 x a GPU" in page
    assert (
        "| tree | ms | state |\n| --- | --- | --- |\n| t | 1.235 | 1.5 |\n| floor | 2 |  |" in page
    )
    assert "## 2_killed (not finished)" in page


def test_the_tokens_are_those_of_the_words(tmp_path, monkeypatch):
    files = [f"def f{i}(x):\n    return x + {i}\n" for i in range(20)]
    monkeypatch.setattr(python_tokens, "texts", lambda most: iter(files))
    python_tokens.main(python_tokens.Flags(tmp_path))
    corpus = load_corpus(tmp_path)
    words = [python_tokens.WORD.findall(file) for file in files]
    assert ["".join(found) for found in words] == files  # nothing of a text is left out
    held_out = [*words[9], *words[19]]
    assert corpus.validation.size == len(held_out)
    assert corpus.train.size == sum(map(len, words)) - len(held_out)
    ids = dict(zip(held_out, corpus.validation, strict=True))
    np.testing.assert_array_equal([ids[word] for word in held_out], corpus.validation)
    assert len(set(ids.values())) == len(ids)
