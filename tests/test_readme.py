import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{i}")
    for name in ("README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
    for i, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    )
    if block != FIRST
]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_block_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a log
    exec(compile(block, name, "exec"), {})


def test_the_first_example_trains_where_adamw_does_not(capsys):
    exec(compile(FIRST, "README.md", "exec"), {})
    found = re.findall(r"^(AdamW.*) ([\d.]+|nan)$", capsys.readouterr().out, re.MULTILINE)
    losses = {name: float(loss) for name, loss in found}
    assert list(losses) == ["AdamW", "AdamW, warmup", "AdamW², cap"]
    assert losses["AdamW², cap"] < 2.3
    for name in ("AdamW", "AdamW, warmup"):
        assert not losses[name] < 3


def test_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file()
