"""Several processes that run one program: how they meet, and which of them speaks."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax


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
        ValueError: If neither the flags nor the cluster say which processes there are.
    """
    virtual_devices = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if virtual_devices or flags.coordinator is not None:
        _keep_order()
    if flags.coordinator is None:
        if flags.num_processes is not None or flags.process_id is not None:
            raise ValueError("--num-processes and --process-id go with --coordinator host:port.")
        return
    address = None if flags.coordinator == "auto" else flags.coordinator
    try:
        jax.distributed.initialize(address, flags.num_processes, flags.process_id)
    except ValueError as error:
        raise ValueError(
            f"--coordinator {flags.coordinator}: {error} Give --coordinator host:port, "
            "--num-processes and --process-id."
        ) from error


def _keep_order() -> None:
    """Lets all devices of a CPU begin their operations in the same order.

    XLA else begins several at once; where they are collectives, all threads may come to wait for
    each other, and it aborts the program.
    """
    flags, name = os.environ.get("XLA_FLAGS", ""), "xla_cpu_enable_concurrency_optimized_scheduler"
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}=false"


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
