"""The bound on the growth of spectral norms, as an Optax transform."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weyl_optax import _matrices, _subspace
from weyl_optax._arguments import check_at_least, value_at


class WeylBoundState(NamedTuple):
    """State of :func:`scale_by_weyl_bound`. Its dicts are keyed by a leaf's path."""

    count: jax.Array  # shape=(), dtype=int32. Updates so far.
    weight_block: dict[str, jax.Array]  # 8 vectors, for sides above 16; float32 at least.
    update_block: dict[str, jax.Array]  # 8 vectors, for sides above 16; float32 at least.
    sigma_weight: dict[str, jax.Array]  # shape=batch. Norm of the weight, last update.
    sigma_update: dict[str, jax.Array]  # shape=batch. Norm of the update, last update.
    scale: dict[str, jax.Array]  # shape=batch. Factor applied to the last update.
    weight_decay: optax.OptState  # State of optax.add_decayed_weights.


def scale_by_weyl_bound(
    tau: optax.ScalarOrSchedule = 0.004,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | None = None,
    min_std: jax.typing.ArrayLike = 1e-3,
    weight_dimension_numbers: _matrices.WeightDimNumOrFn | None = None,
    num_iters: jax.typing.ArrayLike = 1,
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
    :math:`U_t` that it is given by :math:`\alpha_t / \eta_t \le 1`. It stands either
    after a whole optimizer, whose update has the learning rate in it already, or
    before :func:`optax.scale_by_learning_rate` and is told the same rate.

    Args:
        tau: Largest growth of a spectral norm in a step, relative; a schedule of it
            is allowed. The paper takes 0.003 to 0.004 for ViT, 0.004 for Swin, and
            0.01 for GPT. A norm grows by at most :math:`(1 + \tau)^T` in :math:`T`
            steps, so a short run needs a larger one.
        learning_rate: The rate, or the schedule, of the
            :func:`optax.scale_by_learning_rate` that follows. With the default of
            1.0, the update is bounded as it is given.
        weight_decay: Strength of the decoupled weight decay :math:`\lambda`, or a
            schedule. It is added after :math:`\sigma_1(U_t)` is measured, and scaled
            by the same factor:
            :math:`W_t = W_{t-1} - \alpha_t U_t - \alpha_t \lambda W_{t-1}`.
        weight_decay_mask: The leaves to decay, as in :func:`optax.add_decayed_weights`.
        min_std: A weight with a norm below
            ``min_std * (sqrt(m) + sqrt(n))``, that of an :math:`m \times n` Gaussian
            matrix of this standard deviation, counts as having that norm, so that a
            layer that starts at zero can move. 0 is the paper's rule to the letter.
        weight_dimension_numbers: How each leaf is read as matrices: a tree like the
            params with an :class:`optax.contrib.MuonDimensionNumbers` for each leaf,
            or ``None`` to leave a leaf unbounded; or a function from the params to
            such a tree. All axes that are named neither as reduction nor as output
            axes are batch axes, and every matrix of the batch has its own bound. By
            default, ranks 0 and 1 are scalars and vectors (bounded by their 2-norm),
            and above that the last two axes are the matrix. For Flax models see
            :func:`weyl_optax.flax.dimension_numbers`.
        num_iters: Iterations, at least 1, of the estimator of :math:`\sigma_1` at each
            update. It starts from the singular vectors of the last update, where one
            is nearly always enough; each reads the weights and the updates twice. The
            first update has no such start, and its norm can be some percent too low. The
            norm of a matrix with a side of at most 16 is always exact.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs the
        params. A zero update stays zero. An update with NaN or inf comes out with
        NaN, and leaves no trace in the block vectors of its matrix.

    Raises:
        ValueError: If an argument is out of its range, if
            ``weight_dimension_numbers`` does not fit the params, or if ``update`` is
            called without params or with updates of another structure.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax import scale_by_weyl_bound
        >>> solver = optax.chain(optax.lion(0.1), scale_by_weyl_bound(tau=0.01))
        >>> params = {"w": jnp.eye(3)}
        >>> opt_state = solver.init(params)
        >>> grads = {"w": jnp.ones((3, 3))}
        >>> updates, opt_state = solver.update(grads, opt_state, params)
        >>> print(f"{jnp.linalg.norm(updates['w'], 2):.4f}")
        0.0100

    References:
        Qi et al, `Taming Transformer Without Using Learning Rate Warmup
        <https://arxiv.org/abs/2505.21910>`_, 2025

    .. seealso:: :func:`weyl_optax.adamw2`, :func:`weyl_optax.bound_metrics`,
        :func:`weyl_optax.tabulate`
    """
    check_at_least("tau", tau, 0)
    check_at_least("learning_rate", learning_rate, 0)
    check_at_least("weight_decay", weight_decay, 0)
    check_at_least("min_std", min_std, 0)
    check_at_least("num_iters", num_iters, 1)
    decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)

    def init_fn(params: optax.Params) -> WeylBoundState:
        matrices = _matrices.read(params, weight_dimension_numbers)
        weights = {p: jnp.asarray(w) for p, w in _matrices.by_path(params).items()}
        (weight_block,), (sigma_weight,) = _subspace.norms(
            [weights],
            matrices,
            [_subspace.random_blocks(weights, matrices, seed=0)],
            _subspace.COLD_ITERS,
        )
        return WeylBoundState(
            count=jnp.zeros([], jnp.int32),
            weight_block=weight_block,
            update_block=_subspace.random_blocks(weights, matrices, seed=1),
            sigma_weight=sigma_weight,
            sigma_update=_subspace.zero_norms(weights, matrices),
            scale={p: jnp.ones_like(sigma) for p, sigma in sigma_weight.items()},
            weight_decay=decay.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: WeylBoundState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WeylBoundState]:
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_weyl_bound measures the params: call update(updates, state, params)."
            )
        if jax.tree.structure(updates) != jax.tree.structure(params):
            raise ValueError(
                "updates and params differ in structure: "
                f"{jax.tree.structure(updates)} against {jax.tree.structure(params)}."
            )
        matrices = _matrices.read(params, weight_dimension_numbers)
        weights, steps = _matrices.by_path(params), _matrices.by_path(updates)
        for path, w in weights.items():
            given, expected = _matrices.shape_of(steps[path]), _matrices.shape_of(w)
            if given != expected:
                raise ValueError(
                    f"The leaf {path!r} has shape {given} in updates, {expected} in params."
                )
        steps = {p: jnp.asarray(steps[p], _subspace.compute_dtype(weights[p])) for p in matrices}
        start = _subspace.with_own_rows(steps, matrices, state.update_block, state.sigma_update)
        (weight_block, update_block), (sigma_weight, sigma_update) = _subspace.norms(
            [weights, steps],
            matrices,
            [state.weight_block, start],
            num_iters,
        )
        update_block = _subspace.where_found(sigma_update, update_block, state.update_block)
        max_growth = value_at(tau, state.count)
        rate = value_at(learning_rate, state.count)
        scale = {}
        for path, m in matrices.items():
            least = min_std * sum(math.sqrt(size) for size in m.matrix_shape)
            allowed = max_growth * jnp.maximum(sigma_weight[path], least)
            wanted = rate * sigma_update[path]
            # NaN is not <= anything: it passes into the scale, and so into the update.
            bounded = jnp.where(wanted <= allowed, 1, allowed / wanted)
            scale[path] = bounded.astype(sigma_update[path].dtype)

        updates, decay_state = decay.update(updates, state.weight_decay, params)

        def rescale(path: tuple[Any, ...], u: jax.Array) -> jax.Array:
            name = _matrices.path_name(path)
            if name not in matrices:
                return u
            m = matrices[name]
            return (jnp.expand_dims(scale[name], m.reduction + m.output) * u).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(rescale, updates), WeylBoundState(
            count=optax.safe_increment(state.count),
            weight_block=weight_block,
            update_block=update_block,
            sigma_weight=sigma_weight,
            sigma_update=sigma_update,
            scale=scale,
            weight_decay=decay_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
