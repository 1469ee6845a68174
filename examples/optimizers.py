"""The optimizers that the examples compare, by name."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import optax

from weyl_optax import adamw2

Name = Literal["adamw", "adamw_warmup", "adamw2", "radam", "lion", "lamb", "adaptive_grad_clip"]

LABELS: dict[str, str] = {
    "adamw": "AdamW, no warmup",
    "adamw_warmup": "AdamW, warmup",
    "adamw2": "AdamW², no warmup",
    "radam": "RAdam, no warmup",
    "lion": "Lion, no warmup",
    "lamb": "LAMB, no warmup",
    "adaptive_grad_clip": "AdamW + adaptive_grad_clip, no warmup",
}
assert set(LABELS) == set(get_args(Name))


def make_schedule(name: str, learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Cosine decay to zero, from the first step but for `adamw_warmup`."""
    if name == "adamw_warmup":
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    return optax.cosine_decay_schedule(learning_rate, steps)


def is_decayed(params: optax.Params) -> optax.Params:
    """Kernels and embeddings, but no biases, norms, positions or class tokens."""

    def name(path: tuple[Any, ...]) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]

    return jax.tree.map_with_path(lambda path, _: name(path) in ("kernel", "embedding"), params)


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    tau: float,
    clip: float,
    weight_dimension_numbers: Any,
) -> optax.GradientTransformation:
    """An optimizer after clipping by the global norm, `clip=0` for none."""
    b1, b2 = betas
    adam: dict[str, Any] = {"b1": b1, "b2": b2, "weight_decay": weight_decay, "mask": is_decayed}
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(schedule, **adam),
        "adamw_warmup": lambda: optax.adamw(schedule, **adam),
        "adamw2": lambda: adamw2(
            schedule, **adam, tau=tau, weight_dimension_numbers=weight_dimension_numbers
        ),
        "radam": lambda: optax.chain(
            optax.scale_by_radam(b1, b2),
            optax.add_decayed_weights(weight_decay, is_decayed),
            optax.scale_by_learning_rate(schedule),
        ),
        "lion": lambda: optax.lion(schedule, weight_decay=weight_decay, mask=is_decayed),
        "lamb": lambda: optax.lamb(schedule, b1, b2, weight_decay=weight_decay, mask=is_decayed),
        "adaptive_grad_clip": lambda: optax.chain(
            optax.adamw(schedule, **adam), optax.adaptive_grad_clip(tau)
        ),
    }
    optimizer = makers[name]()
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
