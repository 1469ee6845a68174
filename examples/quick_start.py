"""Train a small Transformer on Python's source text, at full learning rate from the first step."""

import argparse
import inspect

import jax
import numpy as np
import optax
from flax import nnx

from weyl_optax import adamw2
from weyl_optax.flax import dimension_numbers

TEXT = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8)
WIDTH, LENGTH, BATCH, STEPS = 64, 64, 16, 200


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm_1, self.norm_2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.token, self.position = (nnx.Embed(n, WIDTH, rngs=rngs) for n in (256, LENGTH))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token(tokens) + self.position(np.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@nnx.jit
def train(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_fn(model: Transformer) -> jax.Array:
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


model = Transformer(nnx.Rngs(0))
schedule = optax.cosine_decay_schedule(1e-2, STEPS)  # no warmup
solver = adamw2(schedule, b2=0.95, weight_dimension_numbers=dimension_numbers(model))
optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)
rng = np.random.default_rng(0)
for step in range(STEPS):
    starts = rng.integers(len(TEXT) - LENGTH, size=BATCH)
    tokens = np.stack([TEXT[start : start + LENGTH + 1] for start in starts]).astype(np.int32)
    loss = train(model, optimizer, tokens)
    if step % 20 == 0 or step == STEPS - 1:
        print(f"step {step:3}  loss {loss:.3f}")
