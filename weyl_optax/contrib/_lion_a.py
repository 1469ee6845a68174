"""LionA and LionAR: Lion with updates of AdamW's size, and with updates of a set angle."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from weyl_optax._arguments import as_schedule, check_at_least, check_below
from weyl_optax._norms.vectors import Per, weight_vectors
from weyl_optax._reading.specification import WeightDimNumOrFn, is_entry
from weyl_optax.contrib._rotate import adamw_angle, rotate_vectors


def scale_by_lion_a(
    b: float = 0.9, *, nesterov: bool = False, inverse_bias_correction: bool = False
) -> optax.GradientTransformation:
    r"""Rescale updates to the sign of the momentum, times the size that Adam's update would have.

    .. math::

        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad
        u_t = \sqrt{\frac{1 - \beta}{1 + \beta}} \, \mathrm{sign}(m_t)

    The factor is the root mean square of Adam's update if the gradient is noise, so
    learning rate and weight decay carry over; with ``nesterov`` the factor is the same, and Adam's
    update 4 % larger at :math:`\beta = 0.98`. (Our derivation; we did not have the paper's text.)

    Args:
        b: Decay rate :math:`\beta` of the momentum.
        nesterov: Whether to take the sign of :math:`\beta m_t + (1 - \beta) g_t`.
        inverse_bias_correction: Whether to multiply update :math:`t` by :math:`1 - \beta^t`: the
            opposite of what Adam does. The paper uses it to train without warmup,
            with ``nesterov`` and :math:`\beta = 0.98`.

    Returns:
        A :class:`optax.GradientTransformation`: :func:`optax.scale_by_lion` times a factor.

    Raises:
        ValueError: If ``b`` is below 0, or not below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.contrib import scale_by_lion_a
        >>> solver = scale_by_lion_a(b=0.6)
        >>> grads = jnp.array([3.0, -0.2])
        >>> updates, _ = solver.update(grads, solver.init(grads))
        >>> print(updates)
        [ 0.5 -0.5]

    References:
        Kosson et al, `Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training
        <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    check_at_least("b", b, 0)
    check_below("b", b, 1)
    # b m_t + (1 - b) g = b² m_{t-1} + (1 - b²) g
    sign = optax.scale_by_lion(b1=b * b if nesterov else b, b2=b)
    size = jnp.sqrt((1 - b) / (1 + b))
    if inverse_bias_correction:
        return optax.chain(
            sign, optax.scale_by_schedule(lambda count: size * _inverse_bias_correction(b, count))
        )
    return optax.chain(sign, optax.scale(size))


def lion_a(
    learning_rate: optax.ScalarOrSchedule,
    b: float = 0.98,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: Any | None = None,
    nesterov: bool = True,
    inverse_bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LionA: Lion with AdamW's learning rate and weight decay.

    Args:
        learning_rate: As for :func:`optax.adamw`.
        b: Decay rate of the momentum.
        weight_decay: Strength of the decoupled weight decay, or a schedule.
        mask: The leaves to decay, see :func:`optax.adamw`.
        nesterov: See :func:`scale_by_lion_a`.
        inverse_bias_correction: See :func:`scale_by_lion_a`.

    Returns:
        The corresponding :class:`optax.GradientTransformationExtraArgs`.

    References:
        Kosson et al, `Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training
        <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    return optax.chain(
        scale_by_lion_a(b, nesterov=nesterov, inverse_bias_correction=inverse_bias_correction),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion_ar(
    learning_rate: optax.ScalarOrSchedule,
    b: float = 0.98,
    *,
    weight_decay: jax.typing.ArrayLike = 0.1,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    per: Per = "unit",
    nesterov: bool = True,
    inverse_bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""LionAR: LionA in rotational equilibrium from the first step.

    Every unit of a matrix turns by the angle :math:`\sqrt{2 \eta_t \lambda \frac{1 - \beta}{1 +
    \beta}}`, which LionA with the weight decay :math:`\lambda` would reach in time, and keeps
    its norm; see :func:`rotate`. Vectors, scalars, units with one input and those that are zero
    at the first update take LionA's steps, without decay.

    Args:
        learning_rate: As for :func:`optax.adamw`.
        b: Decay rate of the momentum.
        weight_decay: :math:`\lambda`, which only sets the angle.
        weight_dimension_numbers: How each leaf is read as matrices, see :func:`keep_norm`; a
            leaf with ``None`` takes LionA's steps.
        per: ``"unit"`` or ``"matrix"``.
        nesterov: See :func:`scale_by_lion_a`.
        inverse_bias_correction: See :func:`scale_by_lion_a`; it scales the angle, too.

    Returns:
        The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: If ``learning_rate`` or ``weight_decay`` is below 0, and as :func:`keep_norm`.

    References:
        Kosson et al, `Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training
        <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    check_at_least("learning_rate", learning_rate, 0, schedule=True)
    check_at_least("weight_decay", weight_decay, 0)
    vectors = weight_vectors(weight_dimension_numbers, per)

    def correction(count: jax.typing.ArrayLike) -> Any:
        return _inverse_bias_correction(b, count) if inverse_bias_correction else 1

    def rate(count: jax.typing.ArrayLike) -> Any:
        return as_schedule(learning_rate)(count) * correction(count)

    def angle(count: jax.typing.ArrayLike) -> jax.Array:
        return adamw_angle(as_schedule(learning_rate)(count), weight_decay, b) * correction(count)

    def is_not_rotated(params: optax.Params) -> Any:
        return jax.tree.map(lambda entry: entry is None, vectors(params), is_leaf=is_entry)

    return optax.chain(
        scale_by_lion_a(b, nesterov=nesterov),
        optax.scale(-1.0),
        optax.masked(optax.scale_by_schedule(rate), is_not_rotated),
        rotate_vectors(angle, vectors, otherwise=rate),
    )


def _inverse_bias_correction(b: float, count: Any) -> jax.Array:
    """1 - b^t in update t = count + 1."""
    return 1 - jnp.asarray(b) ** (count + 1)
