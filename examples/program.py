"""What the programs share: flags, the folder of a run, and runs with several optimizers."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import jax
import jax.numpy as jnp
import optax
import tyro
from filelock import FileLock, Timeout
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from examples import optimizers, placement, processes, results, training
from examples.checkpoints import Damaged
from examples.watch import watch
from models import layers
from weyl_optax import bound_metrics, spectral_norm

# Flags that say where a run is, and not what it is: they may change when it goes on.
WHERE = {"out", "resume", "mesh", *(field.name for field in dataclasses.fields(processes.Flags))}


@dataclasses.dataclass(frozen=True)
class Config(optimizers.Settings):
    """How a model is trained, whatever it is."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the parameters are float32."""
    steps: int = 200
    """Updates."""
    batch: int = 8
    """Examples in an update."""
    accumulate: int = 1
    """Parts in which an update goes through its batch, to need less memory."""
    seed: int = 0
    """Of the weights, the batches and the dropout."""
    log_every: int = 5
    """Updates between logged steps."""
    validate_every: int = 50
    """Updates between validations."""
    save_every: int = 1000
    """Updates between checkpoints; the end and Ctrl-C save too."""
    mesh: str | None = None
    """All devices as a mesh, data=2,fsdp=4: copies of the weights, and parts of each copy. By
    default, data alone; in one process, on as many devices as divide --batch / --accumulate."""
    watch: int = 0
    """Updates between measurements of the paper's 15 terms in every block, 0 for none."""

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.batch < 1 or self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}."
            )
        self.check_at_least(1, "steps", "log_every", "validate_every", "save_every")
        self.check_at_least(0, "learning_rate", "tau", "warmup", "weight_decay", "adam_share")
        self.check_at_least(0, "max_norm", "max_logit", "clip", "watch")
        self.check_fraction("betas")

    def is_due(self, step: int, every: int) -> bool:
        """Whether a step is the first, the last, or one of `every`, which may be 0 for never."""
        return every > 0 and (step % every == 0 or step in (1, self.steps))

    def check_at_least(self, least: int, *names: str) -> None:
        """Raises ValueError where a flag is below."""
        self._check(lambda x: least <= x < math.inf, f"it must be at least {least}", names)

    def check_fraction(self, *names: str) -> None:
        """Raises ValueError where a flag is not in [0, 1)."""
        self._check(lambda x: 0 <= x < 1, "it must be 0 or more, and below 1", names)

    def check_warmup(self, steps: int, runs: Sequence[str]) -> None:
        """Raises ValueError where the warmup of a run does not end before it."""
        have_it = any("warmup" in optimizers.OPTIMIZERS[name].tuned for name in runs)
        if have_it and self.warmup >= steps:
            raise ValueError(f"--warmup {self.warmup}: it must be below the {steps} steps.")

    def _check(self, holds: Callable[[float], bool], what: str, names: Sequence[str]) -> None:
        for name in names:
            value = getattr(self, name)
            if not all(map(holds, value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"--{name.replace('_', '-')} {value}: {what}.")


Flags = TypeVar("Flags")


def parse(
    flags: type[Flags],
    presets: Mapping[str, Any],
    arguments: list[str] | None,
    by: str = "preset",
) -> Flags:
    """The flags of a program, with the defaults of the preset that the flag `by` names.

    Read twice: `tyro.extras.overridable_config_cli` makes a preset a subcommand, which must be
    there before any flag.
    """
    field = by, get_type_hints(flags)[by], next(iter(presets))
    Named = dataclasses.make_dataclass("Named", [field])  # noqa: N806
    known, _ = tyro.cli(Named, args=arguments, return_unknown_args=True, add_help=False)
    name = getattr(known, by)
    return tyro.cli(flags, args=arguments, default=flags(**{by: name}, **vars(presets[name])))


Data = TypeVar("Data")


def run(
    parse: Callable[[], Any], prepare: Callable[[Any], Data], main: Callable[[Any, Data], None]
) -> None:
    """Runs a program from its flags to its end, or to a line that says what to do."""
    try:
        flags = parse()
        processes.join(flags if isinstance(flags, processes.Flags) else processes.Flags())
        data = prepare(flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    resume = " and --resume" if hasattr(flags, "resume") else ""
    try:
        with processes.only_first_prints():
            main(flags, data)
    except Damaged as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: {error}. The run is as its last checkpoint has it: once there is space, go on "
            f"with the same command{resume}."
        )
    except training.Stopped as stopped:
        if processes.is_first():
            print(f"\n{stopped}. Go on with the same command{resume}.")
        sys.exit(130)


def begin(flags: Any) -> None:
    """Begins or goes on with the folder of a run, and its `config.json`.

    Args:
        flags: A dataclass with `out`, the folder, and `resume`.

    Raises:
        ValueError: If it would lose or mix runs.
    """
    folder, file = flags.out, flags.out / "config.json"
    config = {k: v for k, v in dataclasses.asdict(flags).items() if k not in WHERE}
    config = json.loads(json.dumps(config, default=str))
    if flags.resume:
        if not file.exists():
            raise ValueError(f"--resume: {folder} has no run. Leave --resume out to begin one.")
        before = _read_config(file)
        if different := [key for key in config if config[key] != before.get(key)]:
            raise ValueError(
                f"--resume: {folder} was begun with other flags. Give "
                + ", ".join(f"--{key.replace('_', '-')} {before.get(key)}" for key in different)
                + ", or another --out."
            )
    elif file.exists():
        raise ValueError(f"{folder} has a run. Go on with --resume, or give another --out.")
    multihost_utils.sync_global_devices("all have looked")
    if processes.is_first():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file. Name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if not flags.resume:
            file.write_text(json.dumps(config, indent=2) + "\n")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"--resume: {file} is damaged. Write it anew, by the same command with another --out, "
            "and copy it here."
        )
    return config


_locks: list[Any] = []  # a lock ends with its object


def _lock(folder: Path) -> None:
    """Keeps a folder for this process, until that ends."""
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
        _locks.append(lock)
    except Timeout:
        raise ValueError(
            f"another process trains in {folder}. Wait for it, or give another --out."
        ) from None


def make_mesh(config: Config) -> Mesh:
    """The devices of a run; see `placement.make_mesh`."""
    return placement.make_mesh(config.mesh, config.batch // config.accumulate)


def train_each(flags: Any, train: Callable[[str], nnx.Module]) -> dict[str, Any]:
    """The models that `train` makes with the optimizers in `flags.runs`, by name."""
    mesh, available = make_mesh(flags), jax.device_count()
    if available > 1:
        axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        print(f"{mesh.size} of {available} devices: {axes}.")
    models = {}
    for name in flags.runs:
        models[name] = train(name)
        if processes.is_first():
            results.write_summary(
                flags.out, {name: results.summarize(flags.out, name) for name in models}
            )
    return models


def max_logits(
    name: str, inputs: Callable[[Any], jax.Array]
) -> Callable[[nnx.Module, Any], dict[str, jax.Array]] | None:
    """The largest logits of every head, from the inputs in a batch, if an optimizer needs them.

    That is QK-Clip. They are those of a GPT or a ViT.
    """
    if name != "qk_clip":
        return None
    return lambda model, batch: {"blocks/attention": layers.largest_logits(model, inputs(batch))}


def observe(
    name: str, stacks: Callable[[Any], Sequence[Any]]
) -> Callable[[Any, optax.OptState], dict[str, jax.Array]]:
    """What is logged of a run with the optimizer of that name.

    The spectral norm of W_q W_k^T, over all heads together, of each block in the stacks of a
    model, and what the bound did.
    """

    def metrics(model: Any, opt_state: optax.OptState) -> dict[str, jax.Array]:
        products = [_qk(blocks) for blocks in stacks(model)]
        found = {"qk_sigma": jnp.concatenate(spectral_norm(products))}
        return found | bound_metrics(opt_state) if name == "adamw2" else found

    return metrics


def measure(loss: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """The paper's 15 terms in every block, on the first micro-batch, as `watch/<name>`."""

    def terms(model: Any, batch: Any) -> dict[str, jax.Array]:
        found = watch(model, jax.tree.map(lambda x: x[0], batch), loss)
        return {f"watch/{name}": value for name, value in found.items()}

    return terms


def _qk(blocks: Any) -> jax.Array:
    """W_q W_k^T of stacked blocks, (blocks, d, d)."""
    query, key = blocks.attention.query.kernel[...], blocks.attention.key.kernel[...]
    return jnp.einsum("ldnh,lenh->lde", query, key)
