"""Scion and NorMuon, from the parts of Optax.

A tree of dimension numbers says which axes of a leaf are its matrix; see `optax.contrib.muon`.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon


def scion(
    learning_rate: optax.Schedule,
    numbers: Any,
    hidden: Any,
    embeddings: Any,
    *,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    sign_share: float = 1 / 3,
) -> optax.GradientTransformation:
    r"""Scion: steps of a set size in the norm that suits a layer.

    With the momentum :math:`D`, an average of the gradients, a hidden kernel moves by
    :math:`\sqrt{d_{out} / d_{in}}\, U V^\top` where :math:`D = U S V^\top` (by Newton-Schulz), a
    vector by :math:`D` over its root mean square, embeddings by the sign of :math:`D`, times
    `sign_share`, and the head by :math:`10 / d_{in}` of that. The paper's radius is the reciprocal
    of the weight decay. The authors' GPT with a separate head has radii of 1, 3 and
    :math:`10 / d_{in}` for embeddings, hidden kernels and head, so a `sign_share` of a third.

    Args:
        learning_rate: Its schedule.
        numbers: The dimension numbers of all leaves; a vector has no reduction axis.
        hidden: Which leaves are hidden kernels.
        embeddings: Which leaves are embeddings. A kernel that is neither is a head.
        b1: Decay rate of the momentum.
        weight_decay: Times the learning rate.
        mask: The leaves to decay.
        sign_share: The step of an entry of embeddings, in learning rates.

    References:
        Pethick et al, `Training Deep Learning Models with Norm-Constrained LMOs
        <https://arxiv.org/abs/2502.07529>`_, 2025
    """

    def label(n: MuonDimensionNumbers, is_hidden: bool, is_embedding: bool) -> str:
        if not np.size(n.reduction_axis):
            return "vector"
        return "hidden" if is_hidden else "embedding" if is_embedding else "head"

    labels = jax.tree.map(label, numbers, hidden, embeddings, is_leaf=is_numbers)
    heads = jax.tree.map(lambda found: found == "head", labels)

    def spectral(n: MuonDimensionNumbers, u: jax.Array) -> jax.Array:
        ratio = _size(u, n.output_axis) / _size(u, n.reduction_axis)
        return math.sqrt(ratio) * u

    def sign_of_head(n: MuonDimensionNumbers, d: jax.Array) -> jax.Array:
        return 10 / _size(d, n.reduction_axis) * sign_share * jnp.sign(d)

    average = optax.ema(b1, debias=False)
    steps: dict[Hashable, optax.GradientTransformation] = {
        "hidden": optax.chain(
            scale_by_muon(
                beta=b1, nesterov=False, weight_dimension_numbers=only_where(numbers, hidden)
            ),
            _of_matrices(spectral, numbers, hidden),
        ),
        "embedding": optax.chain(
            average, optax.stateless_with_tree_map(lambda d, _: sign_share * jnp.sign(d))
        ),
        "head": optax.chain(average, _of_matrices(sign_of_head, numbers, heads)),
        "vector": optax.chain(
            average,
            optax.stateless_with_tree_map(
                lambda d, _: d / jnp.sqrt(jnp.mean(d**2, axis=-1, keepdims=True) + 1e-30)
            ),
        ),
    }
    return optax.chain(
        optax.partition(steps, labels),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def normuon(
    learning_rate: optax.Schedule,
    numbers: Any,
    hidden: Any,
    others: optax.GradientTransformation,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    r"""NorMuon: Muon whose units take steps of one size.

    Of Muon's orthogonal update, every unit (output) is divided by the root of a moving average of
    the mean of its squares; then the matrix is scaled to a root mean square of 0.2.

    Args:
        learning_rate: Its schedule.
        numbers: The dimension numbers of all leaves.
        hidden: Which leaves are hidden kernels.
        others: A whole optimizer for the other leaves.
        b1: Decay rate of the momentum, which is Nesterov's, as in Muon and in the authors' code.
        b2: Decay rate of the average of the squares.
        weight_decay: Times the learning rate.
        mask: The leaves to decay.

    References:
        Li et al, `NorMuon: Making Muon more efficient and scalable
        <https://arxiv.org/abs/2510.05491>`_, 2025
    """

    def to_one_size(n: MuonDimensionNumbers, u: jax.Array) -> jax.Array:
        axes = (*np.atleast_1d(n.reduction_axis), *np.atleast_1d(n.output_axis))
        return 0.2 * u / (jnp.sqrt(jnp.mean(u**2, axes, keepdims=True)) + 1e-10)

    muon = optax.chain(
        scale_by_muon(beta=b1, weight_dimension_numbers=only_where(numbers, hidden)),
        _scale_by_units(b2, numbers, hidden),
        _of_matrices(to_one_size, numbers, hidden),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    labels = jax.tree.map(lambda is_hidden: "muon" if is_hidden else "others", hidden)
    return optax.partition({"muon": muon, "others": others}, labels)


def _scale_by_units(b2: float, numbers: Any, hidden: Any) -> optax.GradientTransformation:
    """Divides every unit by the root of an average, from zero, of the mean of its squares."""

    def squares(n: MuonDimensionNumbers, u: jax.Array) -> jax.Array:
        return jnp.mean(u**2, n.reduction_axis, keepdims=True)

    means = _of_matrices(squares, numbers, hidden)

    def init(params: optax.Params) -> optax.OptState:
        return optax.tree.zeros_like(means.update(params, means.init(params))[0])

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        new, _ = means.update(updates, optax.EmptyState())
        state = optax.tree.update_moment(new, state, b2, 1)
        updates = jax.tree.map(lambda u, v: u / (jnp.sqrt(v) + 1e-10), updates, state)
        return updates, state

    return optax.GradientTransformation(init, update)


def _of_matrices(
    function: Callable[[MuonDimensionNumbers, jax.Array], jax.Array], numbers: Any, where: Any
) -> optax.GradientTransformation:
    """A function of the update of every leaf that `where` picks."""
    only = only_where(numbers, where)
    return optax.stateless(
        lambda updates, _: jax.tree.map(function, only, updates, is_leaf=is_numbers)
    )


def only_where(numbers: Any, where: Any) -> Any:
    """The numbers of the picked leaves, in a tree that is masked as `optax.partition` masks it."""
    return jax.tree.map(
        lambda n, is_picked: n if is_picked else optax.MaskedNode(),
        numbers,
        where,
        is_leaf=is_numbers,
    )


def is_numbers(x: Any) -> bool:
    """Whether it says how one leaf is read."""
    return isinstance(x, MuonDimensionNumbers)


def _size(u: jax.Array, axes: Any) -> int:
    return math.prod(u.shape[axis] for axis in np.atleast_1d(axes))
