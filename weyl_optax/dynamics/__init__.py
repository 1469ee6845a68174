"""See what training does: the measurements of arXiv 2505.21910 and its sister papers."""

from weyl_optax.dynamics._attention import (
    CollapseMode,
    attention_entropy,
    collapse_mode,
    effective_rank,
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
from weyl_optax.dynamics._update_sizes import update_sizes

__all__ = [
    "CollapseMode",
    "adam_preconditioner",
    "attention_entropy",
    "collapse_mode",
    "critical_learning_rate",
    "effective_rank",
    "product_spectral_norm",
    "qk_spectral_norm",
    "relative_representation_change",
    "sharpness",
    "spectral_energy_concentration",
    "update_sizes",
]
