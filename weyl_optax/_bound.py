"""The bound on the growth of spectral norms, as an Optax transform."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from weyl_optax._arguments import as_schedule, check_at_least, check_in, of_each_leaf
from weyl_optax._norms import cap
from weyl_optax._norms import orthogonal_iteration as iteration
from weyl_optax._reading.specification import (
    BoundedLeaves,
    MatrixSpec,
    WeightDimNumOrFn,
)
from weyl_optax._reading.tabulate import warn_of_reading_by_rank

Growth = Literal["linear", "exponential"]


class WeylBoundState(NamedTuple):
    """State of :func:`scale_by_weyl_bound`.

    Every field but the first is a tree like the params, with ``None`` for a leaf that has nothing
    there. None of them counts as params: :func:`optax.tree.map_params` passes each
    whole field to its ``transform_non_params``, and the result is a prefix of the state, which
    :func:`jax.jit` and :func:`jax.device_put` accept for shardings.
    """

    bound_count: jax.Array  # shape=(), dtype=int32.
    # A block is k vectors along the shorter side, None if that is at most 16; float32 at least.
    weight_block: Any  # shape=(*batch, k, *output) or (*batch, *reduction, k); k = 8
    update_block: Any  # The same, with k = 8 + cap_rank for a capped update.
    sigma_weight: Any  # shape=batch. Norm of the weight, last update.
    sigma_update: Any  # shape=batch. Norm of the update after the cap, last update.
    bound_scale: Any  # shape=batch. Factor applied to the last update.


def scale_by_weyl_bound(
    tau: optax.ScalarOrSchedule = 0.1,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    growth: Growth = "linear",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | None = None,
    min_std: jax.typing.ArrayLike = 1e-3,
    max_std: jax.typing.ArrayLike = 0.02,
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    num_iters: jax.typing.ArrayLike = 1,
    cap_rank: int | None = None,
    cap_mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bound how fast the spectral norm of every weight matrix may grow.

    A Transformer whose weights keep

    .. math::

        \|W_t\|_2 \le (1 + \tau) \|W_{t-1}\|_2

    trains at its full learning rate from the first step, without warmup. By Weyl's
    inequality, :math:`\sigma_1(W - \alpha U) \le \sigma_1(W) + \alpha \sigma_1(U)`,
    it is enough that each matrix takes its step :math:`-\alpha_t U_t` with

    .. math::

        \alpha_t = \min\left(\eta_t,\;
            \tau \frac{\sigma_1(W_{t-1})}{\sigma_1(U_t)}\right),

    where :math:`\eta_t` is the learning rate. This transform multiplies the update
    :math:`U_t` by :math:`\alpha_t / \eta_t \le 1`. Chain it either after a whole optimizer,
    whose update already includes the learning rate, or before
    :func:`optax.scale_by_learning_rate`, and give it the same rate.

    That is the paper's rule. Under it a norm may grow exponentially, by a factor
    :math:`(1 + \tau)^T` in :math:`T` steps: too little or far too much, depending on
    :math:`\tau` and :math:`T`. By default a norm grows like this only up to the usual size,
    and linearly from there: no step of a matrix is larger than :math:`\tau` times the norm of an
    :math:`m \times n` Gaussian matrix of standard deviation :math:`s` (``max_std``),

    .. math::

        \alpha_t = \min\left(\eta_t,\; \tau\, \frac{\min(\sigma_1(W_{t-1}),\;
            s (\sqrt m + \sqrt n))}{\sigma_1(U_t)}\right),

    and no step of a vector or a scalar is larger than :math:`\tau` times the norm of ones, where
    gains begin. A weight that starts at zero, such as an adapter, a residual gain, a bias or a
    zero head, counts as a small one at first (``min_std``).

    One number per matrix is a blunt tool for an update with a few directions that stand out, as
    Adam's have: they hold back all the others. With ``cap_rank``, the :math:`k` leading singular
    values of :math:`U_t = \sum_i \sigma_i u_i v_i^H` are first lowered to the last of them,

    .. math::

        U_t \leftarrow U_t - \sum_{i \le k} (\sigma_i - \sigma_k) u_i v_i^H,

    and :math:`\sigma_1(U_t)` is that of the capped update. Muon makes all of the singular values
    alike, by a polar factor; the cap knows the leading ones from the vectors that the bound keeps
    anyway.

    Args:
        tau: Largest relative growth of a spectral norm in a step, or a schedule.
            With exponential growth, the paper uses 0.003 to 0.004 for ViT, 0.004 for Swin, and
            0.01 for GPT, over 100,000 steps or more; a shorter run needs a larger one.
        learning_rate: The rate, or the schedule, of the
            :func:`optax.scale_by_learning_rate` that follows, or of the
            :func:`optax.scale_by_schedule`, whose sign does not matter. With the default of
            1.0, the update itself is bounded.
        growth: How a norm may grow over the steps: ``"linear"``, or ``"exponential"`` as in
            the paper.
        weight_decay: Strength of the decoupled weight decay :math:`\lambda`, or a
            schedule. It is added after :math:`\sigma_1(U_t)` is measured, and scaled
            by the same factor:
            :math:`W_t = W_{t-1} - \alpha_t U_t - \alpha_t \lambda W_{t-1}`. Use it only
            before :func:`optax.scale_by_learning_rate`: after a whole optimizer, whose update
            is already negated, give the decay to that optimizer instead.
        weight_decay_mask: The leaves to decay, as in :func:`optax.add_decayed_weights`. Within
            :func:`optax.inject_hyperparams`, name a function in ``static_args``.
        min_std: A weight counts as having a norm of at least
            ``min_std * (sqrt(m) + sqrt(n))``, the norm of an :math:`m \times n` Gaussian
            matrix of this standard deviation: a layer that starts at zero can then move.
            The paper has 0. It counts before ``max_std``.
        max_std: With linear growth, a matrix counts as having a norm of at most
            ``max_std * (sqrt(m) + sqrt(n))``, and a vector of at most ``sqrt(n)``; a column of a
            matrix, with reduction axes alone, counts as a matrix. The default
            is the usual standard deviation of a Transformer's initial weights.
        weight_dimension_numbers: How each leaf is read as matrices: a tree like the
            params with an :class:`optax.contrib.MuonDimensionNumbers` for each leaf or
            subtree, or ``None`` to leave it unbounded (where Muon would use Adam); or a
            function from the params to such a tree. Axes that are named neither as
            reduction nor as output axes are batch axes, and every matrix of the batch has
            its own bound; a :class:`SplitDimensionNumbers` cuts a fused leaf into parts. By
            default, ranks 0 and 1 are scalars and vectors (bounded by their 2-norm), and above
            that the last two axes are the matrix; if there are more, a warning is logged. Gains
            and biases that are stacked over layers, (layers, d), are then read as one matrix:
            give a specification. Within :func:`optax.inject_hyperparams`, name a function in
            ``static_args``.
            :func:`weyl_optax.dimension_numbers_from` reads the params of any model from its
            loss; for Flax NNX models see also :func:`weyl_optax.flax.dimension_numbers`.
        num_iters: Iterations, at least 1, of the estimator of :math:`\sigma_1` at each
            update. They start from the singular vectors of the last update, so one
            is nearly always enough; each reads the weights and the updates twice. One
            vector, with a cap four, is drawn afresh each time, to see parts of a matrix that are
            no longer zero. The first update, which has no such start, takes 16 more; if it is zero
            or not finite, the next one has neither. The norm of a matrix with a side of at most 16
            is always exact.
        cap_rank: How many singular values of an update to lower, :math:`k \ge 2`; at most
            :math:`n / 2` for a matrix with a shorter side of :math:`n`, and none for vectors and
            for matrices with a side of at most 16. By default none. A quarter of :math:`n` is a
            good choice for a short run, half of it for a long one. A capped update is small in
            every direction: behind Adam, use a rate of 0.01 to 0.03. No singular value is lowered
            by more than a factor of 100, so an update of rank below :math:`k` does not vanish.
            A cap reads the updates once more. To cap without the bound, set ``tau`` to ``jnp.inf``.
        cap_mask: The leaves whose updates are capped, as in :func:`optax.masked`; by default all
            that are bounded. A function within :func:`optax.inject_hyperparams`: as above.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs the
        params. A zero update stays zero, and ``None`` stays ``None``. Where an update has NaN or
        inf, that entry comes out as NaN and the rest of its matrix as zero, and nothing of it
        stays in the block vectors. A
        sharded weight is bounded as a whole and stays sharded; inside
        :func:`jax.shard_map`, each shard is a matrix of its own. It can be differentiated once,
        in forward and reverse mode, except with a cap. A capped update keeps what the vectors have
        not found yet of its leading directions, so its norm is above :math:`\sigma_k`, by a fifth
        in training; the estimate of it, which counts that, is within 15 %.

    Raises:
        ValueError: If an argument is out of range, if
            ``weight_dimension_numbers`` does not fit the params, or if ``update`` is
            called without params, with updates of another structure, or with a state that was
            made for another reading of the params.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax import scale_by_weyl_bound
        >>> solver = optax.chain(optax.lion(0.1), scale_by_weyl_bound(tau=0.01))
        >>> params = {"w": 0.02 * jnp.eye(3)}
        >>> opt_state = solver.init(params)
        >>> grads = {"w": jnp.ones((3, 3))}
        >>> updates, opt_state = solver.update(grads, opt_state, params)
        >>> print(f"{jnp.linalg.norm(updates['w'], 2):.4f}")
        0.0002

    References:
        Qi et al, `Taming Transformer Without Using Learning Rate Warmup
        <https://arxiv.org/abs/2505.21910>`_, 2025

        Jordan et al, `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024, for an update
        whose singular values are alike; the cap of rank k from warm vectors is of this library

    .. seealso:: :func:`weyl_optax.adamw2`, :func:`weyl_optax.bound_metrics`,
        :func:`weyl_optax.tabulate`
    """
    check_at_least("tau", tau, 0, schedule=True)
    check_at_least("learning_rate", learning_rate, 0, schedule=True)
    check_at_least("weight_decay", weight_decay, 0, schedule=True)
    check_at_least("min_std", min_std, 0)
    check_at_least("max_std", max_std, 0)
    check_at_least("num_iters", num_iters, 1)
    check_in("growth", growth, get_args(Growth))
    if cap_rank is not None and not (type(cap_rank) is int and cap_rank >= 2):
        raise ValueError(
            f"cap_rank must be None or a Python int of at least 2, got {cap_rank!r}: the state's "
            "shape depends on it. Within optax.inject_hyperparams, write "
            'static_args=("cap_rank", "cap_mask").'
        )
    if cap_mask is not None and cap_rank is None:
        raise ValueError(
            "cap_mask picks the leaves to cap, and without cap_rank none is. Give cap_rank, such "
            "as a quarter of the width."
        )
    tau_at, rate_at, decay_at = map(as_schedule, (tau, learning_rate, weight_decay))

    def ranks_of(leaves: BoundedLeaves, params: optax.Params) -> list[int]:
        """How many singular values of each update to lower."""
        if cap_rank is None:
            return [0] * len(leaves.specs)
        is_capped = leaves.of_each_part(of_each_leaf("cap_mask", cap_mask, params))
        return [
            cap.rank_of(spec, cap_rank) if capped else 0
            for spec, capped in zip(leaves.specs, is_capped, strict=True)
        ]

    def init_fn(params: optax.Params) -> WeylBoundState:
        if is_placeholder(params):
            return WeylBoundState(*[0] * len(WeylBoundState._fields))  # type: ignore
        leaves = BoundedLeaves(params, weight_dimension_numbers)
        if weight_dimension_numbers is None:
            warn_of_reading_by_rank(leaves)
        ranks = ranks_of(leaves, params)
        of_each_leaf("weight_decay_mask", weight_decay_mask, params)  # which checks it

        def of_each(make: Callable[..., Any], *more: Any) -> Any:
            """Separate buffers, since a jitted step may donate the state."""
            return leaves.put(list(map(make, leaves.of(params), leaves.specs, *more)))

        return WeylBoundState(
            bound_count=jnp.zeros([], jnp.int32),
            weight_block=of_each(iteration.new_block),
            update_block=of_each(iteration.new_block, ranks),
            sigma_weight=of_each(iteration.zero_norms),
            sigma_update=of_each(iteration.zero_norms),
            bound_scale=of_each(lambda a, spec: iteration.zero_norms(a, spec) + 1),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WeylBoundState]:
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_weyl_bound measures the params: call update(updates, state, params)."
            )
        leaves = BoundedLeaves(params, weight_dimension_numbers, updates)
        n, ranks = len(leaves.specs), ranks_of(leaves, params)
        weights = list(map(jnp.asarray, leaves.of(params)))
        _check_reading(leaves, weights, ranks, state)
        matrices = [
            _as_its_weight(path, jnp.asarray(u), w)
            for path, u, w in zip(leaves.paths, leaves.of(updates), weights, strict=True)
        ]
        sigmas, blocks, spectra = iteration.search(
            weights + matrices,
            leaves.specs * 2,
            leaves.of(state.weight_block) + leaves.of(state.update_block),
            # A cold start at the first update, not in init: params may have been loaded since.
            jnp.where(state.bound_count == 0, iteration.COLD_ITERS, 0) + num_iters,
            state.bound_count,
            [0] * n + ranks,
        )
        if capped := [i for i, rank in enumerate(ranks) if rank]:
            lowered = cap.lower(
                [matrices[i] for i in capped],
                [leaves.specs[i] for i in capped],
                [blocks[n + i] for i in capped],
                [spectra[n + i] for i in capped],
            )
            for i, matrix, sigma in zip(capped, *lowered, strict=True):
                matrices[i], sigmas[n + i] = matrix, sigma
        step = leaves.put(matrices, updates)
        if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
            strength: Any = decay_at(state.bound_count)
            mask = of_each_leaf("weight_decay_mask", weight_decay_mask, params)
            decay = optax.add_decayed_weights(strength, mask)
            step, _ = decay.update(step, decay.init(params), params)
        tau_now, rate = tau_at(state.bound_count), rate_at(state.bound_count)
        scales = []
        for spec, weight, update in zip(leaves.specs, sigmas[:n], sigmas[n:], strict=True):
            reference = _reference(spec, weight, growth, min_std, max_std)
            scales.append(_scale(reference, update, tau_now, rate))
        return leaves.times(scales, step, updates), WeylBoundState(
            bound_count=jnp.asarray(optax.safe_increment(state.bound_count)),
            weight_block=leaves.put(blocks[:n], state.weight_block),
            update_block=leaves.put(blocks[n:], state.update_block),
            sigma_weight=leaves.put(sigmas[:n], state.sigma_weight),
            sigma_update=leaves.put(sigmas[n:], state.sigma_update),
            bound_scale=leaves.put(scales, state.bound_scale),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_reading(
    leaves: BoundedLeaves,
    weights: Sequence[jax.Array],
    ranks: Sequence[int],
    state: WeylBoundState,
) -> None:
    """Checks that the state was made for this reading of the leaves, their dtypes and the ranks."""
    remedy = (
        "Make the bound's state anew, and keep the optimizer's: jax.tree.map(lambda new, old: new "
        "if isinstance(new, WeylBoundState) else old, solver.init(params), state, "
        "is_leaf=lambda x: isinstance(x, WeylBoundState))"
    )
    if not isinstance(state, WeylBoundState):
        raise ValueError(
            f"The state is a {type(state).__name__}, not a WeylBoundState. Restore a checkpoint "
            "into the structure of solver.init(params)."
        )
    try:
        columns = map(leaves.of, (state.sigma_weight, state.weight_block, state.update_block))
        kept = list(zip(*columns, strict=True))
    except ValueError as error:
        raise ValueError(f"The state was made for other params: {error}. {remedy}") from None
    for path, spec, w, rank, of_leaf in zip(
        leaves.paths, leaves.specs, weights, ranks, kept, strict=True
    ):
        sigma, *blocks = jax.tree.map(jnp.shape, of_leaf)
        expected = [iteration.block_shape(spec), iteration.block_shape(spec, rank)]
        dtype = iteration.compute_dtype(w)
        dtypes = [x.dtype for x in jax.tree.leaves(of_leaf[1:])]
        if sigma != spec.batch_shape or blocks != expected or set(dtypes) - {dtype}:
            was = f"norms of shape {sigma}, blocks {blocks[0]} and {blocks[1]}"
            was += f" of {dtypes[0]}" if dtypes else ""
            cap = f", with a cap of rank {rank}" if rank else ""
            raise ValueError(
                f"The leaf {path!r} of shape {spec.shape} is read as matrices {spec.matrix_shape} "
                f"in a batch of shape {spec.batch_shape}, in {dtype}{cap}, and the state was made "
                f"for another reading, rank or dtype: {'unbounded' if sigma is None else was}. "
                f"{remedy}"
            )


def _as_its_weight(path: str, update: jax.Array, weight: jax.Array) -> jax.Array:
    """The update in the dtype that the weight is measured in."""
    if jnp.iscomplexobj(update) != jnp.iscomplexobj(weight):
        remedy = "Make it complex" if jnp.iscomplexobj(weight) else "Take the real part of it"
        raise ValueError(
            f"The leaf {path!r} is {weight.dtype}, and its update {update.dtype}. {remedy} before "
            "the bound."
        )
    return update.astype(iteration.compute_dtype(weight))


def _reference(
    spec: MatrixSpec,
    now: jax.Array,
    growth: Growth,
    min_std: jax.typing.ArrayLike,
    max_std: jax.typing.ArrayLike,
) -> jax.Array:
    """The norm that a weight counts as having: tau times it is the largest norm of its step."""
    m, n = spec.matrix_shape
    gaussian = math.sqrt(m) + math.sqrt(n)  # the norm at deviation 1
    if growth == "linear":
        most = jnp.asarray(max_std, now.dtype) * gaussian
        now = jnp.minimum(now, most if spec.reduction else math.sqrt(n))  # the norm of ones
    return jnp.maximum(now, jnp.asarray(min_std, now.dtype) * gaussian)


def _scale(
    reference: jax.Array,
    sigma_update: jax.Array,
    tau: jax.typing.ArrayLike,
    rate: jax.typing.ArrayLike,
) -> jax.Array:
    """min(1, tau reference / (|rate| sigma_1(U))), or NaN if tau is."""
    tau = jnp.maximum(jnp.asarray(tau, reference.dtype), 0)
    allowed = jnp.where(tau == jnp.inf, tau, tau * reference)  # inf * 0 is NaN
    wanted = jnp.abs(jnp.asarray(rate, reference.dtype)) * sigma_update
    # NaN is not <= anything. A matrix with an entry that is not finite takes no step, and that
    # entry stays not finite.
    is_bounded = ~(wanted <= allowed)
    is_finite = jnp.isfinite(wanted) & jnp.isfinite(allowed)
    factor = jnp.where(is_finite, allowed / jnp.where(is_bounded, wanted, 1), 0)
    return jnp.where(jnp.isnan(tau), tau, jnp.where(is_bounded, factor, 1))


def is_placeholder(params: Any) -> bool:
    """Whether it is what `optax.tree.map_params` passes to `init`, to find params in a state.

    It is a tree without leaves: a field made from it by `jax.tree.map` would be taken for one
    with the shapes of the params.
    """
    return type(params).__name__ == "_ParamsPlaceholder"
