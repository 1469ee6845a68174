"""GPT-2, initialized as in nanoGPT.

Pre-norm blocks, learned positions, GELU, and a head tied to the token embedding. There is no
dropout within attention, and in bfloat16 the residual stream is bfloat16 too, which nanoGPT's
autocast keeps in float32.
The blocks are stacked and scanned over: one is compiled, whatever the depth, and
the optimizer sees few large leaves with a leading layer axis.

Shapes: B batch, T time, D width, V vocabulary.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import hugging_face, layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Size and numerics of a GPT."""

    vocab_size: int = 50257
    pad_vocab_to_multiple_of: int = 1  # more rows in the embedding; the logits leave them out
    context_length: int = 1024  # the longest sequence that has positions
    num_layers: int = 12
    num_heads: int = 12
    width: int = 768
    dropout: float = 0.0  # on the embeddings and on what each branch adds
    use_bias: bool = True  # in the linear layers and the layer norms
    dtype: str = "float32"  # of the computation; the parameters are float32
    remat: bool = False  # recompute each block in the backward pass


# On a CPU, recomputing a block is faster than storing its activations.
_NANO = Config(vocab_size=256, context_length=128, num_layers=4, num_heads=4, width=128, remat=True)

CONFIGS = {
    "nano": _NANO,
    "nano-wide": dataclasses.replace(_NANO, num_heads=8, width=256),
    "nano-widest": dataclasses.replace(_NANO, num_heads=16, width=512),
    "gpt2-small": Config(),
    "gpt2-large": Config(num_layers=36, num_heads=20, width=1280),
}

# The linear layers of GPT-2 are stored as (in, out), those of query, key and value in one.
_NAMES = {
    "wte.weight": ("v d -> v d", "token_embedding/embedding"),
    "wpe.weight": ("t d -> t d", "position_embedding/embedding"),
    "h.{}.ln_1.weight": ("d -> d", "blocks/attention_norm/scale"),
    "h.{}.ln_1.bias": ("d -> d", "blocks/attention_norm/bias"),
    "h.{}.attn.c_attn.weight": (
        "d (p n h) -> p d n h",
        *(f"blocks/attention/{name}/kernel" for name in ("query", "key", "value")),
    ),
    "h.{}.attn.c_attn.bias": (
        "(p n h) -> p n h",
        *(f"blocks/attention/{name}/bias" for name in ("query", "key", "value")),
    ),
    "h.{}.attn.c_proj.weight": ("(n h) d -> n h d", "blocks/attention/out/kernel"),
    "h.{}.attn.c_proj.bias": ("d -> d", "blocks/attention/out/bias"),
    "h.{}.ln_2.weight": ("d -> d", "blocks/mlp_norm/scale"),
    "h.{}.ln_2.bias": ("d -> d", "blocks/mlp_norm/bias"),
    "h.{}.mlp.c_fc.weight": ("d m -> d m", "blocks/mlp/up/kernel"),
    "h.{}.mlp.c_fc.bias": ("m -> m", "blocks/mlp/up/bias"),
    "h.{}.mlp.c_proj.weight": ("m d -> m d", "blocks/mlp/down/kernel"),
    "h.{}.mlp.c_proj.bias": ("d -> d", "blocks/mlp/down/bias"),
    "ln_f.weight": ("d -> d", "norm/scale"),
    "ln_f.bias": ("d -> d", "norm/bias"),
}


class GPT(nnx.Module):
    """A decoder-only Transformer: int tokens (B, T) to float32 logits (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        multiple = config.pad_vocab_to_multiple_of
        rows = math.ceil(config.vocab_size / multiple) * multiple
        self.token_embedding = _embedding(rows, config, rngs)
        self.position_embedding = _embedding(config.context_length, config, rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.blocks = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        T = tokens_BxT.shape[-1]
        if self.config.context_length < T:
            raise ValueError(
                f"tokens has {T} positions, more than context_length={self.config.context_length}."
            )
        x_BxTxD = self.token_embedding(tokens_BxT) + self.position_embedding(jnp.arange(T))
        x_BxTxD = self.dropout(x_BxTxD)
        x_BxTxD = self.norm(layers.scan(self.blocks, x_BxTxD, remat=self.config.remat))
        logits_BxTxV = self.token_embedding.attend(x_BxTxD)[..., : self.config.vocab_size]
        return logits_BxTxV.astype(jnp.float32)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        config: Config = CONFIGS["gpt2-small"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> "GPT":
        """Loads the weights of a GPT2LMHeadModel, or a GPT2Model, of transformers.

        Args:
            path: Its `model.safetensors`, or `model.safetensors.index.json`.
            config: Of the same sizes. Rows that pad the vocabulary are zero.
            rngs: For the dropout.

        Raises:
            ValueError: If names or shapes in the file do not fit. It lists all of them.
        """

        def get(like: hugging_face.Leaves) -> hugging_face.Leaves:
            table = "token_embedding/embedding"
            leaves = hugging_face.read(
                path,
                like | {table: like[table][: config.vocab_size]},
                _NAMES,
                prefix="transformer.",
                ignore=r"\.attn\.(masked_)?bias$",  # the causal mask, in old files
                tied={"lm_head.weight": "wte.weight"},
            )
            padding = len(like[table]) - config.vocab_size
            return leaves | {table: np.pad(leaves[table], ((0, padding), (0, 0)))}

        return hugging_face.make(cls, config, rngs or nnx.Rngs(0), get)

    def to_safetensors(self, path: str | Path) -> None:
        """Saves the weights as transformers does, without the rows that pad the vocabulary."""
        leaves = hugging_face.get_leaves(self)
        rows = leaves["token_embedding/embedding"][: self.config.vocab_size]
        leaves["token_embedding/embedding"] = rows
        hugging_face.write(path, leaves, _NAMES, prefix="transformer.")


class Block(nnx.Module):
    """Attention, then the perceptron, each on a normed branch."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D = config.width
        std = 0.02
        linear = functools.partial(
            layers.linear,
            dtype=config.dtype,
            kernel_init=nnx.initializers.normal(std),
            use_bias=config.use_bias,
            rngs=rngs,
        )
        # A layer that ends a residual branch starts smaller, by the number of branches.
        smaller = nnx.initializers.normal(std / (2 * config.num_layers) ** 0.5)
        last = functools.partial(linear, kernel_init=smaller)
        self.attention_norm = _norm(config, rngs)
        self.attention = layers.Attention(D, config.num_heads, linear, last, is_causal=True)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = layers.MLP(D, 4 * D, linear, last, nnx.gelu)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD += self.dropout(self.attention(self.attention_norm(x_BxTxD)))
        x_BxTxD += self.dropout(self.mlp(self.mlp_norm(x_BxTxD)))
        return x_BxTxD


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
