import dataclasses
import itertools
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from examples import plots
from examples.paper import compare


def test_tuning_finds_the_minimum_of_a_valley_and_nothing_is_evaluated_beyond_its_neighbors():
    grid = {"learning_rate": compare.RATES, "tau": (0.05, 0.1, 0.2), "betas": ((0.8,), (0.9,))}

    def loss(settings):
        asked.append(tuple(settings.values()))
        a, b = math.log10(settings["learning_rate"]), math.log10(settings["tau"])
        return (a + 3) ** 2 + (a + 3) * (b + 1) + 2 * (b + 1) ** 2 + settings["betas"][0]

    asked = []
    found = compare.tune(grid, loss, {name: values[0] for name, values in grid.items()})
    everything = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    few = len(set(asked))
    assert found == min(everything, key=loss)
    assert few < len(everything) / 2


def test_tuning_goes_on_past_a_run_that_diverged_and_ends_where_all_did():
    losses = {1: 1.0, 2: 0.5, 3: math.inf, 4: 0.1}
    assert compare.tune({"x": (1, 2, 3, 4)}, lambda s: losses[s["x"]], {"x": 3}) == {"x": 4}
    assert compare.tune({"x": (1, 2, 3)}, lambda _: math.inf, {"x": 2}) == {"x": 2}


def test_the_search_goes_on_from_a_better_rate_beyond_a_ridge():
    """The middle of the rates is 1e-2: descent ends there, and 1e-3 is better."""
    losses = dict.fromkeys(compare.RATES, 3.0) | {1e-2: 2.0, 1e-3: 1.0, 3e-4: 0.5}
    grid = {"learning_rate": compare.RATES, "tau": (1, 2, 3)}
    found = compare.search(grid, lambda s: losses[s["learning_rate"]] + 0.1 * s["tau"])
    assert found == {"learning_rate": 3e-4, "tau": 1}


def test_the_search_sees_a_better_rate_far_from_the_middle():
    """From 1e-2, descent would go to 3e-2, from where 1e-3 is out of sight."""
    losses = dict.fromkeys(compare.RATES, 3.0) | {1e-2: 2.0, 3e-2: 1.9, 1e-3: 1.0}
    found = compare.search({"learning_rate": compare.RATES}, lambda s: losses[s["learning_rate"]])
    assert found == {"learning_rate": 1e-3}


def run_of(optimizer, rate, loss, seed=0, steps=200, **settings):
    return {
        "model": "gpt",
        "data": None,
        "steps": steps,
        "optimizer": optimizer,
        "seed": seed,
        "settings": {"learning_rate": rate} | settings,
        "val_loss": loss,
    }


RUNS = [
    run_of("adamw2", 1e-3, 2.5, tau=0.1),
    run_of("adamw2", 1e-2, 2.4, tau=0.1),
    run_of("adamw2", 1e-2, 2.45, tau=0.05),
    run_of("adamw2", 3e-2, None, tau=0.1),
    run_of("adamw2", 1e-2, 2.3, seed=1, tau=0.1),
    run_of("adamw2", 1e-3, 2.2, seed=1, tau=0.1),
    run_of("lion", 1e-3, 2.9, betas=[0.9, 0.95]),
]


def test_the_report_takes_the_settings_from_the_first_seed_and_the_mean_over_all(tmp_path, capsys):
    table = tmp_path / "table.jsonl"
    other = [run_of("adamw2", 1e-2, 1.0, steps=1500, tau=0.1)]
    table.write_text("".join(json.dumps(line) + "\n" for line in RUNS + other))
    flags = compare.Flags(table=table, out=tmp_path / "out", report=True)
    compare.main(flags, compare.prepare(flags))
    lines = capsys.readouterr().out.splitlines()
    spread = np.std([2.4, 2.3], ddof=1)
    assert "AdamW², no warmup" in lines[1]
    assert "learning_rate 0.01, tau 0.1 " in lines[1]
    assert f"2.350 ± {spread:.3f}" in lines[1]
    assert lines[1].endswith("  2")
    assert "learning_rate 0.001, betas (0.9, 0.95)" in lines[2]
    assert "2.900" in lines[2]
    assert compare.losses_by_rate(RUNS, "adamw2") == {
        1e-3: [2.5, 2.2],
        1e-2: [2.4, 2.3],
        3e-2: [np.inf],
    }
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


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


@pytest.mark.slow
def test_what_the_table_has_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RATES", (1e-3, 3e-3))
    monkeypatch.setattr(compare, "DECADES", (1e-3,))
    flags = compare.Flags(
        steps=10, runs=("schedule_free",), seeds=2, table=tmp_path / "table.jsonl",
        out=tmp_path / "out",
    )  # fmt: skip
    task = compare.prepare(flags)
    small = dataclasses.replace(
        task.config, batch=2, sequence_length=8, validation_batches=1, warmup=1
    )
    task = task._replace(config=small)
    monkeypatch.setattr(
        compare, "grid", lambda name, steps: {"learning_rate": compare.RATES, "warmup": (1, 2)}
    )
    compare.main(flags, task)
    lines = [json.loads(line) for line in flags.table.read_text().splitlines()]
    settings = [(line["seed"], *line["settings"].values()) for line in lines]
    assert len(settings) == len(set(settings))
    best = compare.best_settings(lines, "schedule_free").values()
    assert {(0, *best), (1, *best)} <= set(settings)
    assert len({rate for seed, rate, _ in settings if seed == 0}) == 2
    assert all(0 < line["val_loss"] < 10 for line in lines)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {".locks", "compare.png", "bound.png"}
    compare.main(flags, task._replace(train=None))
    assert len(flags.table.read_text().splitlines()) == len(lines)


class Trained:
    """A training of no time, whose loss is the number of runs so far."""

    def __init__(self):
        self.texts = []

    def __call__(self, name, config, data, folder, norms):
        self.texts.append(data.train.tobytes())
        line = {"run": name, "step": 10, "loss": 1.0, "val_loss": float(len(self.texts))}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def runs_of(tmp_path, train, **changes):
    flags = compare.Flags(steps=10, table=tmp_path / "table.jsonl", out=tmp_path / "out", **changes)
    return compare.Runs(flags, compare.prepare(flags)._replace(train=train)).of("adamw")


def test_texts_of_the_same_name_share_no_line(tmp_path):
    train, settings, texts = Trained(), {"learning_rate": 1e-3}, []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        texts.append(tmp_path / name / "input.txt")
        texts[-1].write_text(name * 5000)
    losses = [runs_of(tmp_path, train, data=text)(settings) for text in [*texts, *texts]]
    assert losses == [1, 2, 1, 2]
    assert [text[:1] for text in train.texts] == [b"a", b"b"]


def test_a_table_whose_last_line_is_cut_loses_that_line_alone(tmp_path, capsys):
    train, table = Trained(), tmp_path / "table.jsonl"
    for rate in (1e-3, 1e-2):
        runs_of(tmp_path, train)({"learning_rate": rate})
    table.write_text(table.read_text()[:-30])
    for expected in ([1, 3], [1, 3]):
        capsys.readouterr()
        loss = runs_of(tmp_path, train)
        assert "a damaged line is left out: " in capsys.readouterr().out
        assert [loss({"learning_rate": rate}) for rate in (1e-3, 1e-2)] == expected
    assert len(table.read_text().splitlines()) == 3


def test_of_two_at_once_one_trains_and_the_other_has_its_line(tmp_path):
    train = Trained()
    losses = [runs_of(tmp_path, train) for _ in range(2)]  # which have read the same table
    assert [loss({"learning_rate": 1e-3}) for loss in losses] == [1, 1]
    began, go_on = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        began.set()
        assert go_on.wait(60)
        train(*arguments, **options)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(runs_of(tmp_path, slow), {"learning_rate": 1e-2})
        assert began.wait(60)
        second = pool.submit(runs_of(tmp_path, train), {"learning_rate": 1e-2})
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        assert (first.result(60), second.result(60)) == (2, 2)
    assert len(train.texts) == 2


def test_flags_that_do_not_fit_are_errors(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    for flags, message in (
        ({"data": tmp_path / "short.txt"}, "too few for one window of 128"),
        ({"table": tmp_path}, "is a folder. Name a file"),
        ({"steps": 5}, "at least 10"),
        ({"runs": ()}, "--runs has to name an optimizer"),
        ({"out": Path("gs://bucket")}, "name a folder of this machine"),
        ({"model": "vit", "data": tmp_path}, "--data is the text of a GPT"),
    ):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=message):
            compare.prepare(compare.Flags(**{"out": out, "table": tmp_path / "t"} | flags))
        assert not out.exists()
