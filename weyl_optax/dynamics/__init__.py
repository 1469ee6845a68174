"""See what training does: the measurements of arXiv 2505.21910 and its sister papers."""

from typing import Any

from weyl_optax.dynamics._attention import (
    CollapseMode,
    attention_entropy,
    collapse_mode,
    effective_rank,
)
from weyl_optax.dynamics._jacobians import (
    Jacobian,
    jacobian_p_wrt_k,
    jacobian_p_wrt_q,
    jacobian_p_wrt_qk,
    jacobian_p_wrt_x,
)
from weyl_optax.dynamics._representation import relative_representation_change
from weyl_optax.dynamics._sharpness import (
    adam_preconditioner,
    critical_learning_rate,
    sharpness,
)
from weyl_optax.dynamics._spectra import (
    product_spectral_norm,
    qk_spectral_norm,
    spectral_energy_concentration,
)

__all__ = [
    "CollapseMode",
    "Jacobian",
    "adam_preconditioner",
    "attention_entropy",
    "collapse_mode",
    "critical_learning_rate",
    "effective_rank",
    "jacobian_p_wrt_k",
    "jacobian_p_wrt_q",
    "jacobian_p_wrt_qk",
    "jacobian_p_wrt_x",
    "product_spectral_norm",
    "qk_spectral_norm",
    "relative_representation_change",
    "sharpness",
    "spectral_energy_concentration",
    "watch",  # pyright: ignore[reportUnsupportedDunderAll]
]


def __getattr__(name: str) -> Any:
    if name == "watch":  # it alone needs flax
        from weyl_optax.dynamics._watch import watch

        return watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
