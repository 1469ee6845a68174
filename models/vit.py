"""The Vision Transformer of Dosovitskiy et al. (2020), at the sizes of timm and the paper.

Pre-norm blocks over the patches of an image, learned positions, exact GELU. All kernels start as
Xavier's truncated normal, also the head, where timm has a deviation of 0.02 and a head of zeros. A
mean over the patches is taken after the last norm, where timm norms the mean. The blocks are
stacked and scanned over, as in `models/gpt.py`.

Shapes: B batch, R rows, C columns, T tokens, D width.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models import hugging_face, layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Size and numerics of a ViT."""

    image_size: int = 224  # height and width in pixels
    num_channels: int = 3
    patch_size: int = 16
    num_classes: int = 1000
    num_layers: int = 12
    num_heads: int = 12
    width: int = 768
    mlp_width: int = 3072
    norm: Literal["layer", "rms"] = "layer"
    pool: Literal["class", "mean"] = "class"  # a class token, or the mean over the patches
    stochastic_depth: float = 0.0  # in the last block; it grows linearly from 0 in the first
    dtype: str = "float32"  # of the computation; the parameters are float32
    remat: bool = False  # recompute each block in the backward pass


CONFIGS = {
    # For 8 x 8 digits. On a CPU, recomputing a block is faster than storing its activations.
    "nano": Config(
        image_size=8,
        num_channels=1,
        patch_size=2,
        num_classes=10,
        num_layers=4,
        num_heads=4,
        width=128,
        mlp_width=512,
        remat=True,
    ),
    "tiny": Config(num_heads=3, width=192, mlp_width=768),
    "base": Config(),
    "large": Config(num_layers=24, num_heads=16, width=1024, mlp_width=4096),
    "giant": Config(patch_size=14, num_layers=40, num_heads=16, width=1408, mlp_width=6144),
}

_NAMES = {
    "embeddings.cls_token": ("1 1 d -> d", "class_token"),
    "embeddings.position_embeddings": ("1 t d -> t d", "position_embedding"),
    **hugging_face.linear(
        "embeddings.patch_embeddings.projection", "patch_embedding", "o i h w -> h w i o"
    ),
    **hugging_face.vision_block("encoder.layer.{}", "attention", "blocks"),
    **hugging_face.norm("layernorm", "norm"),
    **hugging_face.linear("classifier", "head"),
}


class ViT(nnx.Module):
    """An image classifier: float images (B, height, width, channels) to float32 logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        P, D = config.patch_size, config.width
        if config.image_size % P:
            raise ValueError(f"patch_size={P} does not divide image_size={config.image_size}.")
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            D,
            (P, P),
            strides=P,
            padding="VALID",
            kernel_init=_xavier(in_axis=(0, 1, 2)),
            dtype=config.dtype,
            rngs=rngs,
        )
        has_class = config.pool == "class"
        T = (config.image_size // P) ** 2 + has_class
        position_init = nnx.initializers.truncated_normal(0.02)
        if has_class:
            self.class_token = nnx.Param(position_init(rngs.params(), (D,)))
        self.position_embedding = nnx.Param(position_init(rngs.params(), (T, D)))
        self.blocks = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = _norm(config, rngs)
        self.head = nnx.Linear(
            D, config.num_classes, kernel_init=_xavier(), dtype=config.dtype, rngs=rngs
        )

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        c = self.config
        layers.check_images(images_BxHxWxC, c.image_size, c.num_channels)
        x_BxRxCxD = self.patch_embedding(images_BxHxWxC)
        x_BxTxD = x_BxRxCxD.reshape(len(x_BxRxCxD), -1, c.width)
        if c.pool == "class":
            first_Bx1xD = jnp.broadcast_to(self.class_token[...], (len(x_BxTxD), 1, c.width))
            x_BxTxD = jnp.concatenate([first_Bx1xD.astype(x_BxTxD.dtype), x_BxTxD], axis=1)
        x_BxTxD += self.position_embedding[...].astype(x_BxTxD.dtype)
        depths = jnp.linspace(0, 1, c.num_layers)
        x_BxTxD = self.norm(layers.scan(self.blocks, x_BxTxD, depths, remat=c.remat))
        x_BxD = x_BxTxD[:, 0] if c.pool == "class" else x_BxTxD.mean(1)
        return self.head(x_BxD).astype(jnp.float32)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        config: Config = CONFIGS["base"],
        *,
        new_head: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> "ViT":
        """Loads the weights of a ViTForImageClassification of transformers.

        Args:
            path: Its `model.safetensors`, or `model.safetensors.index.json`.
            config: Of the same sizes, with layer norms and a class token.
            new_head: Whether the classifier is new, as for a file that has none, or one of other
                classes. What is left out of the file is told in a warning of the logger.
            rngs: For the stochastic depth, and for the new classifier.

        Raises:
            ValueError: If names or shapes in the file do not fit. It lists all of them.
        """
        get = functools.partial(hugging_face.read, path, names=_NAMES, prefix="vit.")
        if new_head:
            get = hugging_face.without_head(get)
        return hugging_face.make(cls, config, rngs or nnx.Rngs(0), get)


class Block(nnx.Module):
    """Attention, then the perceptron, each on a normed branch."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D = config.width
        linear = functools.partial(
            layers.linear, dtype=config.dtype, kernel_init=_xavier(), rngs=rngs
        )
        self.attention_norm = _norm(config, rngs)
        self.attention = layers.Attention(D, config.num_heads, linear, linear)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = layers.MLP(D, config.mlp_width, linear, linear, layers.exact_gelu)
        self.stochastic_depth = layers.StochasticDepth(config.stochastic_depth, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array, depth: jax.Array) -> jax.Array:
        x_BxTxD += self.stochastic_depth(self.attention(self.attention_norm(x_BxTxD)), depth)
        x_BxTxD += self.stochastic_depth(self.mlp(self.mlp_norm(x_BxTxD)), depth)
        return x_BxTxD


def _xavier(in_axis: int | tuple[int, ...] = -2) -> nnx.Initializer:
    """Xavier's variance, from a truncated normal distribution."""
    return nnx.initializers.variance_scaling(
        1.0, "fan_avg", "truncated_normal", in_axis=in_axis, out_axis=-1
    )


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    kind = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[config.norm]
    return kind(config.width, epsilon=1e-6, dtype=config.dtype, rngs=rngs)
