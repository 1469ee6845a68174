"""The quantities of a Transformer that blow up before a crash."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import modules
from weyl_optax import spectral_norm

TERMS = (
    *("W_q", "W_k", "W_v", "W_o", "W_1", "W_2"),
    *("gamma_1", "beta_1", "gamma_2", "beta_2"),
    *("W_qW_k", "W_oW_v", "W_2W_1"),
    *("x", "grad_x"),
)


def watch(
    model: nnx.Module, batch: Any, loss: Callable[[nnx.Module, Any], jax.Array]
) -> dict[str, jax.Array]:
    """Measures the 15 terms that the paper watches, in every block of a model.

    ======================  =============================================
    key                     value
    ======================  =============================================
    W_q, W_k, W_v, W_o      spectral norms, over all heads
    W_1, W_2                spectral norms, of the perceptron
    W_qW_k, W_oW_v, W_2W_1  spectral norms of W_q^T W_k, W_o W_v, W_2 W_1
    gamma_1, beta_1         2-norms, of the norm of attention
    gamma_2, beta_2         2-norms, of the norm of the perceptron
    x                       2-norm of the input of the block
    grad_x                  2-norm of dL/dx, the gradient there
    ======================  =============================================

    The last two are over all entries of the batch. A norm without a bias has no beta: with
    RMSNorm, or without biases, the terms are 13. In a SwiGLU, W_1 is the layer that is gated.

    Args:
        model: Of `models`, or with blocks that are named as there. They may be stacked along
            leading axes. It is used in the mode in which it is, training or not.
        batch: What `loss` takes.
        loss: Of the model on the batch, a scalar. The call is jitted, once for each `loss`:
            give it a function that stays, not a new lambda each time.

    Returns:
        A flat dict of float32 scalars, `<path of the stack>/<block>/<key>`.

    Raises:
        ValueError: If the model has no such blocks.

    References:
        Qi et al., Taming Transformer Without Using Learning Rate Warmup,
        https://arxiv.org/abs/2505.21910, 2025, section 3.1
    """
    graph, state = nnx.split(model)
    return _watch(graph, nnx.as_pure(state), batch, loss)


@functools.partial(jax.jit, static_argnames=("graph", "loss"))
def _watch(graph: nnx.GraphDef, state: Any, batch: Any, loss: Callable) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state)
    stacks = {path: block for path, block in nnx.iter_modules(model) if _is_block(block)}
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no blocks to watch. A block has attention_norm, attention "
            "(query, key, value, out), mlp_norm and mlp (up, down)."
        )
    names = {"/".join(map(str, path)): path for path in stacks}
    # All matrices in one call: they share each iteration.
    terms = spectral_norm({name: _matrices(stacks[path]) for name, path in names.items()})
    inputs = _norms_at_inputs(model, stacks, batch, loss)
    for name, path in names.items():
        terms[name] |= _vector_norms(stacks[path])
        terms[name] |= {"x": inputs[path][..., 0], "grad_x": inputs[path][..., 1]}
    return {
        "/".join(map(str, (name, *place, term))): terms[name][term][place]
        for name, path in names.items()
        for place in np.ndindex(_stack_shape(stacks[path]))
        for term in TERMS
        if term in terms[name]
    }


def _is_block(module: nnx.Module) -> bool:
    parts = ("attention_norm", "attention", "mlp_norm", "mlp")
    return all(hasattr(module, part) for part in parts)


def _stack_shape(block: Any) -> tuple[int, ...]:
    return block.mlp.up.kernel.shape[:-2]


def _matrices(block: Any) -> dict[str, jax.Array]:
    """The weights and their products, (*stack, m, n)."""
    rank = len(_stack_shape(block))

    def matrix(layer: Any, inputs: int = 1) -> jax.Array:
        kernel = layer.kernel[...]
        stack, sizes = kernel.shape[:rank], kernel.shape[rank:]
        return kernel.reshape(*stack, math.prod(sizes[:inputs]), math.prod(sizes[inputs:]))

    product = functools.partial(jnp.matmul, precision="highest")

    query, key, value = map(
        matrix, (block.attention.query, block.attention.key, block.attention.value)
    )
    out = matrix(block.attention.out, inputs=2)  # heads and their dimension
    up, down = matrix(block.mlp.up), matrix(block.mlp.down)
    return {
        "W_q": query,
        "W_k": key,
        "W_v": value,
        "W_o": out,
        "W_1": up,
        "W_2": down,
        "W_qW_k": product(query, key.mT),
        "W_oW_v": product(value, out),
        "W_2W_1": product(up, down),
    }


def _vector_norms(block: Any) -> dict[str, jax.Array]:
    parameters = {
        "gamma_1": block.attention_norm.scale,
        "beta_1": getattr(block.attention_norm, "bias", None),
        "gamma_2": block.mlp_norm.scale,
        "beta_2": getattr(block.mlp_norm, "bias", None),
    }
    return {
        name: jnp.linalg.norm(parameter[...], axis=-1)
        for name, parameter in parameters.items()
        if parameter is not None
    }


def _norms_at_inputs(
    model: nnx.Module, stacks: dict[modules.Path, Any], batch: Any, loss: Callable
) -> dict[modules.Path, jax.Array]:
    """The 2-norms of the input of every block and of the gradient there, shape (*stack, 2)."""
    for path, block in stacks.items():
        modules.replace(model, path, _Probed(block, _stack_shape(block)))
    graph, norms, rest = nnx.split(model, _Norms, ...)
    norms, rest = nnx.as_pure(norms), nnx.as_pure(rest)
    measured = jax.grad(lambda norms: loss(nnx.merge(graph, norms, rest), batch))(norms)
    return {
        path: functools.reduce(lambda x, k: x[k], (*path, "norms"), measured) for path in stacks
    }


class _Norms(nnx.Variable):
    """Zeros, whose gradient is what was measured."""


class _Probed(nnx.Module):
    """A block, or a stack of them, that measures its input when it is differentiated."""

    def __init__(self, block: nnx.Module, stack_shape: tuple[int, ...]):
        self.block = block
        self.norms = _Norms(jnp.zeros((*stack_shape, 2)))

    def __call__(self, x: jax.Array, *inputs: Any) -> jax.Array:
        return self.block(_probe(x, self.norms[...]), *inputs)


@jax.custom_vjp
def _probe(x: jax.Array, norms: jax.Array) -> jax.Array:
    """The identity of x. The gradient by `norms` is the norms of x and of its gradient."""
    del norms
    return x


def _probe_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    norms = [jnp.linalg.norm(a.astype(jnp.float32)) for a in (x, gradient)]
    return gradient, jnp.stack(norms)


_probe.defvjp(lambda x, norms: (x, x), _probe_backward)
