"""Train Transformers at full learning rate from the first step.

`weyl_optax` bounds the growth of the spectral norm of every weight matrix to
a factor `1 + tau` per step, by Weyl's inequality.
"""

from weyl_optax._adamw2 import adamw2
from weyl_optax._bound import WeylBoundState, scale_by_weyl_bound
from weyl_optax._metrics import bound_metrics
from weyl_optax._reading.granularity import by_head, by_unit
from weyl_optax._reading.specification import SplitDimensionNumbers
from weyl_optax._reading.tabulate import tabulate
from weyl_optax._reading.traced import dimension_numbers_from
from weyl_optax._spectral_norm import spectral_norm
from weyl_optax._state_shardings import state_shardings

__all__ = [
    "SplitDimensionNumbers",
    "WeylBoundState",
    "adamw2",
    "bound_metrics",
    "by_head",
    "by_unit",
    "dimension_numbers_from",
    "scale_by_weyl_bound",
    "spectral_norm",
    "state_shardings",
    "tabulate",
]

__version__ = "0.2.0"
