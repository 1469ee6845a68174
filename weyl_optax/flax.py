"""How the params of Flax models are read as matrices. Needs flax."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.core import meta
from optax.contrib import MuonDimensionNumbers

from weyl_optax._dimension_numbers import overridden, shape_of

Ints = tuple[int, ...]

_ATTENTION = ("query", "key", "value", "out")


class _Layer(NamedTuple):
    """A parameter of an NNX layer, before layers are stacked."""

    shape: tuple[int | None, ...]  # None: any size
    numbers: tuple[Ints, Ints] | None  # reduction and output axes; None: it is block-diagonal


class _Leaf(NamedTuple):
    shape: Ints
    layer: _Layer | None  # None: only the name is known
    stack: Ints | None  # its layer axes, each counted without those before it; None: unknown


def dimension_numbers(
    model_or_params: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
    *,
    layer_axes: Mapping[str, int] | None = None,
    overrides: Mapping[str, MuonDimensionNumbers | None] | None = None,
) -> Any:
    """Read each leaf of a Flax model as the matrix that its layer multiplies by.

    ========================================  ==============  ===========  ===============
    leaf                                      reduction axes  output axes  known in
    ========================================  ==============  ===========  ===============
    dense kernel (in, out)                    0               1            NNX, Linen
    query, key, value kernel (d, heads, dim)  0               1, 2         NNX, Linen
    attention out kernel (heads, dim, d)      0, 1            2            NNX, Linen
    convolution kernel (h, w, in, out)        0, 1, 2         3            NNX
    depthwise kernel (h, w, 1, channels)      none            0, 1, 2      NNX
    embedding (number, features)              0               1            NNX, Linen
    their biases, scales of norms             none            all          NNX, Linen
    ========================================  ==============  ===========  ===============

    Flax's NNX layers are read by their types, and other NNX modules by their
    ``einsum_str``, of which the second operand is the kernel. Every other leaf is read
    by its name and shape if these leave one reading, and is an error if not: the params
    of a Linen convolution, for one, do not say its ``feature_group_count``.

    The axes that ``nn.scan``, ``nn.vmap``, ``nnx.scan`` and ``nnx.vmap`` stack layers
    along are batch axes. Their partition name "layers" tells where they are, or the
    sizes of an NNX layer, or those of all leaves around a stacked norm or Linen
    ``Dense_0``, if one axis fits only.

    Args:
        model_or_params: An ``nnx.Module``, or the params of a Linen model.
        wrt: Which variables of an NNX model the optimizer is given.
        layer_axes: The axis that stacks the layers in each leaf of a folder, for every
            stacked folder: ``{"decoder/layers": 1}``; ``{}`` if nothing is stacked. A
            folder inside of another counts its axis without that of the outer one.
        overrides: The numbers of leaves that are not to be analysed, keyed by path or
            pattern, as in ``{"*/Conv_?/kernel": MuonDimensionNumbers((0, 1, 2), 3)}``.
            The first that matches is taken.

    Returns:
        A tree with the paths of the params, and an
        :class:`optax.contrib.MuonDimensionNumbers` for each leaf.

    Raises:
        ValueError: If types, names and shapes do not tell how a leaf is used.

    Example:
        >>> from flax import nnx
        >>> from weyl_optax import tabulate
        >>> from weyl_optax.flax import dimension_numbers
        >>> attention = nnx.MultiHeadAttention(4, 64, use_bias=False, rngs=nnx.Rngs(0))
        >>> print(tabulate(nnx.state(attention, nnx.Param), dimension_numbers(attention)))
        path          shape        read as
        key/kernel    (64, 4, 16)  1 matrix of 64 x 64
        out/kernel    (4, 16, 64)  1 matrix of 64 x 64
        query/kernel  (64, 4, 16)  1 matrix of 64 x 64
        value/kernel  (64, 4, 16)  1 matrix of 64 x 64
    """
    if isinstance(model_or_params, nnx.Module):
        params = nnx.state(model_or_params, wrt)
        layers = dict(_layers(model_or_params))
    else:
        params = model_or_params
        layers = {}
    if jax.tree_util.all_leaves([params]):
        raise ValueError(
            f"dimension_numbers needs a tree of params and got {params!r}. If that comes from "
            "optax.inject_hyperparams, name weight_dimension_numbers in its static_args."
        )
    boxes: dict[str, Any] = {}
    for key_path, box in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box):
        path = _path(key_path)
        if path in boxes:
            raise ValueError(f"Two leaves have the path {path!r}. Rename one of them.")
        boxes[path] = box
    shapes = {path: shape_of(*jax.tree.leaves(box)) for path, box in boxes.items()}

    numbers = overridden(list(shapes), overrides)
    leaves = {
        path: _Leaf(shapes[path], layers.get(path), _named_stack(box))
        for path, box in boxes.items()
        if path not in numbers
    }
    if layer_axes is not None:
        leaves = _with_layer_axes(leaves, layer_axes)
    reader = _Reader(leaves, is_module=isinstance(model_or_params, nnx.Module))
    numbers |= {path: reader.read(path) for path in leaves}
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: numbers[_path(key_path)], params, is_leaf=_is_box
    )


def _path(key_path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _is_box(x: Any) -> bool:
    return isinstance(x, nnx.Variable | meta.AxisMetadata) and bool(jax.tree.leaves(x))


def _named_stack(box: Any) -> Ints | None:
    """The axis that ``nn.scan`` with the partition name "layers" has added."""
    names = getattr(box, "names", ())
    if isinstance(box, nnx.Variable):
        names = box.get_metadata().get("out_sharding") or ()
    return (tuple(names).index("layers"),) if "layers" in tuple(names) else None


def _with_layer_axes(
    leaves: Mapping[str, _Leaf], layer_axes: Mapping[str, int]
) -> dict[str, _Leaf]:
    stacked, lengths = {}, {}
    for path, leaf in leaves.items():
        folders = [folder for folder in reversed(_folders(path)) if folder in layer_axes]
        stack = tuple(layer_axes[folder] for folder in folders)
        unstacked = _unstack(leaf.shape, stack)
        if unstacked is None or any(
            lengths.setdefault(folder, length) != length
            for folder, length in zip(folders, unstacked[1], strict=True)
        ):
            raise ValueError(
                f"layer_axes has {dict(layer_axes)}, which does not fit {path!r} of shape "
                f"{leaf.shape}: all leaves of a folder have its axis, of the same size."
            )
        stacked[path] = leaf._replace(stack=stack)
    if unused := layer_axes.keys() - lengths.keys():
        raise ValueError(f"layer_axes has {sorted(unused)}, but the leaves are {sorted(leaves)}.")
    return stacked


def _folders(path: str) -> list[str]:
    """The folders around a path, from the nearest to the root, which is ''."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in reversed(range(len(parts)))]


def _is_inside(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _layers(model: nnx.Module) -> Iterator[tuple[str, _Layer]]:
    """The parameters of the layers in an NNX model whose type tells what they are."""
    for path, module in nnx.iter_graph(model):
        for name, shape, *numbers in layer_parameters(module):
            layer = _Layer(tuple(shape), (numbers[0], numbers[1]) if numbers else None)
            yield "/".join(map(str, (*path, name))), layer


def layer_parameters(module: Any) -> Iterable[tuple[Any, ...]]:
    """The name, shape, reduction axes and output axes of each parameter of a layer."""
    match module:
        case nnx.Linear(in_features=n_in, out_features=n_out):
            return ("kernel", (n_in, n_out), (0,), (1,)), ("bias", (n_out,), (), (0,))
        case nnx.LinearGeneral(in_features=n_in, out_features=n_out):
            batch = tuple(module.batch_axis.values())
            b, i, o = len(batch), len(n_in), len(n_out)
            kernel = _span(b, i), _span(b + i, o)
            bias = (), _span(b, o)
            return ("kernel", batch + n_in + n_out, *kernel), ("bias", batch + n_out, *bias)
        case nnx.Module(einsum_str=str()):
            return _einsum_parameters(module)
        case nnx.ConvTranspose(kernel_shape=shape):
            *window, a, b = range(len(shape))
            reduction, output = ((*window, b), a) if module.transpose_kernel else ((*window, a), b)
            bias = ("bias", (module.out_features,), (), (0,))
            return ("kernel", shape, reduction, (output,)), bias
        case nnx.Conv(kernel_shape=shape, feature_group_count=groups):
            *inputs, output = range(len(shape))
            bias = ("bias", (module.out_features,), (), (0,))
            if module.in_features == groups == module.out_features:
                return ("kernel", shape, (), tuple(inputs)), bias
            if groups > 1:
                return ("kernel", shape), bias
            return ("kernel", shape, tuple(inputs), (output,)), bias
        case nnx.Embed(num_embeddings=number, features=features):
            return (("embedding", (number, features), (0,), (1,)),)
        case nnx.LoRA(in_features=n_in, out_features=n_out):
            return ("lora_a", (n_in, None), (0,), (1,)), ("lora_b", (None, n_out), (0,), (1,))
        case (
            nnx.BatchNorm(num_features=n)
            | nnx.LayerNorm(num_features=n)
            | nnx.RMSNorm(num_features=n)
            | nnx.GroupNorm(num_features=n)
            | nnx.InstanceNorm(num_features=n)
        ):
            return ("scale", (n,), (), (0,)), ("bias", (n,), (), (0,))
        case nnx.PReLU():
            return (("negative_slope", (), (), ()),)
    return ()


def _span(start: int, length: int) -> Ints:
    return tuple(range(start, start + length))


def _einsum_parameters(module: Any) -> Iterator[tuple[Any, ...]]:
    """`inputs,kernel->outputs`: reduced, put out, and, in all three, batched axes."""
    operands, _, outputs = module.einsum_str.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    if isinstance(module, nnx.Einsum):
        name, shape, bias_shape = "kernel", module.kernel_shape, module.bias_shape
    else:  # of another library: its only parameter is the kernel
        variables = {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
        name, shape, bias_shape = "", (), None
        if len(variables) == 1:
            name, shape = next((k, v.shape) for k, v in variables.items())
    if not kernel.isalpha() or len(shape) != len(kernel) or not set(kernel) <= {*inputs, *outputs}:
        return
    reduction = tuple(axis for axis, label in enumerate(kernel) if label not in outputs)
    output = tuple(
        axis for axis, label in enumerate(kernel) if label in outputs and label not in inputs
    )
    yield name, shape, reduction, output
    if bias_shape is not None:
        labels = [label for label in outputs if label in kernel][-len(bias_shape) :]
        if tuple(shape[kernel.index(label)] for label in labels) == tuple(bias_shape):
            output = tuple(axis for axis, label in enumerate(labels) if label not in inputs)
            yield "bias", bias_shape, (), output


def _unstack(shape: Ints, stack: Ints) -> tuple[Ints, Ints] | None:
    """The axes that are left without the layer axes, and the sizes of the layer axes."""
    axes, lengths = list(range(len(shape))), []
    for axis in stack:
        if not -len(axes) <= axis < len(axes):
            return None
        lengths.append(shape[axes.pop(axis)])
    return tuple(axes), tuple(lengths)


class _Reader:
    """Reads each leaf by its own layer, with the leaves around it as evidence."""

    def __init__(self, leaves: Mapping[str, _Leaf], *, is_module: bool):
        self.leaves = leaves
        self.is_module = is_module
        self.excess = dict(self._excess_ranks())
        self.unstackings = {
            (folder, count): self._unstackings(folder, count)
            for folder, count in set(self._stacked_folders())
        }

    def read(self, path: str) -> MuonDimensionNumbers:
        leaf = self.leaves[path]
        return self._read_layer(path, leaf.layer) if leaf.layer else self._read_name(path)

    def _error(self, path: str, why: str) -> ValueError:
        return ValueError(
            "Types, names and shapes do not tell how to read the leaf "
            f"{path!r} of shape {self.leaves[path].shape}: {why}. "
            "weyl_optax.dimension_numbers_from(loss_fn, params, *inputs) reads any leaf from the "
            f"program. Or write it by hand: overrides={{{path!r}: optax.contrib."
            "MuonDimensionNumbers(reduction_axis, output_axis)}. If layers are stacked, name the "
            "axis: layer_axes={'path/of/folder': axis}; if none are, layer_axes={}."
            + ("" if self.is_module else " For an NNX model, pass dimension_numbers(model).")
        )

    # Layer axes.

    def _excess_ranks(self) -> Iterator[tuple[str, int]]:
        """How many axes the leaf of a layer has more than the layer gives it at least."""
        for path, leaf in self.leaves.items():
            if leaf.layer is not None:
                yield path, len(leaf.shape) - len(leaf.layer.shape)
            elif _name(path) == "kernel":
                yield path, len(leaf.shape) - 2
            elif _name(path) == "scale":  # of a norm: (features,), or (1, 1, 1, features)
                yield path, sum(size != 1 for size in leaf.shape) - 1

    def _stacked_folders(self) -> Iterator[tuple[str, int]]:
        """Folders that are stacked as a whole, and the number of their layer axes.

        An NNX layer is; so is what is around a norm, as norms are not stacked alone, and
        what is around a Linen Dense_0, as it would be named VmapDense_0.
        """
        for path, excess in self.excess.items():
            leaf, (folder, around) = self.leaves[path], (*_folders(path), "")[:2]
            if excess > 0 and leaf.stack is None:
                if leaf.layer:
                    yield folder, excess
                if (
                    _name(path) == "scale"
                    or (leaf.layer and _name(folder) in _ATTENTION)
                    or (not leaf.layer and re.fullmatch(r"Dense_\d+", _name(folder)))
                ):
                    yield around, excess

    def _unstackings(self, folder: str, count: int) -> list[dict[str, Ints]]:
        """For each choice of layer axes that fits all leaves of a folder: the axes left.

        A stack has one axis in all leaves, counted from the front or, if negative, from
        behind. Its size is the same in all of them, and what is left are layers.
        """
        shapes = {p: leaf.shape for p, leaf in self.leaves.items() if _is_inside(p, folder)}
        rank = min(map(len, shapes.values()))
        found = []
        for stack in itertools.product(range(-rank, rank), repeat=count):
            unstacked = {path: _unstack(shape, stack) for path, shape in shapes.items()}
            axes = {path: left[0] for path, left in unstacked.items() if left}
            lengths = {left[1] for left in unstacked.values() if left}
            if len(axes) == len(shapes) and len(lengths) == 1 and self._are_layers(axes):
                found.append(axes)
        return found

    def _are_layers(self, axes: Mapping[str, Ints]) -> bool:
        shapes = {path: self._sizes(path, left) for path, left in axes.items()}
        for path, shape in shapes.items():
            layer = self.leaves[path].layer
            if layer and len(shape) <= len(layer.shape):  # else it is stacked more often
                if not (
                    len(shape) == len(layer.shape)
                    and all(want in (None, n) for want, n in zip(layer.shape, shape, strict=True))
                ):
                    return False
            elif not layer and _name(path) == "kernel" and len(shape) <= 2:
                bias = shapes.get(_join(_folders(path)[0], "bias"), shape[1:])
                if len(shape) < 2 or bias != shape[1:]:
                    return False
        return True

    def _sizes(self, path: str, axes: Ints) -> Ints:
        return tuple(self.leaves[path].shape[axis] for axis in axes)

    def _stacked_around(self, path: str) -> list[list[dict[str, Ints]]]:
        """The unstackings of the nearest folder around a leaf that is stacked as a whole."""
        for folder in _folders(path):
            found = [axes for (stacked, _), axes in self.unstackings.items() if stacked == folder]
            if found:
                return found
        return []

    def _unstacked(self, path: str) -> Ints:
        """The axes of a leaf that is read by name, without the layer axes that are known."""
        leaf = self.leaves[path]
        options = {tuple(range(len(leaf.shape)))}
        if leaf.stack is not None:
            options = {left[0] for left in [_unstack(leaf.shape, leaf.stack)] if left}
        elif around := self._stacked_around(path):
            options = {axes[path] for axes in itertools.chain(*around)}
        if len(options) != 1:
            which = "several axes" if options else "no axis"
            raise self._error(path, f"it is in stacked layers, and {which} can be what stacks them")
        return options.pop()

    def _may_be_stacked(self, path: str) -> bool:
        """Whether a leaf of no layer may have layer axes that are not known.

        It may if the layers nearest to it have some: they are a block, or experts beside it.
        """
        if self.leaves[path].stack is not None or self._stacked_around(path):
            return False
        for folder in _folders(path):
            excess = [excess for p, excess in self.excess.items() if _is_inside(p, folder)]
            if excess:
                return min(excess) > 0
        return len(self.leaves[path].shape) > 1 and not self.is_module

    # Readings.

    def _read_layer(self, path: str, layer: _Layer) -> MuonDimensionNumbers:
        shape, stack = self.leaves[path].shape, self.leaves[path].stack
        if layer.numbers is None:
            raise ValueError(
                f"The leaf {path!r} of shape {shape} is the kernel of a grouped convolution, a "
                "block-diagonal matrix, which MuonDimensionNumbers cannot say. Bound each of its "
                f"outputs as a vector: overrides={{{path!r}: optax.contrib.MuonDimensionNumbers("
                f"(), {_span(0, len(shape) - 1)})}}."
            )
        if stack is not None or self.excess[path] == 0:
            left = _unstack(shape, stack or ())
            evidence = [{left[0]} if left and len(left[0]) == len(layer.shape) else set()]
        else:
            around = [(folder, self.excess[path]) for folder in _folders(path)]
            evidence = [{axes[path] for axes in self.unstackings.get(a, [])} for a in around]
        reduction, output = layer.numbers
        for options in evidence:
            readings = {
                MuonDimensionNumbers(
                    tuple(axes[axis] for axis in reduction), tuple(axes[axis] for axis in output)
                )
                for axes in options
            }
            if len(readings) == 1:
                return readings.pop()
        raise self._error(
            path, f"its layer makes {layer.shape}, and sizes do not tell what stacks it"
        )

    def _read_name(self, path: str) -> MuonDimensionNumbers:
        folder, name, axes = _folders(path)[0], _name(path), self._unstacked(path)
        wide = tuple(axis for axis in axes if self.leaves[path].shape[axis] != 1)
        vector = MuonDimensionNumbers((), axes)
        if name in ("kernel", "bias", "scale", "embedding"):
            is_norm = name in ("bias", "scale") and _join(folder, "kernel") not in self.leaves
            if len(axes) < 2 or (is_norm and len(wide) < 2):
                return vector
            if len(axes) == 2 and name in ("kernel", "embedding"):
                return MuonDimensionNumbers(axes[:1], axes[1:])
            if _name(folder) in _ATTENTION and self._is_attention(_folders(folder)[0]):
                n_in = {"bias": 0, "kernel": 2 if _name(folder) == "out" else 1}[name]
                return MuonDimensionNumbers(axes[:n_in], axes[n_in:])
            raise self._error(
                path,
                "it may be of a convolution, whose params do not say feature_group_count, of a "
                "dense layer with several axes, or stacked",
            )
        if not axes or (len(wide) < 2 and not self._may_be_stacked(path)):
            return vector
        if len(wide) == 2 and not self._may_be_stacked(path):
            return MuonDimensionNumbers(wide[:1], wide[1:])
        raise self._error(path, "it is of no known layer, and may be stacked")

    def _is_attention(self, folder: str) -> bool:
        """Whether kernels (d, heads, dim) and (heads, dim, d) are those of one attention.

        They are no stacks of Dense kernels if the bias of ``out`` has one axis, or if the
        kernels have no size in common along any axis.
        """
        kernels = [_join(folder, name, "kernel") for name in _ATTENTION]
        biases = [_join(folder, name, "bias") for name in _ATTENTION]
        if any(path not in self.leaves or self.leaves[path].layer for path in kernels):
            return False
        shapes = {
            path: self._sizes(path, self._unstacked(path))
            for path in (*kernels, *biases)
            if path in self.leaves
        }
        *inputs, out = (shapes[path] for path in kernels)
        return (
            len(out) == 3
            and all(len(kernel) == 3 and kernel[1:] == out[:2] for kernel in inputs)
            and all(shapes.get(bias, out[:2]) == out[:2] for bias in biases[:-1])
            and shapes.get(biases[-1], out[2:]) == out[2:]
            and (
                biases[-1] in shapes
                or self.leaves[kernels[0]].stack is not None
                or all(len(set(sizes)) > 1 for sizes in zip(*inputs, out, strict=True))
            )
        )
