"""Small problems of many leaves, as few calls on an accelerator."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Problem = tuple[jax.Array, ...]  # arrays of shape (b, ...)


def map_batched(fn: Callable[..., Problem], problems: Sequence[Problem]) -> list[Problem]:
    """Calls `fn` on the arrays of every leaf.

    An accelerator would be idle in calls so small: there, one call has all leaves of one size and
    dtype. On a CPU calls are cheap, and joining costs compile time: each slice of the joined result
    is a kernel of its own.
    """
    return lax.platform_dependent(
        problems,
        cpu=lambda problems: [fn(*problem) for problem in problems],
        default=lambda problems: _joined(fn, problems),
    )


def _joined(fn: Callable[..., Problem], problems: Sequence[Problem]) -> list[Problem]:
    """The same, with one call for all problems that differ in b only."""
    # The type of one problem: shape, dtype, and over which manual mesh axes it varies.
    kinds = [jax.typeof(lax.slice_in_dim(problem[-1], 0, 1)) for problem in problems]
    results: list[Problem] = [()] * len(problems)
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        parts = [problems[i] for i in places]
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        outputs = fn(*map(jnp.concatenate, zip(*parts, strict=True)))
        split = [jnp.split(y, ends[:-1]) for y in outputs]
        for i, result in zip(places, zip(*split, strict=True), strict=True):
            results[i] = result
    return results
