"""Eight CPU devices, so that the tests can shard; one cache of compiled programs; float64."""

import os
import tempfile

# The tests compile more than they compute: a third of their time is LLVM's full optimization.
# Without any, small loops take ten times as long. The newer fusions take a fifth more, and modules
# that are compiled in parts, side by side, a tenth. And collectives that begin in any order may
# wait for each other for ever, where devices are more than cores.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# Many tests compile the same programs, in the workers of pytest-xdist too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jax-cache-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# The SVDs of NumPy would use the cores of the other workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

# The workers divide the cores among them, where the system can say so (Linux): with the threads of
# each on all of them, the tests take a third longer.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):
    num_workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= num_workers:
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: num_workers])


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """A process may map 65,530 pieces of memory, and each compiled program needs some."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
