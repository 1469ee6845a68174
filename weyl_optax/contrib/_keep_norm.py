"""Weights that keep their initial norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weyl_optax._bound import is_placeholder
from weyl_optax._norms.orthogonal_iteration import zero_norms
from weyl_optax._norms.vectors import Per, length, tangent, weight_vectors
from weyl_optax._reading.specification import BoundedLeaves, MatrixSpec, WeightDimNumOrFn


class KeepNormState(NamedTuple):
    """State of :func:`keep_norm`."""

    norm: Any  # A tree like the params; shape=batch. Set at the first update; -1 before.


def keep_norm(
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    *,
    per: Per = "unit",
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the initial norm of every unit's weights, or of every matrix.

    Put it last in a chain. The update :math:`u` loses its part along the weight
    :math:`w`, and the weight returns to its sphere:

    .. math::

        d = u - \frac{\langle u, w \rangle}{\|w\|^2} w, \qquad
        w \leftarrow \|w_0\| \frac{w + d}{\|w + d\|}.

    Weight decay, whose update is along the weight, then does nothing. A weight that is
    followed by a normalization computes the same at any norm; other layers may want a gain.

    Args:
        weight_dimension_numbers: How each leaf is read as matrices, as for
            :func:`weyl_optax.scale_by_weyl_bound`. Vectors and scalars, which are biases and
            gains, are left to the optimizer, and so are units with one input, which could not
            move. The rows of an embedding, one for each token,
            keep their norms if it is read as ``MuonDimensionNumbers(1, 0)``.
        per: ``"unit"`` for the 2-norm of the incoming weights of every output unit,
            ``"matrix"`` for the Frobenius norm.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs the params, and
        the first call stores their norms. A unit, or a matrix, that is zero then is left to the
        optimizer: it would never move.

    Raises:
        ValueError: If ``per`` is neither of the two, or if ``weight_dimension_numbers`` does
            not fit the params.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax.contrib import keep_norm
        >>> solver = optax.chain(optax.adam(0.1), keep_norm())
        >>> params = {"w": 3 * jnp.eye(2)}
        >>> opt_state = solver.init(params)
        >>> grads = {"w": jnp.array([[1.0, -1.0], [1.0, 1.0]])}
        >>> updates, opt_state = solver.update(grads, opt_state, params)
        >>> w = params["w"] + updates["w"]
        >>> print(f"{w[1, 0]:.3f}", *(f"{norm:.3f}" for norm in jnp.linalg.norm(w, axis=0)))
        -0.100 3.000 3.000

    References:
        Kosson et al, `Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
        Networks <https://arxiv.org/abs/2305.17212>`_, 2023, section 4

    .. seealso:: :func:`rotate`
    """
    vectors = weight_vectors(weight_dimension_numbers, per)

    def init_fn(params: optax.Params) -> KeepNormState:
        if is_placeholder(params):
            return KeepNormState(norm=0)
        leaves = BoundedLeaves(params, vectors)
        zeros = list(map(zero_norms, leaves.of(params), leaves.specs))
        return KeepNormState(norm=leaves.put([norm - 1 for norm in zeros]))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepNormState]:
        del extra_args
        if params is None:
            raise ValueError("keep_norm needs the params: call update(updates, state, params).")
        leaves = BoundedLeaves(params, vectors, updates)
        weights = [jnp.asarray(w) for w in leaves.of(params)]
        norms = [
            jnp.where(norm < 0, length(w, spec), norm)
            for norm, w, spec in zip(leaves.of(state.norm), weights, leaves.specs, strict=True)
        ]
        kept = [
            step_on_sphere(jnp.asarray(u), w, norm, spec)
            for u, w, norm, spec in zip(
                leaves.of(updates), weights, norms, leaves.specs, strict=True
            )
        ]
        return leaves.put(kept, updates), KeepNormState(leaves.put(norms, state.norm))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def step_on_sphere(u: jax.Array, w: jax.Array, norm: jax.Array, spec: MatrixSpec) -> jax.Array:
    """The update that takes the weight to its sphere, without subtracting large numbers."""
    d = tangent(u, w, spec)
    w = w.astype(d.dtype)
    moved = jnp.hypot(length(w, spec), length(d, spec))
    scale = norm / jnp.where(moved > 0, moved, 1)
    step = spec.times(scale, d) + spec.times(scale - 1, w)
    return jnp.where(jnp.expand_dims(norm > 0, spec.matrix_axes), step, u).astype(u.dtype)
