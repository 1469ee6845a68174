"""What the bound did, ready for a logger."""

from typing import Any

import jax
import jax.numpy as jnp

from weyl_optax._bound import WeylBoundState


def bound_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Collect what :func:`scale_by_weyl_bound` measured in its last update.

    Args:
        opt_state: An optimizer state with a :class:`WeylBoundState` anywhere in it.

    Returns:
        For each bounded leaf, arrays of its batch shape (scalars for a plain matrix
        or vector):

        - ``<path>/sigma_weight``: spectral norm of the weight before the update.
        - ``<path>/sigma_update``: spectral norm of the update, before the bound.
        - ``<path>/scale``: the factor, at most 1, by which the update was multiplied.

        And ``bounded_fraction``, the share of all matrices with a factor below 1.

    Raises:
        ValueError: If ``opt_state`` has no :class:`WeylBoundState`.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax import adamw2, bound_metrics
        >>> params = {"w": 2 * jnp.eye(3), "b": jnp.ones(3)}
        >>> solver = adamw2(0.1, tau=0.01)
        >>> grads = {"w": jnp.ones((3, 3)), "b": jnp.zeros(3)}
        >>> _, opt_state = solver.update(grads, solver.init(params), params)
        >>> for name, value in bound_metrics(opt_state).items():
        ...     print(f"{name} {value:.4f}")
        b/sigma_weight 1.7321
        b/sigma_update 0.0000
        b/scale 1.0000
        w/sigma_weight 2.0000
        w/sigma_update 3.0000
        w/scale 0.0667
        bounded_fraction 0.5000
    """
    is_bound = lambda x: isinstance(x, WeylBoundState)  # noqa: E731
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_bound) if is_bound(x)]
    if not states:
        raise ValueError(
            "opt_state has no WeylBoundState. Chain weyl_optax.scale_by_weyl_bound "
            "after the optimizer, or use weyl_optax.adamw2."
        )
    metrics = {}
    for state in states:
        for path in sorted(state.scale):
            for name in ("sigma_weight", "sigma_update", "scale"):
                metrics[f"{path}/{name}".lstrip("/")] = getattr(state, name)[path]
    scales = [jnp.ravel(s) for state in states for s in state.scale.values()]
    bounded = jnp.concatenate(scales) < 1 if scales else jnp.zeros(1)
    return metrics | {"bounded_fraction": jnp.mean(bounded)}
