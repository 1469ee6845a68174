"""How far a step moves what each layer computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import modules


def layer_representation_changes(
    model: nnx.Module,
    updates: Any,
    batch: Any,
    fn: Callable[[nnx.Module, Any], Any],
) -> dict[str, jax.Array]:
    """Measures how much a step changes the output of each layer, relative to its size.

    That is |dW x| / |W x|, on the inputs x that the layer has before the step, without its bias.
    As long as the gradients of a batch agree it is far larger than the relative size of the
    update: that is why the first steps want a smaller rate.

    Args:
        model: Its linear layers and convolutions are measured, alone or stacked along leading axes.
        updates: The step, as `nnx.Optimizer` applies it: a state or a nested dict like that of
            the model's `nnx.Param`.
        batch: Whatever `fn` takes.
        fn: Calls the model on the batch. The call is jitted, once for each `fn`: give it a
            function that stays, not a new lambda each time.

    Returns:
        For each layer, by its path, an array with the shape of the stack, in float32 at least.

    Raises:
        ValueError: If the model has no such layer, or if `updates` has none of its kernels.

    References:
        Kosson et al., Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training,
        https://arxiv.org/abs/2410.23922, 2024
    """
    graph, state = nnx.split(model)
    return _measure(graph, nnx.as_pure(state), nnx.as_pure(updates), batch, fn)


@functools.partial(jax.jit, static_argnames=("graph", "fn"))
def _measure(
    graph: nnx.GraphDef, state: Any, updates: Any, batch: Any, fn: Callable
) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state)
    measured: dict[modules.Path, _Measured] = {}
    layers: list[tuple[modules.Path, Any]] = list(nnx.iter_modules(model))
    for path, layer in layers:
        rank = _kernel_rank(layer)
        if rank and path:
            stack_rank = layer.kernel.ndim - rank
            measured[path] = _Measured(layer, _kernel(updates, path), stack_rank)
    if not measured:
        raise ValueError(f"{type(model).__name__} has no layer with a kernel inside of it.")
    for path, layer in measured.items():
        modules.replace(model, path, layer)
    fn(model, batch)
    return {"/".join(map(str, path)): layer.change[...] for path, layer in measured.items()}


def _kernel_rank(layer: Any) -> int:
    """The rank of the kernel of a layer that is not stacked; 0 if it is none with a kernel."""
    match layer:
        case nnx.Linear():
            return 2
        case nnx.LinearGeneral(in_features=n_in, out_features=n_out, batch_axis=batch):
            return len(batch) + len(n_in) + len(n_out)
        case nnx.Conv(kernel_shape=shape):
            return len(shape)
    return 0


def _kernel(updates: Any, path: modules.Path) -> jax.Array:
    for name in (*path, "kernel"):
        if name not in updates:
            raise ValueError(
                f"updates has no kernel at {'/'.join(map(str, path))!r}. Give it a tree like "
                "nnx.state(model, nnx.Param)."
            )
        updates = updates[name]
    return updates


class _Measured(nnx.Module):
    """A layer, or a stack of them, that measures what a change of its kernel would do."""

    def __init__(self, layer: Any, change: jax.Array, stack_rank: int):
        self.layer = layer
        self.before, self.after = nnx.clone(layer), nnx.clone(layer)
        self.after.kernel[...] = change
        for linear in (self.before, self.after):
            if linear.bias is not None:
                linear.bias[...] = jnp.zeros_like(linear.bias[...])
        self.change = nnx.Intermediate(jnp.zeros(change.shape[:stack_rank]))

    def __call__(self, *inputs: Any) -> Any:
        norms = [
            jnp.linalg.norm(jnp.ravel(linear(*inputs).astype(jnp.float32)))
            for linear in (self.after, self.before)
        ]
        self.change[...] = norms[0] / norms[1]
        return self.layer(*inputs)
