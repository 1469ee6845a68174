"""The main job, on a small scale."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from examples import language, measurements, optimizers, program, recorder, train_gpt, training
from examples.text_data import load_corpus
from models import layers

SMALL = (
    "--steps 12 --warmup 3 --batch 4 --sequence-length 16 --log-every 3 --validate-every 7 "
    "--validation-batches 1"
).split()


WATCHED = ["--dropout", "0.1", "--watch", "4"]


def run(out, *flags):
    flags = train_gpt.parse([*SMALL, "--out", str(out), *flags])
    train_gpt.main(flags, language.prepare(flags))


def lines(out, name):
    """The logged steps of a run, without its speed."""
    read = recorder.read_metrics(out, name)
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in read]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    run(out, *WATCHED)
    return out


@pytest.mark.slow
def test_leaves_a_whole_run_folder(finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["config"] == json.loads((finished / "config.json").read_text())
    assert summary["config"]["steps"] == 12
    assert list(summary["runs"]) == ["adamw", "adamw_warmup", "adamw2"]
    for name, result in summary["runs"].items():
        logged = lines(finished, name)
        assert [line["step"] for line in logged] == [1, 3, 4, 6, 7, 8, 9, 12]
        assert [line["step"] for line in logged if "val_loss" in line] == [7, 12]
        assert result["val_loss"] == logged[-1]["val_loss"]
        assert result["max_qk_sigma"] == max(s for line in logged for s in line["qk_sigma"])
        assert result["steps_per_second"] > 0
        assert (finished / "checkpoints" / name / "12").is_dir()
        assert list((finished / "tensorboard" / name).glob("events*"))
    for picture in ("loss.png", "qk_sigma.png", "learning_rates.png"):
        assert (finished / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_watch_logs_the_terms_of_every_block(finished):
    for name in ("adamw", "adamw_warmup", "adamw2"):
        terms = {
            line["step"]: {key for key in line if key.startswith("watch/")}
            for line in lines(finished, name)
        }
        assert [step for step in terms if terms[step]] == [1, 4, 8, 12]
        assert len(terms[1]) == 4 * 15
        assert "watch/blocks/3/W_qW_k" in terms[1]
        (events,) = (finished / "tensorboard" / name).glob("events*")
        assert b"watch/blocks/3/W_qW_k" in events.read_bytes()


@pytest.mark.slow
def test_the_runs_see_the_same_weights_and_batches(finished):
    firsts = [lines(finished, name)[0]["loss"] for name in ("adamw", "adamw_warmup", "adamw2")]
    assert firsts[0] == firsts[1] == firsts[2]
    rates = [lines(finished, name)[0]["learning_rate"] for name in ("adamw", "adamw_warmup")]
    assert rates == [pytest.approx(1e-2), 0]


class CtrlC:
    """Presses Ctrl-C once the loss of a step is written."""

    def __init__(self, monkeypatch, name, step):
        write = recorder.Recorder.write

        def press(recorder, at, metrics):
            write(recorder, at, metrics)
            if (recorder.name, at) == (name, step):
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(recorder.Recorder, "write", press)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("adamw2", 6), ("adamw", 1)])
def test_resumes_after_ctrl_c_to_the_same_numbers_to_the_bit(
    finished, tmp_path, monkeypatch, name, step
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        CtrlC(patch, name, step)
        with pytest.raises(training.Stopped, match=f"{name} is saved at step {step}"):
            run(out, *WATCHED, "--runs", name)
    assert not (out / "summary.json").exists()
    run(out, *WATCHED, "--runs", name, "--resume")
    assert lines(out, name) == lines(finished, name)


@pytest.mark.slow
def test_ctrl_c_in_the_last_save_of_a_run_is_heard_before_the_next(tmp_path, monkeypatch, capsys):
    save = recorder.Recorder.save

    def press(recorder, step, *state):
        save(recorder, step, *state)
        if (recorder.name, step) == ("adamw", 12):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "save", press)
        with pytest.raises(training.Stopped, match="adamw has ended, and adamw2 not begun"):
            run(tmp_path / "out", "--runs", "adamw", "adamw2")
    assert lines(tmp_path / "out", "adamw2") == []
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]) == ["adamw"]
    run(tmp_path / "out", "--runs", "adamw", "adamw2", "--resume")
    assert [lines(tmp_path / "out", name)[-1]["step"] for name in ("adamw", "adamw2")] == [12, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_a_run_is_heard_in_it_and_a_second_one_at_once(number):
    before = signal.getsignal(number)
    with training.stop_signal():
        with training.stop_signal() as stopped:
            assert not stopped()
        signal.raise_signal(number)
        for _ in range(2):
            with training.stop_signal() as stopped:
                assert stopped()
                assert signal.getsignal(number) == training.SIGNALS[number]
    with training.stop_signal() as stopped:
        assert not stopped()
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_resumes_from_the_last_checkpoint_after_a_kill(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = (*WATCHED, "--runs", "adamw2", "--save-every", "4")

    def die(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        write = recorder.Recorder.write
        patch.setattr(
            recorder.Recorder, "write", lambda r, at, m: die() if at == 12 else write(r, at, m)
        )
        with pytest.raises(MemoryError):
            run(out, *flags)
    assert [line["step"] for line in lines(out, "adamw2")] == [1, 3, 4, 6, 7, 8, 9]
    run(out, *flags, "--resume")
    assert lines(out, "adamw2") == lines(finished, "adamw2")


@pytest.mark.slow
def test_a_finished_run_resumes_to_itself(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    run(finished, *WATCHED, "--resume")
    assert (finished / "metrics.jsonl").read_text() == before
    assert "AdamW², no warmup" in capsys.readouterr().out


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_its_run_and_the_others_go_on(tmp_path, capsys, caplog):
    out = tmp_path / "out"
    run(out, "--runs", "adamw", "adamw2", "--learning-rate", "1e30")
    text = capsys.readouterr()
    assert "adamw: the loss is nan at step 3. This run ends here." in text.out + text.err
    assert not caplog.records
    runs = json.loads((out / "summary.json").read_text())["runs"]
    assert runs["adamw"]["diverged_at"] == 3
    assert runs["adamw"]["val_loss"] is None
    assert runs["adamw2"]["diverged_at"] is None
    assert runs["adamw2"]["val_loss"] < 6
    assert "diverged at 3" in text.out


@pytest.mark.slow
def test_accumulation_takes_the_same_steps(tmp_path):
    logged = []
    for parts in ("1", "4"):
        run(tmp_path / parts, "--runs", "adamw", "--accumulate", parts)
        logged.append(lines(tmp_path / parts, "adamw"))
    assert [line["step"] for line in logged[0]] == [1, 3, 6, 7, 9, 12]
    for one, four in zip(*logged, strict=True):
        np.testing.assert_allclose(one["loss"], four["loss"], rtol=1e-3)
        if "val_loss" in one:  # of the same sequences
            np.testing.assert_allclose(one["val_loss"], four["val_loss"], rtol=1e-3)
    assert "val_loss" in logged[0][-1]


@pytest.mark.slow
def test_trains_on_nanogpt_tokens_in_bfloat16_without_bias(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        rng.integers(0, 50257, 4000).astype(np.uint16).tofile(tmp_path / name)
    flags = ("--runs", "adamw", "--dtype", "bfloat16", "--no-bias", "--data", str(tmp_path))
    run(tmp_path / "out", *flags, "--steps", "4")
    val_loss = lines(tmp_path / "out", "adamw")[-1]["val_loss"]
    assert abs(val_loss - np.log(50257)) < 0.5
    assert "writes" not in capsys.readouterr().out  # tokens, not text


def test_help_begins_with_the_preset_the_optimizers_and_the_folder(capsys):
    with pytest.raises(SystemExit):
        train_gpt.parse(["--help"])
    shown = re.findall(r"^\W*(--[a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert shown[:5] == ["--preset", "--runs", "--out", "--resume", "--learning-rate"]


def test_presets_are_the_defaults_of_the_other_flags():
    nano, paper = train_gpt.parse([]), train_gpt.parse(["--preset", "gpt2-small", "--tau", "0.02"])
    assert (nano.model, nano.tau, nano.bias) == ("nano", 0.1, True)
    assert (paper.model, paper.tau, paper.bias) == ("gpt2-small", 0.02, False)
    assert paper.batch * paper.sequence_length == 491_520
    assert train_gpt.parse(["--preset", "gpt2-large"]).tau == 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sequence-length", "129"], "nano takes 1 to 128"),
        (["--batch", "9", "--accumulate", "2"], "does not divide --batch 9"),
        (["--warmup", "12"], "it must be below the 12 steps"),
        (["--log-every", "0"], "--log-every 0: it must be at least 1"),
        (["--seed", "-1"], "it must be at least 0, and at most 4294967295."),
        (["--seed", "99999999999999999999999"], "it must be at least 0, and at most 4294967295"),
        (["--max-norm", "0"], "--max-norm 0.0: it must be above 0, and at most"),
        (["--max-logit", "0"], "--max-logit 0.0: it must be above 0"),
        (["--cap-rank", "0"], "--cap-rank 0: it must be at least 2"),
        (["--validation-batches", "1000000000"], "at least 1, and at most 1000000."),
        (["--batch", "1000000000"], "--batch 1000000000: it must be"),
        (["--learning-rate", "1e39"], "--learning-rate 1e+39: it must be at least 0, and at most"),
        (["--weight-decay", "nan"], "--weight-decay nan: it must be at least 0"),
        (["--clip", "inf"], "--clip inf: it must be"),
        (["--runs"], "--runs: name at least one optimizer"),
        (["--tau", "-1"], "--tau -1.0: it must be at least 0"),
        (["--b2", "1.0"], "at least 0, and below 1"),
        (
            ["--model", "llama-nano", "--dropout", "0.1"],
            "--dropout is of a GPT: llama-nano has none",
        ),
        (
            ["--model", "llama-nano-qk-norm", "--runs", "qk_clip"],
            "--runs qk_clip: llama-nano-qk-norm norms its queries and keys",
        ),
        (["--preset", "gpt3"], "invalid choice 'gpt3'"),
        (["--data", "absent"], "no such file or folder"),
        (["--resume"], "has no run"),
    ],
)
def test_bad_flags_are_errors_that_say_what_to_write(flags, message, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as raised:
        run(tmp_path / "out", *flags)
    assert message in str(raised.value) + " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_run_is_lost_or_mixed(finished):
    with pytest.raises(ValueError, match=r"has a run. Go on with --resume"):
        run(finished, *WATCHED)
    with pytest.raises(ValueError, match=r"begun with other flags. Give --seed 0"):
        run(finished, *WATCHED, "--resume", "--seed", "1")


@pytest.mark.parametrize("name", optimizers.LABELS)
def test_every_optimizer_of_the_comparison_descends(name):
    """On noisy gradients, to a kernel whose units have the norms with which they begin."""
    settings = optimizers.Settings(learning_rate=0.1, warmup=5, adam_share=1.0)
    numbers = {
        "blocks": {"kernel": MuonDimensionNumbers(0, 1)},
        "bias": MuonDimensionNumbers((), 0),
    }
    optimizer = optax.with_extra_args_support(optimizers.make(name, settings, 100, numbers)[0])
    params = {"blocks": {"kernel": jnp.eye(3)}, "bias": jnp.ones(3)}
    target = {"blocks": {"kernel": jnp.roll(jnp.eye(3), 1, 0)}, "bias": jnp.full(3, 1.5)}

    @jax.jit
    def step(params, state, key):
        noise = optax.tree.random_like(key, params, jax.random.normal)
        grads = jax.tree.map(lambda p, t, e: p - t + 0.3 * e, params, target, noise)
        updates, state = optimizer.update(grads, state, params, max_logits={})  # no attention
        return optax.apply_updates(params, updates), state

    before = optax.tree.norm(optax.tree.sub(params, target))
    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), 100):
        params, state = step(params, state, key)
    after = optax.tree.norm(optax.tree.sub(params, target))
    assert after < 0.9 * before


def test_a_warmup_that_no_run_has_may_be_as_long_as_it_likes():
    program.Config(warmup=12).check_runs(12, ["adamw2", "muon"])
    with pytest.raises(ValueError, match="below the 12 steps"):
        program.Config(warmup=12).check_runs(12, ["adamw2", "muon_warmup"])


@pytest.mark.slow
def test_qk_clip_sees_the_logits_of_the_whole_batch():
    """At a learning rate of 0 it alone moves the weights: the logits come down to its limit."""
    corpus = load_corpus(None)
    config = language.Config(
        model="nano", batch=4, accumulate=2, sequence_length=16, learning_rate=0.0, max_logit=1e-2
    )
    task = language.make_task(config, corpus)
    optimizer, _ = optimizers.make("qk_clip", config, 4, task.numbers)
    batch = training.next_batch(task, config.accumulate)
    inputs = batch.reshape(4, 17)[:, :-1]
    before = layers.largest_logits(task.model, inputs)
    max_logits = measurements.max_logits("qk_clip", lambda tokens: tokens[:, :-1])
    graph, state, update = training.start(task.model, task.loss, optimizer, max_logits)
    state, _ = update(state, batch)
    # In the first block, which sees the same as before.
    after = layers.largest_logits(nnx.merge(graph, state["params"], state["rest"]), inputs)
    assert (before[0] > config.max_logit).all()
    np.testing.assert_allclose(after[0], config.max_logit, rtol=1e-4)
