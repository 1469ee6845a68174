"""Arguments that are a number, an array that may be traced, or a schedule."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax


def _is_number(value: Any) -> bool:
    """Whether it can be checked now: a schedule or an array is known only at run time."""
    return isinstance(value, (int, float, np.generic))


def check_at_least(name: str, value: Any, least: float) -> None:
    """Checks a Python number."""
    if _is_number(value) and not float(value) >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_above(name: str, value: Any, bound: float) -> None:
    """Checks a Python number."""
    if _is_number(value) and not float(value) > bound:
        raise ValueError(f"{name} must be above {bound}, got {value}.")


def check_below(name: str, value: Any, bound: float) -> None:
    """Checks a Python number."""
    if _is_number(value) and not float(value) < bound:
        raise ValueError(f"{name} must be below {bound}, got {value}.")


def check_in(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks that it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def as_schedule(argument: optax.ScalarOrSchedule) -> optax.Schedule:
    """A schedule unchanged, and a number or an array as a constant schedule."""
    return argument if callable(argument) else optax.constant_schedule(argument)  # type: ignore
