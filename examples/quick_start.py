"""Train a small Transformer on Python's source text, at full learning rate from the first step."""

import argparse
import inspect

import jax
import numpy as np
import optax
from flax import nnx

from weyl_optax import adamw2
from weyl_optax.flax import dimension_numbers

TEXT = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)


class Transformer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.token, self.position = (nnx.Embed(n, width, rngs=rngs) for n in (256, 64))
        self.norm_1, self.norm_2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = (nnx.Linear(width, width, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token(tokens) + self.position(np.arange(64))
        x += self.attention(self.norm_1(x), mask=nnx.make_causal_mask(tokens))
        return self.head(x + self.down(nnx.gelu(self.up(self.norm_2(x)))))


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, tokens)
    optimizer.update(model, grads)
    return loss


model = Transformer(width=128, rngs=nnx.Rngs(0))
schedule = optax.cosine_decay_schedule(1e-2, 200)  # no warmup
numbers = dimension_numbers(loss_fn, model, TEXT[None, :65])  # traces the loss
solver = adamw2(schedule, b2=0.95, weight_dimension_numbers=numbers)
optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)
for step in range(200):
    starts = np.random.default_rng(step).integers(TEXT.size - 64, size=(16, 1))
    loss = train(model, optimizer, TEXT[starts + np.arange(65)])
    if step % 20 == 0 or step == 199:
        print(f"step {step:3}  loss {loss:.3f}")
