"""The quick start runs as it stands, and the loss falls."""

import re
import runpy

import pytest


@pytest.mark.slow
def test_the_quick_start_learns(capsys):
    runpy.run_module("examples.quick_start", run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 11
    assert losses[0] > 5
    assert losses[-1] < 2.6
    assert max(losses) == losses[0]
