"""Other ways to train without warmup, from the sister papers and the rivals, in Optax's form."""

from weyl_optax.contrib._catapult import CatapultState, catapult_schedule, scale_by_catapult
from weyl_optax.contrib._gi_adam import gi_adamw, scale_by_gi_adam
from weyl_optax.contrib._keep_norm import KeepNormState, keep_norm
from weyl_optax.contrib._lion_a import lion_a, lion_ar, scale_by_lion_a
from weyl_optax.contrib._noise_share import NoiseShareState, scale_by_noise_share
from weyl_optax.contrib._qk_clip import qk_clip
from weyl_optax.contrib._rotate import adamw_angle, rotate
from weyl_optax.contrib._soft_spectral_clip import soft_spectral_clip

__all__ = [
    "CatapultState",
    "KeepNormState",
    "NoiseShareState",
    "adamw_angle",
    "catapult_schedule",
    "gi_adamw",
    "keep_norm",
    "lion_a",
    "lion_ar",
    "qk_clip",
    "rotate",
    "scale_by_catapult",
    "scale_by_gi_adam",
    "scale_by_lion_a",
    "scale_by_noise_share",
    "soft_spectral_clip",
]
