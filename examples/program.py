"""What the programs share: their flags, how they end, and runs with several optimizers."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_type_hints

import jax
import tyro
from flax import nnx
from jax.sharding import Mesh

from examples import optimizers, placement, processes, results, run_folder, training
from examples.checkpoints import NO_SPACE, Damaged


class Range(NamedTuple):
    """The values that a flag may have."""

    least: float
    most: float
    has_least: bool = True
    has_most: bool = True

    def __str__(self) -> str:
        low = f"at least {self.least}" if self.has_least else f"above {self.least}"
        return f"{low}, and {'at most' if self.has_most else 'below'} {self.most}"

    def has(self, x: float) -> bool:
        return (self.least <= x if self.has_least else self.least < x) and (
            x <= self.most if self.has_most else x < self.most
        )


COUNT, SHARE = Range(1, 10**6), Range(0, 1, has_most=False)
REAL, POSITIVE = Range(0, 1e30), Range(0, 1e30, has_least=False)  # float32 ends at 3e38
RANGES = {
    **dict.fromkeys(("batch", "accumulate", "epochs", "validation_batches", "seeds"), COUNT),
    **dict.fromkeys(("steps", "log_every", "validate_every", "save_every"), Range(1, 10**9)),
    **dict.fromkeys(("warmup", "watch"), Range(0, 10**9)),
    **dict.fromkeys(("learning_rate", "tau", "weight_decay", "clip"), REAL),
    **dict.fromkeys(("learning_rates", "taus", "target"), REAL),
    **dict.fromkeys(("adam_share", "sign_share", "mixup", "cutmix"), REAL),
    **dict.fromkeys(("max_norm", "max_logit"), POSITIVE),
    **dict.fromkeys(("b1", "b2", "dropout", "stochastic_depth"), SHARE),
    **dict.fromkeys(("random_erasing", "label_smoothing"), SHARE),
    "seed": Range(0, 2**32 - 1),
    "cap_rank": Range(2, 10**6),
    "rand_augment": Range(0, 10),
    "workers": Range(1, 1000),
}


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
        check_ranges(self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}."
            )

    def is_due(self, step: int, every: int) -> bool:
        """Whether a step is the first, the last, or one of `every`, which may be 0 for never."""
        return every > 0 and (step % every == 0 or step in (1, self.steps))

    def check_runs(self, steps: int, runs: Sequence[str]) -> None:
        """Raises ValueError where there is none, or where a warmup does not end before its run."""
        if not _has_each_once(runs):
            raise ValueError("--runs: name at least one optimizer, and each once.")
        have_it = any("warmup" in optimizers.OPTIMIZERS[name].ranges for name in runs)
        if have_it and self.warmup >= steps:
            raise ValueError(f"--warmup {self.warmup}: it must be below the {steps} steps.")


def check_ranges(flags: Any) -> None:
    """Raises ValueError where a flag is out of its range."""
    for name in RANGES.keys() & {field.name for field in dataclasses.fields(flags)}:
        value = getattr(flags, name)
        values = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(map(RANGES[name].has, values)):
            shown = " ".join(map(str, values))
            raise ValueError(f"--{name.replace('_', '-')} {shown}: it must be {RANGES[name]}.")


def describe(kind: type[Config], config: Config, data: str) -> dict[str, Any]:
    """What a checkpoint says of its run: settings of that kind, and a fingerprint of its data."""
    names = {field.name for field in dataclasses.fields(kind)} - run_folder.WHERE
    return {name: getattr(config, name) for name in sorted(names)} | {"data": data}


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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # of what its encoding has not, as the square in ASCII
    flags, has_begun = None, False
    try:
        flags = parse()
        check_ranges(flags)
        processes.join(flags if isinstance(flags, processes.Flags) else processes.Flags())
        processes.set_last_words(f"error: a process was ended, and so are all. {_left(flags)}.")
        with processes.only_first_prints():
            data = prepare(flags)
            has_begun = True
            with training.stop_signal():  # before the first step, and between runs
                main(flags, data)
        sys.stdout.flush()  # where nobody reads it any more, that is an error here, not later
    except (Exception, KeyboardInterrupt) as error:
        _end(error, flags, has_begun)


def _go_on(flags: Any) -> str:
    return "go on with the same command" + " and --resume" * hasattr(flags, "resume")


def _left(flags: Any, once: str = "") -> str:
    """What there is of a run, and what to do."""
    if not hasattr(flags, "resume"):
        return f"{once}{_go_on(flags)}".capitalize()
    return f"{_folder(flags)} is as its last checkpoint has it: {once}{_go_on(flags)}"


def _folder(flags: Any) -> Path:
    return getattr(flags, "out", Path("runs"))


def _end(error: BaseException, flags: Any, has_begun: bool) -> NoReturn:
    """Ends the program with a line: what happened, and what to do."""
    if isinstance(error, BrokenPipeError):  # else Python complains of it as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, (training.Stopped, KeyboardInterrupt)):
        if not has_begun or processes.is_first():
            print(f"\n{str(error) or 'Stopped'}." + f" {_go_on(flags).capitalize()}." * has_begun)
        sys.exit(130)
    if isinstance(error, Damaged) or (isinstance(error, (ValueError, OSError)) and not has_begun):
        line = str(error)
    elif isinstance(error, OSError):
        once = "there is space" if error.errno in NO_SPACE else "that is mended"
        line = f"{error}. {_left(flags, f'once {once}, ')}."
    else:
        first, *_ = *str(error).splitlines(), ""
        line = f"{type(error).__name__}: {first.rstrip('.')}."
        line += " Another process may have ended." * jax.distributed.is_initialized()
        line += f" The traceback is in {_keep(error, _folder(flags))}."
        line += f" {_left(flags)}." * has_begun
    processes.leave(f"error: {line}")


def _keep(error: BaseException, folder: Path) -> Path:
    """Writes a traceback beside a folder, or where there is space, and gives its path."""
    text = "".join(traceback.format_exception(error))
    for parent in (folder.parent, Path(tempfile.gettempdir())):
        file = parent / f"{folder.name}.traceback.txt"
        with contextlib.suppress(OSError):
            file.write_text(text)
            return file
    sys.stderr.write(text)
    return Path("the lines above")


def check_lists(flags: Any, *names: str) -> None:
    """Raises ValueError where a flag of several values has none, or one twice."""
    for name in names:
        if not _has_each_once(getattr(flags, name)):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: name at least one, and each once.")


def _has_each_once(values: Sequence[Any]) -> bool:
    return 0 < len(values) == len(set(values))


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
    with training.stop_signal() as stopped:
        for name in flags.runs:
            if models and stopped():  # in the last save of the one before
                raise training.Stopped(f"{list(models)[-1]} has ended, and {name} not begun")
            models[name] = train(name)
            if processes.is_first():
                results.write_summary(
                    flags.out, {name: results.summarize(flags.out, name) for name in models}
                )
    return models
