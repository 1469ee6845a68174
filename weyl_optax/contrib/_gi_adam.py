"""GI-Adam: Adam whose second moment begins with the first gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from weyl_optax._arguments import check_at_least


def scale_by_gi_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = False,
    init_scale: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformation:
    r"""Rescale updates by Adam with its second moment initialized by the first gradient.

    With :math:`v_0 = a g_1^2` in place of 0, and the usual bias corrections, for :math:`a = 1`
    the first update is :math:`\sqrt{1 - \beta_2}` times Adam's; as long as gradients keep their
    size, update :math:`t` is :math:`\sqrt{1 - \beta_2^t}` times Adam's: a warmup that comes
    out of the moments.

    Args:
        b1: Exponential decay rate of the first moment.
        b2: Exponential decay rate of the second moment.
        eps: Added to the denominator, outside the root.
        eps_root: Added to the denominator, inside the root.
        mu_dtype: The dtype of the first moment, by default the params' dtype.
        nesterov: Whether to use Nesterov momentum.
        init_scale: :math:`a`; the paper suggests at least 1.

    Returns:
        A :class:`optax.GradientTransformation` with the state of :func:`optax.scale_by_adam`.

    Raises:
        ValueError: If ``init_scale`` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.contrib import scale_by_gi_adam
        >>> solver = scale_by_gi_adam(b2=0.99)
        >>> grads = jnp.array([3.0, -0.2])
        >>> updates, _ = solver.update(grads, solver.init(grads))
        >>> print(*(f"{update:.4f}" for update in updates))
        0.1000 -0.1000

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024, section 6.2
    """
    check_at_least("init_scale", init_scale, 0)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        def initialized(g: Any, nu: Any) -> Any:
            if g is None:
                return nu
            square = jnp.square(jnp.abs(jnp.asarray(g)))
            return jnp.where(state.count == 0, (init_scale * square).astype(nu.dtype), nu)

        nu = jax.tree.map(initialized, updates, state.nu, is_leaf=lambda x: x is None)
        return adam.update(updates, state._replace(nu=nu), params)

    return optax.GradientTransformation(adam.init, update_fn)


def gi_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | None = None,
    *,
    nesterov: bool = False,
    init_scale: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """GI-AdamW: :func:`optax.adamw` with the second moment of :func:`scale_by_gi_adam`.

    Args:
        learning_rate: As for :func:`optax.adamw`, like the arguments that follow.
        b1: Exponential decay rate of the first moment.
        b2: Exponential decay rate of the second moment.
        eps: Added to the denominator, outside the root.
        eps_root: Added to the denominator, inside the root.
        mu_dtype: The dtype of the first moment, by default the params' dtype.
        weight_decay: Strength of the decoupled weight decay, or a schedule.
        mask: The leaves to decay.
        nesterov: Whether to use Nesterov momentum.
        init_scale: See :func:`scale_by_gi_adam`.

    Returns:
        The corresponding :class:`optax.GradientTransformationExtraArgs`.

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024, section 6.2
    """
    return optax.chain(
        scale_by_gi_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, init_scale=init_scale),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
