import importlib
import re
from pathlib import Path

import pytest

import weyl_optax

DOCS = Path(__file__).parent.parent / "docs"


def test_reference_has_every_public_name():
    listed = set(re.findall(r"^\.\. auto\w+:: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    public = {"weyl_optax.flax.dimension_numbers"}
    for name in ("weyl_optax", "weyl_optax.contrib", "weyl_optax.dynamics"):
        public |= {f"{name}.{member}" for member in importlib.import_module(name).__all__}
    assert listed == public


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pictures_are_there(page):
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
        assert (DOCS / picture).is_file()


def test_citation_has_the_version():
    citation = (DOCS.parent / "CITATION.cff").read_text()
    assert f"\nversion: {weyl_optax.__version__}\n" in citation
