"""The quick start shows what its name promises: AdamW² ends below AdamW, and not above warmup."""

import re
import runpy

import pytest


@pytest.mark.slow
def test_the_quick_start_ends_below_adamw_with_and_without_warmup(capsys):
    runpy.run_module("examples.quick_start", run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    alone, warmup, ours = losses
    assert ours < warmup - 0.05
    assert ours < alone - 0.1
