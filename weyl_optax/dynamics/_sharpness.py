"""The curvature of the loss, and the largest learning rate that it allows."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from weyl_optax import _sharding as sharding
from weyl_optax._arguments import check_above, check_at_least
from weyl_optax._norms.orthogonal_iteration import compute_dtype, tree_norm
from weyl_optax._reading.specification import names, path_name


def sharpness(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    batch: Any,
    *,
    preconditioner: Any | None = None,
    num_iters: int = 64,
) -> jax.Array:
    r"""Compute the largest eigenvalue of the Hessian of the loss.

    With a preconditioner :math:`P`, of :math:`P^{-1/2} H P^{-1/2}`. Runs the Lanczos iteration on
    ``num_iters`` Hessian-vector products: it takes the memory of a few copies of the params.
    Gradient descent with a constant rate :math:`\eta` is stable on a quadratic loss as long as
    the eigenvalue is below

    ============================  =====================================================
    optimizer                     largest stable eigenvalue
    ============================  =====================================================
    SGD                           :math:`2 / \eta`
    SGD, momentum :math:`\beta`   :math:`(2 + 2 \beta) / \eta`
    Adam, preconditioned          :math:`(2 + 2 \beta_1) / ((1 - \beta_1) \eta)`
    ============================  =====================================================

    with Adam's preconditioner :func:`adam_preconditioner`.

    Args:
        loss_fn: Takes ``params`` and ``batch``, and returns a scalar.
        params: A tree of floating arrays.
        batch: Whatever ``loss_fn`` takes.
        preconditioner: The diagonal of :math:`P`, positive, a tree like ``params``.
        num_iters: Iterations of Lanczos. With as many as there are params the eigenvalue is exact
            except for rounding; one at the end of the spectrum needs far fewer.

    Returns:
        A scalar, in float32 at least. Except for rounding, it is never above the exact value.

    Raises:
        TypeError: If ``num_iters`` is no whole number.
        ValueError: If it is below 1, or if a leaf of params is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import sharpness
        >>> loss = lambda w, scale: jnp.sum(scale * w**2) / 2
        >>> print(f"{sharpness(loss, jnp.ones(3), jnp.array([1.0, 5.0, 3.0])):.4f}")
        5.0000

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024; Cohen et al, `Adaptive Gradient
        Methods at the Edge of Stability <https://arxiv.org/abs/2207.14484>`_, 2022
    """
    check_at_least("num_iters", num_iters, 1)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"sharpness needs floating params, and {path_name(names(path))!r} is "
                f"{jnp.result_type(leaf)}. Give the loss a complex leaf as its real and imaginary "
                "parts, and close over one that is not trained."
            )
    gradient = jax.grad(loss_fn)
    if preconditioner is None:
        preconditioner = jax.tree.map(jnp.ones_like, params)
    dtypes = jax.tree.map(compute_dtype, params)
    root = jax.tree.map(lambda p, dtype: jnp.sqrt(jnp.asarray(p, dtype)), preconditioner, dtypes)

    def product(v: Any) -> Any:
        """A Hessian in the precision of the params times a vector in float32 at least."""
        v = jax.tree.map(lambda v, r, p: (v / r).astype(p.dtype), v, root, params)
        _, hv = jax.jvp(lambda p: gradient(p, batch), (params,), (v,))
        return jax.tree.map(lambda h, r: h.astype(r.dtype) / r, hv, root)

    # Only the tridiagonal matrix is needed. Vectors that lose their orthogonality repeat an
    # eigenvalue that has converged, which does no harm.
    def step(carry: Any, _: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        before, now, beta = carry
        hv = product(now)
        alpha = jnp.asarray(optax.tree.sum(jax.tree.map(lambda h, v: jnp.sum(h * v), hv, now)))
        rest = jax.tree.map(lambda h, v, w: h - alpha * v - beta * w, hv, now, before)
        norm = tree_norm(rest)
        # At the end of an invariant subspace: zeros, which decouple all that follows.
        unit = jax.tree.map(lambda r: r / jnp.where(norm > 0, norm, 1), rest)
        return (now, unit, norm), (alpha, norm)

    shapes = jax.tree.map(lambda p, dtype: jax.ShapeDtypeStruct(p.shape, dtype), params, dtypes)
    start = optax.tree.random_like(jax.random.key(0), shapes, jax.random.normal)
    norm = tree_norm(start)
    start = jax.tree.map(
        lambda v, p: sharding.reshard_as(p, v / norm, range(v.ndim)), start, params
    )
    carry = (jax.tree.map(jnp.zeros_like, start), start, jnp.zeros_like(norm))
    _, (alphas, betas) = lax.scan(step, carry, length=operator.index(num_iters))
    alive = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(betas[:-1] > 0).astype(bool)])
    alphas = jnp.where(alive, alphas, alphas[0])
    betas = jnp.where(alive[1:], betas[:-1], 0)
    tridiagonal = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    return jnp.linalg.eigvalsh(tridiagonal)[-1]


def adam_preconditioner(
    opt_state: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
) -> Any:
    r"""Compute the diagonal by which Adam's next update will divide the gradient.

    :math:`P = (1 - \beta_1^t) (\sqrt{\hat v + \bar\varepsilon} + \varepsilon)`, with the second
    moment of the state and :math:`t` updates so far, for :func:`sharpness`.

    Args:
        opt_state: The state of any optimizer, with one :class:`optax.ScaleByAdamState` in it,
            after at least one update.
        b1: Exponential decay rate of the first moment.
        b2: Exponential decay rate of the second moment.
        eps: Added outside the root.
        eps_root: Added inside the root.

    Returns:
        A tree like the params.

    Raises:
        ValueError: If there is no such state.
        KeyError: If there are several.

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024, and its code
    """
    state = optax.tree.get(opt_state, "ScaleByAdamState")
    if state is None:
        raise ValueError("opt_state has no optax.ScaleByAdamState: it is not that of Adam.")
    count = state.count
    nu_hat = optax.tree.bias_correction(state.nu, b2, count)
    return jax.tree.map(lambda nu: (1 - b1**count) * (jnp.sqrt(nu + eps_root) + eps), nu_hat)


def critical_learning_rate(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    updates: optax.Updates,
    batch: Any,
    *,
    target: jax.typing.ArrayLike,
    initial: jax.typing.ArrayLike = 1e-4,
    factor: jax.typing.ArrayLike = 2.0,
    tolerance: jax.typing.ArrayLike = 0.01,
) -> tuple[jax.Array, jax.Array]:
    r"""Find the largest learning rate at which one step does not raise the loss.

    Starting at ``initial``, the rate is multiplied by ``factor`` while the step does not raise the
    loss :math:`L_0`, up to ``target``. Then the interval is halved until the loss at its upper end
    is at most :math:`L_0 (1 + \delta)`. The loss is assumed to have one minimum over the rate.

    Args:
        loss_fn: Takes ``params`` and ``batch``, and returns a scalar.
        params: Where the step starts.
        updates: The step at a rate of 1, as :func:`optax.apply_updates` adds it; a tree like
            ``params``. For Adam: the update of ``optax.scale_by_adam``, negated.
        batch: Whatever ``loss_fn`` takes.
        target: The largest rate that is tried.
        initial: The rate from which the search starts.
        factor: The ratio of two rates in the first search, above 1.
        tolerance: :math:`\delta`. The paper uses 0.1 for SGD and 0.01 for Adam.

    Returns:
        The rate, and the number of forward passes it took. Both are arrays, so the search
        can be jitted. The rate is ``target`` if no instability was found. It may be
        below ``initial``, if that is already above the critical rate.

    Raises:
        ValueError: If ``initial`` or ``factor - 1`` is not above 0, or ``tolerance`` or
            ``target`` negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax.dynamics import critical_learning_rate
        >>> loss = lambda w, _: 5 * jnp.sum(w**2) / 2 + 1
        >>> w = jnp.ones(3)
        >>> rate, passes = critical_learning_rate(loss, w, -5 * w, None, target=10.0)
        >>> print(f"{rate:.3f} of {2 / 5:.3f} in {passes} passes")
        0.401 of 0.400 in 22 passes

    References:
        Kalra & Barkeshli, `Why Warmup the Learning Rate? Underlying Mechanisms and
        Improvements <https://arxiv.org/abs/2406.09405>`_, 2024, algorithms 1 and 2
    """
    check_above("initial", initial, 0)
    check_above("factor", factor, 1)
    check_at_least("tolerance", tolerance, 0)
    check_at_least("target", target, 0)

    def loss_at(rate: jax.Array) -> jax.Array:
        step = jax.tree.map(lambda u: rate * u, updates)
        return loss_fn(optax.apply_updates(params, step), batch)

    before = loss_fn(params, batch)
    dtype = jnp.result_type(before, jnp.float32)
    initial, target = (jnp.asarray(x, dtype) for x in (initial, target))

    def grow(carry: Any) -> Any:
        _, upper, _, passes = carry
        larger = jnp.minimum(factor * upper, target)
        return upper, larger, loss_at(larger), passes + 1

    first = jnp.minimum(initial, target)
    lower, upper, loss, passes = lax.while_loop(
        lambda carry: (carry[2] <= before) & (carry[1] < target),
        grow,
        (jnp.zeros_like(first), first, loss_at(first), jnp.asarray(2)),
    )

    def halve(carry: Any) -> Any:
        lower, upper, loss, passes = carry
        middle = (lower + upper) / 2
        found = loss_at(middle)
        is_lower = found <= before
        return (
            jnp.where(is_lower, middle, lower),
            jnp.where(is_lower, upper, middle),
            jnp.where(is_lower, loss, found),
            passes + 1,
        )

    def is_wide(carry: Any) -> jax.Array:
        lower, upper, loss, _ = carry
        # Where the loss jumps, the two ends meet.
        return ~(loss <= before * (1 + tolerance)) & (upper - lower > 1e-6 * upper)

    _, upper, _, passes = lax.while_loop(is_wide, halve, (lower, upper, loss, passes))
    return upper, passes
