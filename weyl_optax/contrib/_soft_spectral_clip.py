"""A soft bound on the singular values of every update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from weyl_optax import _sharding
from weyl_optax._arguments import check_at_least
from weyl_optax._block_iteration import compute_dtype
from weyl_optax._dimension_numbers import BoundedLeaves, MatrixSpec, WeightDimNumOrFn
from weyl_optax._vectors import only_matrices


def soft_spectral_clip(
    max_norm: jax.typing.ArrayLike,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    *,
    tolerance: float = 1e-3,
) -> optax.GradientTransformation:
    r"""Clip the singular values of every matrix's update, smoothly.

    .. math::

        U \leftarrow \left(I + U U^\top / c^2\right)^{-1/2} U

    takes a singular value :math:`\sigma` to :math:`\sigma / \sqrt{1 + \sigma^2 / c^2}`: itself
    where it is small, and :math:`c` where it is large, without a decomposition: by the coupled
    Newton-Schulz iteration, in products of matrices alone.

    Args:
        max_norm: :math:`c`, above 0.
        weight_dimension_numbers: How each leaf is read as matrices, see
            :func:`weyl_optax.scale_by_weyl_bound`. Vectors and scalars pass.
        tolerance: The iteration ends when the inverse root is this exact.

    Returns:
        A :class:`optax.GradientTransformation` without state.

    Raises:
        ValueError: If ``max_norm`` is negative, or if ``weight_dimension_numbers`` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.contrib import soft_spectral_clip
        >>> solver = soft_spectral_clip(1.0)
        >>> updates, _ = solver.update(jnp.diag(jnp.array([0.1, 1.0, 10.0])), solver.init(None))
        >>> print(*(f"{sigma:.3f}" for sigma in jnp.diag(updates)))
        0.100 0.707 0.995

    References:
        SPECTRA, `arXiv 2603.14315 <https://arxiv.org/abs/2603.14315>`_
    """
    check_at_least("max_norm", max_norm, 0)
    matrices = only_matrices(weight_dimension_numbers)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves = BoundedLeaves(updates, matrices)
        clipped = [
            _clip(jnp.asarray(u), spec, max_norm, tolerance)
            for u, spec in zip(leaves.of(updates), leaves.specs, strict=True)
        ]
        return leaves.put(clipped, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _clip(
    u: jax.Array, spec: MatrixSpec, max_norm: jax.typing.ArrayLike, tolerance: float
) -> jax.Array:
    axes = spec.batch + spec.reduction + spec.output
    shape = tuple(u.shape[axis] for axis in axes)
    # On explicit axes, whole on every device: a root is not taken of a part of a matrix.
    a = jnp.transpose(_sharding.replicate(u), axes).astype(compute_dtype(u)) / max_norm
    a = a.reshape(*spec.batch_shape, *spec.matrix_shape)
    is_tall = a.shape[-2] > a.shape[-1]
    if is_tall:
        a = jnp.swapaxes(a, -1, -2)
    clipped = _inverse_root(jnp.eye(a.shape[-2]) + _matmul(a, a.conj().mT), tolerance)
    clipped = _matmul(clipped, a)
    if is_tall:
        clipped = jnp.swapaxes(clipped, -1, -2)
    clipped = (max_norm * clipped).astype(u.dtype).reshape(shape)
    clipped = jnp.transpose(clipped, [axes.index(axis) for axis in range(u.ndim)])
    return _sharding.reshard_as(u, clipped, range(u.ndim))


def _inverse_root(a: jax.Array, tolerance: float) -> jax.Array:
    """The inverse square roots of Hermitian matrices, (..., n, n), of eigenvalues from 1 on."""
    identity = jnp.eye(a.shape[-1], dtype=a.dtype)
    scale = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)

    def error(y: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.max(jnp.linalg.norm(identity - _matmul(z, y), axis=(-2, -1)))

    def is_improving(carry: Any) -> jax.Array:
        _, _, before, now = carry
        return (now > tolerance) & (now < before)  # in the end rounding is all that is left

    def step(carry: Any) -> Any:
        y, z, _, before = carry
        t = 1.5 * identity - 0.5 * _matmul(z, y)
        y, z = _matmul(y, t), _matmul(t, z)
        return y, z, before, error(y, z)

    y, z = a / scale, jnp.broadcast_to(identity, a.shape)
    start = error(y, z)
    _, z, _, _ = lax.while_loop(is_improving, step, (y, z, jnp.full_like(start, jnp.inf), start))
    return z / jnp.sqrt(scale)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
