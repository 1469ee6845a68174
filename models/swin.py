"""Swin of Liu et al. (2021), and Flatten-Swin of Han et al. (2023).

A pyramid of stages. In a stage, attention stays within windows of the grid of tokens, and
every other block shifts the windows. Between stages, each 2 x 2 tokens become one, twice
as wide. Flatten-Swin takes focused linear attention over the whole grid in its first
stages. Weights are drawn from N(0, 0.02²), not truncated. The blocks of a stage are stacked
and scanned over, as in `models/gpt.py`.

Shapes: B batch, R rows, C columns, W windows, T tokens, D width, N heads, H head dimension.
"""

import dataclasses
import functools
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import hugging_face, layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Size and numerics of a Swin."""

    image_size: int = 224  # height and width in pixels
    num_channels: int = 3
    patch_size: int = 4
    num_classes: int = 1000
    width: int = 96  # of the first stage; it doubles from stage to stage
    depths: tuple[int, ...] = (2, 2, 18, 2)  # blocks, a number for each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # the same
    window_size: int = 7  # height and width in tokens
    num_linear_stages: int = 0  # stages, from the first, with focused linear attention
    stochastic_depth: float = 0.0  # in the last block; it grows linearly from 0 in the first
    dtype: str = "float32"  # of the computation; the parameters are float32
    remat: bool = False  # recompute each block in the backward pass


_NANO = Config(  # for 8 x 8 digits; remat as in models/vit.py
    image_size=8,
    num_channels=1,
    patch_size=1,
    num_classes=10,
    width=48,
    depths=(2, 4),
    num_heads=(2, 4),
    window_size=4,
    remat=True,
)

CONFIGS = {
    "nano": _NANO,
    "small": Config(),
    "base": Config(width=128, num_heads=(4, 8, 16, 32)),
    "flatten-nano": dataclasses.replace(_NANO, num_linear_stages=1),
    "flatten-small": Config(num_linear_stages=2),
}


class Swin(nnx.Module):
    """An image classifier: float images (B, height, width, channels) to float32 logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        P = config.patch_size
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            config.width,
            (P, P),
            strides=P,
            padding="VALID",
            kernel_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            rngs=rngs,
        )
        self.patch_norm = _norm(config.width, config, rngs)
        self.stages = nnx.List(Stage(config, i, rngs=rngs) for i in range(len(config.depths)))
        D = config.width * 2 ** (len(config.depths) - 1)
        self.norm = _norm(D, config, rngs)
        self.head = nnx.Linear(
            D,
            config.num_classes,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            rngs=rngs,
        )

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        c = self.config
        layers.check_images(images_BxHxWxC, c.image_size, c.num_channels)
        x_BxRxCxD = self.patch_norm(self.patch_embedding(images_BxHxWxC))
        for stage in self.stages:
            x_BxRxCxD = stage(x_BxRxCxD)
        x_BxD = self.norm(x_BxRxCxD).mean((1, 2))
        return self.head(x_BxD).astype(jnp.float32)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        config: Config = CONFIGS["small"],
        *,
        new_head: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> "Swin":
        """Loads the weights of a SwinForImageClassification of transformers.

        Args:
            path: Its `model.safetensors`, or `model.safetensors.index.json`.
            config: Of the same sizes, without linear attention.
            new_head: Whether the classifier is new, as for a file that has none, or one of other
                classes. What is left out of the file is told in a warning of the logger.
            rngs: For the stochastic depth, and for the new classifier.

        Raises:
            ValueError: If names or shapes in the file do not fit. It lists all of them.
        """
        get = functools.partial(
            hugging_face.read,
            path,
            names=_names(len(config.depths)),
            prefix="swin.",
            ignore="relative_position_index$",  # which old files have
        )
        if new_head:
            get = hugging_face.without_head(get)
        return hugging_face.make(cls, config, rngs or nnx.Rngs(0), get)


class Stage(nnx.Module):
    """The merging of tokens, but in the first stage, and blocks of one width."""

    def __init__(self, config: Config, index: int, *, rngs: nnx.Rngs):
        D = config.width * 2**index
        grid = config.image_size // config.patch_size // 2**index  # rows and columns
        window = min(config.window_size, grid)
        is_linear = index < config.num_linear_stages
        is_whole = grid * config.patch_size * 2**index == config.image_size
        if not is_whole or (grid % window and not is_linear):
            raise ValueError(
                f"image_size={config.image_size} with patch_size={config.patch_size} does not give "
                f"stage {index} a grid of whole windows of {config.window_size} tokens."
            )
        depth = config.depths[index]
        self.merging = PatchMerging(D, config, rngs=rngs) if index else None
        self.blocks = layers.stack(
            lambda rngs: Block(config, index, grid, window, rngs=rngs), depth, rngs
        )
        depths = np.linspace(0, 1, sum(config.depths))[sum(config.depths[:index]) :]
        self.depths = tuple(depths[:depth].tolist())
        # A window that is the whole grid has nowhere to go.
        self.shifts = tuple((i % 2) * (window // 2) * (window < grid) for i in range(depth))
        self.remat = config.remat

    def __call__(self, x_BxRxCxD: jax.Array) -> jax.Array:
        if self.merging is not None:
            x_BxRxCxD = self.merging(x_BxRxCxD)
        depths, shifts = jnp.array(self.depths), jnp.array(self.shifts)
        return layers.scan(self.blocks, x_BxRxCxD, depths, shifts, remat=self.remat)


class PatchMerging(nnx.Module):
    """Joins each 2 x 2 tokens, and halves what that gives."""

    def __init__(self, width: int, config: Config, *, rngs: nnx.Rngs):
        self.norm = _norm(2 * width, config, rngs)
        self.reduction = _linear(config, rngs)(2 * width, width, use_bias=False)

    def __call__(self, x_BxRxCxD: jax.Array) -> jax.Array:
        joined = einops.rearrange(x_BxRxCxD, "b (r i) (c j) d -> b r c (j i d)", i=2, j=2)
        return self.reduction(self.norm(joined))


class Block(nnx.Module):
    """Attention, then the perceptron, each on a normed branch."""

    def __init__(self, config: Config, index: int, grid: int, window: int, *, rngs: nnx.Rngs):
        D, N = config.width * 2**index, config.num_heads[index]
        linear = _linear(config, rngs)
        self.attention_norm = _norm(D, config, rngs)
        if index < config.num_linear_stages:
            self.attention = FocusedLinearAttention(D, N, grid, linear, config, rngs=rngs)
        else:
            self.attention = WindowAttention(D, N, window, linear, rngs=rngs)
        self.mlp_norm = _norm(D, config, rngs)
        self.mlp = layers.MLP(D, 4 * D, linear, linear, layers.exact_gelu)
        self.stochastic_depth = layers.StochasticDepth(config.stochastic_depth, rngs=rngs)

    def __call__(self, x_BxRxCxD: jax.Array, depth: jax.Array, shift: jax.Array) -> jax.Array:
        attended_BxRxCxD = self.attention(self.attention_norm(x_BxRxCxD), shift)
        x_BxRxCxD += self.stochastic_depth(attended_BxRxCxD, depth)
        x_BxRxCxD += self.stochastic_depth(self.mlp(self.mlp_norm(x_BxRxCxD)), depth)
        return x_BxRxCxD


class WindowAttention(layers.Attention):
    """Self-attention within windows of the grid, moved by `shift` rows and columns."""

    def __init__(
        self, width: int, num_heads: int, window: int, linear: layers.Linear, *, rngs: nnx.Rngs
    ):
        super().__init__(width, num_heads, linear, linear)
        self.window = window
        bias_init = nnx.initializers.normal(0.02)
        self.relative_position_bias = nnx.Param(
            bias_init(rngs.params(), ((2 * window - 1) ** 2, num_heads))
        )

    def __call__(self, x_BxRxCxD: jax.Array, shift: jax.Array) -> jax.Array:
        _, R, C, _ = x_BxRxCxD.shape
        x_BxRxCxD = jnp.roll(x_BxRxCxD, (-shift, -shift), (1, 2))
        x_BxWxTxD = _to_windows(x_BxRxCxD, self.window)
        q_BxWxTxNxH, k_BxWxTxNxH, v_BxWxTxNxH = (
            self.query(x_BxWxTxD),
            self.key(x_BxWxTxD),
            self.value(x_BxWxTxD),
        )
        bias_TxTxN = self.relative_position_bias[...][_relative_positions(self.window)]
        bias_NxTxT = bias_TxTxN.transpose(2, 0, 1).astype(x_BxWxTxD.dtype)
        near_WxTxT = (shift == 0) | _is_near(R, C, self.window)

        @jax.vmap
        def attend(q_WxTxNxH: jax.Array, k_WxTxNxH: jax.Array, v_WxTxNxH: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(
                q_WxTxNxH, k_WxTxNxH, v_WxTxNxH, bias_NxTxT[None], near_WxTxT[:, None]
            )

        y_BxWxTxD = self.out(attend(q_BxWxTxNxH, k_BxWxTxNxH, v_BxWxTxNxH))
        y_BxRxCxD = einops.rearrange(
            y_BxWxTxD, "b (r c) (i j) d -> b (r i) (c j) d", r=R // self.window, i=self.window
        )
        return jnp.roll(y_BxRxCxD, (shift, shift), (1, 2))


def _to_windows(x_BxRxCxD: jax.Array, window: int) -> jax.Array:
    return einops.rearrange(x_BxRxCxD, "b (r i) (c j) d -> b (r c) (i j) d", i=window, j=window)


def _relative_positions(window: int) -> np.ndarray:
    """For each two tokens of a window, the row of the bias table for their distance, (T, T)."""
    places_Tx2 = np.indices((window, window)).reshape(2, -1).T
    rows, columns = np.moveaxis(places_Tx2[:, None] - places_Tx2[None] + window - 1, -1, 0)
    return rows * (2 * window - 1) + columns


def _is_near(rows: int, columns: int, window: int) -> np.ndarray:
    """Which tokens of a shifted window were together before it was wrapped around, (W, T, T)."""

    def part(size: int) -> np.ndarray:
        return np.repeat([0, 1, 2], [size - window, window - window // 2, window // 2])

    parts_RxC = 3 * part(rows)[:, None] + part(columns)
    parts_WxT = _to_windows(parts_RxC[None, :, :, None], window)[0, :, :, 0]
    return parts_WxT[:, :, None] == parts_WxT[:, None, :]


class FocusedLinearAttention(nnx.Module):
    """Linear attention over the whole grid, with a sharper feature map, and a convolution.

    Softmax's exp(q k^T) becomes f(q) f(k)^T, with f(x) = x^3 |x| / |x^3| of the positive part
    of x, whose sum over the keys is taken first: time and memory are linear in the tokens.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        grid: int,
        linear: layers.Linear,
        config: Config,
        *,
        rngs: nnx.Rngs,
    ):
        H = width // num_heads
        self.query = linear(width, (num_heads, H))
        self.key = linear(width, (num_heads, H))
        self.value = linear(width, (num_heads, H))
        self.out = linear((num_heads, H), width)
        self.position_embedding = nnx.Param(jnp.zeros((grid**2, width)))  # of the keys
        self.scale = nnx.Param(jnp.zeros(width))
        self.convolution = nnx.Conv(  # the same for all heads
            H,
            H,
            (5, 5),
            feature_group_count=H,
            dtype=config.dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        )

    def __call__(self, x_BxRxCxD: jax.Array, shift: jax.Array) -> jax.Array:
        del shift  # no windows
        R = x_BxRxCxD.shape[1]
        x_BxTxD = einops.rearrange(x_BxRxCxD, "b r c d -> b (r c) d")
        q_BxTxNxH, k_BxTxNxH, v_BxTxNxH = (
            self.query(x_BxTxD),
            self.key(x_BxTxD),
            self.value(x_BxTxD),
        )
        heads = q_BxTxNxH.shape[2:]
        k_BxTxNxH += self.position_embedding[...].reshape(-1, *heads).astype(k_BxTxNxH.dtype)
        scale_NxH = nnx.softplus(self.scale[...]).reshape(heads)
        y_BxTxNxH = linear_attention(
            focus(q_BxTxNxH, scale_NxH), focus(k_BxTxNxH, scale_NxH), v_BxTxNxH
        )
        grids = einops.rearrange(v_BxTxNxH, "b (r c) n h -> (b n) r c h", r=R)
        y_BxTxNxH += einops.rearrange(
            self.convolution(grids), "(b n) r c h -> b (r c) n h", n=heads[0]
        )
        return einops.rearrange(self.out(y_BxTxNxH), "b (r c) d -> b r c d", r=R)


def focus(x_BxTxNxH: jax.Array, scale_NxH: jax.Array) -> jax.Array:
    """Sharpens the positive part of queries or keys, and keeps its norm over all heads."""
    x = (nnx.relu(x_BxTxNxH.astype(jnp.float32)) + 1e-6) / scale_NxH

    def norm(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)

    return x**3 * (norm(x) / norm(x**3))


def linear_attention(q_BxTxNxH: jax.Array, k_BxTxNxH: jax.Array, v_BxTxNxH: jax.Array) -> jax.Array:
    """Each value weighed by q k^T, over the mean of q k^T, without forming q k^T."""
    T = q_BxTxNxH.shape[1]
    mean_BxTxN = jnp.einsum("btnh,bnh->btn", q_BxTxNxH, k_BxTxNxH.mean(1)) + 1e-6
    kv_BxNxHxH = jnp.einsum("bsnh,bsnk->bnhk", k_BxTxNxH, v_BxTxNxH) / T
    y_BxTxNxH = jnp.einsum("btnh,bnhk->btnk", q_BxTxNxH, kv_BxNxHxH)
    return y_BxTxNxH / mean_BxTxN[..., None]


def _linear(config: Config, rngs: nnx.Rngs) -> layers.Linear:
    return functools.partial(
        layers.linear, dtype=config.dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
    )


def _norm(width: int, config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, dtype=config.dtype, rngs=rngs)


def _names(num_stages: int) -> hugging_face.Names:
    names = {
        **hugging_face.linear(
            "embeddings.patch_embeddings.projection", "patch_embedding", "o i h w -> h w i o"
        ),
        **hugging_face.norm("embeddings.norm", "patch_norm"),
        **hugging_face.norm("layernorm", "norm"),
        **hugging_face.linear("classifier", "head"),
    }
    for i in range(num_stages):
        theirs, ours = f"encoder.layers.{i}", f"stages/{i}"
        names |= hugging_face.vision_block(f"{theirs}.blocks.{{}}", "self", f"{ours}/blocks")
        names[f"{theirs}.blocks.{{}}.attention.self.relative_position_bias_table"] = (
            "p n -> p n",
            f"{ours}/blocks/attention/relative_position_bias",
        )
        # There, the merging is at the end of the stage before.
        names |= hugging_face.norm(f"{theirs}.downsample.norm", f"stages/{i + 1}/merging/norm")
        names |= hugging_face.linear(
            f"{theirs}.downsample.reduction", f"stages/{i + 1}/merging/reduction"
        )
    return names
