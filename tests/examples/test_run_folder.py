"""A run folder that was damaged: what is left of it is used, and what is not is said."""

import json
import shutil
import subprocess
import sys

import pytest

from examples import language, program, recorder, train_gpt
from examples.checkpoints import Checkpoints, Damaged

FLAGS = (
    "--steps 12 --batch 4 --sequence-length 16 --dropout 0.1 --log-every 3 --validate-every 6 "
    "--runs adamw2 --validation-batches 1 --save-every 4"
).split()


def run(out, *flags):
    flags = train_gpt.parse([*FLAGS, "--out", str(out), *flags])
    train_gpt.main(flags, language.prepare(flags))


def lines(out):
    read = recorder.read_metrics(out, "adamw2")
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in read]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    run(out)
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def checkpoint(out, step):
    return out / "checkpoints" / "adamw2" / str(step)


def biggest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.slow
def test_two_checkpoints_are_kept(finished):
    kept = {f.name for f in (finished / "checkpoints" / "adamw2").iterdir()}
    assert kept == {"8", "12"}


TORN = {  # and how many lines are lost
    "cut in the middle": (lambda text: text[:-40], 1),
    "zeros at its end": (lambda text: text[:-40] + "\0" * 40, 1),
    "an empty line": (lambda text: text + "\n\n", 0),
    "not a line of a record": (lambda text: text + "[1, 2]\n" + '{"run": "adamw2"}\n', 0),
    "empty": (lambda text: "", 5),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "lost"), TORN.values(), ids=TORN)
def test_a_damaged_record_has_the_lines_that_are_whole(finished, out, change, lost):
    record = out / "metrics.jsonl"
    record.write_text(change(record.read_text()))
    whole = lines(finished)
    assert lines(out) == whole[: len(whole) - lost]


@pytest.mark.slow
def test_a_run_with_a_damaged_record_ends_where_the_checkpoint_does(finished, out, capsys):
    record = out / "metrics.jsonl"
    record.write_text(record.read_text()[:-40] + "\0" * 40)
    run(out, "--resume")
    assert f"{record}: 1 damaged lines are left out." in capsys.readouterr().out
    assert lines(out) == lines(finished)
    summaries = [json.loads((f / "summary.json").read_text())["runs"] for f in (out, finished)]
    assert summaries[0]["adamw2"]["val_loss"] == summaries[1]["adamw2"]["val_loss"]


@pytest.mark.slow
def test_a_record_that_is_gone_begins_again_at_the_checkpoint(finished, out):
    (out / "metrics.jsonl").unlink()
    run(out, "--resume")
    assert lines(out) == lines(finished)[-1:]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(biggest(folder)),
    "cut off": lambda folder: biggest(folder).write_bytes(biggest(folder).read_bytes()[:-100]),
    "of zero length": lambda folder: biggest(folder).write_bytes(b""),
    "a part gone": lambda folder: shutil.rmtree(folder / "state"),
    "a file gone": lambda folder: biggest(folder).unlink(),
    "not saved to its end": lambda folder: (folder / "digests.json").unlink(),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(out, damage, capsys):
    damage(checkpoint(out, 12))
    checkpoints = Checkpoints(out / "checkpoints" / "adamw2")
    checkpoints.close()
    assert checkpoints.latest_step == 8
    assert f"{checkpoint(out, 12)} is not whole" in capsys.readouterr().out
    assert (checkpoint(out, 12).parent / "damaged-0-12").is_dir()


@pytest.mark.slow
def test_a_run_goes_on_from_the_one_before(finished, out, capsys):
    flip(biggest(checkpoint(out, 12)))
    run(out, "--resume")
    assert "adamw2 goes on after step 8 on the same devices, to the bit." in capsys.readouterr().out
    assert lines(out) == lines(finished)
    assert checkpoint(out, 12).is_dir()


@pytest.mark.slow
def test_bits_are_promised_for_as_many_cores_only(out, monkeypatch, capsys):
    shutil.rmtree(checkpoint(out, 12))
    monkeypatch.setattr(recorder.os, "sched_getaffinity", lambda _: range(1000))
    run(out, "--resume")
    assert "after step 8 on other devices, up to rounding" in capsys.readouterr().out


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_it_is_said_and_the_run_can_begin_again(finished, out):
    for step in (8, 12):
        flip(biggest(checkpoint(out, step)))
    with pytest.raises(Damaged, match=r"none of the checkpoints in .*adamw2 is whole"):
        run(out, "--resume")
    run(out, "--resume")
    assert lines(out) == lines(finished)


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_a_run_that_was_killed_in_its_first_save_begins_again(finished, out, change, capsys):
    shutil.rmtree(checkpoint(out, 8))
    change(checkpoint(out, 12) / "digests.json")
    run(out, "--resume")
    printed = capsys.readouterr().out
    assert "12 is not whole: it was not saved to its end. It is now damaged-0-12." in printed
    assert "goes on" not in printed
    assert lines(out) == lines(finished)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 20])
def test_a_damaged_config_is_named(out, text):
    (out / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        run(out, "--resume")


def test_a_file_in_place_of_the_folder_and_a_full_disk_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is a file\. Name a folder"):
        run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"

    def full(*_):
        raise OSError(28, "No space left on device")

    for prepare, main, said in ((full, None, ""), (lambda _: None, full, "go on with the same")):
        with pytest.raises(SystemExit) as stopped:
            program.run(lambda: train_gpt.parse([]), prepare, main)
        message = str(stopped.value.code)
        assert message.startswith("error: [Errno 28] No space left on device")
        assert said in message
        assert "\n" not in message


@pytest.mark.slow
def test_a_second_process_is_refused(out):
    """The first is this one, which holds the folder to its end."""
    run(out, "--resume")
    second = subprocess.run(
        [sys.executable, "-m", "examples.train_gpt", *FLAGS, "--out", str(out), "--resume"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1] == (
        f"error: another process trains in {out}. Wait for it, or give another --out."
    )
