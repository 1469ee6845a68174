"""How a tree is read, as a table."""

import logging
import math

import optax

from weyl_optax._reading.specification import (
    BoundedLeaves,
    MatrixSpec,
    WeightDimNumOrFn,
    leaves_with_path,
    path_name,
    resolve_dimension_numbers,
    shape_of,
)


def tabulate(params: optax.Params, weight_dimension_numbers: WeightDimNumOrFn | None = None) -> str:
    """Show how each leaf of the params is read as matrices.

    Args:
        params: A tree of arrays, or of anything with a shape and a dtype.
        weight_dimension_numbers: As for :func:`scale_by_weyl_bound`.

    Returns:
        A table with a line per leaf: its path, its shape, and the batch of matrices
        (rows x columns), vectors or scalars that it is bounded as.

    Raises:
        ValueError: If ``weight_dimension_numbers`` does not fit ``params``.

    Example:
        >>> import jax.numpy as jnp
        >>> from weyl_optax import tabulate
        >>> print(tabulate({"kernel": jnp.ones((12, 64, 256)), "bias": jnp.ones(256)}))
        path    shape          read as
        bias    (256,)         1 vector of 256
        kernel  (12, 64, 256)  12 matrices of 64 x 256
    """
    leaves, _ = leaves_with_path(params)
    specs, _ = leaves_with_path(resolve_dimension_numbers(params, weight_dimension_numbers))
    rows = [("path", "shape", "read as")] + [
        (path_name(path), str(shape_of(leaf)), reading(spec))
        for (path, leaf), (_, spec) in zip(leaves, specs, strict=True)
        if leaf is not None
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def warn_of_reading_by_rank(leaves: BoundedLeaves) -> None:
    """Warns which leaves of more than two axes are read as stacks, without a specification."""
    stacks = [
        f"{path} {spec.shape} as {reading(spec)}"
        for path, spec in zip(leaves.paths, leaves.specs, strict=True)
        if len(spec.shape) > 2
    ]
    if stacks:
        logging.getLogger("weyl_optax").warning(
            "Without weight_dimension_numbers the last two axes of a leaf are its matrix: %s. If "
            "that is not what they multiply by, pass weyl_optax.dimension_numbers_from(loss, "
            "params, batch).",
            ", ".join(stacks),
        )


def reading(spec: MatrixSpec | None) -> str:
    """How a leaf is read, in words."""
    return "unbounded" if spec is None else ", ".join(map(_matrices, spec.parts))


def _matrices(spec: MatrixSpec) -> str:
    count = math.prod(spec.batch_shape)
    m, n = spec.matrix_shape
    one, many, size = "matrix", "matrices", f" of {m} x {n}"
    if m * n == 1:
        one, many, size = "scalar", "scalars", ""
    elif not spec.reduction or not spec.output:
        one, many, size = "vector", "vectors", f" of {m * n}"
    return f"{count} {one if count == 1 else many}{size}"
