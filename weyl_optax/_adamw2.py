"""The paper's AdamW²."""

from typing import Any

import jax
import optax

from weyl_optax._bound import Growth, scale_by_weyl_bound
from weyl_optax._reading.specification import WeightDimNumOrFn


def adamw2(
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
    tau: optax.ScalarOrSchedule = 0.1,
    growth: Growth = "linear",
    min_std: jax.typing.ArrayLike = 1e-3,
    max_std: jax.typing.ArrayLike = 0.02,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    num_iters: jax.typing.ArrayLike = 1,
    cap_rank: int | None = None,
    cap_mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW², which trains Transformers without learning rate warmup.

    :func:`optax.adamw` with :func:`scale_by_weyl_bound`. With Adam's update
    :math:`U_t = \hat{M}_t / (\sqrt{\hat{V}_t + \bar{\varepsilon}} + \varepsilon)`, the
    learning rate :math:`\eta_t` and the weight decay :math:`\lambda`, every matrix
    takes the step

    .. math::

        \begin{align*}
          \alpha_t &= \min\left(\eta_t,\;
              \tau\, \min(\sigma_1(W_{t-1}), s (\sqrt m + \sqrt n))
              / \sigma_1(U_t)\right), \\
          W_t &= W_{t-1} - \alpha_t U_t - \alpha_t \lambda W_{t-1}.
        \end{align*}

    where :math:`s` is ``max_std``. Algorithm 1 of the paper has :math:`\sigma_1(W_{t-1})` in
    place of the inner minimum, and one :math:`\varepsilon`, under the root. To get it, set
    ``growth="exponential"``, ``min_std=0``, ``eps=0``, ``eps_root`` to that
    :math:`\varepsilon`, and ``tau`` to 0.003 to 0.01.

    Args:
        learning_rate: The largest step, see :func:`optax.adamw`. A schedule needs no
            warmup.
        b1: Exponential decay rate of the first moment.
        b2: Exponential decay rate of the second moment.
        eps: Added to the denominator, outside the root.
        eps_root: Added to the denominator, inside the root.
        mu_dtype: The dtype of the first moment, by default the params' dtype.
        weight_decay: Strength of the weight decay, or a schedule. It is multiplied by
            the bounded rate :math:`\alpha_t`.
        mask: The leaves to decay, see :func:`optax.adamw`. Within
            :func:`optax.inject_hyperparams`, name a function in ``static_args``.
        nesterov: Whether to use Nesterov momentum.
        tau: Largest relative growth of a spectral norm in a step, or a schedule; see
            :func:`scale_by_weyl_bound`, also for the arguments that follow.
        growth: Whether norms may grow linearly or exponentially over the steps.
        min_std: A weight counts as no smaller than a Gaussian matrix of this deviation.
        max_std: With linear growth, a matrix counts as no larger than one of this deviation.
        weight_dimension_numbers: How each leaf is read as matrices.
        num_iters: Iterations of the estimator at each update.
        cap_rank: How many leading singular values of Adam's update to lower to the smallest of
            them; by default none.
        cap_mask: The leaves whose updates are capped, see :func:`optax.masked`; by default all
            that are bounded. Our benchmarks cap neither embeddings nor heads.

    Returns:
        The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: As :func:`scale_by_weyl_bound`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from weyl_optax import adamw2
        >>> def f(params): return jnp.sum((params["w"] - 1) ** 2)
        >>> solver = adamw2(learning_rate=0.1, tau=0.5)
        >>> params = {"w": 0.08 * jnp.eye(4)}
        >>> opt_state = solver.init(params)
        >>> for _ in range(5):
        ...     grads = jax.grad(f)(params)
        ...     updates, opt_state = solver.update(grads, opt_state, params)
        ...     params = {"w": params["w"] + updates["w"]}
        ...     print(f"{f(params):.2f} {jnp.linalg.norm(params['w'], 2):.4f}")
        15.07 0.1200
        14.76 0.1600
        14.46 0.2000
        14.16 0.2400
        13.86 0.2800

    References:
        Qi et al, `Taming Transformer Without Using Learning Rate Warmup
        <https://arxiv.org/abs/2505.21910>`_, 2025
    """
    return optax.chain(
        optax.scale_by_adam(
            b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
        ),
        scale_by_weyl_bound(
            tau,
            learning_rate,
            growth=growth,
            weight_decay=weight_decay,
            weight_decay_mask=mask,
            min_std=min_std,
            max_std=max_std,
            weight_dimension_numbers=weight_dimension_numbers,
            num_iters=num_iters,
            cap_rank=cap_rank,
            cap_mask=cap_mask,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
