import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{i}")
    for name in ("README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
    for i, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    )
]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_block_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a log
    exec(compile(block, name, "exec"), {})


def test_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file()
