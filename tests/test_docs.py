import importlib
import re
from pathlib import Path

import pytest

import weyl_optax

DOCS = Path(__file__).parent.parent / "docs"
PYPROJECT = (DOCS.parent / "pyproject.toml").read_text()


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


def test_oldest_versions_are_those_of_the_package():
    needed = re.search(r'^dependencies = \["jax>=(.*?)", "optax>=(.*?)"\]', PYPROJECT, re.MULTILINE)
    assert needed
    jax, optax = (
        f"{version}.0" if version.count(".") < 2 else version for version in needed.groups()
    )
    assert f"JAX {jax} and Optax {optax} (`.ci/floor`)" in (DOCS / "getting_started.md").read_text()
