"""A GPT on text: the flags, the task, and the run folder that the examples share."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models.gpt
from examples import optimizers, training
from examples.data import (
    Corpus,
    Windows,
    load_corpus,
    training_batches,
    validation_batches,
)
from models.gpt import GPT
from weyl_optax import bound_metrics, spectral_norm
from weyl_optax.flax import dimension_numbers


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, data and optimizer of a GPT. The defaults are those of the preset `nano`."""

    model: Literal["nano", "gpt2-small", "gpt2-large"] = "nano"
    """Size of the GPT, from models/gpt.py."""
    bias: bool = True
    """Biases in the linear layers and the layer norms."""
    dropout: float = 0.0
    """Dropout rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the parameters are float32."""
    data: Path | None = None
    """A text file, a folder of text, or a folder with nanoGPT's train.bin and val.bin. By
    default, Python's standard library."""
    steps: int = 200
    """Updates."""
    batch: int = 8
    """Sequences in an update."""
    accumulate: int = 1
    """Parts in which an update goes through its batch, to need less memory."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    learning_rate: float = 1e-2
    """Peak; it decays by a cosine to zero."""
    tau: float = 0.03
    """Largest relative growth of a spectral norm in an update (AdamW²)."""
    warmup: int = 50
    """Updates of linear warmup, for the run that has it."""
    weight_decay: float = 0.1
    """Of matrices; vectors do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    clip: float = 1.0
    """Global gradient norm, 0 for no clipping."""
    seed: int = 0
    """Of the weights, the batches and the dropout."""
    log_every: int = 5
    """Updates between logged steps."""
    validate_every: int = 50
    """Updates between validations."""
    validation_batches: int = 16
    """Batches in a validation."""
    save_every: int = 1000
    """Updates between checkpoints; the end and Ctrl-C save too."""

    def __post_init__(self) -> None:
        context = models.gpt.CONFIGS[self.model].context_length
        if not 1 <= self.sequence_length <= context:
            raise ValueError(
                f"--sequence-length {self.sequence_length}: {self.model} takes 1 to {context}."
            )
        if self.accumulate < 1 or self.batch < 1 or self.batch % self.accumulate:
            raise ValueError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}."
            )
        for name in ("steps", "log_every", "validate_every", "validation_batches", "save_every"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: it must be at least 1.")
        for name in ("learning_rate", "tau", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: it must be 0 or more.")
        for name, values in (("dropout", [self.dropout]), ("betas", self.betas)):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"--{name} {getattr(self, name)}: 0 or more, and below 1.")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: it must be below --steps {self.steps}.")


_GPT2 = Config(
    model="gpt2-small",
    bias=False,
    dtype="bfloat16",
    steps=100_000,
    batch=480,  # of 1024 tokens: 491,520 in an update
    accumulate=20,
    sequence_length=1024,
    learning_rate=6e-4,
    tau=0.01,
    warmup=2000,
    log_every=10,
    validate_every=1000,
    validation_batches=8,
)

PRESETS = {
    "nano": Config(),
    "gpt2-small": _GPT2,
    "gpt2-large": dataclasses.replace(
        _GPT2, model="gpt2-large", accumulate=60, learning_rate=2.5e-4
    ),
}


def prepare(flags: Any) -> Corpus:
    """Reads the text, and begins or goes on with the folder of a run and its `config.json`.

    Args:
        flags: A `Config` with `out`, the folder, and `resume`.

    Raises:
        ValueError: If the data do not fit the flags, or if it would lose or mix runs.
    """
    corpus = load_corpus(flags.data)
    for tokens in (corpus.train, corpus.validation):
        Windows(tokens, flags.sequence_length)
    folder, file = flags.out, flags.out / "config.json"
    config = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("out", "resume")}
    config = json.loads(json.dumps(config, default=str))
    if flags.resume:
        if not file.exists():
            raise ValueError(f"--resume: {folder} has no run. Leave --resume out to begin one.")
        before = json.loads(file.read_text())
        if different := [key for key in config if config[key] != before.get(key)]:
            raise ValueError(
                f"--resume: {folder} was begun with other flags. Give "
                + ", ".join(f"--{key.replace('_', '-')} {before.get(key)}" for key in different)
                + ", or another --out."
            )
    elif file.exists():
        raise ValueError(f"{folder} has a run. Go on with --resume, or give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2) + "\n")
    return corpus


def run_program(parse: Callable[[], Any], main: Callable[[Any, Corpus], None]) -> None:
    """Runs a program from its flags to its end, or to a line that says what to do."""
    try:
        flags = parse()
        corpus = prepare(flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        main(flags, corpus)
    except training.Stopped as stopped:
        print(f"\n{stopped}. Go on with the same command and --resume.")
        sys.exit(130)


def make_model(config: Config, corpus: Corpus) -> GPT:
    """The GPT of a config, with the vocabulary of a corpus, from its seed."""
    size = dataclasses.replace(
        models.gpt.CONFIGS[config.model],
        vocab_size=corpus.vocab_size,
        use_bias=config.bias,
        dropout=config.dropout,
        dtype=config.dtype,
    )
    return GPT(size, rngs=nnx.Rngs(config.seed))


def train_run(name: str, config: Config, corpus: Corpus, folder: Path) -> GPT:
    """Trains a GPT with the optimizer of that name; see `training.train`."""
    model = make_model(config, corpus)
    numbers = dimension_numbers(model)
    is_numbers = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    learning_rate = optimizers.make_schedule(
        name, config.learning_rate, config.steps, config.warmup
    )
    optimizer = optimizers.make_optimizer(
        name,
        learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        decay_mask=jax.tree.map(lambda n: bool(n.reduction_axis), numbers, is_leaf=is_numbers),
        tau=config.tau,
        clip=config.clip,
        weight_dimension_numbers=numbers,
    )
    task = training.Task(
        model=model,
        batches=training_batches(corpus.train, config.sequence_length, config.batch, config.seed),
        validation=validation_batches(
            corpus.validation,
            config.sequence_length,
            config.batch // config.accumulate,
            config.validation_batches,
        ),
        loss=next_token_loss,
        observe=observe_bound if name == "adamw2" else observe,
    )
    plan = training.Plan(
        steps=config.steps,
        accumulate=config.accumulate,
        log_every=config.log_every,
        validate_every=config.validate_every,
        save_every=config.save_every,
    )
    return training.train(name, task, optimizer, learning_rate, plan, folder)


def next_token_loss(model: GPT, batch: jax.Array) -> jax.Array:
    """Cross entropy in nats per token. The batch, (B, T + 1), holds inputs and targets."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def observe(model: GPT, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The spectral norm of W_q W_k^T, over all heads together, of each block."""
    del opt_state
    attention = model.blocks.attention
    products = jnp.einsum("ldnh,lenh->lde", attention.query.kernel[...], attention.key.kernel[...])
    return {"qk_sigma": spectral_norm(products)}


def observe_bound(model: GPT, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The same, and what the bound did."""
    return observe(model, opt_state) | bound_metrics(opt_state)


def summarize(folder: Path, name: str) -> dict[str, Any]:
    """The result of a run, from its logged steps."""
    lines = training.read_metrics(folder, name)
    last = lines[-1]
    losses = [line["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    rates = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
    sigmas = [sigma for line in lines for sigma in line["qk_sigma"] if sigma is not None]
    return {
        "val_loss": last.get("val_loss"),
        "train_loss": None if last["loss"] is None else float(np.mean(losses)),
        "max_qk_sigma": max(sigmas, default=None),
        "steps_per_second": float(np.median(rates)) if rates else None,
        "diverged_at": last["step"] if last["loss"] is None else None,
    }


def generate(model: GPT, prompt: str, length: int, seed: int, temperature: float = 0.8) -> str:
    """Text that a GPT over bytes writes after a prompt."""
    graph, state = nnx.split(model)
    state = nnx.as_pure(state)
    context = model.config.context_length
    start = np.frombuffer(prompt.encode(), np.uint8)[-context:]
    tokens = jnp.zeros(context, jnp.int32).at[: start.size].set(start)

    @jax.jit
    def write(state: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        def next_token(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
            tokens, used = carry
            model = nnx.merge(graph, state)
            model.eval()
            logits = model(tokens[None])[0, used - 1]
            token = jax.random.categorical(key, logits / temperature)
            # The window moves on once it is full.
            tokens = jnp.where(used == context, jnp.roll(tokens, -1), tokens)
            used = jnp.minimum(used, context - 1)
            return (tokens.at[used].set(token), used + 1), token

        return jax.lax.scan(next_token, (tokens, start.size), jax.random.split(key, length))[1]

    written = write(state, tokens, jax.random.key(seed))
    return prompt + bytes(np.asarray(written, np.uint8)).decode(errors="replace")


def write_summary(folder: Path, runs: dict[str, Any]) -> None:
    """Writes `summary.json`."""
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({"config": config, "runs": runs}, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n")
