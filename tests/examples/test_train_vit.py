"""Image classifiers through the main job, on a small scale."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest
from numpy_layers import forward

from examples import program, recorder, train_vit, vision
from examples.checkpoints import Damaged

SMALL = "--steps 6 --warmup 2 --batch 8 --log-every 2 --validate-every 3".split()


def run(out, *flags):
    flags = train_vit.parse([*SMALL, "--out", str(out), *flags])
    images = vision.prepare(flags)
    train_vit.main(flags, images)
    return images


def lines(out, name):
    """The logged steps of a run, without its speed."""
    read = recorder.read_metrics(out, name)
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in read]


@pytest.mark.slow
def test_leaves_a_whole_run_folder_with_the_accuracy(tmp_path, capsys):
    out = tmp_path / "out"
    run(out, "--runs", "adamw", "adamw2")
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["runs"]) == ["adamw", "adamw2"]
    for name, result in summary["runs"].items():
        logged = lines(out, name)
        assert [line["step"] for line in logged] == [1, 2, 3, 4, 6]
        assert result["val_accuracy"] == logged[-1]["val_accuracy"]
        assert len(logged[0]["qk_sigma"]) == 4
        assert (out / "checkpoints" / name / "6").is_dir()
    text = capsys.readouterr().out
    assert "1,400 images of 10 classes to train on, 397 held out." in text
    accuracy = summary["runs"]["adamw2"]["val_accuracy"]
    assert f"AdamW² reaches a validation accuracy of {accuracy:.3f}" in text
    for picture in ("loss.png", "qk_sigma.png", "learning_rates.png"):
        assert (out / picture).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin-nano", "flatten-nano"])
def test_the_accuracy_is_the_share_of_the_digits_that_are_right(tmp_path, name):
    flags = train_vit.parse(
        [*SMALL, "--model", name, "--out", str(tmp_path / "out"), "--stochastic-depth", "0.2"]
    )
    images = vision.prepare(flags)
    model = train_vit.train("adamw", flags, images, flags.out)
    model.eval()
    pixels = np.stack([np.asarray(images.validation[i].image) for i in range(397)])
    labels = np.array([images.validation[i].label for i in range(397)])
    logits = np.asarray(forward(model, (pixels[..., None] / 255 - 0.305) / 0.376), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(397), labels]
    last = lines(flags.out, "adamw")[-1]
    np.testing.assert_allclose(last["val_accuracy"], np.mean(logits.argmax(-1) == labels))
    np.testing.assert_allclose(last["val_loss"], losses.mean(), rtol=1e-5)
    assert len(last["qk_sigma"]) == 2 + 4  # blocks


@pytest.mark.slow
def test_an_image_folder_trains_and_resumes_to_the_same_numbers(image_folder, tmp_path, capsys):
    flags = (
        *("--data", str(image_folder), "--runs", "adamw", "--workers", "1", "--epochs", "4"),
        *("--steps", "None"),
        *("--validate-every", "100"),
        *("--rand-augment", "9", "0.5", "--random-erasing", "0.25", "--mixup", "0.8"),
        *("--cutmix", "1.0", "--label-smoothing", "0.1", "--stochastic-depth", "0.1"),
    )
    images = run(tmp_path / "whole", *flags)
    assert len(images.skipped) == 2
    assert "Files that cannot be read as images, and were skipped: 2." in capsys.readouterr().out
    whole = lines(tmp_path / "whole", "adamw")
    assert [line["step"] for line in whole] == [1, 2, 4, 5]  # 4 epochs of 10 images, by 8
    assert whole[-1]["val_accuracy"] in {i / 5 for i in range(6)}  # of 6 images, one is broken

    class Killed(Exception):
        pass

    write = recorder.Recorder.write

    def kill(recorder, step, metrics):
        if step == 5:
            raise Killed
        write(recorder, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.Recorder, "write", kill)
        with pytest.raises(Killed):
            run(tmp_path / "out", *flags, "--save-every", "3")
    run(tmp_path / "out", *flags, "--save-every", "3", "--resume")
    assert lines(tmp_path / "out", "adamw") == whole


FOLDER = ("--runs", "adamw", "--workers", "1", "--validate-every", "100", "--steps", "6")


@pytest.mark.slow
def test_a_reader_that_is_killed_ends_a_run_with_one_line(image_folder, tmp_path, monkeypatch):
    write = recorder.Recorder.write

    def kill(recorder, step, metrics):
        write(recorder, step, metrics)
        if step == 2:
            for reader in multiprocessing.active_children():
                reader.kill()
                reader.join()

    monkeypatch.setattr(recorder.Recorder, "write", kill)
    flags = (*SMALL, *FOLDER, "--data", str(image_folder), "--out", str(tmp_path / "out"))
    long = ("--steps", "1000")  # than what has been read ahead
    with pytest.raises(SystemExit) as ended:
        program.run(lambda: train_vit.parse([*flags, *long]), vision.prepare, train_vit.main)
    error = str(ended.value)
    assert error.startswith("error: RuntimeError: Worker process was terminated unexpectedly")
    assert error.endswith("checkpoint has it: go on with the same command and --resume.")
    assert "\n" not in error
    assert "Worker process" in (tmp_path / "out.traceback.txt").read_text()


@pytest.mark.slow
def test_a_class_that_was_added_before_resume_is_refused(image_folder, tmp_path):
    flags = (*FOLDER, "--data", str(image_folder), "--steps", "2", "--warmup", "0")
    run(tmp_path / "out", *flags)
    for part in ("train", "val"):
        shutil.copytree(image_folder / part / "green", image_folder / part / "red")
    with pytest.raises(Damaged, match=r"the data are not those on which adamw was trained up to"):
        run(tmp_path / "out", *flags, "--resume")
    for part in ("train", "val"):
        shutil.rmtree(image_folder / part / "red")
    run(tmp_path / "out", *flags, "--resume")


def test_presets_are_the_recipes_of_the_papers():
    base, large, giant = (
        train_vit.parse(["--preset", f"vit-{n}"]) for n in ("base", "large", "giant")
    )
    for flags in (base, large, giant):
        assert (flags.tau, flags.learning_rate, flags.b2) == (0.004, 1e-3, 0.99)
        assert (flags.batch, flags.epochs, flags.clip) == (1024, 150, 0)
        assert (flags.rand_augment, flags.mixup, flags.cutmix) == ((9, 0.5), 0.8, 1.0)
        assert flags.label_smoothing == 0.1
    assert [f.weight_decay for f in (base, large, giant)] == [0.05, 0.1, 0.1]
    assert [f.stochastic_depth for f in (base, large, giant)] == [0.1, 0.5, 0.5]
    for name in ("swin-small", "swin-base", "flatten-small"):
        flags = train_vit.parse(["--preset", name])
        assert (flags.model, flags.tau, flags.epochs, flags.clip) == (name, 0.004, 300, 5)
        assert (flags.b2, flags.weight_decay) == (0.999, 0.05)
    assert train_vit.parse(["--preset", "flatten-small", "--epochs", "150"]).epochs == 150


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vit-huge"], "invalid choice 'vit-huge'"),
        (["--model", "vit-base"], "the digits are 8 x 8 in gray"),
        (["--data", "absent"], "no folder absent"),
        (["--epochs", "0"], "--epochs 0: it must be at least 1"),
        (["--epochs", "1", "--steps", "9"], "--steps 9 --epochs 1: give one of them, and None"),
        (["--preset", "vit-base", "--steps", "200"], "--steps 200 --epochs 150: give one"),
        (["--steps", "None"], "--steps None --epochs None: give one of them"),
        (["--workers", "1000000"], "it must be at least 1, and at most 1000."),
        (["--mixup", "-1"], "--mixup -1.0: it must be at least 0"),
        (["--stochastic-depth", "1"], "at least 0, and below 1"),
        (["--warmup", "6"], "it must be below the 6 steps"),
        (["--resume"], "has no run"),
    ],
)
def test_bad_flags_are_errors_that_say_what_to_write(flags, message, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as raised:
        run(tmp_path / "out", *flags)
    assert message in str(raised.value) + " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
