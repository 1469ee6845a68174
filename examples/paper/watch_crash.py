"""Watch a Transformer crash: the paper's measurements, beside the same model with the bound."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from examples import language, program, run_folder, vision
from examples.paper import crash_page, nano
from models import layers
from weyl_optax.dynamics import (
    attention_entropy,
    collapse_mode,
    effective_rank,
    spectral_energy_concentration,
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A run that crashes without the bound."""

    learning_rate: float
    """Peak; it decays by a cosine to zero."""
    tau: float
    """Largest relative growth of a spectral norm in an update (AdamW²)."""
    steps: int
    """Updates."""


PRESETS = {
    "gpt": Preset(learning_rate=0.3, tau=0.03, steps=160),
    "vit": Preset(learning_rate=0.1, tau=0.015, steps=160),
}


@dataclasses.dataclass(frozen=True)
class Flags(Preset):
    """Watch a nano GPT or ViT crash with AdamW, and train with QK-Clip and AdamW²; make a page."""

    model: Literal["gpt", "vit"] = "gpt"
    """On Python's standard library, or on scikit-learn's handwritten digits."""
    watch: int = 4
    """Updates between measurements, and frames of the animation."""
    seed: int = 0
    """Of the weights and the batches."""
    out: Path = Path("runs/watch_crash")
    """The folder of the run."""
    resume: bool = False
    """Go on with the run in that folder."""


class Experiment(NamedTuple):
    """A model in training, and what the page says of it."""

    name: str
    model: nano.Nano
    inputs: jax.Array  # held out, whose attention is watched
    entropy: float  # of the frequencies of the targets, in nats: what guessing reaches


def parse(arguments: list[str] | None = None) -> Flags:
    """The flags, with the defaults of the model that they name."""
    return program.parse(Flags, PRESETS, arguments, by="model")


def prepare(flags: Flags) -> Experiment:
    """Reads the data, and begins or goes on with the folder of a run.

    Raises:
        ValueError: If a flag is out of range, or if it would lose or mix runs.
    """
    if flags.watch < 1:
        raise ValueError(f"--watch {flags.watch}: it must be at least 1.")
    model = nano.load(flags.model)
    config = dataclasses.replace(
        model.config,
        **{field.name: getattr(flags, field.name) for field in dataclasses.fields(Preset)},
        growth="exponential",  # the paper's rule
        seed=flags.seed,
        watch=flags.watch,
        log_every=flags.watch,
        validate_every=flags.steps,
    )
    data = model.data
    if flags.model == "gpt":
        length = config.sequence_length
        inputs = language.validation_batches(data.validation, length, 2, 1)[0][:, :-1]
        targets = data.validation
    else:
        batch = next(iter(vision.validation_batches(data, 8, len(data.validation), workers=1)))
        inputs, targets = vision.normalize(data, batch["image"][:8]), batch["label"]
    run_folder.begin(flags)
    name = {"gpt": "GPT on Python's source text", "vit": "ViT on handwritten digits"}[flags.model]
    entropy = float(scipy.stats.entropy(np.bincount(targets)))
    return Experiment(name, model._replace(config=config), jnp.asarray(inputs), entropy)


def main(flags: Flags, experiment: Experiment) -> None:
    """Trains with each, and makes the page."""

    def snapshot(model: Any) -> dict[str, jax.Array]:
        return measure_attention(model, experiment.inputs)

    model = experiment.model
    for name in crash_page.RUNS:
        model.train(name, model.config, model.data, flags.out, snapshot=snapshot)
    signs, path = crash_page.write(flags.out, experiment.name, flags, experiment.entropy)
    print(f"\n{signs}\n\nPage: {path}")


def measure_attention(model: Any, inputs: jax.Array) -> dict[str, jax.Array]:
    """What the page shows of attention in all blocks; see `crash_page.Run`."""
    maps = layers.attention_weights(model, inputs)
    query, key = (
        layer.kernel[...] for layer in (model.blocks.attention.query, model.blocks.attention.key)
    )
    directions = jnp.arange(1, query.shape[-1] + 1)
    return {
        "entropy": attention_entropy(maps),
        "effective_rank": effective_rank(maps),
        "mode": collapse_mode(maps),
        "maps": maps[:, 0].astype(jnp.float16),
        "energy": spectral_energy_concentration(query, key, directions),
    }


if __name__ == "__main__":
    program.run(parse, prepare, main)
