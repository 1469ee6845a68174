"""Warmup from the critical learning rate, instead of zero."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from weyl_optax._arguments import check_above, check_at_least
from weyl_optax.dynamics import critical_learning_rate


def catapult_schedule(
    initial: float, peak: float, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    r"""Warm up from the learning rate that the first step can bear, then decay by a cosine.

    The rate follows a linear warmup from zero over ``warmup_steps``, but starts where
    that reaches ``initial``: it takes :math:`T (1 - \eta_0 / \eta)` of its :math:`T` steps, and
    none if the peak is not above ``initial``.

    Args:
        initial: The rate of the first step, from
            :func:`weyl_optax.dynamics.critical_learning_rate`.
        peak: The rate after the warmup.
        warmup_steps: Length of a warmup from zero.
        decay_steps: The total number of steps, after which the rate is zero.

    Returns:
        The :class:`optax.Schedule`.

    Raises:
        ValueError: If an argument is negative, or if ``decay_steps`` is not above
            ``warmup_steps``.

    Example:
        >>> from weyl_optax.contrib import catapult_schedule
        >>> schedule = catapult_schedule(0.5, 1.0, warmup_steps=10, decay_steps=100)
        >>> [round(float(schedule(count)), 2) for count in (0, 1, 5, 100)]
        [0.5, 0.6, 1.0, 0.0]

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024, section 6.1
    """
    for name, value in {"initial": initial, "peak": peak, "warmup_steps": warmup_steps}.items():
        check_at_least(name, value, 0)
    check_above("decay_steps", decay_steps, warmup_steps)
    steps = round(warmup_steps * max(0.0, 1 - initial / peak)) if peak else 0
    return optax.warmup_cosine_decay_schedule(min(initial, peak), peak, steps, decay_steps)


class CatapultState(NamedTuple):
    """State of :func:`scale_by_catapult`."""

    learning_rate: jax.Array  # shape=(), dtype=float32.
    value: jax.Array  # shape=(), dtype=float32. The loss when the rate was last raised.


def scale_by_catapult(
    target: jax.typing.ArrayLike,
    *,
    initial: jax.typing.ArrayLike = 1e-4,
    tolerance: jax.typing.ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Raise the learning rate to the critical one each time the loss has come down.

    The persistent catapult. It takes the place of :func:`optax.scale_by_learning_rate`, and
    needs no warmup length. The first step takes the critical rate along its update. That may
    raise the loss; as soon as it is below the loss at the last search, the rate is raised to the
    new critical one. At ``target`` the search ends, and costs nothing more. (Our derivation: we
    did not have the paper's algorithm 3.)

    Args:
        target: The largest rate.
        initial: The rate from which a search starts; see
            :func:`weyl_optax.dynamics.critical_learning_rate`.
        tolerance: How much a step at the critical rate may raise the loss, relative to it.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs the params, and, like
        Optax's line searches, ``value=``, the loss, and ``value_fn=``, the loss of this batch
        as a function of the params.

    Raises:
        ValueError: If an argument is negative, if ``initial`` is zero, or if ``update`` lacks one.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax.contrib import scale_by_catapult
        >>> loss = lambda w: 5 * jnp.sum(w**2) / 2 + 1
        >>> w = jnp.ones(3)
        >>> solver = scale_by_catapult(target=10.0)
        >>> state = solver.init(w)
        >>> value, grads = jax.value_and_grad(loss)(w)
        >>> updates, state = solver.update(grads, state, w, value=value, value_fn=loss)
        >>> print(f"{state.learning_rate:.3f} of {2 / 5:.3f}")
        0.401 of 0.400

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024, algorithm 3
    """
    check_at_least("target", target, 0)
    check_above("initial", initial, 0)
    check_at_least("tolerance", tolerance, 0)

    def init_fn(params: optax.Params) -> CatapultState:
        del params
        return CatapultState(jnp.zeros([], jnp.float32), jnp.full([], jnp.inf, jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CatapultState]:
        del extra_args
        if params is None or value is None or value_fn is None:
            raise ValueError(
                "scale_by_catapult tries steps: call update(updates, state, params, value=loss, "
                "value_fn=the loss of this batch as a function of the params)."
            )
        step = jax.tree.map(jnp.negative, updates)
        value = jnp.asarray(value, jnp.float32)

        def raised() -> CatapultState:
            critical, _ = critical_learning_rate(
                lambda params, _: value_fn(params),
                params,
                step,
                None,
                target=target,
                initial=jnp.maximum(initial, state.learning_rate),
                tolerance=tolerance,
            )
            rate = jnp.maximum(state.learning_rate, critical.astype(jnp.float32))
            return CatapultState(rate, value)

        is_searched = (state.learning_rate < target) & (value < state.value)
        state = lax.cond(is_searched, raised, lambda: CatapultState(*state))
        return jax.tree.map(lambda u: (state.learning_rate * u).astype(u.dtype), step), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
