"""Warmup from the critical learning rate, in place of zero."""

import optax

from weyl_optax._arguments import check_at_least


def catapult_schedule(
    initial: float, peak: float, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    r"""Warm up from the learning rate that the first step can bear, then decay by a cosine.

    The rate grows as in a linear warmup from zero over ``warmup_steps``, and starts where
    that reaches ``initial``: it takes :math:`T (1 - \eta_0 / \eta)` of its :math:`T` steps, and
    none where the peak is not above ``initial``.

    Args:
        initial: The rate of the first step, from
            :func:`weyl_optax.dynamics.critical_learning_rate`.
        peak: The rate after the warmup.
        warmup_steps: Of a warmup from zero.
        decay_steps: The number of all steps, at whose end the rate is zero.

    Returns:
        The :class:`optax.Schedule`.

    Raises:
        ValueError: If an argument is negative.

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
    steps = round(warmup_steps * max(0.0, 1 - initial / peak)) if peak else 0
    return optax.warmup_cosine_decay_schedule(min(initial, peak), peak, steps, decay_steps)
