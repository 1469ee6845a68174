"""Many small dense problems, as a device likes to have them."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

EIGH_WORK = 2**14  # operations, as b k^3, of a batch that jaxlib leaves in one thread


def solve(
    fn: Callable[..., tuple[jax.Array, ...]], problems: Sequence[tuple[jax.Array, ...]]
) -> list[tuple[jax.Array, ...]]:
    """Calls `fn` on the arrays of every leaf, of shape (b, ...).

    An accelerator would be idle in calls so small: there, one call has all leaves of one size and
    dtype. On a CPU, where a call costs nothing, XLA compiles kernels that are alike once, but the
    slice of every part of a joined result anew.
    """
    return lax.platform_dependent(
        problems,
        cpu=lambda problems: [fn(*problem) for problem in problems],
        default=lambda problems: _joined(fn, problems),
    )


def _joined(
    fn: Callable[..., tuple[jax.Array, ...]], problems: Sequence[tuple[jax.Array, ...]]
) -> list[tuple[jax.Array, ...]]:
    """The same, with one call for all problems that differ in b only."""
    results: dict[int, tuple[jax.Array, ...]] = {}
    kinds = [(problem[-1].dtype, problem[-1].shape[1:]) for problem in problems]
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        parts = [problems[i] for i in places]
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        outputs = fn(*map(jnp.concatenate, zip(*parts, strict=True)))
        split = [jnp.split(y, ends[:-1]) for y in outputs]
        results |= dict(zip(places, zip(*split, strict=True), strict=True))
    return [results[i] for i in range(len(problems))]


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of Hermitian matrices (b, k, k)."""
    return _in_parts(lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)), x)


def eigvalsh(x: jax.Array) -> jax.Array:
    """Eigenvalues, ascending, of Hermitian matrices (b, k, k)."""
    return _in_parts(functools.partial(jnp.linalg.eigvalsh, symmetrize_input=False), x)


def _in_parts(fn: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`fn` of a batch of matrices.

    On a CPU, jaxlib spreads a batch that is worth it over XLA's threads, and waits for them in
    one of these threads: with few of them, two batches in one program (the bounds of two
    groups of an `optax.partition`, say) can wait for each other forever. So they go in parts
    that are too small for that.
    """

    def in_parts(x: jax.Array) -> Any:
        size = EIGH_WORK // x.shape[-1] ** 3
        return fn(x) if len(x) <= size else lax.map(fn, x, batch_size=size)

    return lax.platform_dependent(x, cpu=in_parts, default=fn)
