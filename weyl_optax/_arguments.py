"""Arguments that are a number, an array that may be traced, or a schedule."""

from typing import Any

import jax
import numpy as np
import optax


def check_at_least(name: str, value: Any, least: float) -> None:
    """Checks a Python number. A schedule or an array is known only when it runs."""
    if isinstance(value, (int, float, np.generic)) and not float(value) >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def value_at(argument: optax.ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    """The value at a step."""
    return argument(count) if callable(argument) else argument
