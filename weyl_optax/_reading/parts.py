"""The parts of a fused kernel, read from how a program cuts the values it makes from it.

A value that is linear in a leaf, such as its product with the data, with a bias and a gain, may run
along an axis of the leaf. If slices, a `split` or an `unstack` cut it there into pieces that cover
the axis, these are the parts. Pieces that are added up or concatenated again, such as the halves of
a rotary embedding, are one matrix.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

from jax.extend.core import Jaxpr, JaxprEqn, Literal
from optax.contrib import MuonDimensionNumbers

from weyl_optax._reading.programs import IDENTITIES, body_of, shapes_of
from weyl_optax._reading.specification import DimensionNumbers, SplitDimensionNumbers, axes_of


class _Span(NamedTuple):
    """Says that a value is linear in a leaf, and runs along one of the leaf's axes."""

    path: str
    leaf_axis: int
    axis: int | None  # of the value; None at one index of it
    step: Fraction = Fraction(1)  # how far an index of the value goes along the leaf's axis
    piece: tuple[int, int] | None = None  # start and end of what has been cut out


_Spans: TypeAlias = frozenset[_Span]
_NONE: _Spans = frozenset()

_UNCHANGED = IDENTITIES | frozenset("conj imag neg real".split())
_SUMS = frozenset("add add_any complex select_n sub".split())
_CONCATENATIONS = frozenset("concatenate dynamic_update_slice scatter scatter-add stack".split())


def parts_of(
    program: Jaxpr, leaves: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """The sizes of parts, by path and axis of the leaf.

    Args:
        program: The jaxpr of a loss.
        leaves: The path and the shape of each leaf, which is an operand of the program.
    """
    reader = _Reader()
    spans = [
        frozenset(_Span(path, axis, axis) for axis in range(len(shape))) for path, shape in leaves
    ]
    reader.run(program, [*spans, *[_NONE] * (len(program.invars) - len(spans))])
    found: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for path, shape in leaves:
        for axis, size in enumerate(shape):
            pieces = sorted(reader.pieces[path, axis])
            is_covered = [0, *(end for _, end in pieces)] == [*(start for start, _ in pieces), size]
            if is_covered and (path, axis) not in reader.joined:
                found[path][axis] = tuple(end - start for start, end in pieces)
    return found


def in_parts(
    numbers: Mapping[str, MuonDimensionNumbers], parts: Mapping[str, Mapping[int, tuple[int, ...]]]
) -> dict[str, DimensionNumbers]:
    """The same, in parts. A vector is, if a kernel has parts of these sizes: as its bias."""
    of_kernels = {
        sizes
        for path, found in parts.items()
        if path in numbers and axes_of(numbers[path].reduction_axis)
        for sizes in found.values()
    }
    return {
        path: _in_parts(
            entry,
            {
                axis: sizes
                for axis, sizes in parts.get(path, {}).items()
                if axes_of(entry.reduction_axis) or sizes in of_kernels
            },
        )
        for path, entry in numbers.items()
    }


def _in_parts(
    numbers: MuonDimensionNumbers, sizes: Mapping[int, tuple[int, ...]]
) -> DimensionNumbers:
    """In the parts of the first output axis that has some; if each is one index, a batch axis."""
    output = axes_of(numbers.output_axis)
    for axis in output:
        if axis in sizes and max(sizes[axis]) > 1:
            return SplitDimensionNumbers(numbers.reduction_axis, output, axis, sizes[axis])
        if axis in sizes and len(output) > 1:
            others = tuple(other for other in output if other != axis)
            return MuonDimensionNumbers(numbers.reduction_axis, others)
    return numbers


class _Reader:
    """Runs a program on the spans of its values, and notes how they are cut."""

    def __init__(self):
        self.pieces: dict[tuple[str, int], set[tuple[int, int]]] = defaultdict(set)
        self.joined: set[tuple[str, int]] = set()  # whose pieces have come together again

    def run(self, program: Jaxpr, operands: Sequence[_Spans]) -> list[_Spans]:
        """The spans of the outputs of a program."""
        values: dict[Any, _Spans] = dict(zip(program.invars, operands, strict=True))

        def read(atoms: Sequence[Any]) -> list[_Spans]:
            return [_NONE if isinstance(x, Literal) else values.get(x, _NONE) for x in atoms]

        for eqn in program.eqns:
            values.update(zip(eqn.outvars, self.apply(eqn, read(eqn.invars)), strict=True))
        return read(program.outvars)

    def apply(self, eqn: JaxprEqn, operands: list[_Spans]) -> list[_Spans]:
        """The spans of the outputs of an equation; none where it is not linear, or not followed."""
        name, params, shapes = eqn.primitive.name, eqn.params, shapes_of(eqn.invars)
        if name == "scan":
            n_consts, n_carry = params["num_consts"], params["num_carry"]
            xs = zip(operands[n_consts + n_carry :], shapes[n_consts + n_carry :], strict=True)
            at_one = [_moved(spans, _without([0], shape)) for spans, shape in xs]
            inside = [*operands[:n_consts], *[_NONE] * n_carry, *at_one]
            results = self.run(params["jaxpr"].jaxpr, inside)
            stacked = [_moved(spans, _behind_a_new_axis(spans)) for spans in results[n_carry:]]
            return [*results[:n_carry], *stacked]
        elif name == "cond":
            branches = [self.run(branch.jaxpr, operands[1:]) for branch in params["branches"]]
            return [_NONE.union(*spans) for spans in zip(*branches, strict=True)]
        elif name != "while" and (body := body_of(eqn)):
            return self.run(body, operands)
        elif name in ("slice", "split", "unstack"):
            return self.cut(eqn, operands[0])
        elif name in _UNCHANGED:
            return operands
        elif name in _SUMS:
            return [self.join(operands)]
        elif name in _CONCATENATIONS:
            return [_only_pieces(self.join(operands))]
        elif name == "pad":
            return [_only_pieces(operands[0])]
        elif name == "mul":
            return [_linear(*operands) | _linear(*operands[::-1])]
        elif name == "div":
            return [_linear(*operands)]
        elif name in ("dot_general", "ragged_dot_general"):
            x, y, *_ = operands
            if not _has_free_groups(params):
                return [_NONE]
            lhs, rhs = _product_axes(params, *map(len, shapes[:2]))
            return [_moved(_linear(x, y), lhs) | _moved(_linear(y, x), rhs)]
        elif name == "reshape":
            return [_reshaped(operands[0], shapes[0], params["new_sizes"])]
        elif name == "transpose":
            to = {axis: place for place, axis in enumerate(params["permutation"])}
            return [_moved(operands[0], to)]
        elif name == "squeeze":
            return [_moved(operands[0], _without(params["dimensions"], shapes[0]))]
        elif name == "broadcast_in_dim":
            to = enumerate(params["broadcast_dimensions"])
            kept = {i: place for i, place in to if shapes[0][i] == params["shape"][place]}
            return [_moved(operands[0], kept)]
        return [_NONE] * len(eqn.outvars)

    def cut(self, eqn: JaxprEqn, spans: _Spans) -> list[_Spans]:
        """The spans of the pieces of a value."""
        params, (shape,) = eqn.params, shapes_of(eqn.invars)
        if eqn.primitive.name == "slice":
            strides = params["strides"] or [1] * len(shape)
            spans = _moved(spans, {i: i for i, stride in enumerate(strides) if stride == 1})
            ends = zip(params["start_indices"], params["limit_indices"], shape, strict=True)
            for axis, (start, end, size) in enumerate(ends):
                if (start, end) != (0, size):
                    spans = self.piece(spans, axis, start, end)
            return [spans]
        axis = params["axis"]
        sizes = params.get("sizes", [1] * shape[axis])
        if len(sizes) == 1 and eqn.primitive.name == "split":
            return [spans]
        ends = zip(accumulate(sizes), sizes, strict=True)
        pieces = [self.piece(spans, axis, end - size, end) for end, size in ends]
        if eqn.primitive.name == "unstack":
            return [_moved(piece, _without([axis], shape)) for piece in pieces]
        return pieces

    def piece(self, spans: _Spans, axis: int, start: int, end: int) -> _Spans:
        """The spans of a piece along an axis. A piece of a piece counts as the outer one."""
        kept = set()
        for span in spans:
            if span.axis == axis:
                first, last = start * span.step, end * span.step
                if first.denominator > 1 or last.denominator > 1:
                    continue
                if span.piece:
                    span = span._replace(axis=None)
                else:
                    span = span._replace(piece=(int(first), int(last)))
                    self.pieces[span.path, span.leaf_axis].add((int(first), int(last)))
            kept.add(span)
        return frozenset(kept)

    def join(self, operands: Iterable[_Spans]) -> _Spans:
        """The spans of a sum."""
        spans = _NONE.union(*operands)
        pieces = {(span.path, span.leaf_axis, span.piece) for span in spans if span.piece}
        leaf_axes = [key[:2] for key in pieces]
        self.joined |= {key for key in leaf_axes if leaf_axes.count(key) > 1}
        return spans


def _linear(spans: _Spans, others: _Spans) -> _Spans:
    """The spans of a product with other values, which is not linear in a leaf that is in both."""
    paths = {span.path for span in others}
    return frozenset(span for span in spans if span.path not in paths)


def _moved(spans: _Spans, to: Mapping[int, int | None]) -> _Spans:
    """The spans with axes moved, or at one index of them; without spans whose axis is gone."""
    return frozenset(
        span if span.axis is None else span._replace(axis=to[span.axis])
        for span in spans
        if span.axis is None or span.axis in to
    )


def _only_pieces(spans: _Spans) -> _Spans:
    """The spans of pieces, wherever their axis has gone."""
    return frozenset(span._replace(axis=None) for span in spans if span.piece)


def _behind_a_new_axis(spans: _Spans) -> dict[int, int | None]:
    """Where axes are once there is one more before them."""
    return {span.axis: span.axis + 1 for span in spans if span.axis is not None}


def _has_free_groups(params: Mapping[str, Any]) -> bool:
    """Whether the groups of a product, if it has any, are of the rows of its result."""
    if (ragged := params.get("ragged_dot_dimension_numbers")) is None:
        return True
    (lhs_summed, _), (lhs_batch, _) = ragged.dot_dimension_numbers
    return not {*lhs_summed, *lhs_batch}.intersection(ragged.lhs_ragged_dimensions)


def _without(dropped: Sequence[int], shape: Sequence[int]) -> dict[int, int | None]:
    """Where axes are at one index of others."""
    kept = [axis for axis in range(len(shape)) if axis not in dropped]
    return {axis: place for place, axis in enumerate(kept)} | dict.fromkeys(dropped)


def _product_axes(params: Mapping[str, Any], *ranks: int) -> list[dict[int, int | None]]:
    """Where the axes of both sides of a product are in its result."""
    groups = ()
    if ragged := params.get("ragged_dot_dimension_numbers"):
        numbers, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
    else:
        numbers = params["dimension_numbers"]
    (lhs_summed, rhs_summed), batch = numbers
    places, start = [], len(batch[0])
    for summed, shared, rank in zip(
        (lhs_summed, (*rhs_summed, *groups)), batch, ranks, strict=True
    ):
        free = [axis for axis in range(rank) if axis not in (*summed, *shared)]
        to: dict[int, int | None] = {axis: place for place, axis in enumerate(shared)}
        places.append(to | {axis: start + place for place, axis in enumerate(free)})
        start += len(free)
    return places


def _reshaped(spans: _Spans, before: Sequence[int], after: Sequence[int]) -> _Spans:
    """With each axis as the major part of one that begins where it does, or the other way round."""
    begins = {math.prod(after[:place]): place for place in range(len(after)) if after[place] > 1}
    reshaped = set()
    for span in spans:
        if span.axis is None:
            reshaped.add(span)
            continue
        size, place = before[span.axis], begins.get(math.prod(before[: span.axis]))
        if size > 1 and place is not None and (not size % after[place] or not after[place] % size):
            step = span.step * Fraction(size, after[place])
            reshaped.add(span._replace(axis=place, step=step))
        elif size == 1 and span.piece:
            reshaped.add(span._replace(axis=None))
    return frozenset(reshaped)
