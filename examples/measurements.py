"""What is logged of a training beside its loss."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import optimizers
from examples.watch import watch
from models import layers
from weyl_optax import bound_metrics, spectral_norm


def max_logits(
    name: str, inputs: Callable[[Any], jax.Array]
) -> Callable[[nnx.Module, Any], dict[str, jax.Array]] | None:
    """The largest logits of every head, from the inputs in a batch, if an optimizer needs them.

    That is QK-Clip. They are those of a GPT or a ViT.
    """
    if name != "qk_clip":
        return None
    return lambda model, batch: {"blocks/attention": layers.largest_logits(model, inputs(batch))}


def observe(
    name: str, stacks: Callable[[Any], Sequence[Any]]
) -> Callable[[Any, optax.OptState], dict[str, jax.Array]]:
    """What is logged of a run with the optimizer of that name.

    The spectral norm of W_q W_k^T, over all heads together, of each block in the stacks of a
    model, and what the bound did.
    """

    def metrics(model: Any, opt_state: optax.OptState) -> dict[str, jax.Array]:
        products = [_qk(blocks) for blocks in stacks(model)]
        found = {"qk_sigma": jnp.concatenate(spectral_norm(products))}
        return found | bound_metrics(opt_state) if name in optimizers.ALONE else found

    return metrics


def measure(loss: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """The paper's 15 terms in every block, on the first micro-batch, as `watch/<name>`."""

    def terms(model: Any, batch: Any) -> dict[str, jax.Array]:
        found = watch(model, jax.tree.map(lambda x: x[0], batch), loss)
        return {f"watch/{name}": value for name, value in found.items()}

    return terms


def _qk(blocks: Any) -> jax.Array:
    """W_q W_k^T of stacked blocks, (blocks, d, d)."""
    query, key = blocks.attention.query.kernel[...], blocks.attention.key.kernel[...]
    return jnp.einsum("ldnh,lenh->lde", query, key)
