"""The picture on top of the README."""

import json

import pytest

from examples.paper import overview


def test_losses_are_those_of_the_best_settings_over_the_rate(tmp_path):
    table = tmp_path / "table.jsonl"
    run = {"model": "gpt", "data": None, "steps": 200, "seed": 0}
    with table.open("w") as file:
        for name in (name for pair in overview.PAIRS.items() for name in pair):
            for rate, tau, loss in ((0.1, 0.1, 2.0), (0.01, 0.1, 3.0), (0.1, 0.3, 4.0)):
                settings = {"learning_rate": rate, "tau": tau}
                line = run | {"optimizer": name, "settings": settings, "val_loss": loss}
                file.write(json.dumps(line) + "\n")
    curves = overview.losses_by_rate(table)
    assert curves["muon_bound"] == {0.01: 3.0, 0.1: 2.0}
    assert len(curves) == 8


def test_a_run_that_is_not_there_says_how_to_make_it(tmp_path):
    line = {"run": "adamw", "step": 1, "loss": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"python -m examples\.train_gpt --runs adamw2 --out"):
        overview.prepare(overview.Flags(run=tmp_path))


def test_a_table_without_the_runs_and_one_that_is_none(tmp_path):
    table = tmp_path / "notes.md"
    table.write_text('{"model": "vit"}\n{"model": "g')
    with pytest.raises(ValueError, match="has no run of adamw"):
        overview.losses_by_rate(table)
    table.write_text("# Notes\n\n12\n")
    with pytest.raises(ValueError, match=r"notes\.md is no table of runs"):
        overview.losses_by_rate(table)
