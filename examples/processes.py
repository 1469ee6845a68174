"""Several processes that run one program: how they meet, and which of them speaks."""

import atexit
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import NoReturn

import jax

SAY, GIVE_UP = 60.0, 280.0  # seconds of waiting for the others; JAX aborts after 300
SILENCE = 50  # seconds without a word of a process, after which JAX aborts the others


@dataclasses.dataclass(frozen=True)
class Flags:
    """How the processes of a program meet."""

    coordinator: str | None = None
    """Train in several processes, which meet at this host:port of the first; `auto` where Slurm,
    Open MPI, Kubernetes or a TPU pod starts them and says the rest. By default, one process."""
    num_processes: int | None = None
    """How many they are, where the cluster does not say."""
    process_id: int | None = None
    """The number of this process, from 0, where the cluster does not say."""


def join(flags: Flags) -> None:
    """Prepares for several devices, and waits for the other processes.

    It has to come before any use of a device.

    Raises:
        ValueError: If neither the flags nor the cluster say which processes there are, or where
            they cannot meet.
    """
    virtual_devices = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if virtual_devices or flags.coordinator is not None:
        _keep_order()
    if flags.coordinator is None:
        if flags.num_processes is not None or flags.process_id is not None:
            raise ValueError("--num-processes and --process-id go with --coordinator host:port.")
        return
    address = None if flags.coordinator == "auto" else flags.coordinator
    if address:
        _check(address, flags.process_id == 0)
    joined = threading.Event()
    threading.Thread(target=_watch, args=(flags, joined), daemon=True).start()
    try:
        jax.distributed.initialize(
            address, flags.num_processes, flags.process_id, heartbeat_timeout_seconds=SILENCE
        )
    except ValueError as error:
        raise ValueError(
            f"--coordinator {flags.coordinator}: {error} Give --coordinator host:port, "
            "--num-processes and --process-id."
        ) from error
    finally:
        joined.set()


def _check(address: str, is_first: bool) -> None:
    """Raises ValueError where JAX would end without a word."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {address}: write host:port, with a port up to 65535.")
    if is_first:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(
                f"--coordinator {address}: {os.strerror(error.errno or 0)}. Give another port, to "
                "all processes."
            ) from None


def _watch(flags: Flags, joined: threading.Event) -> None:
    """Says for what this process waits, and ends it before JAX aborts it."""
    waits = (
        f"--coordinator {flags.coordinator}: the processes have not met "
        f"in {{:.0f}} s. Start each with this address of the first, and its own --process-id."
    )
    if not joined.wait(SAY):
        print(waits.format(SAY), file=sys.stderr, flush=True)
        if not joined.wait(GIVE_UP - SAY):
            print(f"error: {waits.format(GIVE_UP)}", file=sys.stderr, flush=True)
            os._exit(1)


def _keep_order() -> None:
    """Lets all devices of a CPU begin their operations in the same order.

    XLA else begins several at once; where they are collectives, all threads may come to wait for
    each other, and it aborts the program.
    """
    flags, name = os.environ.get("XLA_FLAGS", ""), "xla_cpu_enable_concurrency_optimized_scheduler"
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}=false"


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Lets processes that start here hear neither Ctrl-C nor SIGTERM, which this one answers."""
    resource_tracker.ensure_running()  # its start would end what follows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_speakers: list[subprocess.Popen[bytes]] = []


def set_last_words(line: str) -> None:
    """Has a line said if this process, of several, is killed, or aborted by JAX as others are gone.

    A process beside this one says it, where it does not hear that this one ends by itself.
    """
    if jax.distributed.is_initialized():
        command = ["sh", "-c", 'read -r _ || echo "$0" >&2', line]
        speaker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        _speakers.append(speaker)
        atexit.register(_take_back)


def _take_back() -> None:
    while _speakers:
        _speakers.pop().communicate(b"\n")


def leave(error: str) -> NoReturn:
    """Ends this process with an error; one of several does not wait for others, who may be gone."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        print(error, file=sys.stderr, flush=True)
        _take_back()
        os._exit(1)
    sys.exit(error)


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what all have in common."""
    return jax.process_index() == 0


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Drops what the other processes print."""
    if is_first():
        yield
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
