"""Weights in the safetensors files of Hugging Face's transformers, as leaves of our models.

Which tensor holds which leaf, a model tells by a dict: from the name of the tensor, with {}
for the number of the block, to an einops pattern from the tensor to the leaf, and the path
of the leaf. A tensor of several leaves has several paths, and the pattern's first axis for
them. By hand, since transformers has given up its models in Flax.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Names = Mapping[str, tuple[str, ...]]
Leaves = dict[str, Any]  # arrays by path
_logger = logging.getLogger(__name__)


def linear(
    theirs: str, ours: str, kernel: str = "o i -> i o", bias: str = "o -> o"
) -> dict[str, tuple[str, ...]]:
    """A linear layer or a convolution of torch."""
    return {
        f"{theirs}.weight": (kernel, f"{ours}/kernel"),
        f"{theirs}.bias": (bias, f"{ours}/bias"),
    }


def norm(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    """A layer norm of torch."""
    return {
        f"{theirs}.weight": ("d -> d", f"{ours}/scale"),
        f"{theirs}.bias": ("d -> d", f"{ours}/bias"),
    }


def vision_block(theirs: str, projections: str, ours: str) -> dict[str, tuple[str, ...]]:
    """The block that ViT and Swin share, whose query, key and value are in `projections`."""
    names = norm(f"{theirs}.layernorm_before", f"{ours}/attention_norm")
    for layer in ("query", "key", "value"):
        names |= linear(
            f"{theirs}.attention.{projections}.{layer}",
            f"{ours}/attention/{layer}",
            "(n h) d -> d n h",
            "(n h) -> n h",
        )
    return {
        **names,
        **linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out", "d (n h) -> n h d"),
        **norm(f"{theirs}.layernorm_after", f"{ours}/mlp_norm"),
        **linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
        **linear(f"{theirs}.output.dense", f"{ours}/mlp/down"),
    }


def get_leaves(model: nnx.Module) -> Leaves:
    """The parameters of a model."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in state}


def make(
    kind: Callable[..., Any], config: Any, rngs: nnx.Rngs, get: Callable[[Leaves], Leaves]
) -> Any:
    """A model whose parameters `get` gives, from arrays of their shapes.

    Its initial parameters are not drawn, but for those that `get` leaves out: nothing asks for
    them where the rest of its state, random streams above all, is made.
    """
    abstract = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    like = {path: np.broadcast_to(False, x.shape) for path, x in get_leaves(abstract).items()}
    leaves = get(like)

    def is_given(path: tuple[Any, ...], _: Any) -> bool:
        return "/".join(map(str, path)) in leaves

    graph, params, _ = nnx.split(abstract, is_given, ...)
    for path, leaf in nnx.to_flat_state(params):
        leaf.set_value(jnp.asarray(leaves["/".join(map(str, path))], leaf.get_value().dtype))
    rest = nnx.jit(lambda rngs: nnx.state(kind(config, rngs=rngs), nnx.Not(is_given)))(rngs)
    return nnx.merge(graph, params, rest)


def read(
    path: str | Path,
    like: Leaves,
    names: Names,
    *,
    prefix: str,
    ignore: str = "$^",
    leave_out: str = "$^",
    tied: Mapping[str, str] = MappingProxyType({}),
) -> Leaves:
    """Reads leaves from a file.

    Args:
        path: A safetensors file, or the index of several, `model.safetensors.index.json`.
        like: Arrays of the shapes that the leaves shall have.
        names: Which tensor holds which leaf. Leaves that are not in `like` are left out.
        prefix: What may stand before the names in the file.
        ignore: A regular expression for names in the file that are not needed.
        leave_out: The same, for names that are told in a warning of the logger.
        tied: Names in the file that may only repeat another one, or stand in its place.

    Returns:
        NumPy arrays of the dtypes in the file.

    Raises:
        ValueError: If names or shapes in the file do not fit. It lists all of them. Or if the
            path is no such file; it says what it is.
    """
    with _opened(Path(path)) as files:

        def get_tensor(name: str) -> Any:
            return files[stored[name]].get_tensor(stored[name])

        stored = {name.removeprefix(prefix): name for name in files}
        if left_out := sorted(name for name in stored if re.search(leave_out, name)):
            _logger.warning("%s: left out %s.", path, ", ".join(left_out))
        stored = {name: full for name, full in stored.items() if name not in left_out}
        stored = {tied[name]: stored[name] for name in tied if name in stored} | stored
        shapes = {
            name: tuple(files[full].get_slice(full).get_shape()) for name, full in stored.items()
        }
        expected = {name: tensor.shape for name, tensor in _tensors(like, names)}
        held = {path for _, *paths in names.values() for path in paths}
        problems = [
            *(f"{leaf}: no tensor holds such a leaf" for leaf in like if leaf not in held),
            *(f"{name}: missing" for name in expected if name not in shapes),
            *(
                f"{name}: unknown"
                for name in shapes
                if name not in expected and name not in tied and not re.search(ignore, name)
            ),
            *(
                f"{name}: {shapes[name]} where {expected[name]} belongs"
                for name in expected
                if shapes.get(name, expected[name]) != expected[name]
            ),
            *(
                f"{name}: differs from {other}, to which it is tied here"
                for name, other in tied.items()
                if {name, other} <= shapes.keys()
                and not np.array_equal(*map(get_tensor, (name, other)))
            ),
        ]
        if problems:
            if any(problem.startswith("classifier.") for problem in problems):
                problems.append("(new_head=True leaves out the file's classifier, if it has one)")
            raise ValueError(f"{path} does not fit this config:\n  " + "\n  ".join(problems))

        leaves: Leaves = {}
        for template, pattern, paths in _held(like, names):
            blocks = _blocks(template, [like[path] for path in paths])
            sizes = dict(zip(pattern.split("->")[1].split(), blocks.shape[1:], strict=True))
            tensors = [get_tensor(template.format(i)) for i in range(len(blocks))]
            blocks = np.stack([einops.rearrange(np.asarray(t), pattern, **sizes) for t in tensors])
            parts = [blocks] if len(paths) == 1 else np.moveaxis(blocks, 1, 0)
            for leaf, part in zip(paths, parts, strict=True):
                leaves[leaf] = part.reshape(like[leaf].shape)
        return leaves


def without_head(get: Callable[..., Leaves]) -> Callable[[Leaves], Leaves]:
    """`read` for a vision model's leaves but those of its head, whatever head the file has."""

    def get_body(like: Leaves) -> Leaves:
        body = {path: leaf for path, leaf in like.items() if not path.startswith("head/")}
        return get(body, leave_out=r"^(classifier|pooler)\.")

    return get_body


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """The open file of each tensor, by its name."""
    with contextlib.ExitStack() as stack:
        files = {}
        for part in _parts(path):
            try:
                file = stack.enter_context(safe_open(part, framework="flax"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{part} is {_what(part)} ({error}).") from None
            files |= dict.fromkeys(file.keys(), file)
        yield files


def _parts(path: Path) -> list[Path]:
    """The file, or those of an index."""
    if path.suffix != ".json":
        return [path]
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path} is no index of safetensors files, which has a weight_map from the names of "
            "tensors to those of files."
        ) from None
    return [path.parent / name for name in sorted(names)]


def _what(path: Path) -> str:
    """What a path is that is no safetensors file, and what to do."""
    if path.is_dir():
        return "a folder: name the file in it, model.safetensors or model.safetensors.index.json"
    if not path.exists():
        return "not there"
    with path.open("rb") as file:
        if file.read(50).startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS, and the file itself was not fetched: run git lfs pull"
    return "no safetensors file, or it is cut off: fetch it again"


def write(path: str | Path, leaves: Leaves, names: Names, *, prefix: str) -> None:
    """Writes leaves to a file that `read` and transformers can read."""
    tensors = {prefix + name: np.ascontiguousarray(t) for name, t in _tensors(leaves, names)}
    save_file(tensors, path, metadata={"format": "pt"})


def _tensors(leaves: Leaves, names: Names) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the value of every tensor that holds some leaves."""
    for template, pattern, paths in _held(leaves, names):
        tensor, leaf = pattern.split("->")
        for i, block in enumerate(_blocks(template, [leaves[path] for path in paths])):
            yield template.format(i), einops.rearrange(block, f"{leaf}->{tensor}")


def _held(leaves: Leaves, names: Names) -> Iterator[tuple[str, str, list[str]]]:
    """The entries for leaves that are there."""
    for template, (pattern, *paths) in names.items():
        if paths[0] in leaves:
            yield template, pattern, paths


def _blocks(template: str, leaves: list[Any]) -> np.ndarray:
    """What the tensors of a template hold, (blocks, [leaves,] ...); one block if it has no {}."""
    joined = leaves[0] if len(leaves) == 1 else np.stack(leaves, axis="{}" in template)
    return np.asarray(joined if "{}" in template else joined[None])
