"""A ViT or a Swin on images: its flags, its data, and how it is trained."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from grain.sharding import ShardByJaxProcess
from optax.contrib import MuonDimensionNumbers

import models.swin
import models.vit
from examples import placement, program, run_folder, training
from examples.image_data import (
    Augmentation,
    Images,
    load_images,
    training_batches,
    validation_batches,
)
from models.swin import Swin
from models.vit import ViT
from weyl_optax.flax import dimension_numbers

ModelName = Literal[
    "vit-nano",
    "vit-tiny",
    "vit-base",
    "vit-large",
    "vit-giant",
    "swin-nano",
    "swin-small",
    "swin-base",
    "flatten-nano",
    "flatten-small",
]
SIZES: dict[str, models.vit.Config | models.swin.Config] = {
    **{f"vit-{name}": size for name, size in models.vit.CONFIGS.items()},
    **{
        name if name.startswith("flatten-") else f"swin-{name}": size
        for name, size in models.swin.CONFIGS.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Config(program.Config):
    """Model, data and optimizer of an image classifier."""

    model: ModelName = "vit-nano"
    """Architecture and size, from models/vit.py and models/swin.py."""
    stochastic_depth: float = 0.0
    """Probability to leave out the last block; it grows from 0 in the first."""
    data: Path | None = None
    """A folder with train/<class>/<image> and val/<class>/<image>, as ImageNet. By default,
    scikit-learn's handwritten digits."""
    steps: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Updates."""
    epochs: int | None = None
    """Passes over the images, in place of --steps."""
    rand_augment: tuple[float, float] = (0.0, 0.0)
    """RandAugment's magnitude, of 10, and its standard deviation."""
    random_erasing: float = 0.0
    """Probability to put noise into a part of an image."""
    mixup: float = 0.0
    """Alpha of mixup, 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix, 0 for none; with both, each batch takes one."""
    label_smoothing: float = 0.0
    """Probability that the target gives to all classes alike."""
    workers: int = 8
    """Processes that read --data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"--steps {self.steps} --epochs {self.epochs}: give one of them, and None for the "
                "other."
            )


_NANO = Config(
    steps=200,
    batch=64,
    learning_rate=2e-2,
    warmup=60,
    validate_every=25,
)
_IMAGENET = Config(
    model="vit-base",
    dtype="bfloat16",
    epochs=150,
    batch=1024,
    learning_rate=1e-3,
    tau=0.004,
    growth="exponential",
    warmup=10_000,
    weight_decay=0.05,
    b2=0.99,
    clip=0.0,
    stochastic_depth=0.1,
    rand_augment=(9.0, 0.5),
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    log_every=50,
    validate_every=1250,
)
_SWIN = dataclasses.replace(
    _IMAGENET,
    model="swin-small",
    epochs=300,
    b2=0.999,
    clip=5.0,
    stochastic_depth=0.3,
    random_erasing=0.25,
)
_LARGE = dataclasses.replace(_IMAGENET, weight_decay=0.1, stochastic_depth=0.5)

PRESETS = {
    "nano": _NANO,
    # Table 2a of the paper.
    "vit-base": _IMAGENET,
    "vit-large": dataclasses.replace(_LARGE, model="vit-large", accumulate=4),
    "vit-giant": dataclasses.replace(_LARGE, model="vit-giant", accumulate=16),
    # Liu et al. (2021) and Han et al. (2023), without their warmup.
    "swin-small": _SWIN,
    "swin-base": dataclasses.replace(_SWIN, model="swin-base", stochastic_depth=0.5),
    "flatten-small": dataclasses.replace(_SWIN, model="flatten-small"),
}


def prepare(flags: Any) -> Images:
    """Finds the images, and begins or goes on with the folder of a run.

    Raises:
        ValueError: If the data do not fit the flags, or if it would lose or mix runs.
    """
    if "qk_clip" in flags.runs and not flags.model.startswith("vit-"):
        raise ValueError(f"--runs qk_clip needs the logits of a ViT, and --model is {flags.model}.")
    images = load_images(flags.data, SIZES[flags.model].num_channels)
    flags.check_runs(num_steps(flags, images), flags.runs)
    program.make_mesh(flags)  # which checks the flag
    run_folder.begin(flags)
    return images


def num_steps(config: Config, images: Images) -> int:
    """The updates of a run."""
    if config.epochs is None:
        assert config.steps is not None
        return config.steps
    return max(1, config.epochs * len(images.train) // config.batch)


def make_model(config: Config, images: Images) -> ViT | Swin:
    """The model of a config, with the classes of the images, from its seed."""
    size = dataclasses.replace(
        SIZES[config.model],
        num_classes=len(images.classes),
        stochastic_depth=config.stochastic_depth,
        dtype=config.dtype,
    )
    return (ViT if isinstance(size, models.vit.Config) else Swin)(size, rngs=nnx.Rngs(config.seed))


def normalize(images: Images, pixels: jax.Array) -> jax.Array:
    """Pixels, 0 to 255, as a model takes them."""
    return (pixels / 255 - np.array(images.mean)) / np.array(images.std)


def make_task(config: Config, images: Images) -> training.Task:
    """A classifier on its mesh, its batches and its loss."""
    mesh = program.make_mesh(config)
    model = placement.place_model(make_model(config, images), mesh)
    return training.Task(
        mesh=mesh,
        model=model,
        numbers=numbers_of(model),
        batches=training_set(config, images),
        loss=placement.spread_rows(functools.partial(loss, images), mesh),
        run=program.describe(Config, config, images.fingerprint),
    )


def training_set(config: Config, images: Images) -> grain.DatasetIterator:
    """Endless batches, of which each process has its rows."""
    return training_batches(
        images,
        SIZES[config.model].image_size,
        config.batch // config.accumulate,
        Augmentation(
            config.rand_augment,
            config.random_erasing,
            config.mixup,
            config.cutmix,
            config.label_smoothing,
        ),
        config.seed,
        config.workers,
        ShardByJaxProcess(),
    )


def loss(images: Images, model: ViT | Swin, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross entropy in nats per image."""
    logits = model(normalize(images, batch["image"]))
    return optax.softmax_cross_entropy(logits, batch["target"]).mean()


def numbers_of(model: ViT | Swin) -> Any:
    """How the leaves of a ViT or a Swin are read as matrices."""
    c = model.config
    images = jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.num_channels), jnp.float32)
    # Added, not looked up as a GPT's, a table of positions would be one long vector.
    has_table = isinstance(model, ViT) or c.num_linear_stages > 0
    tables = {"*position_embedding": MuonDimensionNumbers(-2, -1)} if has_table else None
    return dimension_numbers(type(model).__call__, model, images, overrides=tables)


def held_out(config: Config, images: Images) -> Iterable[dict[str, np.ndarray]]:
    """The batches of a validation, of which each process has its rows."""
    return validation_batches(
        images,
        SIZES[config.model].image_size,
        config.batch // config.accumulate,
        config.workers,
        ShardByJaxProcess(),
    )


def evaluate(
    images: Images, model: ViT | Swin, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The loss and the hits of a batch, and how many images it has."""
    logits = model(normalize(images, batch["image"]))
    label, weight = batch["label"], batch["weight"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return {
        "loss": (weight * losses).sum(),
        "accuracy": (weight * (logits.argmax(-1) == label)).sum(),
        "count": weight.sum(),
    }


def stacks(model: ViT | Swin) -> list[nnx.Module]:
    """The stacked blocks of a model, those of each stage of a Swin apart."""
    return [model.blocks] if isinstance(model, ViT) else [stage.blocks for stage in model.stages]
