"""What the bound did, ready for a logger."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from weyl_optax import _sharding as sharding
from weyl_optax._bound import WeylBoundState
from weyl_optax._reading.specification import leaves_with_path, path_name

MEASURED = {  # fields of the state, by their names in the metrics
    "sigma_weight": "sigma_weight",
    "sigma_update": "sigma_update",
    "scale": "bound_scale",
}


def bound_metrics(
    opt_state: Any, *, scalars: bool = False, prefix: str = ""
) -> dict[str, jax.Array]:
    """Collect what :func:`scale_by_weyl_bound` measured in its last update.

    Args:
        opt_state: An optimizer state with a :class:`WeylBoundState` anywhere in it; also
            the state of an ``nnx.Optimizer``, or a checkpoint of it, restored as nested dicts.
        scalars: Whether to summarize all matrices in ten numbers.
        prefix: Prefix of all names, such as ``"optimizer/"``.

    Returns:
        For each bounded leaf, arrays of its batch shape (scalars for a plain matrix
        or vector), copies that outlive a donated state:

        - ``<path>/sigma_weight``: spectral norm of the weight before the update.
        - ``<path>/sigma_update``: spectral norm of the update, after the cap and before the bound.
        - ``<path>/scale``: the factor, at most 1, by which the update was multiplied.

        And ``bounded_fraction``, the share of matrices and vectors with a factor below 1.

        With ``scalars``, the arrays are replaced by the minimum, median and maximum over all
        matrices and vectors: ``sigma_weight/min``, ``sigma_weight/median`` and so on. If two
        bounds in one state measure the same leaf, all names begin with ``bound_0/``,
        ``bound_1/`` and so on.

    Raises:
        ValueError: If ``opt_state`` has no :class:`WeylBoundState`.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax import adamw2, bound_metrics
        >>> params = {"w": 2 * jnp.eye(3), "b": jnp.ones(3)}
        >>> solver = adamw2(0.1, tau=0.01, max_std=1.0)
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
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_bound) if _is_bound(x)]
    if not states:
        raise ValueError(
            "opt_state has no WeylBoundState. Chain weyl_optax.scale_by_weyl_bound "
            "after the optimizer, or use weyl_optax.adamw2."
        )
    measured = [_measured(state) for state in states]
    if max(Counter(name for found in measured for name in found).values(), default=0) > 1:
        parts = {f"bound_{i}/": found for i, found in enumerate(measured)}
    else:
        parts = {"": {name: value for found in measured for name, value in found.items()}}
    return {
        f"{prefix}{part}{name}": value
        for part, found in parts.items()
        for name, value in (_summary(found) if scalars else found | _fraction(found)).items()
    }


def _is_bound(x: Any) -> bool:
    """Whether it is a state of the bound, or was one before its tuples became dicts."""
    fields = {*MEASURED.values()}
    return isinstance(x, WeylBoundState) or (isinstance(x, Mapping) and fields <= set(x))


def _measured(state: WeylBoundState | Mapping[str, Any]) -> dict[str, jax.Array]:
    """What one bound measured, by name."""
    fields = state._asdict() if isinstance(state, WeylBoundState) else state
    columns = [leaves_with_path(fields[field])[0] for field in MEASURED.values()]
    return {
        path_name((*path, name)): sharding.replicate(jnp.array(value))
        for row in zip(*columns, strict=True)
        for name, (path, value) in zip(MEASURED, row, strict=True)
        if value is not None
    }


def _all_of(measured: Mapping[str, jax.Array], quantity: str) -> jax.Array:
    """The values of all matrices; if there are none, NaN, and for the scale 1."""
    found = [jnp.ravel(x) for name, x in measured.items() if name.rpartition("/")[2] == quantity]
    return jnp.concatenate(found or [jnp.array([1.0 if quantity == "scale" else jnp.nan])])


@jax.jit  # eagerly, each call moves constants to the device, which jax.transfer_guard forbids
def _fraction(measured: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The share of matrices with a factor below 1."""
    return {"bounded_fraction": jnp.mean(_all_of(measured, "scale") < 1)}


@jax.jit
def _summary(measured: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Ten numbers for all matrices."""
    statistics = {"min": jnp.min, "median": jnp.median, "max": jnp.max}
    return {
        f"{quantity}/{name}": statistic(_all_of(measured, quantity))
        for quantity in MEASURED
        for name, statistic in statistics.items()
    } | _fraction(measured)
