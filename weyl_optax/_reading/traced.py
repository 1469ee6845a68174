"""How the leaves of a parameter tree are read from the program that uses them.

A leaf is read by the product in which it meets the data, meaning anything that depends on the
inputs. Of its axes, those that the product sums are reduced, those along which the data does not
vary are the output, and those that both have and keep are batch axes, as are axes that are scanned
over or indexed. Without a reduction or an output it is a vector of all its axes: a bias or a gain.
On the way to the data, layout, arithmetic and masks do not change what a leaf is. A product with a
constant passes the axes it sums on to those that take their place. A product with other weights
does too, but an axis it has summed is a side of the matrix only if the leaf has no axis of its own
for that side, as in LoRA, and otherwise a batch axis, as in a mixture. Rows that the data picks, by
indices or by shares such as a softmax's, are reduced along the axis that is picked, unless they are
matrices that multiply the data in turn: then they are experts, and it is a batch axis. A product
takes precedence over entries that meet the data one by one, and those over a statistic, so no mask
or penalty undoes a reading; among products, one of the leaf itself comes first. An axis of size 1
counts for nothing, and a leaf with one axis or none, or a stack of such, has only one reading.

The jaxpr of the loss is interpreted with abstract values that know which axes of which leaves they
hold, and along which of their own axes the data varies.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.source_info_util import summarize
from optax.contrib import MuonDimensionNumbers

from weyl_optax._reading.parts import in_parts, parts_of
from weyl_optax._reading.programs import IDENTITIES, body_of, shapes_of
from weyl_optax._reading.specification import (
    DimensionNumbers,
    leaves_with_path,
    overridden,
    path_name,
)


def dimension_numbers_from(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    overrides: Mapping[str, DimensionNumbers | None] | None = None,
    by_part: bool = False,
    **kwargs: Any,
) -> Any:
    """Read each leaf of params as the matrix by which a function multiplies its inputs.

    ``fn(params, *args, **kwargs)`` is traced, not run. Each leaf is followed through
    casts, transposes, reshapes, loops and nested calls, and through arithmetic and products
    with constants and other leaves, to the operation in which it meets the inputs:

    =============================  ======================  ===============
    operation                      reduction axes          output axes
    =============================  ======================  ===============
    product (``dot_general``)      contracted              the others
    convolution                    window, input channels  output channels
    depthwise convolution          none                    window
    lookup of rows (``gather``)    looked up               the others
    anything elementwise           none                    all
    =============================  ======================  ===============

    Axes that are scanned over, indexed, or batch axes of the product are batch axes. Elementwise
    uses, such as a mask, and uses without a product with the inputs, such as a penalty, count
    only if nothing else does. Axes of size 1 count on neither side. Members under a
    :func:`jax.vmap` that all take the same input are one matrix with more outputs: to make each
    a matrix of its own, say so in `overrides`.

    Args:
        fn: The training loss, or the model's call, of any framework.
        params: A tree of arrays or of :class:`jax.ShapeDtypeStruct`.
        *args: The other arguments of `fn`, among them the inputs: trees of arrays or of
            :class:`jax.ShapeDtypeStruct`; anything else in them is passed on unchanged.
            Arrays that `fn` closes over are constants, not inputs.
        overrides: Patterns of paths, such as ``'*/norm/scale'``, and what to return for
            their leaves, `None` to leave them unbounded. The first match counts.
        by_part: Whether to read a fused kernel as the several matrices into which slices, a
            split or an unstack cut its product with the inputs, or the kernel itself; its bias,
            too. Pieces that are added up or concatenated again are not split.
        **kwargs: Like `args`.

    Returns:
        A tree like `params`, unboxed, with an
        :class:`optax.contrib.MuonDimensionNumbers` for each leaf, or `None` where it is not an
        array of floats; with `by_part`, a :class:`SplitDimensionNumbers` where it has parts.

    Raises:
        ValueError: If a leaf with several axes is not used, is used in two ways, or in a way
            that is not known; or if a pattern matches no path.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from weyl_optax import dimension_numbers_from
        >>> def loss(params, x):
        ...     return jnp.sum(jnp.einsum("btd,dhk->bthk", x, params["query"]) + params["bias"])
        >>> params = {"query": jnp.ones((64, 4, 16)), "bias": jnp.ones((4, 16))}
        >>> numbers = dimension_numbers_from(loss, params, jnp.ones((2, 8, 64)))
        >>> numbers["query"]
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
        >>> numbers["bias"]
        MuonDimensionNumbers(reduction_axis=(), output_axis=(0, 1))
    """
    entries, treedef = leaves_with_path(params)
    paths = [path_name(path) for path, _ in entries]
    numbers: dict[str, Any] = dict(overridden(paths, overrides))
    leaves = {
        path: _Leaf(path, tuple(array.shape))
        for path, (_, array) in zip(paths, entries, strict=True)
        if _is_array(array) and jnp.issubdtype(array.dtype, jnp.inexact) and path not in numbers
    }
    operands = [
        _Value(_views(leaves.get(path)), is_weight=True)
        for path, (_, array) in zip(paths, entries, strict=True)
        if _is_array(array)
    ]
    jaxpr = _trace(fn, params, args, kwargs)
    inputs = [_Value(data=_varying(shape)) for shape in shapes_of(jaxpr.invars[len(operands) :])]
    interpreter = _Interpreter()
    for output in interpreter.run(jaxpr, operands + inputs):
        for view in output.views:
            if view.axes:  # the loss itself says nothing
                interpreter.activate(view)
    uses = [use for use in interpreter.uses if use not in interpreter.superseded]

    problems = []
    for path, leaf in leaves.items():
        every = range(len(leaf.shape))
        numbers[path] = _agreed(leaf, [use for use in uses if use.leaf == leaf])
        if isinstance(numbers[path], str) and len(_wide(leaf, every)) < 2:
            numbers[path] = MuonDimensionNumbers((), tuple(every))
        elif isinstance(numbers[path], str):
            problems.append(numbers[path])
    if problems:
        raise ValueError("\n".join(problems))
    if by_part:
        arrays = zip(paths, entries, strict=True)
        operands = [(path, array.shape) for path, (_, array) in arrays if _is_array(array)]
        numbers |= in_parts({path: numbers[path] for path in leaves}, parts_of(jaxpr, operands))
    return treedef.unflatten([numbers.get(path) for path in paths])


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _trace(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> Jaxpr:
    """The program of `fn` as a function of the arrays in its arguments, in their order."""
    leaves, treedef = jax.tree.flatten((params, args, kwargs))

    def of_arrays(*arrays: jax.Array) -> list[jax.Array]:
        remaining = iter(arrays)
        filled = [next(remaining) if _is_array(leaf) else leaf for leaf in leaves]
        params, args, kwargs = treedef.unflatten(filled)
        return [x for x in jax.tree.leaves(fn(params, *args, **kwargs)) if _is_array(x)]

    return jax.make_jaxpr(of_arrays)(*filter(_is_array, leaves)).jaxpr


# What a value is made of.


class _Leaf(NamedTuple):
    path: str
    shape: tuple[int, ...]


class _Piece(NamedTuple):
    """A factor of an axis of a value."""

    leaf_axes: frozenset[int]  # the axes of the leaf that it runs over, none if it is broadcast
    size: int


_Axes: TypeAlias = frozenset[int]  # of a leaf
_Axis: TypeAlias = tuple[_Piece, ...]  # from major to minor; the product of their sizes is its size


class _Roles(NamedTuple):
    """What a product does with the axes of a leaf."""

    reduction: _Axes
    batch: _Axes
    output: _Axes

    @classmethod
    def of(cls, axes: Sequence[_Axis], reduced: Iterable[int], batch: Iterable[int]) -> "_Roles":
        others = {*range(len(axes))} - {*reduced, *batch}
        return cls(*(_held(axes[i] for i in side) for side in (reduced, batch, others)))


class _View(NamedTuple):
    """How a value lays out a leaf."""

    leaf: _Leaf
    axes: tuple[_Axis, ...]
    batch: _Axes = frozenset()  # axes of the leaf that were scanned over or indexed
    paired: _Axes = frozenset()  # along which it was multiplied with another weight
    looked_up: _Axes = frozenset()  # that arrays of indices select from
    mixed: _Axes = frozenset()  # that were summed, alone or with other weights
    mixed_first: _Axes = frozenset()  # by the first of these sums
    pooled: _Axes = frozenset()  # by one without factors, as in a mean
    scaled: _Axes = frozenset()  # that the data multiplied, without varying along the others
    by_shares: bool = False  # whether shares multiplied them
    use: "_Use | None" = None  # in which it met the data, or that cannot be followed

    @property
    def has_met(self) -> bool:
        """Whether it has met the data, and is followed to a later product."""
        return self.use is not None and not self.use.problem

    @property
    def own(self) -> _Axes:
        """The axes of the leaf that were neither scanned over nor indexed, wider than 1."""
        return _wide(self.leaf, frozenset(range(len(self.leaf.shape))) - self.batch)

    @property
    def is_of_vectors(self) -> bool:
        """Whether each entry of a stack has one axis or none, and so only one reading."""
        return len(self.own) < 2

    def rearrange(self, axes: Iterable[_Axis]) -> "_View":
        """With other axes. A leaf's axis that they leave out was sliced to size 1: an index."""
        axes = tuple(axes)
        indexed = _wide(self.leaf, _held(self.axes) - _held(axes))
        return self._replace(axes=axes, batch=self.batch | indexed)

    def drop(self, *dropped: int) -> "_View":
        """At one index of these axes."""
        axes = tuple(axis for i, axis in enumerate(self.axes) if i not in dropped)
        return self._replace(axes=axes, batch=self.batch | (_held(self.axes) - _held(axes)))

    def at_index(self, *axes: int) -> "_View":
        """With these axes indexed, in place."""
        return self._replace(batch=self.batch | _held(self.axes[i] for i in axes))

    def mix(self, axes: _Axes) -> "_View":
        """With axes of the leaf summed."""
        return self._replace(mixed=self.mixed | axes, mixed_first=self.mixed_first or axes)

    def spoil(self, axes: tuple[_Axis, ...], use: "_Use | None") -> "_View":
        """Beyond what can be followed."""
        return _View(self.leaf, axes, batch=self.batch, use=use)

    def insert(self, position: int, size: int) -> "_View":
        """Put beside others along one more axis, along which data varies."""
        leaf_axes = frozenset([0]) if self.leaf == _DATA else frozenset()
        axes = (*self.axes[:position], (_Piece(leaf_axes, size),), *self.axes[position:])
        return self._replace(axes=axes)

    def resize(self, shape: Sequence[int]) -> "_View":
        """Sliced, padded or concatenated; a scalar is broadcast."""
        if not self.axes:
            return self._replace(axes=tuple(map(_broadcast, shape)))
        axes = (
            axis if size == _size(axis) else _fuse([axis], size)
            for axis, size in zip(self.axes, shape, strict=True)
        )
        return self._replace(axes=tuple(axes))

    def broadcast(self, shape: Sequence[int]) -> "_View":
        """With axes of size 1 repeated; a scalar is too."""
        if not self.axes:
            return self.resize(shape)
        pairs = zip(self.axes, shape, strict=True)
        return self.rearrange(a if _size(a) == size else _broadcast(size) for a, size in pairs)


def _views(leaf: _Leaf | None) -> tuple[_View, ...]:
    """A leaf itself, if it is followed: one with one axis or none has only one reading."""
    if leaf is None or len(leaf.shape) < 2:
        return ()
    axes = tuple((_Piece(frozenset([i]), size),) for i, size in enumerate(leaf.shape))
    return (_View(leaf, axes),)


def _varying_where_longer(data: _View, parts: Iterable[Sequence[int]]) -> _View:
    """Data put together from parts, which differ along the axes in which it is longer than one."""
    shapes = [part for part in parts if len(part) == len(data.axes)]
    axes = (
        _varying([size]).axes[0] if any(shape[i] < size for shape in shapes) else axis
        for i, (axis, size) in enumerate(zip(data.axes, map(_size, data.axes), strict=True))
    )
    return data._replace(axes=tuple(axes))


def _wide(leaf: _Leaf, axes: Iterable[int]) -> _Axes:
    return frozenset(axis for axis in axes if leaf.shape[axis] > 1)


def _held(axes: Iterable[_Axis]) -> _Axes:
    """The axes of the leaf that some axes of a value run over."""
    return frozenset().union(*(piece.leaf_axes for axis in axes for piece in axis))


def _size(axis: _Axis) -> int:
    return math.prod(piece.size for piece in axis)


def _fuse(axes: Iterable[_Axis], size: int) -> _Axis:
    return (_Piece(_held(axes), size),)


def _broadcast(size: int) -> _Axis:
    return _fuse((), size)


def _reshape(axes: Sequence[_Axis], shape: Sequence[int]) -> list[_Axis]:
    """Deals the pieces out to axes of other sizes, and splits those that reach over an end."""
    pieces = [piece for axis in reversed(axes) for piece in reversed(axis) if piece.size > 1]
    reshaped = []
    for size in shape:
        axis = []
        while size > 1 and pieces:
            leaf_axes, available = pieces.pop()
            taken = math.gcd(size, available)
            if taken < min(size, available):  # as in (2, 3) to (3, 2): not by factors, but fused
                more_axes, more = pieces.pop()
                pieces.append(_Piece(leaf_axes | more_axes, available * more))
                continue
            axis.append(_Piece(leaf_axes, taken))
            size //= taken
            if taken < available:
                pieces.append(_Piece(leaf_axes, available // taken))
        reshaped.append(tuple(axis))
    return reshaped


_DATA = _Leaf("", (2,))  # stands for all inputs: what runs over its one axis varies with them


def _data(axes: Iterable[_Axis]) -> _View:
    return _View(_DATA, tuple(_fuse([axis], _size(axis)) for axis in axes))


def _varying(shape: Iterable[int]) -> _View:
    """Data that varies along all axes."""
    return _View(_DATA, tuple((_Piece(frozenset([0]), size),) for size in shape))


class _Value(NamedTuple):
    views: tuple[_View, ...] = ()  # the leaves it is made of, before a product with the data
    data: _View | None = None  # along which axes it varies with the inputs, if it does
    is_weight: bool = False  # it depends on params
    is_share: bool = False  # it is data in [0, 1], or made of such linearly: what mixes
    columns: tuple[bool, ...] = ()  # along its last axis, if put together there: which are data

    def map(self, fn: Callable[[_View], _View]) -> "_Value":
        data = self.data and _data(fn(self.data).axes)
        return self._replace(views=_unique(map(fn, self.views)), data=data, columns=())

    def resize(self, shape: Sequence[int]) -> "_Value":
        return self.map(lambda view: view.resize(shape))


def _join(*values: _Value) -> _Value:
    """A value that is one of them, or made of all of them elementwise."""
    views = _unique(view for value in values for view in value.views)
    data = [value.data.axes for value in values if value.data]
    joined = _data(map(_overlay, *data)) if data else None
    are_shares = all(value.is_share for value in values if value.data)
    is_weight = any(value.is_weight for value in values)
    return _Value(views, joined, is_weight, bool(data) and are_shares)


def _number(shape: tuple[int, ...], value: _Value) -> _Value:
    """A value that cannot be followed is a statistic, such as a norm, once it is one number."""
    if math.prod(shape) > 1:
        return value
    axes = tuple(map(_broadcast, shape))
    views = (v.spoil(axes, None) if v.use and v.use.problem else v for v in value.views)
    return value._replace(views=_unique(views))


def _overlay(*axes: _Axis) -> _Axis:
    return _fuse(axes, _size(axes[0]))


def _unique(views: Iterable[_View]) -> tuple[_View, ...]:
    return tuple(dict.fromkeys(views))


# What an equation does with it.

# One output for one operand, with axes that may be shorter or longer.
_RESIZINGS = frozenset("all_gather fft reduce_window_max reduce_window_sum slice split".split())
# The operands have the axes of the output, in another size where they are put side by side.
_CONCATENATIONS = frozenset("concatenate dynamic_update_slice pad scatter scatter-add".split())
# Linear in each operand, or in what it divides.
_LINEAR = _CONCATENATIONS | frozenset(
    "add add_any conj cumsum div dot_general imag mul neg real select_n stack sub".split()
)
# Scalars and axes of size 1 are broadcast.
_ELEMENTWISE = _LINEAR | frozenset(
    "abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp complex "
    "cos cosh cumlogsumexp cummax cummin cumprod digamma "
    "eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le lgamma log log1p logistic lt max min ne nextafter not or pow "
    "rem round rsqrt sign sin sinh sqrt square tan tanh xor".split()
)
# The first turn data into shares; the second keep shares, if all their data is.
_MAKE_SHARES = frozenset("eq exp exp2 ge gt le logistic lt ne".split())
_KEEP_SHARES = frozenset("add div max mul reduce_max reduce_sum select_n sub".split())
_REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum "
    "reduce_xor".split()
)


def _layouts(eqn: JaxprEqn, view: _View) -> list[_View]:
    """The views in the outputs of an equation that only lays out its operand, else none."""
    params, axes = eqn.params, view.axes
    shapes = shapes_of(eqn.outvars)
    match eqn.primitive.name:
        case "transpose":
            return [view.rearrange(axes[i] for i in params["permutation"])]
        case "reshape":
            order = params["dimensions"] or range(len(axes))
            return [view.rearrange(_reshape([axes[i] for i in order], shapes[0]))]
        case "squeeze":
            kept = (axis for i, axis in enumerate(axes) if i not in params["dimensions"])
            return [view.rearrange(kept)]
        case "broadcast_in_dim":
            laid_out = list(map(_broadcast, shapes[0]))
            for i, axis in zip(params["broadcast_dimensions"], axes, strict=True):
                if _size(axis) == shapes[0][i]:
                    laid_out[i] = axis
            return [view.rearrange(laid_out)]
        case "tile":
            repeated = zip(params["reps"], axes, strict=True)
            return [view.rearrange((*_broadcast(n), *axis) for n, axis in repeated)]
        case name if name in _RESIZINGS and len(axes) == len(shapes[0]):
            return [view.resize(shape) for shape in shapes]
        case "unstack":
            return [view.drop(params["axis"]) for _ in shapes]
    return []


def _product_axes(eqn: JaxprEqn, view: _View, side: int) -> list[_Axis]:
    """The axes of a product: of its batch, of lhs, and of rhs.

    Axes of the other side run over the axes of the leaf that they have been contracted with.
    """
    contracted, batch = (sides[side] for sides in eqn.params["dimension_numbers"])
    (shape,), shared = shapes_of(eqn.outvars), [view.axes[i] for i in batch]
    own = [axis for i, axis in enumerate(view.axes) if i not in (*contracted, *batch)]
    others = [_fuse([view.axes[i] for i in contracted], size) for size in shape[len(shared) :]]
    start = (len(others) - len(own)) * side
    others[start : start + len(own)] = own
    return [*shared, *others]


class _Interpreter:
    """Runs a program on `_Value`s, and notes the uses of leaves."""

    def __init__(self):
        self.uses: list[_Use] = []
        self.superseded: set[_Use] = set()  # lookups of experts
        self.eqns: list[JaxprEqn] = []  # the equation being applied, after its callers

    def run(self, jaxpr: Jaxpr, operands: Sequence[_Value]) -> list[_Value]:
        """The outputs of a program."""
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, operands, strict=True))

        def read(atoms: Sequence[Any]) -> list[_Value]:
            return [_Value() if isinstance(x, Literal) else values.get(x, _Value()) for x in atoms]

        for eqn in jaxpr.eqns:
            self.eqns.append(eqn)
            outputs = map(_number, shapes_of(eqn.outvars), self.apply(eqn, read(eqn.invars)))
            values.update(zip(eqn.outvars, outputs, strict=True))
            self.eqns.pop()
        return read(jaxpr.outvars)

    def apply(self, eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
        """The outputs of an equation."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(params, operands)
        if name == "while":
            return self.while_loop(params, operands)
        if name == "cond":
            index, *rest = operands
            results = [self.run(branch.jaxpr, rest) for branch in params["branches"]]
            joined = [_join(*each) for each in zip(*results, strict=True)]
            if index.data:
                shapes = shapes_of(eqn.outvars)
                joined = [v._replace(data=_varying(s)) for v, s in zip(joined, shapes, strict=True)]
            return joined
        if body := body_of(eqn):  # under shard_map, axes are shorter inside
            inside = list(map(_Value.resize, operands, shapes_of(body.invars)))
            return list(map(_Value.resize, self.run(body, inside), shapes_of(eqn.outvars)))
        is_weight = any(operand.is_weight for operand in operands)
        if name.startswith("random_"):  # a key is an input, but not data
            return [_Value()] * len(eqn.outvars)
        if not any(operand.views or operand.data for operand in operands):
            return [_Value(is_weight=is_weight)] * len(eqn.outvars)
        if name in IDENTITIES or name == "rev":
            return operands
        if name == "sort":  # all operands, in the order of the first
            order = _Value(data=_join(*operands).data)
            return [_join(order, operand) for operand in operands]
        if name in _ELEMENTWISE and name != "dot_general":
            return [self.elementwise(eqn, operands)]
        if name in _REDUCTIONS:
            return [self.reduce(eqn, *operands)]

        is_data, shapes = any(operand.data for operand in operands), shapes_of(eqn.outvars)
        results = [_Value((), _varying(s) if is_data else None, is_weight) for s in shapes]
        operand, *others = operands
        if name == "top_k":
            results[0] = results[0]._replace(is_share=operand.is_share)
        views: Iterable[_View] | None = None
        match name:
            case "dot_general":
                if not params["dimension_numbers"][0][0]:
                    return [self.outer_product(eqn, operands)]
                views = self.product(eqn, operands)
            case "ragged_dot_general":
                views = self.ragged_product(eqn, *operands[:2])
            case "conv_general_dilated" if params["batch_group_count"] == 1:
                views = self.convolution(eqn, *operands)
            case "gather" if not others[0].views:
                views = self.gather(eqn, *operands)
                results[0] = results[0]._replace(is_share=operand.is_share)
            case "dynamic_slice" if not any(other.views for other in others):
                views = self.dynamic_slice(eqn, operand, others)
        if views is not None:
            return [results[0]._replace(views=_unique(views))]
        if not others and (count := len(_layouts(eqn, _varying(shapes_of(eqn.invars)[0])))):
            return [operand.map(lambda view, i=i: _layouts(eqn, view)[i]) for i in range(count)]
        return [
            result._replace(views=self.unknown(operands, shape))
            for result, shape in zip(results, shapes, strict=True)
        ]

    def scan(self, params: Mapping[str, Any], operands: list[_Value]) -> list[_Value]:
        n_consts, n_carry = params["num_consts"], params["num_carry"]
        xs = [x.map(lambda view: view.drop(0)) for x in operands[n_consts + n_carry :]]
        carry = operands[n_consts : n_consts + n_carry]
        carry, ys = self.loop(params["jaxpr"].jaxpr, operands[:n_consts], carry, xs)
        return carry + [y.map(lambda view: view.insert(0, params["length"])) for y in ys]

    def while_loop(self, params: Mapping[str, Any], operands: list[_Value]) -> list[_Value]:
        n_cond, n_consts = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        body = params["body_jaxpr"].jaxpr
        carry, _ = self.loop(body, operands[n_cond:n_consts], operands[n_consts:])
        self.run(params["cond_jaxpr"].jaxpr, operands[:n_cond] + carry)
        return carry

    def loop(
        self, body: Jaxpr, consts: list[_Value], carry: list[_Value], xs: Sequence[_Value] = ()
    ) -> tuple[list[_Value], list[_Value]]:
        """The carry, as it may be at the start or after any iteration, and the rest."""
        start = len(self.uses)
        while True:
            outputs = self.run(body, [*consts, *carry, *xs])
            after = list(map(_join, carry, outputs))
            if after == carry:
                return carry, outputs[len(carry) :]
            del self.uses[start:]  # less was known of the carry
            carry = after

    def elementwise(self, eqn: JaxprEqn, operands: list[_Value]) -> _Value:
        """Entry by entry. A leaf's entries are followed while the value is linear in them."""
        name, (shape,) = eqn.primitive.name, shapes_of(eqn.outvars)
        if name == "stack":
            axis, size = eqn.params["axis"], len(operands)
            operands = [v.map(lambda view: view.insert(axis, size)) for v in operands]
        lay_out = _View.resize if name in _CONCATENATIONS else _View.broadcast

        def align(view: _View) -> _View:
            if len(view.axes) in (0, len(shape)):
                return lay_out(view, shape)
            return _varying(shape) if view.leaf == _DATA else view  # the indices of a scatter

        constants = [
            _Value(data=align(_varying(s)))
            for s, operand in zip(shapes_of(eqn.invars), operands, strict=True)
            if not operand.data and name != "stack"
        ]
        operands = [operand.map(align) for operand in operands]
        scales = name in ("dot_general", "mul", "div")
        views = []
        for i, operand in enumerate(operands):
            others = _join(*(other for j, other in enumerate(operands) if j != i))
            if name == "select_n":  # by a mask, or between data and a leaf
                scales = not any(case.data for j, case in enumerate(operands) if j not in (0, i))
            spanned = {i for view in operand.views for i, a in enumerate(view.axes) if _held([a])}
            for view in operand.views:
                if name not in _LINEAR and (view.has_met or view.scaled):
                    continue
                if others.data and not view.has_met:
                    met = self.meet(view, others, others.data.axes, scales, spanned)
                    views += met if name in _LINEAR else []
                elif len(view.axes) == len(shape):
                    views.append(view)
                else:
                    views += self.unknown([operand], shape)
        result = _join(*operands)
        if result.data:
            result = result._replace(data=_join(result, *constants).data)
        if result.data and name in _CONCATENATIONS:
            result = result._replace(data=_varying_where_longer(result.data, shapes_of(eqn.invars)))
        is_share = name in _MAKE_SHARES or (result.is_share and name in _KEEP_SHARES)
        columns: tuple[bool, ...] = ()
        if name == "concatenate" and eqn.params["dimension"] == len(shape) - 1:
            sizes = [s[-1] for s in shapes_of(eqn.invars)]
            columns = tuple(
                operand.data is not None
                for operand, size in zip(operands, sizes, strict=True)
                for _ in range(size)
            )
        return result._replace(views=_unique(views), is_share=is_share, columns=columns)

    def meet(
        self, view: _View, others: _Value, data: Sequence[_Axis], scales: bool, spanned: set[int]
    ) -> Iterable[_View]:
        """Notes that entries of a leaf meet data of their shape, and returns what is followed."""
        use = self.entries(view, _ENTRIES)
        held = _wide(view.leaf, _held(view.axes))
        if view.use or not held or len(view.axes) != len(data):
            return []
        if not _held(data) or any(not other.use for other in others.views):
            return [view]  # the data is a scalar, such as a loss scale, or in another weight
        along = [i for i, axis in enumerate(data) if _held([axis])]
        varied = held & _held(view.axes[i] for i in along)
        is_of_each_sample = not spanned.issuperset(along)
        if view.scaled and not scales:  # part of the sum that may follow
            return [view]
        if scales and (varied < held or not is_of_each_sample):  # a scale or a mask of the weight
            by_shares = others.is_share and (view.by_shares or not view.scaled)
            scaled = view.scaled | (varied if varied < held else frozenset())
            return [view._replace(scaled=scaled, by_shares=by_shares)]
        view = view._replace(use=use._replace(is_activation=is_of_each_sample))
        if scales or varied < held or not is_of_each_sample:
            return [view]
        return self.activate(view)

    def reduce(self, eqn: JaxprEqn, operand: _Value) -> _Value:
        """Sums and the like. A sum of entries that the data has scaled is a product with it."""
        dropped, is_sum = eqn.params["axes"], eqn.primitive.name == "reduce_sum"
        views = []
        for view in operand.views:
            kept = tuple(axis for i, axis in enumerate(view.axes) if i not in dropped)
            summed, lost = _held(view.axes[i] for i in dropped), _held(view.axes) - _held(kept)
            result = view._replace(axes=kept)
            if view.has_met:
                views += [result] if is_sum else []
            elif is_sum and view.scaled & summed:
                roles = _Roles(summed, view.scaled - lost, _held(kept) - view.scaled)
                data = _Value(data=_varying(()), is_share=view.by_shares)
                views += self.contract(view, data, roles, result)
            else:
                views.append(result.mix(lost)._replace(pooled=view.pooled | lost))
        result = operand.map(lambda view: view.drop(*dropped))._replace(views=_unique(views))
        return result._replace(is_share=operand.is_share and eqn.primitive.name in _KEEP_SHARES)

    def outer_product(self, eqn: JaxprEqn, operands: list[_Value]) -> _Value:
        """A product that sums nothing, such as einsum's "bd,d->bd"."""
        sides = [
            operand.map(lambda view, side=side: view.rearrange(_product_axes(eqn, view, side)))
            for side, operand in enumerate(operands)
        ]
        return self.elementwise(eqn, sides)

    def product(self, eqn: JaxprEqn, operands: list[_Value]) -> Iterable[_View]:
        contracted, batch = eqn.params["dimension_numbers"]
        for side, (operand, other) in enumerate((operands, operands[::-1])):
            named = len(contracted[side]) + len(batch[side])
            is_row = named == len(shapes_of(eqn.invars)[1 - side])
            for view in operand.views:
                roles = _Roles.of(view.axes, contracted[side], batch[side])
                result = view._replace(axes=tuple(_product_axes(eqn, view, side)))
                yield from self.contract(view, other, roles, result, is_row)

    def ragged_product(self, eqn: JaxprEqn, lhs: _Value, rhs: _Value) -> Iterable[_View]:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        if not self.is_activation(lhs):
            return self.unknown([lhs, rhs], shapes_of(eqn.outvars)[0])
        for view in rhs.views:
            groups = (*batch, *numbers.rhs_group_dimensions)
            self.matrix(view, lhs, _Roles.of(view.axes, contracted, groups))
        return []

    def convolution(self, eqn: JaxprEqn, lhs: _Value, rhs: _Value) -> Iterable[_View]:
        groups, (shape,) = eqn.params["feature_group_count"], shapes_of(eqn.outvars)
        numbers = eqn.params["dimension_numbers"]
        if not self.is_activation(lhs):
            yield from self.unknown([lhs, rhs], shape)
            return
        for view in rhs.views:
            out, *window = (view.axes[i] for i in numbers.rhs_spec)
            group = ()
            if groups > 1:  # each has output channels of its own; vmap over kernels makes groups
                group, out = _reshape([out], (groups, _size(out) // groups))
            axes = (group, out, *window)
            self.matrix(view, lhs, _Roles.of(axes, range(2, len(axes)), [0]))

    def is_activation(self, lhs: _Value) -> bool:
        """Whether it is data, maybe with biases and gains, which are noted."""
        for view in lhs.views:
            if view.has_met:
                self.activate(view)
        return lhs.data is not None and all(view.has_met for view in lhs.views)

    def contract(
        self, view: _View, other: _Value, roles: _Roles, result: _View, is_row: bool = True
    ) -> Iterable[_View]:
        """Sums axes of a leaf in a product, and returns what is followed of the result."""
        lost = roles.reduction - _held(result.axes)
        if not other.data:
            are_rows = view.has_met and view.use and view.use.kind == _PRODUCT
            if view.has_met and (other.is_weight or are_rows):
                return self.activate(view)
            if other.is_weight:
                lost = roles.reduction
                result = result._replace(paired=view.paired | roles.batch)
            return [result.mix(lost)]
        use = self.matrix(view, other, roles, is_row)
        if not roles.reduction:
            return []
        if view.use:  # rows that were picked may still be experts once they are mixed
            are_rows = view.use.kind == _PRODUCT and roles.reduction <= view.looked_up
            return [result._replace(batch=view.batch | lost)] if are_rows else []
        if not other.is_share:
            return []
        looked_up, batch = view.looked_up | roles.reduction, view.batch | lost
        return [result._replace(looked_up=looked_up, batch=batch, use=use)]

    def dynamic_slice(
        self, eqn: JaxprEqn, operand: _Value, starts: list[_Value]
    ) -> Iterable[_View]:
        sizes, (full, *_) = eqn.params["slice_sizes"], shapes_of(eqn.invars)
        moved = [i for i, v in enumerate(starts) if v.data and sizes[i] < full[i]]
        indexed = [i for i, v in enumerate(starts) if moved and not v.data and sizes[i] == 1]

        def select(view: _View) -> _View:
            return self.look_up(view.at_index(*indexed), moved, True).resize(sizes)

        return map(select, operand.views)

    def gather(self, eqn: JaxprEqn, operand: _Value, indices: _Value) -> Iterable[_View]:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        (full, _), (shape,) = shapes_of(eqn.invars), shapes_of(eqn.outvars)
        collapsed, batching = numbers.collapsed_slice_dims, numbers.operand_batching_dims
        index_axes = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        batched = {
            index_axes[i]: axis
            for i, axis in zip(numbers.start_indices_batching_dims, batching, strict=True)
        }
        selected = [i for i in numbers.start_index_map if i in collapsed or sizes[i] < full[i]]
        by_input = indices.data is not None
        is_one_index = not by_input and len(index_axes) == len(batched)  # of a stack
        are_data = dict(zip(numbers.start_index_map, indices.columns, strict=False))
        constant = [i for i in selected if by_input and not are_data.get(i, True)]
        indexed = [i for i in constant if sizes[i] == 1]  # as in w[1, t]; w[t, :4] has a slice
        selected = [i for i in selected if i not in constant]

        def select(view: _View) -> _View:
            view = view.at_index(*indexed)
            rest = (a for i, a in enumerate(view.axes) if i not in (*selected, *batching))
            if indices.data:  # tables batched like the indices; not one, its indices repeated
                along = zip(numbers.start_indices_batching_dims, batching, strict=True)
                has_rest, places = _held(rest), indices.data.axes
                own = _held(view.axes[i] for j, i in along if has_rest or _held([places[j]]))
                view = view._replace(batch=view.batch | own, looked_up=view.looked_up | own)
            if not is_one_index:
                view = self.look_up(view, selected, by_input)
            looked_up = [view.axes[i] for i in selected]
            window = enumerate(view.resize(sizes).axes)
            window = iter([axis for i, axis in window if i not in (*collapsed, *batching)])
            axes = []
            for i, size in enumerate(shape):
                if i in numbers.offset_dims:
                    axes.append(next(window))
                elif i in batched:
                    axes.append(view.axes[batched[i]])
                else:
                    axes.append(_fuse(looked_up, size))
            return view.rearrange(axes)

        return map(select, operand.views)

    def look_up(self, view: _View, axes: list[int], by_input: bool) -> _View:
        """Some entries of these axes. With constant indices, they may still be part of a weight."""
        if not axes or (view.use and (view.use.kind != _ENTRIES or view.use.is_activation)):
            return view
        looked_up = view.looked_up | _held(view.axes[i] for i in axes)
        view = view._replace(looked_up=looked_up)
        return view._replace(use=self.entries(view, _PRODUCT)) if by_input else view

    def entries(self, view: _View, kind: int) -> "_Use":
        """Notes a use of the entries: as a vector, or of rows that have been looked up."""
        held = _held(view.axes)
        if view.use and view.use.problem:
            return self.problem(view, view.use)
        if not held and view.own:
            return self.statistic(view)
        axes, batch = (held | view.mixed) - view.batch, view.batch
        if _wide(view.leaf, axes - view.paired):  # else it is a vector of these
            axes, batch = axes - view.paired, batch | view.paired
        mixed = (view.mixed if held - view.mixed else view.mixed_first) - view.pooled
        reduction = (view.looked_up or mixed) & axes
        output = axes - reduction
        return self.read(view, _Roles(reduction, batch, output), kind)

    def matrix(
        self, view: _View, other: _Value, roles: _Roles, is_row: bool = False
    ) -> "_Use | None":
        """Notes a use in a product with the data, maybe with a row that has no axes of its own."""
        reduction, batch, output = roles
        batch = (batch - view.mixed) | view.batch | view.paired
        if view.use and view.use.problem:
            return self.problem(view, view.use)
        if view.use and view.use.kind == _PRODUCT:  # rows are activations, unless they are experts
            if is_row:  # several experts of each row
                reduction, output = reduction - view.looked_up, output - view.looked_up
            are_experts = view.looked_up <= batch and not view.looked_up & (reduction | output)
            if reduction and output and are_experts:
                self.superseded.add(view.use)
                self.read(view, _Roles(reduction, batch, output), _PRODUCT)
            return None
        own = _Roles(reduction - view.mixed, batch, output - view.mixed)
        if view.use:  # a masked weight, or a gain in an activation
            sides = [_wide(view.leaf, side - batch) for side in (own.reduction, own.output)]
            is_matrix = any(sides) if view.mixed else all(sides)
            if not is_matrix or any(view.leaf == of.leaf for of in other.views):
                self.activate(view)
                return None
        elif any(view.leaf == of.leaf for of in other.views):  # scores, of tokens made from it
            as_it_is = view._replace(mixed=frozenset())
            return self.read(as_it_is, _Roles(frozenset(), view.batch, frozenset()), _PRODUCT)
        if not _wide(view.leaf, reduction | output):
            return self.statistic(view)
        if own.reduction and own.output and not own.reduction & own.output:
            return self.read(view, own._replace(batch=batch | view.mixed), _PRODUCT)
        if not view.mixed:
            return self.read(view, own, _PRODUCT)
        # A product with other weights was one with a matrix, of one side or both.
        sides = own.reduction | own.output or view.mixed - view.mixed_first
        reduction = (view.mixed if own.reduction | own.output else view.mixed_first) - batch
        if not reduction or not sides:
            return self.statistic(view)
        return self.read(view, _Roles(reduction, batch, sides - reduction), _PRODUCT)

    def activate(self, view: _View) -> Iterable[_View]:
        """Notes that entries that met the data are a bias or a gain: they are not followed."""
        if view.use and view.use.kind == _ENTRIES:
            self.note(view.use._replace(kind=_PRODUCT, is_activation=True))
        return []

    def read(self, view: _View, roles: _Roles, kind: int) -> "_Use":
        """Notes what an operation does with a leaf."""
        leaf, every = view.leaf, frozenset(range(len(view.leaf.shape)))
        reduction, batch, output = roles
        # Where an axis has been split, its parts can have different roles; not so if its entries
        # were laid out anew.
        batch -= view.looked_up & (reduction | output)
        split = _wide(leaf, (batch & reduction) | (batch & output) | (reduction & output))
        if split and view.is_of_vectors:
            split, reduction, batch, output = frozenset(), frozenset(), view.batch, frozenset()
        problem = ""
        if split and self.eqns[-1].primitive.name == "conv_general_dilated":
            vectors = MuonDimensionNumbers((), tuple(sorted(every - split)))
            problem = (
                "is a grouped convolution, which is block-diagonal; "
                f"{vectors} reads every output unit as a vector"
            )
        elif split:
            problem = f"splits its axes {sorted(split)} into parts that are used in different ways"
        reduction, output = reduction - batch, output - batch - reduction
        if not reduction or not output:  # a vector, whichever axes of size 1 were left out
            reduction, output = frozenset(), every - batch
        axes = tuple(sorted(reduction)), tuple(sorted(output))
        of_one = bool(_wide(leaf, view.batch - view.looked_up))
        use = _Use(leaf, tuple(self.eqns), kind, problem, axes, len(view.mixed), of_one)
        return self.note(use)

    def statistic(self, view: _View) -> "_Use":
        problem = "uses nothing but a statistic of it"
        return self.problem(view, _Use(view.leaf, tuple(self.eqns), _STATISTIC, problem))

    def problem(self, view: _View, use: "_Use") -> "_Use":
        """Notes a use with a problem, which vectors do not have."""
        if view.is_of_vectors:
            return self.read(view, _Roles(frozenset(), view.batch, frozenset()), use.kind)
        return self.note(use)

    def unknown(self, operands: Sequence[_Value], shape: tuple[int, ...]) -> tuple[_View, ...]:
        """The result of an operation that cannot be followed: a problem where the data meets it."""
        axes, problem = tuple(map(_broadcast, shape)), "is an operation that cannot be followed"
        views = (view for operand in operands for view in operand.views)
        unknown = [
            v.spoil(axes, v.use or _Use(v.leaf, tuple(self.eqns), _PRODUCT, problem))
            for v in views
            if not v.has_met
        ]
        if not any(operand.data for operand in operands):
            return _unique(unknown)
        for view in unknown:
            self.entries(view, _PRODUCT)
        return ()

    def note(self, use: "_Use") -> "_Use":
        self.uses.append(use)
        return use


# What the uses of a leaf come to.

_STATISTIC, _ENTRIES, _PRODUCT = range(3)


class _Use(NamedTuple):
    """An operation that uses a leaf, and the reading that it gives or the problem with it."""

    leaf: _Leaf
    eqns: tuple[JaxprEqn, ...]  # the operation, after its callers
    kind: int
    problem: str = ""
    axes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # reduction and output
    num_mixed: int = 0  # axes that had been summed, alone or with other weights
    is_of_one_entry: bool = False  # at one index of an axis
    is_activation: bool = False  # of entries that met the data: they make no weight

    @property
    def rank(self) -> tuple[int, int, bool, bool]:
        """Products count first, then those of the leaf itself, with a matrix, and of all of it."""
        return (
            self.kind,
            -self.num_mixed,
            (self.is_activation and not self.is_of_one_entry)
            or all(self.axes)
            or bool(self.problem),
            not self.is_of_one_entry,
        )

    @property
    def sides(self) -> frozenset[_Axes]:
        """The same for a matrix and its transpose, and whatever role axes of size 1 have."""
        return frozenset(filter(None, (_wide(self.leaf, axes) for axes in self.axes)))

    def __str__(self) -> str:
        # Inside a function of JAX's own, no frame is the user's.
        places = (summarize(eqn.source_info) for eqn in reversed(self.eqns))
        where = f"{self.eqns[-1].primitive.name} at {next(filter(None, places), 'an unknown line')}"
        return f"{where} {self.problem or f'reads it as {MuonDimensionNumbers(*self.axes)}'}"


def _agreed(leaf: _Leaf, uses: list[_Use]) -> MuonDimensionNumbers | str:
    """The reading on which all uses of a leaf agree, or what is wrong with them."""
    name = f"The leaf {leaf.path!r} of shape {leaf.shape}"
    remedy = (
        f"Say how to read it: overrides={{{leaf.path!r}: optax.contrib.MuonDimensionNumbers("
        "reduction_axis, output_axis)}, or None to leave it unbounded."
    )
    if not uses:
        return (
            f"{name} never meets an input. Let fn be the training loss, and pass it the batch as "
            f"an argument: arrays that fn closes over are constants. {remedy}"
        )
    rank = max(use.rank for use in uses)
    uses = [use for use in uses if use.rank == rank]
    for use in uses:
        if use.problem:
            return f"{name} cannot be read: {use}. {remedy}"
        if use.sides != uses[0].sides:
            return f"{name} is used in two ways: {uses[0]}, but {use}. {remedy}"
    return MuonDimensionNumbers(*uses[0].axes)
