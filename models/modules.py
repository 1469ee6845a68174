"""The modules inside of a model, by their paths."""

import functools
from typing import Any, TypeAlias

from flax import nnx

Path: TypeAlias = tuple[Any, ...]  # names and indices


def find(model: Any, path: Path) -> Any:
    """The module at a path."""
    return functools.reduce(
        lambda module, name: module[name] if isinstance(name, int) else getattr(module, name),
        path,
        model,
    )


def replace(model: nnx.Module, path: Path, module: nnx.Module) -> None:
    """Puts another module in the place of that at a path."""
    *above, name = path
    parent = find(model, tuple(above))
    if isinstance(name, int):
        parent[name] = module
    else:
        setattr(parent, name, module)
