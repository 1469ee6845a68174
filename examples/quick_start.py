"""A small Transformer at a high rate: AdamW, AdamW with warmup, and AdamW² without."""

import argparse
import ast
import functools
import inspect
import typing

import jax
import numpy as np
import optax
from flax import nnx

from weyl_optax import adamw2
from weyl_optax.flax import dimension_numbers

WIDTH, LENGTH, STEPS, RATE = 64, 64, 400, 0.03
SOURCES = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, typing))
TEXT = np.frombuffer(SOURCES.encode(), np.uint8).astype(np.int32)

init = nnx.initializers.normal(0.02)
Linear = functools.partial(nnx.Linear, kernel_init=init)
Embed = functools.partial(nnx.Embed, embedding_init=init)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm_1, self.norm_2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, WIDTH, kernel_init=init, decode=False, rngs=rngs)
        self.up = Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.token, self.position = (Embed(n, WIDTH, rngs=rngs) for n in (256, LENGTH))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token(tokens) + self.position(np.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, tokens)
    optimizer.update(model, grads)
    return loss


def train(solver: optax.GradientTransformation) -> float:
    """The mean loss of the last twenty steps."""
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)
    losses = []
    for i in range(STEPS):
        starts = np.random.default_rng(i).integers(TEXT.size - LENGTH, size=(16, 1))
        losses.append(step(model, optimizer, TEXT[starts + np.arange(LENGTH + 1)]))
    return float(np.mean(losses[-20:]))


no_warmup = optax.cosine_decay_schedule(RATE, STEPS)
warmup = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 5, STEPS)
numbers = dimension_numbers(loss_fn, Transformer(nnx.Rngs(0)), TEXT[None, : LENGTH + 1])
for name, solver in {
    "AdamW": optax.adamw(no_warmup, b2=0.95, weight_decay=0.1),
    "AdamW with warmup": optax.adamw(warmup, b2=0.95, weight_decay=0.1),
    "AdamW² with the cap": adamw2(
        no_warmup, b2=0.95, weight_decay=0.1, cap_rank=16, weight_dimension_numbers=numbers
    ),
}.items():
    print(f"{name:19}  loss {train(solver):.3f}")
