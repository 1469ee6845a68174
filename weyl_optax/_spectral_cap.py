"""A cap on the leading singular values of an update, as an Optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weyl_optax._bound import how_to_make_anew, is_placeholder
from weyl_optax._norms import orthogonal_iteration as iteration
from weyl_optax._reading.specification import BoundedLeaves, MatrixSpec, WeightDimNumOrFn


class SpectralCapState(NamedTuple):
    """State of :func:`spectral_cap`."""

    cap_count: jax.Array  # shape=(), dtype=int32.
    # A tree like the params; shape=(*batch, k, *output) or (*batch, *reduction, k): k vectors
    # along the shorter side, 8 more than are capped.
    cap_block: Any


def spectral_cap(
    rank: int, weight_dimension_numbers: WeightDimNumOrFn | None = None
) -> optax.GradientTransformation:
    r"""Lower the leading singular values of every update to the smallest of them.

    With :math:`U = \sum_i \sigma_i u_i v_i^H`,

    .. math::

        U \leftarrow U - \sum_{i \le k} (\sigma_i - \sigma_k) u_i v_i^H.

    Adam's updates have a few directions that stand out. Once capped, these no longer set the
    length of the step: with :func:`weyl_optax.scale_by_weyl_bound` after the cap, all others may
    be as large. Muon does the same to all directions, with a polar factor; the cap knows the
    leading ones from a block of vectors, which each step updates by one orthogonal iteration.

    Chain it after an optimizer's scaling, and before the bound and the weight decay.

    Args:
        rank: How many singular values to lower, :math:`k`; at most :math:`n / 2` for a matrix
            with a shorter side of :math:`n`. A quarter of :math:`n` is a good choice for a
            short run, half of it for a long one. The capped update is small in every direction:
            behind Adam, use a rate of 0.01 to 0.03.
        weight_dimension_numbers: How each leaf is read as matrices, as for
            :func:`weyl_optax.scale_by_weyl_bound`; ``None`` leaves a leaf unchanged.
            Vectors, and matrices with a side of at most 16, are never changed.

    Returns:
        A :class:`optax.GradientTransformation`. No singular value is lowered by more than a
        factor of 100, so an update of rank below :math:`k` does not vanish. The singular vectors
        are estimates; the part of a direction that the block has not found yet stays. A matrix
        with NaN or inf is unchanged. There is no derivative. A bound that follows estimates the
        norm of a capped update less exactly, since many of its singular values are equal: from
        the third step after a change on, up to 1.3 times too small, 1.1 without a cap.

    Raises:
        ValueError: If ``rank`` is below 1, if ``weight_dimension_numbers`` does not fit the
            updates, or if ``update`` is called with a state that was made for another rank or
            another reading of the leaves.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from weyl_optax import spectral_cap
        >>> solver = spectral_cap(2)
        >>> updates = {"w": jnp.diag(jnp.linspace(20.0, 1.0, 20))}
        >>> opt_state = solver.init(updates)
        >>> capped, opt_state = solver.update(updates, opt_state)
        >>> print(jnp.linalg.svd(capped["w"], compute_uv=False)[:4].round(2))
        [19. 19. 18. 17.]

    References:
        Jordan et al, `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024, for an
        update whose singular values are alike; the cap of rank k from a warm block is of this
        library

    .. seealso:: :func:`weyl_optax.adamw2`, :func:`weyl_optax.contrib.soft_spectral_clip`
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"rank must be a Python int of at least 1, got {rank!r}: the state's shape depends on "
            'it. Within optax.inject_hyperparams, name it: static_args=("rank",), or "cap_rank".'
        )

    def rank_of(spec: MatrixSpec) -> int:
        n = min(spec.matrix_shape)
        return min(rank, n // 2) if n > iteration.SHORT_SIDE else 0

    def init_fn(params: optax.Params) -> SpectralCapState:
        if is_placeholder(params):
            return SpectralCapState(0, 0)  # type: ignore
        leaves = BoundedLeaves(params, weight_dimension_numbers)
        blocks = [
            iteration.new_block(a, spec, rank_of(spec)) if rank_of(spec) else None
            for a, spec in zip(leaves.of(params), leaves.specs, strict=True)
        ]
        return SpectralCapState(jnp.zeros([], jnp.int32), leaves.put(blocks))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SpectralCapState]:
        del params
        leaves = BoundedLeaves(updates, weight_dimension_numbers)
        steps, blocks = [jnp.asarray(u) for u in leaves.of(updates)], leaves.of(state.cap_block)
        for path, spec, block in zip(leaves.paths, leaves.specs, blocks, strict=True):
            _check_block(path, spec, block, rank_of(spec))
        capped = [i for i, block in enumerate(blocks) if block is not None]
        specs = [leaves.specs[i] for i in capped]
        _, new, excesses = iteration.search(
            [steps[i] for i in capped],
            specs,
            [blocks[i] for i in capped],
            jnp.where(state.cap_count == 0, iteration.COLD_ITERS, 1),
            state.cap_count,
            list(map(rank_of, specs)),
        )
        for i, spec, block, excess in zip(capped, specs, new, excesses, strict=True):
            lowered = iteration.without_excess(steps[i], spec, block, excess)
            steps[i], blocks[i] = lowered.astype(steps[i].dtype), block
        return leaves.put(steps, updates), SpectralCapState(
            jnp.asarray(optax.safe_increment(state.cap_count)),
            leaves.put(blocks, state.cap_block),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _check_block(path: str, spec: MatrixSpec, block: Any, rank: int) -> None:
    """Checks that the state was made for this rank, and for the current reading of the leaf."""
    found = jax.tree.map(jnp.shape, block)
    wanted = iteration.block_shape(spec, rank) if rank else None
    if found != wanted:
        raise ValueError(
            f"The cap of rank {rank} on the leaf {path!r} of shape {spec.shape} keeps a block of "
            f"shape {wanted}, and the state has {found}: it was made for another rank or reading. "
            f"{how_to_make_anew('the cap', SpectralCapState)}"
        )
