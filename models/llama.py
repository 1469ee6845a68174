"""A Llama: what decoders have become since GPT-2.

Pre-norm blocks with RMSNorm, rotary positions, SwiGLU, a head of its own, no biases; and, if
wanted, queries and keys that are normed (QK-norm), as in Qwen3.

Shapes: B batch, T time, D width, V vocabulary, N heads, H head dimension, F half of it, M inner
width of the perceptron.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Size and numerics of a Llama."""

    vocab_size: int = 32000
    context_length: int = 2048  # the longest sequence
    num_layers: int = 12  # by default, of the depth and width of GPT-2 small
    num_heads: int = 12
    width: int = 768
    inner_width: int = 2048  # of the perceptron, usually 8/3 of the width
    qk_norm: bool = False  # norm every head's queries and keys
    rotary_base: float = 10_000.0
    dtype: str = "float32"  # of the computation; the parameters are float32
    remat: bool = False  # recompute each block in the backward pass


# On a CPU, recomputing a block is faster than storing its activations.
_NANO = Config(
    vocab_size=256,
    context_length=128,
    num_layers=2,
    num_heads=2,
    width=48,
    inner_width=128,
    remat=True,
)

_SMALL = Config(context_length=1024, remat=True)

CONFIGS = {
    "llama-nano": _NANO,
    "llama-nano-qk-norm": dataclasses.replace(_NANO, qk_norm=True),
    "llama-nano-wide": dataclasses.replace(_NANO, num_heads=4, width=96, inner_width=256),
    "llama-small": _SMALL,
    "llama-small-qk-norm": dataclasses.replace(_SMALL, qk_norm=True),
}


class Llama(nnx.Module):
    """A decoder-only Transformer: int tokens (B, T) to float32 logits (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.blocks = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = _norm(config.width, config, rngs)
        self.head = _linear(config, rngs)(config.width, config.vocab_size)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        T = tokens_BxT.shape[-1]
        if self.config.context_length < T:
            raise ValueError(
                f"tokens has {T} positions, more than context_length={self.config.context_length}."
            )
        x_BxTxD = self.token_embedding(tokens_BxT)
        x_BxTxD = self.norm(layers.scan(self.blocks, x_BxTxD, remat=self.config.remat))
        return self.head(x_BxTxD).astype(jnp.float32)


class Block(nnx.Module):
    """Attention, then the perceptron, each on a normed branch."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D = config.width
        # As in GPT-2, a layer that ends a residual branch starts smaller, by their number.
        smaller = nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        linear = _linear(config, rngs)
        last = functools.partial(linear, kernel_init=smaller)
        self.attention_norm = _norm(D, config, rngs)
        self.attention = Attention(config, linear, last, rngs=rngs)
        self.mlp_norm = _norm(D, config, rngs)
        self.mlp = SwiGLU(D, config.inner_width, linear, last)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD += self.attention(self.attention_norm(x_BxTxD))
        x_BxTxD += self.mlp(self.mlp_norm(x_BxTxD))
        return x_BxTxD


class Attention(layers.Attention):
    """Causal attention with rotary positions, and normed queries and keys if wanted."""

    def __init__(
        self, config: Config, linear: layers.Linear, last: layers.Linear, *, rngs: nnx.Rngs
    ):
        super().__init__(config.width, config.num_heads, linear, last, is_causal=True)
        if config.width // config.num_heads % 2:
            raise ValueError(
                f"width={config.width} / num_heads={config.num_heads} must be even: rotary "
                "positions turn pairs."
            )
        self.base = config.rotary_base
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.query_norm, self.key_norm = (
                _norm(config.width // config.num_heads, config, rngs) for _ in range(2)
            )

    def queries_and_keys(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BxTxNxH, k_BxTxNxH = super().queries_and_keys(x_BxTxD)
        if self.qk_norm:
            q_BxTxNxH, k_BxTxNxH = self.query_norm(q_BxTxNxH), self.key_norm(k_BxTxNxH)
        return rotate(q_BxTxNxH, self.base), rotate(k_BxTxNxH, self.base)


def rotate(x_BxTxNxH: jax.Array, base: float) -> jax.Array:
    """Turns the pair (i, i + F) of every head by an angle of its own for each position."""
    T, F = x_BxTxNxH.shape[1], x_BxTxNxH.shape[3] // 2
    frequencies_F = base ** (-jnp.arange(F) / F)
    angles_Tx1xF = jnp.arange(T)[:, None, None] * frequencies_F
    cos_Tx1xF, sin_Tx1xF = jnp.cos(angles_Tx1xF), jnp.sin(angles_Tx1xF)
    a_BxTxNxF, b_BxTxNxF = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = (
        a_BxTxNxF * cos_Tx1xF - b_BxTxNxF * sin_Tx1xF,
        b_BxTxNxF * cos_Tx1xF + a_BxTxNxF * sin_Tx1xF,
    )
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxNxH.dtype)


class SwiGLU(nnx.Module):
    """A perceptron whose inner layer is gated by another."""

    def __init__(self, width: int, inner_width: int, linear: layers.Linear, last: layers.Linear):
        self.gate = linear(width, inner_width)
        self.up = linear(width, inner_width)
        self.down = last(inner_width, width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        h_BxTxM = nnx.silu(self.gate(x_BxTxD)) * self.up(x_BxTxD)
        return self.down(h_BxTxM)


def _linear(config: Config, rngs: nnx.Rngs) -> functools.partial[nnx.LinearGeneral]:
    return functools.partial(
        layers.linear,
        dtype=config.dtype,
        kernel_init=nnx.initializers.normal(0.02),
        use_bias=False,
        rngs=rngs,
    )


def _norm(size: int, config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=1e-5, dtype=config.dtype, rngs=rngs)
