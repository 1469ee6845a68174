"""How far a step moves what each layer computes. Needs flax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from weyl_optax.dynamics import _modules
from weyl_optax.flax import layer_parameters


def layer_representation_changes(
    model: nnx.Module,
    updates: Any,
    batch: Any,
    fn: Callable[[nnx.Module, Any], Any],
) -> dict[str, jax.Array]:
    r"""Compute how much a step changes the output of each linear layer, relative to its size.

    .. math::

        \frac{\lVert \Delta W x \rVert_2}{\lVert W x \rVert_2}

    on the inputs :math:`x` that the layer has before the step, without its bias. As long as the
    gradients of a batch agree it is far larger than the relative size of the update: that
    is why the first steps want a smaller rate.

    Args:
        model: A Flax NNX module. Its layers with a kernel are measured: linear layers, einsums and
            convolutions, alone or stacked along leading axes.
        updates: The step, as ``nnx.Optimizer`` applies it: a state or a nested dict like that of
            the model's ``nnx.Param``.
        batch: Whatever ``fn`` takes.
        fn: Calls the model on the batch. The call is jitted, once for each ``fn``: give it a
            function that stays, not a new lambda each time.

    Returns:
        For each layer, by its path, an array with the shape of the stack, in float32 at least.

    Raises:
        ValueError: If the model has no such layer, or if ``updates`` has none of its kernels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from weyl_optax.dynamics import layer_representation_changes
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jax.nn.relu)
        >>> updates = jax.tree.map(lambda p: -0.1 * p, nnx.state(model, nnx.Param))
        >>> changes = layer_representation_changes(
        ...     model, updates, jnp.ones((2, 4)), lambda model, x: model(x))
        >>> for path, change in changes.items():
        ...     print(f"{path} {change:.3f}")
        layers/0 0.100

    References:
        Kosson et al., `Analyzing & Reducing the Need for Learning Rate Warmup in GPT
        Training <https://arxiv.org/abs/2410.23922>`_, 2024
    """
    graph, state = nnx.split(model)
    return _measure(graph, nnx.as_pure(state), nnx.as_pure(updates), batch, fn)


@functools.partial(jax.jit, static_argnames=("graph", "fn"))
def _measure(
    graph: nnx.GraphDef, state: Any, updates: Any, batch: Any, fn: Callable
) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state)
    measured: dict[_modules.Path, _Measured] = {}
    layers: list[tuple[_modules.Path, Any]] = list(nnx.iter_modules(model))
    for path, layer in layers:
        shapes = {name: shape for name, shape, *_ in layer_parameters(layer)}
        if "kernel" not in shapes or not path:
            continue
        stack = layer.kernel.shape[: layer.kernel.ndim - len(shapes["kernel"])]
        measured[path] = _Measured(layer, _kernel(updates, path), len(stack))
    if not measured:
        raise ValueError(f"{type(model).__name__} has no layer with a kernel inside of it.")
    for path, layer in measured.items():
        _modules.replace(model, path, layer)
    fn(model, batch)
    return {"/".join(map(str, path)): layer.change[...] for path, layer in measured.items()}


def _kernel(updates: Any, path: _modules.Path) -> jax.Array:
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
