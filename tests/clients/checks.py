"""What is asked of every client: how its leaves are read, and how far they move in a step."""

import math

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers

TAU = 0.02
MIN_STD, MAX_STD = 1e-3, 0.02


def by_path(tree):
    """Path -> leaf, without boxes and None."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in leaves
    }


def axes(numbers):
    return {path: tuple(entry) for path, entry in by_path(numbers).items()}


def norms(leaf, reduction, output):
    """The exact spectral norm of each matrix."""
    leaf = np.asarray(leaf, np.float64)
    batch = [axis for axis in range(leaf.ndim) if axis not in (*reduction, *output)]
    m, n = (math.prod(leaf.shape[axis] for axis in side) for side in (reduction, output))
    matrices = leaf.transpose(*batch, *reduction, *output).reshape(-1, m, n)
    return np.linalg.norm(matrices, 2, axis=(1, 2))


def usual_norms(shape, reduction, output):
    """The least and the most for which the norm of a weight counts."""
    m, n = (math.prod(shape[axis] for axis in side) for side in (reduction, output))
    gaussian = math.sqrt(m) + math.sqrt(n)
    return MIN_STD * gaussian, MAX_STD * gaussian if reduction else math.sqrt(n)


def assert_bounded(before, after, readings):
    """No matrix takes a step above tau times its norm, where the usual is the most that counts."""
    for path, leaf in by_path(after).items():
        old, new = (np.asarray(x, np.float64) for x in (before[path], leaf))
        assert np.all(np.isfinite(new)), path
        least, most = usual_norms(old.shape, *readings[path])
        allowed = TAU * np.clip(norms(old, *readings[path]), least, most)
        taken = norms(new - old, *readings[path])
        assert np.all(taken <= 1.05 * allowed), f"{path}: a step of {(taken / allowed).max():.2f}"
