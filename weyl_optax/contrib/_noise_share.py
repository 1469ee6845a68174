"""Smaller steps where the gradients of successive batches agree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weyl_optax._arguments import check_above, check_below
from weyl_optax._bound import is_placeholder
from weyl_optax._norms.orthogonal_iteration import compute_dtype, zero_norms
from weyl_optax._norms.vectors import length, running_rms
from weyl_optax._reading.specification import BoundedLeaves, WeightDimNumOrFn


class NoiseShareState(NamedTuple):
    """State of :func:`scale_by_noise_share`."""

    inner_state: Any
    num_finite: Any  # A tree like the params; shape=batch. Number of gradients in the averages.
    mean: Any  # A tree like the params. Of the gradients, not corrected for bias.
    root_mean_square: Any  # The same; shape=batch. Of their norms, not corrected for bias.


def scale_by_noise_share(
    inner_optimizer: optax.GradientTransformation,
    b: jax.typing.ArrayLike = 0.9,
    *,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the updates of each matrix by the root of the noise share of its gradients.

    While gradients agree, as they do early in training, a step of a given size changes what a
    network computes :math:`\sqrt{1 + B \varphi}` times as much as one along noise, with the
    batch size :math:`B` and the signal-to-noise ratio :math:`\varphi` of an example. This
    undoes it, by :math:`\sqrt{s}` with the noise share :math:`s = 1 / (1 + B \varphi)`:

    .. math::

        s_t = \frac{E_t - \|m_t\|^2}{E_t \, (1 - r_t)}, \qquad
        r_t = \frac{1 - \beta}{1 + \beta} \cdot \frac{1 + \beta^t}{1 - \beta^t},

    with the averages :math:`m_t` of the gradients and :math:`E_t` of their squared norms, both
    corrected for bias. :math:`r_t` is :math:`\|m_t\|^2 / E_t` if all is noise, so the share
    is right from the second update on. Nothing is known at the first update, which is set to
    zero. (Our derivation; we did not have the paper's text.)

    Args:
        inner_optimizer: Makes the updates. Gradients are measured before it, and its updates
            scaled after it.
        b: Decay rate :math:`\beta` of both averages.
        weight_dimension_numbers: How each leaf is read as matrices, each with its own share;
            see :func:`weyl_optax.scale_by_weyl_bound`. Where it is ``None``, updates pass through.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs params only if
        the inner optimizer does. Gradients of one sign and size, such as of the same batch each
        time, have no noise, and their updates go to zero.

    Raises:
        ValueError: If ``b`` is not between 0 and 1, or if ``weight_dimension_numbers`` does not
            fit.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax.contrib import scale_by_noise_share
        >>> solver = scale_by_noise_share(optax.sgd(1.0))
        >>> signal = jnp.ones((100, 100))
        >>> state = solver.init(signal)
        >>> for key in jax.random.split(jax.random.key(0), 50):
        ...     grads = signal + jax.random.normal(key, signal.shape)
        ...     updates, state = solver.update(grads, state)
        >>> print(f"{jnp.linalg.norm(updates) / jnp.linalg.norm(grads):.2f}")  # sqrt(1 / 2)
        0.71

    References:
        Kosson et al, `Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training
        <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    check_above("b", b, 0)
    check_below("b", b, 1)
    optimizer = optax.with_extra_args_support(inner_optimizer)

    def init_fn(params: optax.Params) -> NoiseShareState:
        if is_placeholder(params):
            return NoiseShareState(optimizer.init(params), 0, params, 0)  # type: ignore
        leaves = BoundedLeaves(params, weight_dimension_numbers)
        floats = leaves.of(params)
        return NoiseShareState(
            inner_state=optimizer.init(params),
            num_finite=leaves.put(list(map(zero_norms, floats, leaves.specs))),
            mean=leaves.put([jnp.zeros_like(x, compute_dtype(x)) for x in floats]),
            root_mean_square=leaves.put(list(map(zero_norms, floats, leaves.specs))),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseShareState]:
        leaves = BoundedLeaves(updates, weight_dimension_numbers)
        rate = jnp.asarray(b)
        scales, counts, means, roots = [], [], [], []
        for g, count, mean, root, spec in zip(
            leaves.of(updates),
            leaves.of(state.num_finite),
            leaves.of(state.mean),
            leaves.of(state.root_mean_square),
            leaves.specs,
            strict=True,
        ):
            g = jnp.asarray(g).astype(mean.dtype)
            now = length(g, spec)
            finite = jnp.isfinite(now)  # if not, it passes into the update alone
            new_root, count = running_rms(root, count, now, rate)
            unbiased = 1 - rate**count
            noise_only = (1 - rate) / (1 + rate) * (2 - unbiased) / unbiased
            new = rate * mean + (1 - rate) * g
            new = jnp.where(jnp.expand_dims(finite, spec.matrix_axes), new, mean).astype(g.dtype)
            signal, total = length(new, spec) / unbiased, new_root / jnp.sqrt(unbiased)
            share = 1 - jnp.square(signal / jnp.where(total > 0, total, 1))
            possible = 1 - noise_only
            share = jnp.where(total > 0, share / jnp.where(possible > 0, possible, 1), 0)
            scales.append(jnp.where(count > 1, jnp.sqrt(jnp.clip(share, 0, 1)), 0))
            counts.append(count)
            means.append(new)
            roots.append(new_root)
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)
        scaled = [
            spec.times(scale, jnp.asarray(u))
            for u, scale, spec in zip(leaves.of(updates), scales, leaves.specs, strict=True)
        ]
        return leaves.put(scaled, updates), NoiseShareState(
            inner_state,
            leaves.put(counts, state.num_finite),
            leaves.put(means, state.mean),
            leaves.put(roots, state.root_mean_square),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
