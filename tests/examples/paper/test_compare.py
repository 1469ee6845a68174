import dataclasses
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from examples import language, optimizers, plots
from examples.paper import compare
from examples.text_data import split_test, training_batches, validation_batches

RANGES = {"learning_rate": (1e-3, 1e-1), "b2": (0.9, 0.999), "warmup": (0.02, 0.3)}


def test_trials_are_log_uniform_in_their_ranges():
    drawn = compare.draw(RANGES, slice(0, 1000), steps=100_000)
    found = {name: np.array([settings[name] for settings in drawn]) for name in RANGES}
    for values, low, high in (
        (found["learning_rate"], 1e-3, 1e-1),
        (1 - found["b2"], 1e-3, 1e-1),
        (found["warmup"] / 100_000, 0.02, 0.3),
    ):
        place = np.log(values / low) / np.log(high / low)
        counts, _ = np.histogram(place, 10, (-1e-2, 1 + 1e-2))
        assert counts.sum() == 1000
        assert np.all(np.abs(counts - 100) < 15)
    assert all(isinstance(settings["warmup"], int) for settings in drawn)


def test_more_trials_begin_with_those_that_there_are():
    few, many = (compare.draw(RANGES, slice(0, n), steps=100) for n in (8, 16))
    assert many[:8] == few
    assert compare.draw(RANGES, slice(8, 16), steps=100) == many[8:]


def test_a_range_is_widened_where_the_best_lies_in_its_outer_tenth():
    settings = {"learning_rate": 0.09, "b2": 0.99, "warmup": 3}
    assert compare.at_edges(RANGES, settings, 100) == {"learning_rate": 1}
    # 0.1 * log(100) from an end is a factor of 1.585.
    for rate, side in ((0.00158, -1), (0.00159, None), (0.0630, None), (0.0632, 1)):
        found = compare.at_edges(RANGES, settings | {"learning_rate": rate}, 100)
        assert found.get("learning_rate") == side
    wider = compare.widen(RANGES, {"learning_rate": 0.09, "b2": 0.905, "warmup": 2}, 100)
    assert wider["learning_rate"] == (1e-3, pytest.approx(0.3))
    assert wider["b2"] == pytest.approx((0.7, 0.999))
    assert wider["warmup"] == pytest.approx((0.02 / 3, 0.3))
    again = compare.widen({"warmup": (0.02, 0.5)}, {"warmup": 48}, 100)
    assert again["warmup"] == (0.02, 0.9)


def test_optimizers_take_turns_and_have_as_many_trials_and_a_widened_one_finds_more():
    """AdamW's best rate lies above its range, and Lion's in the middle of it."""
    asked = []

    def loss_of(name, best):
        def loss(settings):
            asked.append((name, settings["learning_rate"]))
            return abs(np.log(settings["learning_rate"] / best))

        return loss

    losses = {"adamw": loss_of("adamw", 0.08), "lion": loss_of("lion", 3e-4)}
    flags = compare.Flags(runs=tuple(losses), trials=8, rounds=2)
    best, ranges = compare.tune(losses, flags)
    first = list(dict.fromkeys(asked))[:16]
    assert [name for name, _ in first] == ["adamw", "lion"] * 8
    tried = {name: len({rate for asked_of, rate in asked if asked_of == name}) for name in losses}
    assert tried == {"adamw": 16, "lion": 16}
    assert ranges["adamw"]["learning_rate"] == (3e-4, pytest.approx(0.09))
    assert ranges["lion"]["learning_rate"] == optimizers.OPTIMIZERS["lion"].ranges["learning_rate"]
    assert best["adamw"]["learning_rate"] > 0.03


def line(name, use, loss, seed=0, rate=0.01, test=None, **changes):
    settings = {"learning_rate": rate, "weight_decay": 0.1, "b2": 0.99}
    return {
        "model": "llama",
        "data": "python x",
        "batch": 16,
        "steps": 800,
        "optimizer": name,
        "use": use,
        "seed": seed,
        "settings": settings | ({"adam_share": 0.1} if name == "muon" else {}),
        "val_loss": loss,
        "test_loss": test or loss,
        "train_losses": [3.0] * 20,
        "cpu_seconds": 30.0,
    } | changes


LINES = [
    line("adamw", "tuning", 2.0),
    line("adamw", "tuning", 2.04, rate=0.02),
    line("adamw", "tuning", 2.2, rate=0.001),
    line("adamw", "tuning", None, rate=0.03),
    line("adamw", "rate", 2.3, rate=0.1),
    line("adamw", "rate", 1.0, rate=0.11),  # of other settings
    *(line("adamw", "report", 2.0, seed=s, test=2.1 + 0.01 * s) for s in range(1, 6)),
    line("adamw", "report", 1.0, seed=1, rate=0.02),  # of settings that are not the best
    line("muon", "tuning", 1.9),
    *(line("muon", "report", 1.9, seed=s, test=2.05 + 0.011 * s) for s in range(1, 6)),
]


class Task:
    """What names the runs of a task."""

    def __init__(self, text="x"):
        self.data = dataclasses.make_dataclass("Data", ["fingerprint"])(text)
        self.config = dataclasses.make_dataclass("Config", ["batch"])(16)


@pytest.fixture
def trained(monkeypatch):
    """Trainings of no time, whose loss is the number of runs so far."""
    runs = []

    class Trainer:
        def __init__(self, task, steps):
            self.task = task

        def train(self, name, seed, settings):
            runs.append((name, seed, settings))
            loss = float(len(runs))
            return {"val_loss": loss, "test_loss": loss, "train_losses": [loss], "cpu_seconds": 1.0}

    monkeypatch.setattr(compare, "Trainer", Trainer)
    return runs


def of_table(tmp_path, lines, **changes):
    table = tmp_path / "table.jsonl"
    if lines:
        table.write_text("".join(json.dumps(found) + "\n" for found in lines))
    options = {"table": table, "out": tmp_path, "runs": ("adamw", "muon")} | changes
    return compare.Flags(**options)


def test_the_report_has_intervals_of_student_and_paired_differences(tmp_path, trained):
    flags = of_table(tmp_path, [*LINES, line("adamw", "tuning", 1.0, steps=1500)], report=True)
    text = compare.report(compare.Runs(flags, Task()), flags)
    results, differences, sensitivity = text.split("\n\n")
    # The seeds of AdamW are 0.01 apart: deviation 0.01581, of which Student's 2.776 / sqrt(5).
    muon, adamw = results.splitlines()[1:]
    assert "2.130 ± 0.020  5      4       2.000" in adamw
    assert "2.083 ± 0.022  5      1       1.900" in muon
    assert "learning_rate 0.01, weight_decay 0.1" in adamw
    # Their difference is 0.05 - 0.001 s.
    adamw, muon = differences.splitlines()[1:]
    assert "+0.047 ± 0.002*" in adamw
    adamw = sensitivity.splitlines()[1]
    assert "50%" in adamw
    assert adamw.split()[-3:] == ["2.000", "2.300", "30"]
    assert trained == []


def test_no_difference_has_no_star():
    assert compare._interval([0.1, -0.1, 0.05], sign="+") == "+0.017 ± 0.259"


@pytest.mark.slow
def test_a_report_of_a_table_that_is_cut_short_shows_what_there_is(tmp_path, trained, capsys):
    for number in (1, 4, len(LINES)):
        flags = of_table(tmp_path, LINES[:number], report=True)
        compare.main(flags, Task())
        assert "AdamW, no warmup" in capsys.readouterr().out
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    assert (tmp_path / "seconds.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_the_table_has_is_not_trained_again(tmp_path, trained):
    flags = of_table(tmp_path, [], trials=2, rounds=2, seeds=2, rates=(3.0,))
    compare.main(flags, Task())
    number = len(trained)
    # 2 rounds of 2 trials, 2 seeds and a rate.
    assert number == 2 * (2 * 2 + 2 + 1) == len(flags.table.read_text().splitlines())
    assert {seed for _, seed, _ in trained} == {0, 1, 2}
    compare.main(flags, Task())
    assert len(trained) == number
    compare.main(flags, Task("another text"))
    assert len(trained) == 2 * number


def loss_of(flags, task=None):
    return compare.Runs(flags, task or Task()).loss("adamw", "tuning")


def test_a_table_whose_last_line_is_cut_loses_that_line_alone(tmp_path, trained, capsys):
    flags = of_table(tmp_path, [])
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
    flags = of_table(tmp_path, [])
    losses = [loss_of(flags) for _ in range(2)]  # which have read the same table
    assert [loss({"learning_rate": 1e-3}) for loss in losses] == [1, 1]
    began, go_on = threading.Event(), threading.Event()
    train = compare.Trainer.train

    def slow(*arguments):
        began.set()
        assert go_on.wait(60)
        return train(*arguments)

    monkeypatch.setattr(compare.Trainer, "train", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(loss_of(flags), {"learning_rate": 1e-2})
        assert began.wait(60)
        second = pool.submit(loss_of(flags), {"learning_rate": 1e-2})
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        assert (first.result(60), second.result(60)) == (2, 2)
    assert len(trained) == 2


@pytest.mark.slow
def test_a_run_is_that_of_a_plain_loop(tmp_path):
    """The losses, with settings that the compiled program is given, and on both held-out sets."""
    flags = compare.Flags(steps=20, table=tmp_path / "t", out=tmp_path)
    task = compare.prepare(flags)
    small = dataclasses.replace(task.config, batch=4, sequence_length=16)
    corpus, test = split_test(task.data)
    corpus = corpus._replace(validation=corpus.validation[:1000])
    task = task._replace(
        config=small, data=corpus._replace(validation=np.r_[corpus.validation, test[:1000]])
    )
    trainer = compare.Trainer(task, 20)
    trainer.train("adamw_warmup", 0, {"learning_rate": 1e-2, "b2": 0.9, "warmup": 5})
    rate, b2, warmup = 1e-3, 0.99, 2
    settings = {"learning_rate": rate, "b2": b2, "warmup": warmup}
    found = trainer.train("adamw_warmup", 3, settings)  # by what the first has compiled
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, 20)
    config = dataclasses.replace(small, seed=3)
    graph, params = nnx.split(language.make_model(config, task.data))
    params = nnx.as_pure(params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, 0.9, b2, weight_decay=0.1, mask=optimizers.is_decayed),
    )
    state, losses = optimizer.init(params), []

    @jax.jit
    def loss_and_grads(params, tokens):
        loss = lambda params: language.next_token_loss(nnx.merge(graph, params), tokens)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    for tokens in itertools.islice(training_batches(corpus.train, 16, 4, 3), 20):
        loss, grads = loss_and_grads(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(found["train_losses"], losses, rtol=1e-4)
    for key, tokens in (("val_loss", corpus.validation), ("test_loss", test[:1000])):
        batches = validation_batches(tokens, 16, 4, 999 // 16 // 4)
        expected = np.mean([loss_and_grads(params, tokens)[0] for tokens in batches])
        np.testing.assert_allclose(found[key], expected, rtol=1e-4)
    failed = trainer.train("adamw_warmup", 0, settings | {"learning_rate": 1e25})
    assert failed["val_loss"] is None
    assert failed["train_losses"][-1] is None


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
    for flags, message in (
        ({"steps": 5}, "at least 20"),
        ({"runs": ()}, "--runs has to name an optimizer"),
        ({"runs": ("qk_clip",)}, "--runs qk_clip"),
        ({"seeds": 1}, "--seeds at least 2"),
        ({"out": Path("gs://bucket")}, "name a folder of this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.prepare(compare.Flags(**{"out": tmp_path, "table": tmp_path / "t"} | flags))
