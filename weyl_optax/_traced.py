"""How the leaves of a parameter tree are read from the program that uses them.

The jaxpr of a loss is interpreted with abstract values: each knows whether it depends on the
inputs, of which leaves it is made, and which of their axes it holds in its own. Where a leaf meets
the inputs, the dimension numbers of that operation tell its reduction, output and batch axes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.source_info_util import summarize
from optax.contrib import MuonDimensionNumbers

from weyl_optax._dimension_numbers import leaves_with_path, overridden, path_name


def dimension_numbers_from(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    overrides: Mapping[str, MuonDimensionNumbers | None] | None = None,
    **kwargs: Any,
) -> Any:
    """Read each leaf of params as the matrix by which a function multiplies its inputs.

    ``fn(params, *args, **kwargs)`` is traced, not run. Each leaf is followed through
    casts, transposes, reshapes, loops and nested calls, and through arithmetic with
    constants and other leaves, to the operation in which it meets the inputs:

    =============================  ======================  ===============
    operation                      reduction axes          output axes
    =============================  ======================  ===============
    product (``dot_general``)      contracted              the others
    convolution                    window, input channels  output channels
    depthwise convolution          none                    window
    lookup of rows (``gather``)    looked up               the others
    anything elementwise           none                    all
    =============================  ======================  ===============

    Axes that are scanned over, indexed, or batch axes of the product are batch axes. Members
    under a :func:`jax.vmap` that all take the same input are one matrix with more outputs:
    where each is to be a matrix of its own, say so in `overrides`.

    Args:
        fn: The training loss, or the model's call, of any framework.
        params: A tree of arrays or of :class:`jax.ShapeDtypeStruct`.
        *args: The other arguments of `fn`, among them the inputs: trees of arrays or of
            :class:`jax.ShapeDtypeStruct`; what else is in them is passed on as it is.
            Arrays that `fn` closes over are constants, not inputs.
        overrides: Patterns of paths, as ``'*/norm/scale'``, and what to return for
            their leaves, `None` to leave them unbounded. The first that matches counts.
        **kwargs: As `args`.

    Returns:
        A tree like `params`, boxes taken off, with an
        :class:`optax.contrib.MuonDimensionNumbers` for each leaf, or `None` where it is not an
        array of floats.

    Raises:
        ValueError: If a leaf is not used, or in two ways, or in a way that is not known;
            or if a pattern matches no path.

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
        _Value(views=(_View.of(leaves[path]),)) if path in leaves else _Value()
        for path, (_, array) in zip(paths, entries, strict=True)
        if _is_array(array)
    ]
    jaxpr = _trace(fn, params, args, kwargs)
    inputs = [_Value(is_input=True)] * (len(jaxpr.invars) - len(operands))
    interpreter = _Interpreter()
    interpreter.run(jaxpr, operands + inputs)

    problems = []
    for path, leaf in leaves.items():
        numbers[path] = _agreed(leaf, [use for use in interpreter.uses if use.leaf == leaf])
        if isinstance(numbers[path], str):
            problems.append(numbers[path])
    if problems:
        raise ValueError("\n".join(problems))
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
_TwoSides: TypeAlias = Sequence[Sequence[int]]  # axes of lhs and of rhs
_Axis: TypeAlias = tuple[_Piece, ...]  # from major to minor; the product of their sizes is its size


class _View(NamedTuple):
    """How a value lays out a leaf."""

    leaf: _Leaf
    axes: tuple[_Axis, ...]
    batch: frozenset[int] = frozenset()  # axes of the leaf that were scanned over or indexed
    looked_up: frozenset[int] = frozenset()  # axes of the leaf that arrays of indices select from
    is_noted: bool = False  # it met an input already, and is followed for a product to come

    @classmethod
    def of(cls, leaf: _Leaf) -> "_View":
        return cls(leaf, tuple((_Piece(frozenset([i]), n),) for i, n in enumerate(leaf.shape)))

    def rearrange(self, axes: Iterable[_Axis]) -> "_View":
        """With other axes. A leaf's axis that they leave out was sliced to size 1: an index."""
        axes = tuple(axes)
        indexed = _wide(self.leaf, _held(self.axes) - _held(axes))
        return self._replace(axes=axes, batch=self.batch | indexed)

    def drop(self, *dropped: int) -> "_View":
        """At one index of these axes."""
        axes = tuple(axis for i, axis in enumerate(self.axes) if i not in dropped)
        return self._replace(axes=axes, batch=self.batch | _held(self.axes[i] for i in dropped))

    def insert(self, position: int, size: int) -> "_View":
        """Broadcast over an axis more."""
        axes = (*self.axes[:position], _broadcast(size), *self.axes[position:])
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


def _wide(leaf: _Leaf, axes: Iterable[int]) -> frozenset[int]:
    return frozenset(axis for axis in axes if leaf.shape[axis] > 1)


def _held(axes: Iterable[_Axis]) -> frozenset[int]:
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


class _Value(NamedTuple):
    is_input: bool = False  # it depends on the inputs, and not on params and constants alone
    views: tuple[_View, ...] = ()  # the leaves it is made of, if they met no input yet

    def map(self, fn: Callable[[_View], _View]) -> "_Value":
        return self._replace(views=_unique(map(fn, self.views)))

    def resize(self, shape: Sequence[int]) -> "_Value":
        return self.map(lambda view: view.resize(shape))


def _join(*values: _Value) -> _Value:
    views = _unique(view for value in values for view in value.views)
    return _Value(any(value.is_input for value in values), views)


def _unique(views: Iterable[_View]) -> tuple[_View, ...]:
    return tuple(dict.fromkeys(views))


# What an equation does with it.

# One output for each operand, with the same axes.
_IDENTITIES = frozenset(
    "convert_element_type copy copy_p device_put layout_constraint mesh_cast name "
    "optimization_barrier pvary reduce_precision reshard rev sharding_constraint "
    "stop_gradient".split()
)
# The operands have the axes of the output. Scalars are broadcast.
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex "
    "concatenate conj cos cosh cumlogsumexp cummax cummin cumprod cumsum digamma div "
    "dynamic_update_slice eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow "
    "is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pad pow real "
    "rem round rsqrt scatter scatter-add select_n sign sin sinh sqrt square sub tan tanh "
    "xor".split()
)
# Of weights alone they are statistics, such as the norm in weight normalization.
_REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum "
    "reduce_xor".split()
)


def _layouts(eqn: JaxprEqn, view: _View) -> list[_View] | None:
    """The views in the outputs of an equation that only lays out its operand, else None."""
    params, axes = eqn.params, view.axes
    shapes = _shapes(eqn.outvars)
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
        case "slice" | "split" | "all_gather" if len(axes) == len(shapes[0]):
            return [view.resize(shape) for shape in shapes]
        case "unstack":
            return [view.drop(params["axis"]) for _ in shapes]
    return None


def _body(eqn: JaxprEqn) -> Jaxpr | None:
    """The program that an equation calls with its operands, as `jit` and `remat` do."""
    for param in eqn.params.values():
        body = param.jaxpr if isinstance(param, ClosedJaxpr) else param
        if isinstance(body, Jaxpr):
            inside, outside = _shapes(body.invars), _shapes(eqn.invars)
            if list(map(len, inside)) == list(map(len, outside)):
                return body
    return None


def _shapes(atoms: Iterable[Any]) -> list[tuple[int, ...]]:
    return [getattr(atom.aval, "shape", ()) for atom in atoms]


class _Interpreter:
    """Runs a program on `_Value`s, and notes the uses of leaves."""

    def __init__(self):
        self.uses: list[_Use] = []
        self.eqns: list[JaxprEqn] = []  # the equation that is applied, and before it its callers

    def run(self, jaxpr: Jaxpr, operands: Sequence[_Value]) -> list[_Value]:
        """The outputs of a program."""
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, operands, strict=True))

        def read(atoms: Sequence[Any]) -> list[_Value]:
            return [_Value() if isinstance(x, Literal) else values.get(x, _Value()) for x in atoms]

        for eqn in jaxpr.eqns:
            self.eqns.append(eqn)
            values.update(zip(eqn.outvars, self.apply(eqn, read(eqn.invars)), strict=True))
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
            return [_join(_Value(index.is_input), *each) for each in zip(*results, strict=True)]
        if body := _body(eqn):  # under shard_map, axes are shorter inside
            inside = list(map(_Value.resize, operands, _shapes(body.invars)))
            return list(map(_Value.resize, self.run(body, inside), _shapes(eqn.outvars)))

        result = _Value(any(operand.is_input for operand in operands))
        if name in _REDUCTIONS or not any(operand.views for operand in operands):
            return [result] * len(eqn.outvars)
        if name in _IDENTITIES:
            return operands
        if name in _ELEMENTWISE:
            return [self.elementwise(eqn, operands)]
        operand, *others = operands
        match name:
            case "dot_general":
                return [self.product(eqn, operands, *params["dimension_numbers"])]
            case "ragged_dot_general":
                numbers = params["ragged_dot_dimension_numbers"]
                contracted, (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
                batch = (lhs_batch, (*rhs_batch, *numbers.rhs_group_dimensions))
                return [self.product(eqn, operands[:2], contracted, batch)]
            case "conv_general_dilated" if params["batch_group_count"] == 1:
                return [self.convolution(eqn, *operands)]
            case "gather" if not others[0].views:
                return [self.gather(eqn, *operands)]
            case "dynamic_slice" if not any(other.views for other in others):
                return [self.dynamic_slice(eqn, operand, others)]
            case "stack":
                axis, size = params["axis"], len(operands)
                stacked = [v.map(lambda view: view.insert(axis, size)) for v in operands]
                return [self.elementwise(eqn, stacked)]
        views = [_layouts(eqn, view) for view in operand.views]
        if others or None in views:
            for view in _join(*operands).views:
                self.unknown(view)
            return [result] * len(eqn.outvars)
        return [result._replace(views=_unique(output)) for output in zip(*views, strict=True)]

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
        """The carry, which is what it is at the start or after any iteration, and the rest."""
        start = len(self.uses)
        while True:
            outputs = self.run(body, [*consts, *carry, *xs])
            after = list(map(_join, carry, outputs))
            if after == carry:
                return carry, outputs[len(carry) :]
            del self.uses[start:]  # less was known of the carry
            carry = after

    def elementwise(self, eqn: JaxprEqn, operands: list[_Value]) -> _Value:
        """Where a leaf meets an input, it is a vector. Where it meets weights, it is followed."""
        (shape,), ranks = _shapes(eqn.outvars), list(map(len, _shapes(eqn.invars)))
        # Inputs that scale a weight by a scalar, such as a loss scale, do not make it a vector.
        inputs = {i for i, v in enumerate(operands) if v.is_input and (ranks[i] or not any(ranks))}
        followed = []
        for i, operand in enumerate(operands):
            for view in operand.views:
                if inputs - {i}:
                    self.entries(view)
                    # A matrix with a random mask, as of DropConnect, looks like this, until its
                    # product: then it is used in two ways.
                    if len(shape) > 1 and not view.is_noted and all(_held([a]) for a in view.axes):
                        followed.append(view._replace(is_noted=True))
                elif len(view.axes) in (0, len(shape)):
                    followed.append(view.resize(shape))
                else:
                    self.unknown(view)
        is_input = bool(inputs) or (not followed and any(v.is_input for v in operands))
        return _Value(is_input, _unique(followed))

    def product(
        self, eqn: JaxprEqn, operands: list[_Value], contracted: _TwoSides, batch: _TwoSides
    ) -> _Value:
        lhs, rhs = operands
        if contracted[0]:
            for side, operand, other in ((0, lhs, rhs), (1, rhs, lhs)):
                rank = len(_shapes(eqn.invars)[1 - side])
                is_row = rank == len(contracted[side]) + len(batch[side])
                for view in operand.views:
                    self.matrix(view, other, contracted[side], batch[side], is_row)
            return _Value(lhs.is_input or rhs.is_input)

        # Elementwise, as einsum's "bd,d->bd", or an outer product. In the output, the batch axes
        # come first, then those of lhs, then those of rhs.
        (shape,) = _shapes(eqn.outvars)

        def lay_out(view: _View, side: int) -> _View:
            shared = [view.axes[i] for i in batch[side]]
            own = [axis for i, axis in enumerate(view.axes) if i not in batch[side]]
            others = list(map(_broadcast, shape[len(shared) :]))
            start = (len(others) - len(own)) * side
            others[start : start + len(own)] = own
            return view.rearrange([*shared, *others])

        lhs = lhs.map(lambda view: lay_out(view, 0))
        rhs = rhs.map(lambda view: lay_out(view, 1))
        return self.elementwise(eqn, [lhs, rhs])

    def convolution(self, eqn: JaxprEqn, lhs: _Value, rhs: _Value) -> _Value:
        groups = eqn.params["feature_group_count"]
        for view in lhs.views:
            self.entries(view)
        for view in rhs.views:
            out, *window = (view.axes[i] for i in eqn.params["dimension_numbers"].rhs_spec)
            group = ()
            if groups > 1:  # each has output channels of its own; vmap over kernels makes groups
                group, out = _reshape([out], (groups, _size(out) // groups))
            axes = (group, out, *window)
            self.matrix(view._replace(axes=axes), lhs, range(2, len(axes)), [0])
        return _Value(lhs.is_input or rhs.is_input)

    def dynamic_slice(self, eqn: JaxprEqn, operand: _Value, starts: list[_Value]) -> _Value:
        sizes, (full, *_) = eqn.params["slice_sizes"], _shapes(eqn.invars)
        moved = [i for i, v in enumerate(starts) if v.is_input and sizes[i] < full[i]]
        sliced = operand.map(lambda view: self.look_up(view, moved, True).resize(sizes))
        return sliced._replace(is_input=operand.is_input or bool(moved))

    def gather(self, eqn: JaxprEqn, operand: _Value, indices: _Value) -> _Value:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        (full, _), (shape,) = _shapes(eqn.invars), _shapes(eqn.outvars)
        collapsed, batching = numbers.collapsed_slice_dims, numbers.operand_batching_dims
        index_axes = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        batched = {
            index_axes[i]: axis
            for i, axis in zip(numbers.start_indices_batching_dims, batching, strict=True)
        }
        selected = [i for i in numbers.start_index_map if i in collapsed or sizes[i] < full[i]]
        is_one_index = not indices.is_input and len(index_axes) == len(batched)  # of a stack

        def select(view: _View) -> _View:
            rest = (a for i, a in enumerate(view.axes) if i not in (*selected, *batching))
            if indices.is_input and _held(rest):  # rows of tables that are batched as the indices
                own = _held(view.axes[i] for i in batching)
                view = view._replace(batch=view.batch | own, looked_up=view.looked_up | own)
            if not is_one_index:
                view = self.look_up(view, selected, indices.is_input)
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

        return _Value(operand.is_input or indices.is_input, operand.map(select).views)

    def look_up(self, view: _View, axes: list[int], by_input: bool) -> _View:
        """Some entries of these axes. By constant indices, they may yet be a part of a weight."""
        if not axes:
            return view
        looked_up = view.looked_up | _held(view.axes[i] for i in axes)
        view = view._replace(looked_up=looked_up)
        if by_input and not view.is_noted:
            self.entries(view, kind="lookup")
        return view._replace(is_noted=view.is_noted or by_input)

    def entries(self, view: _View, kind: str = "inputs") -> None:
        """Notes a use of the entries: as a vector, or of rows that have been looked up."""
        if not view.is_noted:
            others = _held(view.axes) - view.looked_up - view.batch
            self.note(view, view.looked_up - view.batch, others, kind)

    def matrix(
        self,
        view: _View,
        other: _Value,
        reduction_axes: Iterable[int],
        batch_axes: Iterable[int],
        is_row: bool = False,
    ) -> None:
        """Notes a use in a product with another value, maybe a row, without axes of its own."""
        named = {*reduction_axes, *batch_axes}
        reduction = _held(view.axes[i] for i in reduction_axes)
        output = _held(axis for i, axis in enumerate(view.axes) if i not in named)
        view = view._replace(batch=view.batch | _held(view.axes[i] for i in batch_axes))
        kind = "inputs" if other.is_input else "weights"
        if view.is_noted:
            kind = "experts"
            # Rows that were looked up are activations: what they meet says nothing of the leaf.
            if is_row:  # several experts of each row
                reduction, output = reduction - view.looked_up, output - view.looked_up
            if not (other.is_input and view.looked_up <= view.batch and reduction and output):
                return
        self.note(view, reduction, output, kind)

    def note(self, view: _View, reduction: _Axes, output: _Axes, kind: str) -> None:
        leaf, batch, every = view.leaf, view.batch, frozenset(range(len(view.leaf.shape)))
        problem = ""
        # Where an axis has been split, its parts can have different roles.
        split = _wide(leaf, (batch & reduction) | (batch & output) | (reduction & output))
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
        self.uses.append(_Use(leaf, tuple(self.eqns), kind, axes, problem))

    def unknown(self, view: _View) -> None:
        if not view.is_noted:
            problem = "is an operation that cannot be followed"
            self.uses.append(_Use(view.leaf, tuple(self.eqns), problem=problem))


# What the uses of a leaf come to.


class _Use(NamedTuple):
    """An operation that uses a leaf, and the reading that it gives or the problem with it."""

    leaf: _Leaf
    eqns: tuple[JaxprEqn, ...]  # the operation, and before it its callers
    kind: str = "inputs"  # or "lookup", "experts" that were looked up, "weights" alone
    axes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # reduction and output
    problem: str = ""

    @property
    def sides(self) -> frozenset[frozenset[int]]:
        """The same for a matrix and its transpose, and whatever role axes of size 1 have."""
        return frozenset(filter(None, (_wide(self.leaf, axes) for axes in self.axes)))

    def __str__(self) -> str:
        # Inside of a function of JAX's own no frame is the user's.
        places = (summarize(eqn.source_info) for eqn in reversed(self.eqns))
        where = f"{self.eqns[-1].primitive.name} at {next(filter(None, places), 'an unknown line')}"
        return f"{where} {self.problem or f'reads it as {MuonDimensionNumbers(*self.axes)}'}"


def _agreed(leaf: _Leaf, uses: list[_Use]) -> MuonDimensionNumbers | str:
    """The reading on which all uses of a leaf agree, or what is wrong with them."""
    # Products of weights alone (LoRA, but also a Gram matrix) count where nothing else does.
    uses = [use for use in uses if use.kind != "weights"] or uses
    # Experts that were looked up and multiplied by are matrices, not the rows of one.
    if any(use.kind == "experts" for use in uses):
        uses = [use for use in uses if use.kind != "lookup"]
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
    for use in uses:
        if use.problem:
            return f"{name} cannot be read: {use}. {remedy}"
        if use.sides != uses[0].sides:
            return f"{name} is used in two ways: {uses[0]}, but {use}. {remedy}"
    return MuonDimensionNumbers(*uses[0].axes)
