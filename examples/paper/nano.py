"""The small models that train within minutes on a CPU, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from flax import nnx

from examples import language, program, train_gpt, train_vit, training, vision
from examples.image_data import Images, load_images
from examples.text_data import Corpus, load_corpus

Name: TypeAlias = Literal[
    "gpt", "gpt-wide", "gpt-widest", "llama", "llama-qk-norm", "llama-wide", "vit", "swin"
]

TEXT: dict[Name, dict[str, Any]] = {  # 20 tokens a parameter: 800 steps of a Llama, 1,320 if wide
    "gpt": {"model": "nano"},
    "gpt-wide": {"model": "nano-wide"},
    "gpt-widest": {"model": "nano-widest"},
    "llama": {"model": "llama-nano", "batch": 16, "cap_rank": 12},
    "llama-qk-norm": {"model": "llama-nano-qk-norm", "batch": 16, "cap_rank": 12},
    "llama-wide": {"model": "llama-nano-wide", "batch": 32, "cap_rank": 24},
}


class Nano(NamedTuple):
    """A model to train, with what its training takes."""

    train: Callable[..., nnx.Module]
    make_task: Callable[..., training.Task]
    config: program.Config
    data: Corpus | Images


def load(name: Name) -> Nano:
    """A GPT or Llama, on Python's standard library; or a ViT or Swin, on digits."""
    if name in TEXT:
        config = dataclasses.replace(language.PRESETS["nano"], **TEXT[name])
        return Nano(train_gpt.train, language.make_task, config, load_corpus(None))
    config = dataclasses.replace(vision.PRESETS["nano"], model=f"{name}-nano")
    return Nano(train_vit.train, vision.make_task, config, load_images(None, num_channels=1))
