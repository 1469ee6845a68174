"""GPT-2 as nanoGPT builds it.

Pre-norm blocks, learned positions, GELU, and a head tied to the token embedding.
The blocks are stacked and scanned over: one is compiled, whatever the depth, and
the optimizer sees few large leaves with a leading layer axis.

Shapes: B batch, T time, D width, N heads, H head dimension, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Size and numerics of a GPT."""

    vocab_size: int = 50257
    context_length: int = 1024  # the longest sequence that has positions
    num_layers: int = 12
    num_heads: int = 12
    width: int = 768
    dropout: float = 0.0  # on the embeddings and on what each branch adds
    use_bias: bool = True  # in the linear layers and the layer norms
    dtype: str = "float32"  # of the computation; the parameters are float32
    remat: bool = False  # recompute each block in the backward pass


CONFIGS = {
    # On a CPU, recomputing a block is faster than storing its activations.
    "nano": Config(
        vocab_size=256, context_length=128, num_layers=4, num_heads=4, width=128, remat=True
    ),
    "gpt2-small": Config(),
    "gpt2-large": Config(num_layers=36, num_heads=20, width=1280),
}


class GPT(nnx.Module):
    """A decoder-only Transformer: int tokens (B, T) to float32 logits (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = _embedding(config.vocab_size, config, rngs)
        self.position_embedding = _embedding(config.context_length, config, rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        T = tokens_BxT.shape[-1]
        if self.config.context_length < T:
            raise ValueError(
                f"tokens has {T} positions, more than context_length={self.config.context_length}."
            )
        x_BxTxD = self.token_embedding(tokens_BxT) + self.position_embedding(jnp.arange(T))
        x_BxTxD = self.dropout(x_BxTxD)

        apply = nnx.remat(Block.__call__) if self.config.remat else Block.__call__

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x_BxTxD: jax.Array, block: Block) -> jax.Array:
            return apply(block, x_BxTxD)

        x_BxTxD = self.norm(through(x_BxTxD, self.blocks))
        return self.token_embedding.attend(x_BxTxD).astype(jnp.float32)


class Block(nnx.Module):
    """Attention, then the perceptron, each on a normed branch."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD += self.dropout(self.attention(self.attention_norm(x_BxTxD)))
        x_BxTxD += self.dropout(self.mlp(self.mlp_norm(x_BxTxD)))
        return x_BxTxD


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D, N = config.width, config.num_heads
        self.query = _linear(D, (N, D // N), config, rngs)
        self.key = _linear(D, (N, D // N), config, rngs)
        self.value = _linear(D, (N, D // N), config, rngs)
        self.out = _linear((N, D // N), D, config, rngs, residual=True)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        q_BxTxNxH, k_BxTxNxH, v_BxTxNxH = (
            self.query(x_BxTxD),
            self.key(x_BxTxD),
            self.value(x_BxTxD),
        )
        fused = jax.default_backend() == "gpu" and q_BxTxNxH.dtype.itemsize == 2
        y_BxTxNxH = jax.nn.dot_product_attention(
            q_BxTxNxH,
            k_BxTxNxH,
            v_BxTxNxH,
            is_causal=True,
            implementation="cudnn" if fused else "xla",  # cuDNN's kernel takes 16 bits only
        )
        return self.out(y_BxTxNxH)


class MLP(nnx.Module):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.up = _linear(config.width, 4 * config.width, config, rngs)
        self.down = _linear(4 * config.width, config.width, config, rngs, residual=True)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x_BxTxD)))


def _embedding(num_embeddings: int, config: Config, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        num_embeddings,
        config.width,
        dtype=config.dtype,
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width, epsilon=1e-5, dtype=config.dtype, use_bias=config.use_bias, rngs=rngs
    )


def _linear(
    in_features: int | tuple[int, ...],
    out_features: int | tuple[int, ...],
    config: Config,
    rngs: nnx.Rngs,
    residual: bool = False,
) -> nnx.LinearGeneral:
    """A linear layer; one that ends a residual branch starts smaller, by depth."""
    std = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
    return nnx.LinearGeneral(
        in_features,
        out_features,
        axis=(-2, -1) if isinstance(in_features, tuple) else -1,
        dtype=config.dtype,
        use_bias=config.use_bias,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )
