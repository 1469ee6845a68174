"""Two processes, against one."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from examples import language, processes, recorder, train_gpt

VIRTUAL = "--xla_force_host_platform_device_count=8"
FLAGS = (
    "--runs adamw2 --steps 12 --warmup 3 --batch 16 --accumulate 2 --sequence-length 16 "
    "--dropout 0.1 --log-every 2 --validate-every 6 --validation-batches 1"
).split()

# Sends SIGTERM to the second process alone, once the loss of step 8 is logged.
PROGRAM = """
import os, signal
from examples import language, processes, program, train_gpt, recorder

write = recorder.Recorder.write

def stop(recorder, step, metrics):
    write(recorder, step, metrics)
    if step == 8 and not processes.is_first():
        os.kill(os.getpid(), signal.SIGTERM)

recorder.Recorder.write = stop
program.run(train_gpt.parse, language.prepare, train_gpt.main)
"""


def run(out, *flags):
    flags = train_gpt.parse([*FLAGS, "--out", str(out), *flags])
    train_gpt.main(flags, language.prepare(flags))


def start_two(out, *flags):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    flags = [*FLAGS, "--out", str(out), *flags, "--coordinator", coordinator]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *flags, "--num-processes", "2", "--process-id", str(i)],
            env=os.environ | {"XLA_FLAGS": devices},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run of two processes that was stopped, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "out"
    pair = start_two(out, "--mesh", "data=2,fsdp=2")
    said = [process.communicate(timeout=500) for process in pair]
    assert [process.returncode for process in pair] == [130, 130], said
    return out, [text for text, _ in said]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_go_on_as_one(stopped, tmp_path, capsys):
    out = shutil.copytree(stopped[0], tmp_path / "two")
    two = recorder.read_metrics(out, "adamw2")
    assert [line["step"] for line in two] == [1, *range(2, 9, 2)]
    run(tmp_path / "one")
    one = recorder.read_metrics(tmp_path / "one", "adamw2")
    capsys.readouterr()
    run(out, "--resume")
    assert "goes on after step 8 on other devices, up to rounding" in capsys.readouterr().out
    resumed = recorder.read_metrics(out, "adamw2")
    assert resumed[: len(two)] == two
    assert [line["step"] for line in resumed] == [line["step"] for line in one]
    for a, b in zip(resumed, one, strict=True):
        assert a.keys() | {"steps_per_second"} == b.keys() | {"steps_per_second"}
        for key in ("loss", "val_loss", "qk_sigma"):
            np.testing.assert_allclose(a.get(key, 0), b.get(key, 0), rtol=1e-4)


@pytest.mark.slow
def test_the_first_process_speaks_and_writes_alone(stopped):
    out, (first, second) = stopped
    assert "4 of 4 devices: data=2, fsdp=2." in first
    assert "adamw2 is saved at step 8. Go on with the same command and --resume." in first
    # Gloo's threads print at once, each a message of single digits piece by piece.
    pieces = (
        r"\[Gloo\] Rank| is connected to| peer ranks\.|"
        r"Expected number of connected peer ranks is :|\s"
    )
    digits = re.sub(pieces, "", second)
    assert re.fullmatch(r"\d*", digits)
    assert len(digits) == 3 * second.count("[Gloo] Rank")
    assert len(list((out / "tensorboard" / "adamw2").glob("events*"))) == 1
    assert json.loads((out / "config.json").read_text())["steps"] == 12


def test_flags_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="go with --coordinator host:port"):
        processes.join(processes.Flags(process_id=1))
    program = subprocess.run(
        [sys.executable, "-m", "examples.train_gpt", "--coordinator", "auto"],
        capture_output=True,
        text=True,
    )
    assert program.returncode == 1
    assert "error: --coordinator auto: " in program.stderr
    assert "Give --coordinator host:port, --num-processes and --process-id." in program.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "--coordinator localhost: write host:port, with a port up to 65535"),
        ("localhost:99999", "write host:port"),
        ("localhost:", "write host:port"),
        (":1234", "write host:port"),
    ],
)
def test_an_address_that_is_none_is_an_error(address, message):
    with pytest.raises(ValueError, match=message):
        processes.join(processes.Flags(address, 2, 0))


def test_a_port_in_use_is_an_error_of_the_first_process():
    with socket.create_server(("", 0)) as used:
        address = f"localhost:{used.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"Address already in use\. Give another port"):
            processes.join(processes.Flags(address, 2, 0))


LONELY = """
from examples import processes
processes.SAY, processes.GIVE_UP = 1.0, 3.0
processes.join(processes.Flags("localhost:{port}", 2, {process_id}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("process_id", [0, 1])
def test_who_waits_for_nobody_says_so_and_ends(process_id):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ended = subprocess.run(
        [sys.executable, "-c", LONELY.format(port=port, process_id=process_id)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if "--coordinator" in line]
    for line, begin, seconds in zip(said, ("", "error: "), (1, 3), strict=True):
        assert line == (
            f"{begin}--coordinator localhost:{port}: the processes have not met in {seconds} s. "
            "Start each with this address of the first, and its own --process-id."
        )


LEFT_ALONE = """
import sys, time
from examples import processes
processes.SILENCE = 10
processes.join(processes.Flags("localhost:{port}", 2, {process_id}))
processes.set_last_words("error: what to do.")
print("joined", flush=True)
{end}
"""


def start_left_alone(end):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", LEFT_ALONE.format(port=port, process_id=i, end=end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in pair:
        assert process.stdout.readline() == "joined\n"
    return pair


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_whose_partner_is_killed_says_what_to_do(killed):
    """It waits for nothing of the other; JAX aborts it, after the seconds that are set here."""
    pair = start_left_alone("sys.stdin.read()")
    pair[killed].kill()
    pair[1 - killed].wait(60)
    for process in pair:
        assert process.communicate(timeout=60)[1].splitlines()[-1] == "error: what to do."
        assert process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "sys.exit('error: mine.')", "processes.leave('error: mine.')"])
def test_a_process_that_ends_by_itself_says_its_own_words_alone(end):
    for process in start_left_alone(end):
        said = process.communicate(timeout=60)[1].splitlines()
        assert [line for line in said if "error:" in line] == ["error: mine."] * bool(end)
        assert process.returncode == bool(end)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("--a=1", "--a=1"),
        (VIRTUAL, f"{VIRTUAL} --xla_cpu_enable_concurrency_optimized_scheduler=false"),
        (
            f"{VIRTUAL} --xla_cpu_enable_concurrency_optimized_scheduler=true",
            f"{VIRTUAL} --xla_cpu_enable_concurrency_optimized_scheduler=true",
        ),
    ],
)
def test_virtual_devices_keep_one_order(before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    processes.join(processes.Flags())
    assert os.environ["XLA_FLAGS"] == after
