import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from examples import language, optimizers, plots
from examples.paper import compare
from examples.paper.problems import Problem


def problem_of(flags, data="some text"):
    config = dataclasses.replace(language.PRESETS["nano"], steps=flags.steps)
    return Problem(config, *[None] * (len(Problem._fields) - 2), data)


@pytest.fixture
def trained(monkeypatch):
    """Trainings of no time, whose loss is the number of runs so far."""
    runs = []

    def result(_, optimizer, seed, settings, **others):
        runs.append((optimizer, seed, settings))
        loss = float(len(runs))
        losses = {"val_loss": loss, "test_loss": loss, "train_losses": [loss] * 20}
        return losses | {"cpu_seconds": 1.0}

    monkeypatch.setattr(compare, "Trainer", lambda problem: None)
    monkeypatch.setattr(compare.Runs, "_result", result)
    return runs


def flags_of(tmp_path, **changes):
    options = {
        "table": tmp_path / "table.jsonl",
        "out": tmp_path / "out",
        "runs": ("adamw", "muon"),
    }
    return compare.Flags(**options | {"trials": 2, "rounds": 2, "seeds": 2} | changes)


@pytest.mark.slow
def test_what_the_table_has_is_not_trained_again(tmp_path, trained, capsys):
    flags = flags_of(tmp_path)
    compare.main(flags, problem_of(flags))
    number = len(trained)
    # 2 rounds of 2 trials, 2 seeds and 4 rates.
    assert number == 2 * (2 * 2 + 2 + 4) == len(flags.table.read_text().splitlines())
    names = [name for name, _, _ in trained]
    assert names == ["adamw", "muon"] * 10
    # The first trial is the best; the seeds and rates are those of its settings.
    for name in ("adamw", "muon"):
        of = [(seed, settings) for found, seed, settings in trained if found == name]
        best = of[0][1]
        assert [seed for seed, _ in of] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0]
        assert [settings for _, settings in of[4:6]] == [best, best]
        rates = [settings["learning_rate"] / best["learning_rate"] for _, settings in of[6:]]
        np.testing.assert_allclose(rates, [0.1, 0.3, 3, 10], rtol=0.01)
    compare.main(flags, problem_of(flags))
    assert len(trained) == number
    compare.main(flags, problem_of(flags, "another text"))
    assert len(trained) == 2 * number
    longer = dataclasses.replace(flags, rates=False, steps=900)
    compare.main(longer, problem_of(longer))
    assert len(trained) == 2 * number + 2 * (2 * 2 + 2)


@pytest.mark.slow
def test_a_report_shows_the_optimizers_that_have_a_trial(tmp_path, trained, capsys):
    flags = flags_of(tmp_path)
    compare.main(flags, problem_of(flags))
    lines = flags.table.read_text().splitlines(keepends=True)
    for number, shown_of in ((0, 0), (1, 1), (2, 2), (9, 2), (len(lines), 2)):
        flags.table.write_text("".join(lines[:number]))
        capsys.readouterr()
        compare.main(dataclasses.replace(flags, report=True), problem_of(flags))
        shown = capsys.readouterr().out
        assert ("AdamW, no warmup" in shown) == (shown_of > 0)
        assert ("\n| Muon, no warmup" in shown) == (shown_of > 1)
        assert len(flags.table.read_text().splitlines()) == number
    assert (flags.out / "rates.png").stat().st_size > 10_000
    assert (flags.out / "seconds.png").stat().st_size > 10_000


def test_a_report_without_a_run_is_an_error_that_names_what_was_looked_for(tmp_path, trained):
    flags = flags_of(tmp_path, report=True)
    with pytest.raises(
        ValueError, match=r"table\.jsonl has no trial of --runs with llama on python .* 800 steps"
    ):
        compare.prepare(flags)
    training = dataclasses.replace(flags, report=False)
    compare.Runs(training, compare.prepare(training)).get("adamw", "tuning", 0, {})
    compare.prepare(flags)


def test_the_table_of_the_repository_has_every_run_once_and_whole():
    lines = [json.loads(line) for line in compare.Flags.table.read_text().splitlines()]
    common = ["model", "data", "batch", "steps", "decay"]
    keys = [*common, "optimizer", "use", "seed", "settings"]
    results = ["val_loss", "test_loss", "train_losses", "cpu_seconds"]
    assert {tuple(line) for line in lines} == {(*keys, *results)}
    runs = [json.dumps([line[key] for key in keys]) for line in lines]
    assert len(runs) == len(set(runs)) > 0
    for line in lines:
        assert (line["use"] == "fresh") == (line["seed"] > 0)
        assert set(line["settings"]) == set(optimizers.OPTIMIZERS[line["optimizer"]].ranges)
        assert (line["val_loss"] is None) == (line["test_loss"] is None)


def loss_of(flags):
    return compare.Runs(flags, problem_of(flags)).losses("adamw")


def test_a_table_whose_last_line_is_cut_loses_that_line_alone(tmp_path, trained, capsys):
    flags = flags_of(tmp_path)
    for rate in (1e-3, 1e-2):
        loss_of(flags)({"learning_rate": rate})
    flags.table.write_text(flags.table.read_text()[:-30])
    for expected in ([1, 3], [1, 3]):
        capsys.readouterr()
        loss = loss_of(flags)
        assert "a damaged line is left out: " in capsys.readouterr().out
        assert [loss({"learning_rate": rate}) for rate in (1e-3, 1e-2)] == expected
    assert len(flags.table.read_text().splitlines()) == 3


def test_of_two_at_once_one_trains_and_the_other_has_its_line(tmp_path, trained, monkeypatch):
    flags = flags_of(tmp_path)
    losses = [loss_of(flags) for _ in range(2)]  # which have read the same table
    assert [loss({"learning_rate": 1e-3}) for loss in losses] == [1, 1]
    began, go_on = threading.Event(), threading.Event()
    result = compare.Runs._result

    def slow(self, **run):
        began.set()
        assert go_on.wait(60)
        return result(self, **run)

    monkeypatch.setattr(compare.Runs, "_result", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(loss_of(flags), {"learning_rate": 1e-2})
        assert began.wait(60)
        second = pool.submit(loss_of(flags), {"learning_rate": 1e-2})
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        assert (first.result(60), second.result(60)) == (2, 2)
    assert len(trained) == 2


def test_labels_of_lines_with_the_same_end_are_apart_and_in_the_order_of_their_best():
    losses = {
        "adamw": {1e-3: [2.0], 1e-2: [9.0]},
        "lion": {1e-3: [1.9], 1e-2: [np.inf]},
        "adamw2": {1e-3: [1.8], 1e-2: [1.5, 1.6]},
    }
    (ax,) = plots.learning_rate_sweep(losses).axes
    heights = {text.get_text(): text.xyann[1] for text in ax.texts}
    assert list(heights) == ["AdamW², no warmup", "Lion, no warmup", "AdamW, no warmup"]
    assert np.all(np.diff(list(heights.values())) > 0.03)
    assert max(heights.values()) <= 1


def test_flags_that_do_not_fit_are_errors(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    for flags, message in (
        ({"data": tmp_path / "short.txt"}, "too few for one window of 128"),
        ({"table": tmp_path}, "is a folder. Name a file"),
        ({"steps": 5}, "at least 20"),
        ({"batch": 0}, "batch 0"),
        ({"model": "vit", "data": tmp_path}, "vit trains on digits. Leave --data out"),
        ({"runs": ()}, "--runs: name at least one, and each once"),
        ({"runs": ("adamw", "adamw")}, "--runs: name at least one, and each once"),
        ({"runs": ("qk_clip",)}, "--runs qk_clip"),
        ({"seeds": 1}, "--seeds at least 2"),
        ({"out": Path("gs://bucket")}, "name a folder of this machine"),
    ):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=message):
            compare.prepare(compare.Flags(**{"out": out, "table": tmp_path / "t"} | flags))
        assert not out.exists()
    flags = compare.Flags(out=tmp_path, table=tmp_path / "t", batch=64, steps=200, decay="wsd")
    config = compare.prepare(flags).config
    assert (config.batch, config.steps, config.decay) == (64, 200, "wsd")
