"""A GPT or a Llama on text: its flags, its data, and how it is trained."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from grain.sharding import ShardByJaxProcess
from jax.experimental import multihost_utils

from examples import placement, program, run_folder, training
from examples.text_data import (
    Corpus,
    Windows,
    load_corpus,
    training_batches,
    validation_batches,
)
from models import gpt, llama
from models.gpt import GPT
from models.llama import Llama
from weyl_optax.flax import dimension_numbers

Model: TypeAlias = GPT | Llama
SIZES: dict[str, gpt.Config | llama.Config] = {**gpt.CONFIGS, **llama.CONFIGS}


@dataclasses.dataclass(frozen=True)
class Config(program.Config):
    """Model, data and optimizer of a GPT. The defaults are those of the preset `nano`."""

    model: Literal[
        "nano", "nano-wide", "nano-widest", "gpt2-small", "gpt2-large",
        "llama-nano", "llama-nano-qk-norm", "llama-nano-wide",
        "llama-small", "llama-small-qk-norm",
    ] = "nano"  # fmt: skip
    """Size of the GPT, from models/gpt.py, or of a Llama, from models/llama.py."""
    bias: bool = True
    """Biases in the linear layers and the layer norms. A Llama has none."""
    dropout: float = 0.0
    """Dropout rate. A Llama has none."""
    data: Path | None = None
    """A text file, a folder of text, or a folder with nanoGPT's train.bin and val.bin or the
    token files of the GPT-2 speedruns. By default, Python's standard library."""
    sequence_length: int = 128
    """Tokens in a sequence, of which a batch has --batch."""
    validation_batches: int = 16
    """Batches of --batch sequences in a validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        context = SIZES[self.model].context_length
        if not 1 <= self.sequence_length <= context:
            raise ValueError(
                f"--sequence-length {self.sequence_length}: {self.model} takes 1 to {context}."
            )
        if isinstance(SIZES[self.model], llama.Config) and self.dropout:
            raise ValueError(f"--dropout is of a GPT: {self.model} has none. Leave it out.")


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
    growth="exponential",
    warmup=2000,
    log_every=10,
    validate_every=1000,
    validation_batches=1,
)

PRESETS = {
    "nano": Config(),
    "gpt2-small": _GPT2,
    "gpt2-large": dataclasses.replace(
        _GPT2, model="gpt2-large", accumulate=60, learning_rate=2.5e-4
    ),
}


def prepare(flags: Any) -> Corpus:
    """Reads the text, and begins or goes on with the folder of a run.

    Raises:
        ValueError: If the data do not fit the flags, or if it would lose or mix runs.
    """
    if "qk_clip" in flags.runs and getattr(SIZES[flags.model], "qk_norm", False):
        raise ValueError(
            f"--runs qk_clip: {flags.model} norms its queries and keys, so their weights do not "
            "change its logits. Leave qk_clip out."
        )
    corpus = load_corpus(flags.data)
    check_length(flags, corpus)
    flags.check_runs(flags.steps, flags.runs)
    program.make_mesh(flags)  # which checks the flag
    run_folder.begin(flags)
    return corpus


def check_length(config: Config, corpus: Corpus) -> None:
    """Raises ValueError where a corpus is shorter than a sequence and the token after it."""
    for tokens in (corpus.train, corpus.validation):
        Windows(tokens, config.sequence_length)


def make_model(config: Config, corpus: Corpus) -> Model:
    """The model of a config, with the vocabulary of a corpus, from its seed."""
    size = dataclasses.replace(
        SIZES[config.model], vocab_size=corpus.vocab_size, dtype=config.dtype
    )
    rngs = nnx.Rngs(config.seed)
    if isinstance(size, llama.Config):
        return Llama(size, rngs=rngs)
    return GPT(dataclasses.replace(size, use_bias=config.bias, dropout=config.dropout), rngs=rngs)


def make_task(config: Config, corpus: Corpus) -> training.Task:
    """A model on its mesh, its batches and its loss."""
    mesh = program.make_mesh(config)
    model = placement.place_model(make_model(config, corpus), mesh)
    return training.Task(
        mesh=mesh,
        model=model,
        numbers=numbers_of(model),
        batches=training_batches(
            corpus.train,
            config.sequence_length,
            config.batch // config.accumulate,
            config.seed,
            ShardByJaxProcess(),
        ),
        loss=placement.spread_rows(next_token_loss, mesh),
        run=program.describe(Config, config, corpus.fingerprint),
    )


def numbers_of(model: Model) -> Any:
    """How the leaves of a model are read as matrices."""
    tokens = jax.ShapeDtypeStruct((1, model.config.context_length), jnp.int32)
    return dimension_numbers(type(model).__call__, model, tokens)


def held_out(config: Config, corpus: Corpus) -> list[np.ndarray]:
    """The batches of a validation, of which each process has its rows."""
    return validation_batches(
        corpus.validation,
        config.sequence_length,
        config.batch // config.accumulate,
        config.validation_batches * config.accumulate,
        ShardByJaxProcess(),
    )


def next_token_loss(model: Model, batch: jax.Array) -> jax.Array:
    """Cross entropy in nats per token. The batch, (B, T + 1), holds inputs and targets."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def evaluate(model: Model, batch: jax.Array) -> dict[str, jax.Array]:
    """The loss of a batch, and that it counts as one."""
    return {"loss": next_token_loss(model, batch), "count": jnp.ones([])}


def generate(model: Model, prompt: str, length: int, seed: int, temperature: float = 0.8) -> str:
    """Text that a model over bytes writes after a prompt."""
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

    written = multihost_utils.process_allgather(
        write(state, tokens, jax.random.key(seed)), tiled=True
    )
    return prompt + bytes(np.asarray(written, np.uint8)).decode(errors="replace")
