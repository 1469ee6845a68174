r"""Eigenvalues of many small Hermitian matrices, by Jacobi's method.

A rotation of two rows and columns makes one pair of entries off the diagonal zero. The rows are
dealt into two halves, row i of the one against row i of the other, so that n / 2 rotations are
made at once; then all rows but the first move on by a place, as players of a round-robin
tournament do. A sweep is the n - 1 rounds in which every two rows meet.

It is written with arrays alone: the same program on a CPU, a GPU and a TPU, compiled in no time
whatever the number of matrices, and no device waits for another where they are sharded. The
matrices are the last axis of all arrays, which so is the one that is vectorized.
"""

import jax
import jax.numpy as jnp
from jax import lax

SWEEPS = 6  # each squares what is left off the diagonal; a 16 x 16 matrix needs all of them


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of Hermitian matrices.

    Args:
        a: Shape (n, n, b).

    Returns:
        The eigenvalues, ascending, shape (n, b), and a matrix of eigenvectors as columns for
        each, shape (n, n, b).
    """
    with jax.disable_jit(False):  # op by op, the rounds would take seconds
        return _eigh(a)


@jax.jit
def _eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = len(a)
    padding = max(4, n + n % 2) - n  # two halves of two rows at least
    a = jnp.pad(a, [(0, padding), (0, padding), (0, 0)])
    num_rounds = SWEEPS * (len(a) - 1)  # whole sweeps: every row is back in its place
    vectors = lax.full_like(a, 0) + _eye(len(a), a.dtype)
    a, vectors = lax.fori_loop(0, num_rounds, lambda _, x: _round(*x), (a, vectors))
    return _sorted(jnp.real(_diagonal(a))[:n], jnp.conj(vectors[:n, :n]))


def _round(a: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotates row i of the first half and row i of the second against each other, for all i."""
    half = len(a) // 2
    first, second = (jnp.real(_diagonal(x)) for x in (a[:half, :half], a[half:, half:]))
    off = _diagonal(a[:half, half:])
    size = jnp.abs(off)
    # tan t = sign(x) / (|x| + sqrt(1 + x^2)), where x = cot 2t: the smaller of the two angles.
    unit = jnp.where(size > 0, size, 1)
    cotangent = (second - first) / (2 * unit)
    tangent = jnp.where(cotangent < 0, -1, 1) / (jnp.abs(cotangent) + jnp.hypot(1, cotangent))
    tangent = jnp.where(size > 0, tangent, 0)
    cosine = lax.rsqrt(1 + tangent * tangent)
    sine = (tangent * cosine).astype(a.dtype) * (off / unit.astype(a.dtype))

    def rotated(x: jax.Array) -> jax.Array:
        top, bottom = x[:half], x[half:]
        c, s = (y[:, None].astype(x.dtype) for y in (cosine, sine))
        # The first row stays, all others move on by one place.
        top, bottom = c * top - s * bottom, jnp.conj(s) * top + c * bottom
        return jnp.concatenate([top[:1], bottom[:1], top[1:-1], bottom[1:], top[-1:]])

    # J A J^H = J (J A)^H, as A is Hermitian.
    return rotated(jnp.conj(jnp.swapaxes(rotated(a), 0, 1))), rotated(vectors)


def _sorted(values: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values in ascending order, and their rows as the columns of a matrix.

    A value's place is the number of those before it: sums over n x n comparisons, since a sort
    is a kernel of its own on every device.
    """
    n = len(values)
    index = jnp.arange(n)[:, None]
    is_before = (values[None] < values[:, None]) | (
        (values[None] == values[:, None]) & (index > index.T)[..., None]
    )
    place = jnp.sum(is_before, axis=1)
    is_at = place[:, None] == index[None]  # (n, n, b): whether value i goes to place j
    columns = jnp.sum(jnp.where(is_at[:, None], rows[:, :, None], 0), axis=0)
    return jnp.sum(jnp.where(is_at, values[:, None], 0), axis=0), columns


def _diagonal(a: jax.Array) -> jax.Array:
    return jnp.sum(_eye(len(a), a.dtype) * a, axis=1)


def _eye(n: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.eye(n, dtype=dtype)[..., None]
