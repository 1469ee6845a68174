"""What the architectures share: stacks of blocks, and the layers of a block.

Shapes: B batch, T time or tokens, D width, N heads, H head dimension.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def stack(make: Callable[[nnx.Rngs], nnx.Module], size: int, rngs: nnx.Rngs) -> Any:
    """Modules of one kind in one, every leaf with a leading axis of that size."""
    return nnx.split_rngs(splits=size)(nnx.vmap(make))(rngs)


def scan(blocks: nnx.Module, x: jax.Array, *per_block: jax.Array, remat: bool = False) -> jax.Array:
    """Sends `x` through a stack of blocks. One is compiled, whatever the depth.

    Each block is called with `x` and its slice of every array in `per_block`. With
    `remat`, the backward pass computes a block again instead of storing its inside.
    """
    call = nnx.remat(type(blocks).__call__) if remat else type(blocks).__call__

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def through(x: jax.Array, block: nnx.Module, inputs: tuple[jax.Array, ...]) -> jax.Array:
        return call(block, x, *inputs)

    return through(x, blocks, per_block)


def check_images(images: jax.Array, image_size: int, num_channels: int) -> None:
    """Raises ValueError where images are not (batch, image_size, image_size, num_channels)."""
    if images.shape[1:] != (image_size, image_size, num_channels):
        raise ValueError(
            f"images has the shape {images.shape}, not (batch, {image_size}, {image_size}, "
            f"{num_channels})."
        )


def linear(
    in_features: int | tuple[int, ...],
    out_features: int | tuple[int, ...],
    *,
    dtype: str,
    kernel_init: nnx.Initializer,
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> nnx.LinearGeneral:
    """A linear layer from the last axis, or from the last two (heads, head dimension)."""
    return nnx.LinearGeneral(
        in_features,
        out_features,
        axis=(-2, -1) if isinstance(in_features, tuple) else -1,
        dtype=dtype,
        kernel_init=kernel_init,
        use_bias=use_bias,
        rngs=rngs,
    )


Linear = Callable[[int | tuple[int, ...], int | tuple[int, ...]], nnx.LinearGeneral]


class Attention(nnx.Module):
    """Self-attention: (B, T, D) to (B, T, D). `linear` makes its layers, `last` the last one."""

    def __init__(
        self, width: int, num_heads: int, linear: Linear, last: Linear, *, is_causal: bool = False
    ):
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide width={width}.")
        heads = num_heads, width // num_heads
        self.is_causal = is_causal
        self.query = linear(width, heads)
        self.key = linear(width, heads)
        self.value = linear(width, heads)
        self.out = last(heads, width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        q_BxTxNxH, k_BxTxNxH = self.queries_and_keys(x_BxTxD)
        v_BxTxNxH = self.value(x_BxTxD)
        fused = jax.default_backend() == "gpu" and q_BxTxNxH.dtype.itemsize == 2
        y_BxTxNxH = jax.nn.dot_product_attention(
            q_BxTxNxH,
            k_BxTxNxH,
            v_BxTxNxH,
            is_causal=self.is_causal,
            implementation="cudnn" if fused else "xla",  # cuDNN's kernel takes 16 bits only
        )
        return self.out(y_BxTxNxH)

    def queries_and_keys(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those whose products are the logits."""
        return self.query(x_BxTxD), self.key(x_BxTxD)

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Float32 (B, N, T, T), which a call may never form; -inf where a query must not look."""
        q_BxTxNxH, k_BxTxNxH = self.queries_and_keys(x_BxTxD)
        T, H = q_BxTxNxH.shape[1], q_BxTxNxH.shape[-1]
        logits_BxNxTxT = jnp.einsum("btnh,bsnh->bnts", q_BxTxNxH, k_BxTxNxH) / H**0.5
        allowed_TxT = jnp.tril(jnp.ones((T, T), bool)) if self.is_causal else True
        logits_BxNxTxT = logits_BxNxTxT.astype(jnp.float32)
        return jnp.where(allowed_TxT, logits_BxNxTxT, -jnp.inf)


class _Observed(nnx.Module):
    """A block, or a stack of them, that keeps what a function finds in its attention's logits."""

    def __init__(self, block: nnx.Module, find: Callable[[jax.Array], jax.Array]):
        self.block = block
        self.find = find

    def __call__(self, x_BxTxD: jax.Array, *inputs: Any) -> jax.Array:
        normed_BxTxD = self.block.attention_norm(x_BxTxD)
        self.found = nnx.Intermediate(self.find(self.block.attention.logits(normed_BxTxD)))
        return self.block(x_BxTxD, *inputs)


def attention_weights(model: nnx.Module, inputs: Any) -> jax.Array:
    """The attention maps of all blocks of a GPT or a ViT, float32 (blocks, B, N, T, T)."""
    return _observe_logits(model, inputs, jax.nn.softmax)


def largest_logits(model: nnx.Module, inputs: Any) -> jax.Array:
    """The largest logit of every head of a GPT or a ViT over a batch, float32 (blocks, N)."""
    return _observe_logits(model, inputs, lambda logits_BxNxTxT: logits_BxNxTxT.max((0, 2, 3)))


def _observe_logits(
    model: nnx.Module, inputs: Any, find: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    observed = nnx.clone(model)
    observed.blocks = _Observed(observed.blocks, find)
    observed(inputs)
    return observed.blocks.found[...]


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        width: int,
        inner_width: int,
        linear: Linear,
        last: Linear,
        activation: Callable[[jax.Array], jax.Array],
    ):
        self.activation = activation
        self.up = linear(width, inner_width)
        self.down = last(inner_width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, as in the vision models; GPT-2 has the approximation."""
    return nnx.gelu(x, approximate=False)


class StochasticDepth(nnx.Module):
    """In training, leaves out a residual branch for some images, and scales it up for the rest.

    The probability grows linearly over the blocks, from 0 at depth 0 to `rate` at depth 1.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.rate = rate
        self.deterministic = False  # as in nnx.Dropout: model.eval() sets it
        self.rngs = rngs.dropout.fork()

    def __call__(self, branch: jax.Array, depth: jax.Array) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return branch
        kept = (1 - self.rate * depth).astype(branch.dtype)
        each_image = branch.shape[0], *[1] * (branch.ndim - 1)
        return jnp.where(
            jax.random.bernoulli(self.rngs(), kept, each_image),
            branch / kept,
            jnp.zeros_like(branch),
        )
