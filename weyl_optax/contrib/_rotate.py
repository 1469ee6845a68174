"""Updates that turn every weight by a set angle, as in rotational equilibrium."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weyl_optax._arguments import as_schedule, check_at_least, check_below
from weyl_optax._bound import is_placeholder
from weyl_optax._norms.orthogonal_iteration import zero_norms
from weyl_optax._norms.vectors import Per, length, running_rms, tangent, weight_vectors
from weyl_optax._reading.specification import BoundedLeaves, WeightDimNumOrFn
from weyl_optax.contrib._keep_norm import step_on_sphere


class ScaleByAngleState(NamedTuple):
    """State of :func:`rotate`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] # shape=(), dtype=int32.
    norm: Any  # A tree like the params; shape=batch. Set at the first update; -1 before.
    num_finite: Any  # A tree like the params; shape=batch. Number of updates in the mean.
    root_mean_square: Any  # The same; shape=batch. Of the norms of updates, not bias-corrected.


def rotate(
    angle: optax.ScalarOrSchedule,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    *,
    per: Per = "unit",
    decay: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Turn the weights of every unit by a given angle, on average, and keep their norms.

    Put it last in a chain, after any optimizer: it uses only the directions of the optimizer's
    updates. With :math:`d` the part of the update that is orthogonal to the weight,

    .. math::

        w \leftarrow \|w_0\| \frac{v}{\|v\|}, \qquad
        v = w + \eta_r \|w_0\| \frac{d}{\sqrt{\mathrm{EMA}(\|d\|^2)}}.

    With ``decay=0`` each update turns by :math:`\arctan \eta_r`. That, with ``per="matrix"``, is
    the hyperball update of AdamH and MuonH, except that they keep the update's part along
    the weight before they return to the sphere.

    Args:
        angle: :math:`\eta_r`, in radians for each update, or a schedule. :func:`adamw_angle`
            gives the angle to which AdamW settles by itself.
        weight_dimension_numbers: How each leaf is read as matrices, see :func:`keep_norm`.
            What that leaves to the optimizer keeps its update.
        per: ``"unit"`` or ``"matrix"``, see :func:`keep_norm`.
        decay: Rate of the exponential moving average, with bias correction.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs the params.

    Raises:
        ValueError: If ``angle`` or ``decay`` is negative, if ``decay`` is not below 1, or as
            :func:`keep_norm`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax.contrib import rotate
        >>> solver = optax.chain(optax.adam(1.0), rotate(0.1))
        >>> params = {"w": 3 * jnp.eye(2)}
        >>> opt_state = solver.init(params)
        >>> grads = {"w": jnp.array([[1.0, -1.0], [1.0, 1.0]])}
        >>> updates, opt_state = solver.update(grads, opt_state, params)
        >>> w = params["w"] + updates["w"]
        >>> print(f"{jnp.arctan2(-w[1, 0], w[0, 0]):.4f} {jnp.arctan(0.1):.4f}")
        0.0997 0.0997

    References:
        Kosson et al, `Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
        Networks <https://arxiv.org/abs/2305.17212>`_, 2023, section 4, and its code, without the
        centering of weights that that does besides; `Hyperball optimization
        <https://arxiv.org/abs/2606.16899>`_ for AdamH and MuonH

    .. seealso:: :func:`keep_norm`, :func:`lion_ar`
    """
    return rotate_vectors(angle, weight_vectors(weight_dimension_numbers, per), decay)


def rotate_vectors(
    angle: optax.ScalarOrSchedule,
    vectors: WeightDimNumOrFn,
    decay: jax.typing.ArrayLike = 0.9,
    otherwise: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """As `rotate`, where vectors that are zero at first take their update times `otherwise`."""
    check_at_least("angle", angle, 0, schedule=True)
    check_at_least("decay", decay, 0)
    check_below("decay", decay, 1)

    def init_fn(params: optax.Params) -> ScaleByAngleState:
        if is_placeholder(params):
            return ScaleByAngleState(0, 0, 0, 0)  # type: ignore
        leaves = BoundedLeaves(params, vectors)
        # Separate buffers, since a jitted step may donate the state.
        norm, *zeros = (list(map(zero_norms, leaves.of(params), leaves.specs)) for _ in range(3))
        kept = map(leaves.put, ([x - 1 for x in norm], *zeros))
        return ScaleByAngleState(jnp.zeros([], jnp.int32), *kept)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAngleState]:
        del extra_args
        if params is None:
            raise ValueError("rotate needs the params: call update(updates, state, params).")
        leaves = BoundedLeaves(params, vectors, updates)
        eta, rate = (as_schedule(x)(state.count) for x in (angle, otherwise))
        stepped, norms, counts, means = [], [], [], []
        for u, w, norm, count, root, spec in zip(
            leaves.of(updates),
            leaves.of(params),
            leaves.of(state.norm),
            leaves.of(state.num_finite),
            leaves.of(state.root_mean_square),
            leaves.specs,
            strict=True,
        ):
            u, w = jnp.asarray(u), jnp.asarray(w)
            norm = jnp.where(norm < 0, length(w, spec), norm)
            d = tangent(u, w, spec)
            moved = length(d, spec)
            # Values that are not finite pass into the update, but not into the state.
            new, count = running_rms(root, count, moved, decay)
            average = new / jnp.sqrt(1 - jnp.asarray(decay, root.dtype) ** count)
            step = spec.times(eta * norm / jnp.where(average > 0, average, 1), d)
            is_kept = jnp.expand_dims(norm > 0, spec.matrix_axes)  # see keep_norm
            step = jnp.where(is_kept, step, jnp.asarray(rate, u.dtype) * u).astype(u.dtype)
            stepped.append(step_on_sphere(step, w, norm, spec))
            norms.append(norm)
            counts.append(count)
            means.append(new)
        return leaves.put(stepped, updates), ScaleByAngleState(
            jnp.asarray(optax.safe_increment(state.count)),
            leaves.put(norms, state.norm),
            leaves.put(counts, state.num_finite),
            leaves.put(means, state.root_mean_square),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamw_angle(
    learning_rate: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike = 0.9,
) -> jax.Array:
    r"""Compute the angle of AdamW's update in equilibrium, in radians.

    :math:`\sqrt{2 \eta \lambda \frac{1 - \beta_1}{1 + \beta_1}}`, for a weight whose gradient is
    noise; see table 1 of `Rotational Equilibrium <https://arxiv.org/abs/2305.17212>`_.
    """
    return jnp.sqrt(2 * jnp.asarray(learning_rate) * weight_decay * (1 - b1) / (1 + b1))
