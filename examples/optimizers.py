"""The optimizers that the examples compare, by name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax

from examples import rivals
from examples.rivals import is_numbers
from weyl_optax import adamw2, by_unit, scale_by_weyl_bound
from weyl_optax.contrib import (
    gi_adamw,
    keep_norm,
    lion_a,
    lion_ar,
    qk_clip,
    rotate,
    scale_by_noise_share,
    soft_spectral_clip,
)

Growth = Literal["linear", "exponential"]
Decay = Literal["cosine", "wsd"]
Alone = Literal[
    "adamw",
    "adamw_warmup",
    "adamw2",
    "adamw2_warmup",
    "adamw2_cap",
    "adamw_cap",
    "radam",
    "lion",
    "lamb",
    "unit_clip",
    "schedule_free",
    "gi_adamw",
    "noise_share",
    "soft_clip",
    "qk_clip",
    "keep_norm",
    "adam_h",
    "lion_a",
    "lion_ar",
    "muon",
    "muon_warmup",
    "muon_h",
    "scion",
    "normuon",
]
Bounded = Literal[  # AdamW's is AdamW²
    "radam_bound",
    "lion_bound",
    "lamb_bound",
    "gi_adamw_bound",
    "noise_share_bound",
    "soft_clip_bound",
    "keep_norm_bound",
    "adam_h_bound",
    "lion_a_bound",
    "lion_ar_bound",
    "muon_bound",
    "muon_h_bound",
]
Name = Alone | Bounded


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer is made of, whichever it is."""

    learning_rate: float = 1e-2
    """Peak."""
    decay: Decay = "cosine"
    """Of the rate to zero: by a cosine, or linearly in the last fifth (warmup, stable, decay)."""
    tau: float = 0.1
    """Largest growth of a spectral norm in an update, relative (AdamW²)."""
    growth: Growth = "linear"
    """Of spectral norms over the updates; the paper's is exponential."""
    warmup: int = 50
    """Updates of linear warmup, for the runs that have it."""
    weight_decay: float = 0.1
    """Of kernels and embeddings; the others do not decay."""
    b1: float = 0.9
    """Decay rate of the first moment; for Lion and Scion, of the momentum."""
    b2: float = 0.95
    """Decay rate of Adam's second moment; for Lion, of the momentum that is kept."""
    adam_share: float = 0.1
    """Times the learning rate, that of Adam for embeddings and vectors (Muon, AdamH, MuonH)."""
    sign_share: float = 1 / 3
    """Times the learning rate, the step of every entry of embeddings; of the head 10 / width of
    that (Scion)."""
    cap_rank: int = 32
    """Singular values of an update that are lowered to the last of them (AdamW² with the cap)."""
    max_norm: float = 10.0
    """Largest singular value of Adam's update (soft spectral clip)."""
    max_logit: float = 100.0
    """Largest logit of attention, above which queries and keys shrink (QK-Clip)."""
    clip: float = 1.0
    """Global gradient norm, 0 for no clipping."""


class Optimizer(NamedTuple):
    """An optimizer of the comparison."""

    label: str
    make: Callable[[optax.Schedule, Settings, Any], optax.GradientTransformation]
    schedule: Callable[[Settings, int], optax.Schedule]
    ranges: Mapping[str, tuple[float, float]]  # of what is tuned; the warmup's in shares of a run


def make(
    name: str, settings: Settings, steps: int, weight_dimension_numbers: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer after clipping by the global norm, and its learning rate."""
    schedule = OPTIMIZERS[name].schedule(settings, steps)
    return make_at(name, schedule, settings, weight_dimension_numbers), schedule


def make_at(
    name: str, rate: optax.Schedule, settings: Settings, weight_dimension_numbers: Any
) -> optax.GradientTransformation:
    """An optimizer after clipping by the global norm, at a learning rate of any schedule."""
    optimizer = OPTIMIZERS[name].make(rate, settings, weight_dimension_numbers)
    if settings.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip), optimizer)
    return optimizer


def is_decayed(params: optax.Params) -> optax.Params:
    """Kernels and embeddings (of a GPT, also that of positions), and nothing else."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        return _name(path).rpartition("/")[2] in ("kernel", "embedding")

    return jax.tree.map_with_path(is_decayed, params)


def is_hidden_kernel(params: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The kernels of the blocks: neither embeddings nor the classifier."""

    def is_hidden(path: tuple[Any, ...], _: Any) -> bool:
        name = _name(path)
        return "blocks/" in name and name.endswith("kernel")

    return jax.tree.map_with_path(is_hidden, params, is_leaf=is_leaf)


def is_embedding(params: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The embeddings."""
    return jax.tree.map_with_path(
        lambda path, _: _name(path).endswith("embedding"), params, is_leaf=is_leaf
    )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def evaluation_params(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    """The params of which the loss counts: those of schedule-free training are an average."""
    states = jax.tree.leaves(opt_state, is_leaf=_is_schedule_free)
    for state in filter(_is_schedule_free, states):
        return optax.contrib.schedule_free_eval_params(state, params)
    return params


def _is_schedule_free(x: Any) -> bool:
    return isinstance(x, optax.contrib.ScheduleFreeState)


def _no_warmup(s: Settings, steps: int) -> optax.Schedule:
    return _after_warmup(s, 0, steps)


def _warmup(s: Settings, steps: int) -> optax.Schedule:
    return _after_warmup(s, s.warmup, steps)


def _after_warmup(s: Settings, warmup: int, steps: int) -> optax.Schedule:
    peak, start = s.learning_rate, max(warmup, round(0.8 * steps))
    if s.decay == "cosine":
        decay = optax.cosine_decay_schedule(peak, steps - warmup)
    else:
        linear = optax.linear_schedule(peak, 0.0, steps - start)
        decay = optax.join_schedules((optax.constant_schedule(peak), linear), (start - warmup,))
    if not warmup:
        return decay
    return optax.join_schedules((optax.linear_schedule(0.0, peak, warmup), decay), (warmup,))


def _warmup_constant(s: Settings, steps: int) -> optax.Schedule:
    del steps
    return optax.warmup_constant_schedule(0.0, s.learning_rate, s.warmup)


def _adam(s: Settings) -> dict[str, Any]:
    return {"b1": s.b1, "b2": s.b2, "weight_decay": s.weight_decay, "mask": is_decayed}


def _adamw(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    del numbers
    return optax.adamw(rate, **_adam(s))


def _adamw2(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return adamw2(rate, **_adam(s), tau=s.tau, growth=s.growth, weight_dimension_numbers=numbers)


def _adamw2_cap(
    rate: optax.Schedule, s: Settings, numbers: Any, tau: float | None = None
) -> optax.GradientTransformation:
    return adamw2(
        rate,
        **_adam(s),
        tau=s.tau if tau is None else tau,
        growth=s.growth,
        weight_dimension_numbers=numbers,
        cap_rank=s.cap_rank,
        cap_mask=is_hidden_kernel,
    )


def _adamw_cap(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return _adamw2_cap(rate, s, numbers, tau=math.inf)


def _radam(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    del numbers
    return optax.chain(
        optax.scale_by_radam(s.b1, s.b2),
        optax.add_decayed_weights(s.weight_decay, is_decayed),
        optax.scale_by_learning_rate(rate),
    )


def _lion(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    del numbers
    return optax.lion(rate, s.b1, s.b2, weight_decay=s.weight_decay, mask=is_decayed)


def _lamb(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    del numbers
    return optax.lamb(rate, s.b1, s.b2, weight_decay=s.weight_decay, mask=is_decayed)


def _unit_clip(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    bound = scale_by_weyl_bound(
        s.tau, growth="exponential", weight_dimension_numbers=by_unit(numbers)
    )
    return optax.chain(optax.adamw(rate, **_adam(s)), bound)


def _schedule_free(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    """`optax.contrib.schedule_free_adamw`, but for the mask of the decay, which that has not."""
    del numbers
    adam = optax.chain(
        optax.scale_by_rms(s.b2, bias_correction=True, eps_in_sqrt=False),
        optax.add_decayed_weights(s.weight_decay, is_decayed),
        optax.scale_by_learning_rate(rate),
    )
    return optax.contrib.schedule_free(adam, learning_rate=rate, b1=s.b1)


def _muon(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    # The Adam within `optax.contrib.muon` has Nesterov momentum, and decays norms and biases.
    hidden = is_hidden_kernel(numbers, is_numbers)
    muon = optax.contrib.muon(
        rate,
        weight_decay=s.weight_decay,
        muon_weight_dimension_numbers=rivals.only_where(numbers, hidden),
    )
    labels = jax.tree.map(lambda is_hidden: "muon" if is_hidden else "others", hidden)
    return optax.partition({"muon": muon, "others": _others(rate, s)}, labels)


def _others(rate: optax.Schedule, s: Settings) -> optax.GradientTransformation:
    """AdamW for what Muon and its kind do not take, at a share of the rate."""
    return optax.adamw(lambda count: s.adam_share * rate(count), **_adam(s))


def _gi_adamw(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    del numbers
    return gi_adamw(rate, **_adam(s))


def _noise_share(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return scale_by_noise_share(
        optax.adamw(rate, **_adam(s)), s.b1, weight_dimension_numbers=numbers
    )


def _soft_clip(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(s.b1, s.b2),
        soft_spectral_clip(s.max_norm, _hidden_kernels(numbers)),
        optax.add_decayed_weights(s.weight_decay, is_decayed),
        optax.scale_by_learning_rate(rate),
    )


def _qk_clip(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return optax.chain(_adamw(rate, s, numbers), qk_clip(s.max_logit))


def _keep_norm(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return optax.chain(optax.adamw(rate, **_adam(s)), keep_norm(_hidden_kernels(numbers)))


def _adam_h(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return optax.chain(_others(rate, s), _hyperball(rate, numbers))


def _muon_h(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return optax.chain(_muon(rate, s, numbers), _hyperball(rate, numbers))


def _hyperball(rate: optax.Schedule, numbers: Any) -> optax.GradientTransformation:
    return rotate(rate, _hidden_kernels(numbers), per="matrix", decay=0.0)


def _lion_a(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    del numbers
    return lion_a(rate, weight_decay=s.weight_decay, mask=is_decayed)


def _lion_ar(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return lion_ar(
        rate, weight_decay=s.weight_decay, weight_dimension_numbers=_hidden_kernels(numbers)
    )


def _scion(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return rivals.scion(
        rate,
        numbers,
        is_hidden_kernel(numbers, is_numbers),
        is_embedding(numbers, is_numbers),
        b1=s.b1,
        weight_decay=s.weight_decay,
        mask=is_decayed,
        sign_share=s.sign_share,
    )


def _normuon(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
    return rivals.normuon(
        rate,
        numbers,
        is_hidden_kernel(numbers, is_numbers),
        _others(rate, s),
        weight_decay=s.weight_decay,
        mask=is_decayed,
    )


def _hidden_kernels(numbers: Any) -> Any:
    """The kernels, as Muon takes them, in a tree of dimension numbers; None for other leaves.

    Neither embeddings nor the classifier are hidden.
    """
    hidden = is_hidden_kernel(numbers, is_numbers)
    return jax.tree.map(lambda x, kept: x if kept else None, numbers, hidden, is_leaf=is_numbers)


_TAU = {"tau": (0.02, 0.5)}
_WARMUP = {"warmup": (0.02, 0.3)}
_SHARE = {"adam_share": (0.03, 1.0)}
_DECAY = {"weight_decay": (0.01, 1.0)}
_ADAM = _DECAY | {"b2": (0.9, 0.999)}
_MUON = _ADAM | _SHARE


def _from(lowest: float, **others: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """The ranges of what is tuned; that of the peak rate has two decades."""
    return {"learning_rate": (lowest, 100 * lowest)} | others


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("AdamW, no warmup", _adamw, _no_warmup, _from(3e-4, **_ADAM)),
    "adamw_warmup": Optimizer("AdamW, warmup", _adamw, _warmup, _from(3e-4, **_ADAM, **_WARMUP)),
    "adamw2": Optimizer("AdamW², no warmup", _adamw2, _no_warmup, _from(1e-3, **_ADAM, **_TAU)),
    "adamw2_warmup": Optimizer(
        "AdamW², short warmup",
        _adamw2,
        _warmup,
        _from(1e-3, **_ADAM, **_TAU, warmup=(0.01, 0.1)),
    ),
    "adamw2_cap": Optimizer(
        "AdamW² with the cap, no warmup", _adamw2_cap, _no_warmup, _from(1e-3, **_ADAM, **_TAU)
    ),
    "adamw_cap": Optimizer(
        "AdamW with the cap, no bound, no warmup", _adamw_cap, _no_warmup, _from(1e-3, **_ADAM)
    ),
    "radam": Optimizer("RAdam, no warmup", _radam, _no_warmup, _from(3e-4, **_ADAM)),
    "lion": Optimizer(
        "Lion, no warmup", _lion, _no_warmup, _from(3e-5, weight_decay=(0.1, 10.0), b2=(0.9, 0.999))
    ),
    "lamb": Optimizer("LAMB, no warmup", _lamb, _no_warmup, _from(1e-3, **_ADAM)),
    "unit_clip": Optimizer(
        "AdamW, units clipped, no warmup",
        _unit_clip,
        _no_warmup,
        _from(1e-3, **_ADAM, tau=(0.003, 0.1)),
    ),
    "schedule_free": Optimizer(
        "AdamW, schedule-free, warmup",
        _schedule_free,
        _warmup_constant,
        _from(3e-4, **_ADAM, **_WARMUP),
    ),
    "gi_adamw": Optimizer("GI-AdamW, no warmup", _gi_adamw, _no_warmup, _from(3e-4, **_ADAM)),
    "noise_share": Optimizer(
        "AdamW, noise share, no warmup", _noise_share, _no_warmup, _from(3e-4, **_ADAM)
    ),
    "soft_clip": Optimizer(
        "AdamW, soft clip, no warmup",
        _soft_clip,
        _no_warmup,
        _from(3e-4, **_ADAM, max_norm=(1.0, 30.0)),
    ),
    "qk_clip": Optimizer(
        "AdamW, QK-Clip, no warmup",
        _qk_clip,
        _no_warmup,
        _from(3e-4, **_ADAM, max_logit=(10.0, 100.0)),
    ),
    "keep_norm": Optimizer(
        "AdamW, norms kept, no warmup", _keep_norm, _no_warmup, _from(3e-4, **_ADAM)
    ),
    "adam_h": Optimizer("AdamH, no warmup", _adam_h, _no_warmup, _from(3e-3, **_MUON)),
    "lion_a": Optimizer(
        "LionA, no warmup", _lion_a, _no_warmup, _from(1e-3, weight_decay=(0.1, 10.0))
    ),
    "lion_ar": Optimizer(
        "LionAR, no warmup", _lion_ar, _no_warmup, _from(1e-2, weight_decay=(0.1, 10.0))
    ),
    "muon": Optimizer("Muon, no warmup", _muon, _no_warmup, _from(3e-3, **_MUON)),
    "muon_warmup": Optimizer("Muon, warmup", _muon, _warmup, _from(3e-3, **_MUON, **_WARMUP)),
    "muon_h": Optimizer("MuonH, no warmup", _muon_h, _no_warmup, _from(3e-3, **_MUON)),
    "scion": Optimizer(
        "Scion, no warmup",
        _scion,
        _no_warmup,
        _from(3e-3, **_DECAY, b1=(0.5, 0.95), sign_share=(0.03, 3.0)),
    ),
    "normuon": Optimizer("NorMuon, no warmup", _normuon, _no_warmup, _from(3e-3, **_MUON)),
}
assert set(OPTIMIZERS) == set(get_args(Alone))


def _bounded(name: str) -> Optimizer:
    """An optimizer with the bound behind it. Muon has it for its own weights alone."""
    alone = OPTIMIZERS[name]
    bounded_weights = _hidden_kernels if name == "muon" else lambda numbers: numbers

    def make(rate: optax.Schedule, s: Settings, numbers: Any) -> optax.GradientTransformation:
        bound = scale_by_weyl_bound(
            s.tau, growth=s.growth, weight_dimension_numbers=bounded_weights(numbers)
        )
        return optax.chain(alone.make(rate, s, numbers), bound)

    label = alone.label.replace(", no warmup", "") + " with the bound, no warmup"
    return Optimizer(label, make, alone.schedule, dict(alone.ranges) | _TAU)


ALONE = {name: name.removesuffix("_bound") for name in get_args(Bounded)}
OPTIMIZERS |= {name: _bounded(alone) for name, alone in ALONE.items()}
ALONE |= dict.fromkeys(("adamw2", "adamw2_warmup", "adamw2_cap"), "adamw")
LABELS = {name: optimizer.label for name, optimizer in OPTIMIZERS.items()}
