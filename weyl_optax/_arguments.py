"""Arguments that are a number, an array that may be traced, a schedule, or a mask."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from weyl_optax._reading.specification import is_function


def _known(name: str, value: Any, schedule: bool = False) -> float | None:
    """The number, or None for a schedule or a JAX array, whose values are left to run time."""
    if isinstance(value, (int, float, np.generic, np.ndarray)) and np.ndim(value) == 0:
        return float(value)
    if callable(value):
        if schedule:
            return None
        raise ValueError(
            f"{name} must be a number, got the function {value!r}. For a schedule, use "
            "optax.inject_hyperparams."
        )
    if getattr(value, "shape", None) == ():
        return None
    raise ValueError(f"{name} must be a number, got {value!r}.")


def check_at_least(name: str, value: Any, least: float, schedule: bool = False) -> None:
    """Checks a number that is known, where `schedule` says so of what may be one."""
    number = _known(name, value, schedule)
    if number is not None and not number >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_above(name: str, value: Any, bound: float) -> None:
    """Checks a number that is known."""
    number = _known(name, value)
    if number is not None and not number > bound:
        raise ValueError(f"{name} must be above {bound}, got {value}.")


def check_below(name: str, value: Any, bound: float) -> None:
    """Checks a number that is known."""
    number = _known(name, value)
    if number is not None and not number < bound:
        raise ValueError(f"{name} must be below {bound}, got {value}.")


def check_in(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Checks that it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def as_schedule(argument: optax.ScalarOrSchedule) -> optax.Schedule:
    """A schedule unchanged, and a number or an array as a constant schedule."""
    return argument if callable(argument) else optax.constant_schedule(argument)  # type: ignore


def of_each_leaf(name: str, mask: Any, params: optax.Params) -> Any:
    """A mask as a tree like the params: of a tree of bools, a prefix of one, or a function.

    No mask picks all.

    Raises:
        ValueError: If it does not fit, or is a single value that is not True.
    """
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)) and mask is not True:
        raise ValueError(
            f"{name} is {mask!r}, and would pick no leaf. If it is a function, name it in "
            "static_args of optax.inject_hyperparams, which takes it for a schedule."
        )
    try:
        return jax.tree.map(
            lambda is_picked, part: jax.tree.map(lambda _: is_picked, part),
            True if mask is None else mask(params) if is_function(mask) else mask,
            params,
        )
    except ValueError as error:
        raise ValueError(f"{name} does not fit the params: {error}") from None
