"""How a tree is read, as a table."""

import math

import optax

from weyl_optax import _matrices


def tabulate(
    params: optax.Params, weight_dimension_numbers: _matrices.WeightDimNumOrFn | None = None
) -> str:
    """Show as which matrices each leaf of the params is read.

    Args:
        params: A tree of arrays, or of anything with a shape and a dtype.
        weight_dimension_numbers: As for :func:`scale_by_weyl_bound`.

    Returns:
        A table with a line per leaf: its path, its shape, and the batch of matrices
        (rows x columns), vectors or scalars as which it is bounded.

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
    matrices = _matrices.read(params, weight_dimension_numbers)
    rows = [("path", "shape", "read as")]
    for path, leaf in _matrices.by_path(params).items():
        rows.append((path, str(_matrices.shape_of(leaf)), _reading(matrices.get(path))))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def _reading(matrices: _matrices.Matrices | None) -> str:
    if matrices is None:
        return "unbounded"
    count = math.prod(matrices.batch_shape)
    m, n = matrices.matrix_shape
    one, many, size = "matrix", "matrices", f" of {m} x {n}"
    if m * n == 1:
        one, many, size = "scalar", "scalars", ""
    elif not matrices.reduction or not matrices.output:
        one, many, size = "vector", "vectors", f" of {m * n}"
    return f"{count} {one if count == 1 else many}{size}"
