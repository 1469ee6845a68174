"""A run folder that was damaged: what is left of it is used, and what is not is said."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import language, program, recorder, run_folder, train_gpt
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


def cut_to(number):
    """Keeps the first lines of a record."""
    return lambda file: file.write_text("".join(file.read_text().splitlines(True)[:number]))


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
@pytest.mark.parametrize(
    ("change", "gone"), [(lambda f: f.unlink(), 5), (cut_to(0), 5), (cut_to(2), 3), (cut_to(4), 1)]
)
def test_lines_of_the_record_that_are_gone_are_said_once(finished, out, capsys, change, gone):
    record, left = out / "metrics.jsonl", 5 - gone
    assert len(lines(out)) == 5
    change(record)
    run(out, "--resume")
    said = f"{record}: of 5 lines of adamw2 up to step 12, {gone} are gone."
    assert said in capsys.readouterr().out
    assert lines(out) == lines(finished)[:left] + lines(finished)[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints/adamw2"])
def test_a_run_without_its_checkpoints_says_that_it_begins_again(finished, out, capsys, folder):
    shutil.rmtree(out / folder)
    run(out, "--resume")
    assert "adamw2 has logged steps and has no checkpoint: it begins again." in (
        capsys.readouterr().out
    )
    assert lines(out) == lines(finished)


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl"])
@pytest.mark.parametrize("flags", [[], ["--resume"], ["--seed", "7"]])
def test_a_folder_without_its_config_is_not_begun_anew(tmp_path, left, flags):
    (tmp_path / "checkpoints" / "adamw2" / "4").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("")
    for name in {"checkpoints", "metrics.jsonl"} - {left}:
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name}")
    how = r"config\.json is gone\. Write it anew" if flags == ["--resume"] else "has a run"
    with pytest.raises(ValueError, match=how):
        run(tmp_path, *flags)
    assert not (tmp_path / "config.json").exists()


def test_a_folder_in_which_nothing_was_trained_may_be_begun_anew(tmp_path):
    for seed in ("1", "2"):
        flags = train_gpt.parse([*FLAGS, "--out", str(tmp_path), "--seed", seed])
        run_folder.begin(flags)
        assert json.loads((tmp_path / "config.json").read_text())["seed"] == int(seed)


def test_the_flags_that_an_error_names_are_flags(tmp_path):
    def flags(out, *more):
        return train_gpt.parse([*FLAGS, "--out", str(tmp_path / out), *more])

    run_folder.begin(flags("a", "--runs", "adamw", "adamw2", "--no-bias", "--mesh", "data=1"))
    with pytest.raises(ValueError, match="was begun with other flags") as raised:
        run_folder.begin(flags("a", "--resume"))
    named = str(raised.value).split("Give ")[1].split(", or another")[0].split()
    assert "--no-bias" in named
    run_folder.begin(flags("a", "--resume", *named))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def relabel(folder, change):
    label = json.loads((folder / "digests.json").read_text())
    (folder / "digests.json").write_text(json.dumps(change(label)))


DAMAGE = {
    "a flipped bit": lambda folder: flip(biggest(folder)),
    "cut off": lambda folder: biggest(folder).write_bytes(biggest(folder).read_bytes()[:-100]),
    "of zero length": lambda folder: biggest(folder).write_bytes(b""),
    "a part gone": lambda folder: shutil.rmtree(folder / "state"),
    "a file gone": lambda folder: biggest(folder).unlink(),
    "not saved to its end": lambda folder: (folder / "digests.json").unlink(),
    "no digests": lambda folder: relabel(folder, lambda _: {}),
    "null": lambda folder: relabel(folder, lambda _: None),
    "a list": lambda folder: relabel(folder, lambda label: [label]),
    "digests of nothing": lambda folder: relabel(folder, lambda label: label | {"files": {}}),
    "a file too many": lambda folder: (folder / "state" / "more").write_text(""),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(out, damage, capsys):
    damage(checkpoint(out, 12))
    label = json.loads((checkpoint(out, 8) / "digests.json").read_text())
    checkpoints = Checkpoints(out / "checkpoints" / "adamw2", label["run"])
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
def test_a_checkpoint_of_another_step_is_refused(out):
    checkpoint(out, 12).rename(checkpoint(out, 40))
    with pytest.raises(Damaged, match=r"40 is the checkpoint of step 12: name it so again"):
        run(out, "--resume")
    checkpoint(out, 40).rename(checkpoint(out, 3))
    checkpoint(out, 8).rename(checkpoint(out, 12))
    with pytest.raises(Damaged, match=r"12 is the checkpoint of step 8"):
        run(out, "--resume")
    assert {f.name for f in checkpoint(out, 3).parent.iterdir()} == {"3", "12"}  # nothing is lost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"12 is the checkpoint of another run, with seed 1, not 0\. Put back"),
        ({"run": "adamw"}, "of another run, with run adamw, not adamw2"),
        ({"learning_rate": 0.5, "steps": 9}, "with learning_rate 0.5, not 0.01, steps 9, not 12"),
        ({"data": "0"}, r"the data are not those on which adamw2 was trained up to step 12"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(out, changes, message):
    relabel(checkpoint(out, 12), lambda label: label | {"run": label["run"] | changes})
    with pytest.raises(Damaged, match=message):
        run(out, "--resume")
    assert checkpoint(out, 12).is_dir()


@pytest.mark.slow
def test_a_text_that_was_replaced_is_refused_and_one_that_was_put_back_is_not(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the first text, of which there is enough. " * 40)
    run(out, "--data", str(text), "--steps", "4")
    whole = lines(out)
    text.rename(tmp_path / "first.txt")
    text.write_text("A QUITE OTHER TEXT WITH OTHER LETTERS!!! " * 40)
    with pytest.raises(Damaged, match="Put those back, or give another --out"):
        run(out, "--data", str(text), "--steps", "4", "--resume")
    (tmp_path / "first.txt").rename(text)
    run(out, "--data", str(text), "--steps", "4", "--resume")
    assert lines(out) == whole


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


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file", r"file is a file\. Name a folder"),
        ("gs://bucket/run", "name a folder of this machine"),
        (b"r\xff".decode(errors="surrogateescape"), r"--out 'r.udcff': name it in UTF-8"),
    ],
)
def test_what_cannot_be_a_folder_is_refused(tmp_path, monkeypatch, folder, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=message):
        run(folder)
    assert (tmp_path / "file").read_text() == "mine"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def ending(tmp_path, error, when="main"):
    """The exit code of a program in which an error comes up."""

    def raise_it(*_):
        raise error

    main, prepare = (raise_it, lambda _: None) if when == "main" else (None, raise_it)
    with pytest.raises(SystemExit) as stopped:
        program.run(lambda: train_gpt.parse(["--out", str(tmp_path / "run")]), prepare, main)
    return stopped.value.code


ENDINGS = {
    "no space": (OSError(errno.ENOSPC, "No space left on device"), "once there is space"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "once there is space"),
    "size of a file": (OSError(errno.EFBIG, "File too large"), "once there is space"),
    "input or output": (OSError(errno.EIO, "Input/output error"), "once that is mended"),
    "not foreseen": (RuntimeError("a\nb"), r"error: RuntimeError: a\. The traceback is in "),
    "ours": (Damaged("none is whole."), r"error: none is whole\.$"),
}


@pytest.mark.parametrize(("error", "said"), ENDINGS.values(), ids=ENDINGS)
def test_whatever_happens_in_a_run_ends_with_one_line(tmp_path, error, said):
    line = ending(tmp_path, error)
    assert line.startswith("error: ")
    assert re.search(said, line)
    assert "\n" not in line
    if not isinstance(error, Damaged):
        assert f"{tmp_path / 'run'} is as its last checkpoint has it" in line
        assert line.endswith("go on with the same command and --resume.")
    file = tmp_path / "run.traceback.txt"
    assert file.exists() == isinstance(error, RuntimeError)
    if file.exists():
        assert str(file) in line
        assert file.read_text().endswith("RuntimeError: a\nb\n")


LIMITED = """
import resource, sys, types
import jax
from examples import processes
from examples.checkpoints import Checkpoints
from examples.recorder import Recorder
from jax.sharding import Mesh
from pathlib import Path

def fill_record():
    mesh = Mesh(jax.devices(), ("data",))
    with Recorder(Path(sys.argv[1]), "adamw2", mesh, {}) as recorder:
        limit()
        for step in range(10_000):
            recorder.write(step, {"loss": 1.0})

def save():
    checkpoints = Checkpoints(Path(sys.argv[1]), {})
    state = [jax.random.normal(jax.random.key(i), (200, 200)) for i in range(20)]
    limit()
    checkpoints.save(2, state, {})

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

try:
    globals()[sys.argv[2]]()
except OSError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fill_record", "save"])
def test_a_file_that_may_not_grow_is_one_error_and_no_hang(tmp_path, what):
    """A full disk does the same; TensorBoard's writer would wait for ever, Orbax say more."""
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), what],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"error: \[Errno 27\] File too large.*\n", ended.stderr)


@pytest.mark.parametrize(
    "error", [ValueError("--x 3: it must be 4."), OSError(13, "Permission denied", "/x")]
)
def test_whatever_happens_before_is_one_line_of_it_alone(tmp_path, error):
    assert ending(tmp_path, error, when="prepare") == f"error: {error}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["prepare", "main"])
def test_ctrl_c_at_any_time_is_one_line(tmp_path, when, capsys):
    assert ending(tmp_path, KeyboardInterrupt(), when=when) == 130
    said = capsys.readouterr()
    go_on = " Go on with the same command and --resume." * (when == "main")
    assert said.out == f"\nStopped.{go_on}\n"
    assert said.err == ""


def test_a_letter_that_the_terminal_has_not_is_a_question_mark(tmp_path):
    code = (
        "from examples import program, train_gpt\n"
        "program.run(lambda: train_gpt.parse([]), lambda _: None, lambda *_: print('AdamW²'))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "AdamW?\n"


PRINTS = """
from examples import program, train_gpt

def prepare(flags):
    if {when!r} == "before":
        say()

def say():
    print("a line " * 100_000 * ({when!r} != "at the end"))

program.run(lambda: train_gpt.parse(["--out", "out"]), prepare, lambda *_: say())
"""


@pytest.mark.parametrize("when", ["before", "in a run", "at the end"])
def test_a_pipe_that_nobody_reads_is_one_line(tmp_path, when):
    """As that of `| head -1`."""
    program = subprocess.Popen(
        [sys.executable, "-c", PRINTS.format(when=when)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert program.stdout
    program.stdout.close()
    assert program.stderr
    with program.stderr:
        said = program.stderr.read()
    assert program.wait(60) == 1
    go_on = (
        ". out is as its last checkpoint has it: once that is mended, go on with the same command "
        "and --resume."
    )
    assert said == f"error: [Errno 32] Broken pipe{go_on * (when != 'before')}\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_program_without_a_terminal_runs(tmp_path, closed):
    code = (
        "import sys; from examples import program, train_gpt\n"
        "def main(*_): print('x'); print('y', file=sys.stderr); open('done', 'w').close()\n"
        "program.run(lambda: train_gpt.parse([]), lambda _: None, main)"
    )
    subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    assert [file.name for file in tmp_path.iterdir()] == ["done"]
    assert (tmp_path / "done").read_text() == ""


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
