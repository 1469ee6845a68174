"""A soft bound on the singular values of every update."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from weyl_optax import _sharding as sharding
from weyl_optax._arguments import check_above, check_below
from weyl_optax._norms.orthogonal_iteration import compute_dtype, scaled_to_one
from weyl_optax._reading.granularity import map_entries
from weyl_optax._reading.specification import BoundedLeaves, MatrixSpec, WeightDimNumOrFn, axes_of

# Above this, the cubic takes values that rounding has put above 1 to below `least`.
_MAX_SCALE = 1.69
_TOLERANCE = 1e-3  # the largest relative error at which the iteration ends


def soft_spectral_clip(
    max_norm: jax.typing.ArrayLike,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
) -> optax.GradientTransformation:
    r"""Clip the singular values of every matrix's update, smoothly.

    .. math::

        U \leftarrow \left(I + U U^\top / c^2\right)^{-1/2} U

    takes a singular value :math:`\sigma` to :math:`\sigma / \sqrt{1 + \sigma^2 / c^2}`: itself
    if it is small, and :math:`c` if it is large. It needs no decomposition, only the matrix
    products of a scaled Newton-Schulz iteration, which ends at a relative error of 0.001. In
    float32, rounding adds about :math:`10^{-7} \|U\|_2`, as much as the update's own rounding.

    Args:
        max_norm: :math:`c`, above 0 and finite.
        weight_dimension_numbers: How each leaf is read as matrices, see
            :func:`weyl_optax.scale_by_weyl_bound`. Vectors and scalars pass through.

    Returns:
        A :class:`optax.GradientTransformation` without state.

    Raises:
        ValueError: If ``max_norm`` is not above 0 and finite, or if ``weight_dimension_numbers``
            does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.contrib import soft_spectral_clip
        >>> solver = soft_spectral_clip(1.0)
        >>> updates, _ = solver.update(jnp.diag(jnp.array([0.1, 1.0, 10.0])), solver.init(None))
        >>> print(*(f"{sigma:.3f}" for sigma in jnp.diag(updates)))
        0.100 0.707 0.995

    References:
        SPECTRA, `arXiv 2603.14315 <https://arxiv.org/abs/2603.14315>`_; for the iteration, Chen &
        Chow, `A Stable Scaling of Newton-Schulz for Improving the Sign Function Computation of a
        Hermitian Matrix <https://www.mcs.anl.gov/papers/P5059-0114.pdf>`_, 2014
    """
    check_above("max_norm", max_norm, 0)
    check_below("max_norm", max_norm, math.inf)
    matrices = map_entries(
        lambda entry: entry if axes_of(entry.reduction_axis) else None, weight_dimension_numbers
    )

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        leaves = BoundedLeaves(updates, matrices)
        clipped = [
            _clip(jnp.asarray(u), spec, max_norm)
            for u, spec in zip(leaves.of(updates), leaves.specs, strict=True)
        ]
        return leaves.put(clipped, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _clip(u: jax.Array, spec: MatrixSpec, max_norm: jax.typing.ArrayLike) -> jax.Array:
    axes = spec.batch + spec.reduction + spec.output
    shape = tuple(u.shape[axis] for axis in axes)
    # On explicit axes, replicated: the root needs the whole matrix.
    a = jnp.transpose(sharding.replicate(u), axes).astype(compute_dtype(u))
    a = a.reshape(*spec.batch_shape, *spec.matrix_shape)
    c = jnp.asarray(max_norm).astype(a.dtype)
    is_tall = a.shape[-2] > a.shape[-1]
    if is_tall:
        a = a.mT
    clipped = c * _polar_factor_beside_identity(a / c)
    if is_tall:
        clipped = clipped.mT
    clipped = jnp.transpose(clipped.reshape(shape), [axes.index(axis) for axis in range(u.ndim)])
    return sharding.reshard_as(u, clipped.astype(u.dtype), range(u.ndim))


def _polar_factor_beside_identity(a: jax.Array) -> jax.Array:
    """The part under `a` of the polar factor of (a, I): (I + a a^H)^(-1/2) a for every matrix.

    (I + a a^H)^(-1/2) itself would square the condition number. Singular values of (a, I) are at
    least 1 and at most a known upper bound. So those of `x` are between a known `least` and 1, and
    each step can take the odd cubic that lifts `least` the most.
    """
    identity = jnp.broadcast_to(jnp.eye(a.shape[-2], dtype=a.dtype), (*a.shape[:-1], a.shape[-2]))
    # The result does not depend on the upper bound.
    scaled, largest = scaled_to_one(lax.stop_gradient(a), (-2, -1))
    norm = jnp.sqrt(jnp.linalg.norm(_matmul(scaled, scaled.conj().mT), axis=(-2, -1)))
    greatest = jnp.hypot(1, largest * norm)[..., None, None]

    def is_inexact(carry: Any) -> jax.Array:
        _, _, before, least = carry
        return jnp.any((1 - least > _TOLERANCE) & (least > before))  # until only rounding is left

    def step(carry: Any) -> Any:
        x, root, _, least = carry
        scale = jnp.minimum(jnp.sqrt(3 / (1 + least + least**2)), _MAX_SCALE)
        gram = _matmul(x, x.conj().mT) + _matmul(root, root.conj().mT)
        cubic = 1.5 * scale * identity - 0.5 * scale**3 * gram
        lifted = 1.5 * scale * least - 0.5 * scale**3 * least**3
        return _matmul(cubic, x), _matmul(cubic, root), least, lifted

    start = a / greatest, identity / greatest, jnp.zeros_like(greatest), 1 / greatest
    return lax.while_loop(is_inexact, step, start)[0]


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
