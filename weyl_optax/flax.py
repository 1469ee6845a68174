"""How Flax models are read as matrices. Needs flax."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from weyl_optax._matrices import by_path, default_numbers, path_name, shape_of


def dimension_numbers(model_or_params: Any, wrt: nnx.filterlib.Filter = nnx.Param) -> Any:
    """Read each leaf of a Flax model as the matrix that its layer multiplies by.

    ========================================  ==============  ===========
    leaf                                      reduction axes  output axes
    ========================================  ==============  ===========
    dense kernel (in, out)                    0               1
    query, key, value kernel (d, heads, dim)  0               1, 2
    attention out kernel (heads, dim, d)      0, 1            2
    convolution kernel (h, w, in, out)        0, 1, 2         3
    depthwise kernel (h, w, 1, channels)      none            0, 1, 2
    embedding (number, features)              0               1
    their biases, scales of norms             none            all
    ========================================  ==============  ===========

    An NNX model is read by the types of its layers, the params of a Linen model by
    their names. Axes in front of those above, from ``nnx.vmap`` or ``nn.scan``, are
    batch axes. A parameter that belongs to no Flax layer is read by its rank, less
    the batch axes of the layers around it.

    Args:
        model_or_params: An ``nnx.Module``, or the params of a Linen model.
        wrt: Which variables of an NNX model the optimizer is given.

    Returns:
        A tree with the paths of the params, and an
        :class:`optax.contrib.MuonDimensionNumbers` for each leaf.

    Raises:
        ValueError: If the name of a Linen kernel does not tell how to read it.

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
        ranks = _ranks(params)
        layers = dict(_layers_of_modules(model_or_params))
    else:
        params = model_or_params
        ranks = _ranks(params)
        layers = dict(_layers_of_names(ranks))
    batch_axes = {
        path: ranks[path] - len(layers[path].reduction_axis) - len(layers[path].output_axis)
        for path in ranks.keys() & layers.keys()
    }

    def numbers(path: str) -> MuonDimensionNumbers:
        if path in layers:
            return layers[path]
        around = _nearest(path, batch_axes)
        return default_numbers(max(0, ranks[path] - min(around, default=0)))

    def from_the_front(path: str) -> MuonDimensionNumbers:
        axes = numbers(path)
        return MuonDimensionNumbers(*(tuple(axis % ranks[path] for axis in a) for a in axes))

    return jax.tree_util.tree_map_with_path(
        lambda path, _: from_the_front(path_name(path)),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def _ranks(params: Any) -> dict[str, int]:
    return {path: len(shape_of(leaf)) for path, leaf in by_path(params).items()}


def _last(reduction: int, output: int) -> MuonDimensionNumbers:
    """The last axes of a leaf, counted from behind: what is in front is batch."""
    return MuonDimensionNumbers(
        tuple(range(-reduction - output, -output)), tuple(range(-output, 0))
    )


def _nearest(path: str, values: dict[str, int]) -> list[int]:
    """The values of the leaves in the nearest folder around a path that has some."""
    while "/" in path:
        path = path.rpartition("/")[0]
        inside = [value for other, value in values.items() if other.startswith(path + "/")]
        if inside:
            return inside
    return []


def _layers_of_modules(model: nnx.Module) -> Iterator[tuple[str, MuonDimensionNumbers]]:
    """The parameters of the Flax layers in an NNX model."""
    for path, module in nnx.iter_graph(model):
        for name, numbers in _parameters(module):
            yield "/".join(map(str, (*path, name))), numbers


def _parameters(module: Any) -> Iterable[tuple[str, MuonDimensionNumbers]]:
    match module:
        case nnx.Linear():
            return ("kernel", _last(1, 1)), ("bias", _last(0, 1))
        case nnx.LinearGeneral():
            n_in, n_out = len(module.in_features), len(module.out_features)
            return ("kernel", _last(n_in, n_out)), ("bias", _last(0, n_out))
        case nnx.Einsum() if module.einsum_str:
            return _einsum_parameters(module)
        case nnx.ConvTranspose(transpose_kernel=True):
            rank = len(module.kernel_size)
            kernel = MuonDimensionNumbers((*range(-rank - 2, -2), -1), (-2,))
            return ("kernel", kernel), ("bias", _last(0, 1))
        case nnx.Conv() if module.in_features == module.feature_group_count == module.out_features:
            window = tuple(range(-len(module.kernel_size) - 2, -1))
            return ("kernel", MuonDimensionNumbers((), window)), ("bias", _last(0, 1))
        case nnx.Conv() | nnx.ConvTranspose():
            return ("kernel", _last(len(module.kernel_size) + 1, 1)), ("bias", _last(0, 1))
        case nnx.Embed():
            return (("embedding", _last(1, 1)),)
        case nnx.LoRA():
            return ("lora_a", _last(1, 1)), ("lora_b", _last(1, 1))
        case (
            nnx.BatchNorm() | nnx.LayerNorm() | nnx.RMSNorm() | nnx.GroupNorm() | nnx.InstanceNorm()
        ):
            return ("scale", _last(0, 1)), ("bias", _last(0, 1))
        case nnx.PReLU():
            return (("negative_slope", _last(0, 0)),)
    return ()


def _einsum_parameters(module: nnx.Einsum) -> Iterator[tuple[str, MuonDimensionNumbers]]:
    """`inputs,kernel->outputs`: reduced, put out, and, in all three, batched axes."""
    operands, outputs = module.einsum_str.split("->")
    inputs, kernel = operands.split(",")
    axes = {label: position - len(kernel) for position, label in enumerate(kernel)}
    yield (
        "kernel",
        MuonDimensionNumbers(
            tuple(axes[label] for label in kernel if label not in outputs),
            tuple(axes[label] for label in kernel if label in outputs and label not in inputs),
        ),
    )
    if module.bias_shape is not None:
        labels = [label for label in outputs if label in kernel][-len(module.bias_shape) :]
        output = [i - len(labels) for i, label in enumerate(labels) if label not in inputs]
        yield "bias", MuonDimensionNumbers((), tuple(output))


def _layers_of_names(ranks: dict[str, int]) -> Iterator[tuple[str, MuonDimensionNumbers]]:
    """The parameters of the Flax layers in the params of a Linen model."""
    norms = {p: rank - 1 for p, rank in ranks.items() if p.rpartition("/")[2] == "scale"}
    for path in ranks:
        folder, _, name = path.rpartition("/")
        around, _, layer = folder.rpartition("/")
        if name == "scale":
            yield path, _last(0, 1)
        elif name == "embedding":
            yield path, _last(1, 1)
        elif name in ("kernel", "bias"):
            if layer in ("query", "key", "value"):
                n_in, n_out = 1, 2
            elif layer == "out" and _beside(around, "query/kernel") in ranks:
                n_in, n_out = 2, 1
            elif _beside(folder, "kernel") in ranks:
                n_in, n_out = _kernel_ranks(folder, layer, ranks, norms)
            else:
                n_in, n_out = 0, 1  # the bias of a norm
            yield path, _last(n_in if name == "kernel" else 0, n_out)


def _beside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _kernel_ranks(
    folder: str, layer: str, ranks: dict[str, int], norms: dict[str, int]
) -> tuple[int, int]:
    """The number of reduction and of output axes of a dense or convolution kernel.

    A bias has the batch and the output axes, a norm beside it the batch axes and one.
    """
    kernel, bias = (ranks.get(_beside(folder, name)) for name in ("kernel", "bias"))
    if kernel == 2 or bias == 1:
        batch = 0
    else:
        batch = min(_nearest(_beside(folder, "kernel"), norms) or norms.values(), default=None)
    bare = bias is None and batch is not None and kernel - batch == 3
    if batch is None or (bare and not layer.lower().startswith("conv")):
        raise ValueError(
            f"The name {_beside(folder, 'kernel')!r} (rank {kernel}) does not tell how to read it: "
            "as a stack of dense kernels, a convolution, or a dense kernel with several axes. "
            "Give the specification of this model by hand, an optax.contrib.MuonDimensionNumbers("
            "reduction_axis, output_axis) for each leaf."
        )
    output = 1 if bias is None else bias - batch
    return kernel - batch - output, output
