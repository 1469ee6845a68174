"""Weights that start at zero, or far below the usual size, learn as far as AdamW's do.

In at most three times its steps, at the same rate and with all defaults.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from weyl_optax import adamw2, dimension_numbers_from

RATE, STEPS = 1e-2, 100
D, RANK, SAMPLES = 64, 4, 512


def normal(seed, *shape, std=1.0):
    return std * jax.random.normal(jax.random.key(seed), shape)


X = normal(0, SAMPLES, D)
FIXED = normal(1, D, D, std=D**-0.5)
BRANCH = jnp.tanh(X @ FIXED)
A, B = normal(2, D, RANK, std=D**-0.5), normal(3, RANK, D, std=RANK**-0.5)


def square(output, target):
    return jnp.mean((output - target) ** 2)


# A loss whose least value is nearly zero, where it starts, and its input.
CASES = {
    "LoRA": (
        lambda p, x: square(x @ (FIXED + 2 * p["a"] @ p["b"]), X @ (FIXED + 0.3 * A @ B)),
        {"a": normal(4, D, RANK, std=D**-0.5), "b": jnp.zeros((RANK, D))},
        X,
    ),
    "ReZero": (
        lambda p, branch: square(p["gain"] * branch, BRANCH),
        {"gain": jnp.zeros([])},
        BRANCH,
    ),
    "LayerScale": (
        lambda p, branch: square(p["gain"] * branch, BRANCH),
        {"gain": jnp.full(D, 1e-5)},
        BRANCH,
    ),
    "bias": (lambda p, _: square(p["bias"], normal(5, D, std=0.5)), {"bias": jnp.zeros(D)}, X),
    "zero head": (
        lambda p, branch: square(branch @ p["head"], BRANCH @ A),
        {"head": jnp.zeros((D, RANK))},
        BRANCH,
    ),
    "small kernels": (
        lambda p, x: square(jnp.tanh(x @ p["a"]) @ p["b"], BRANCH @ FIXED),
        {"a": normal(6, D, D, std=0.002), "b": normal(7, D, D, std=0.002)},
        X,
    ),
}


def final_loss(solver, loss, params, inputs, steps):
    def step(carry, _):
        params, state = carry
        updates, state = solver.update(jax.grad(loss)(params, *inputs), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        (params, _), _ = jax.lax.scan(step, (params, solver.init(params)), None, length=steps)
        return loss(params, *inputs)

    return float(train(params))


def assert_ends_where_adamw_does(loss, params, *inputs):
    numbers = dimension_numbers_from(loss, params, *inputs)
    bounded = adamw2(RATE, weight_dimension_numbers=numbers)
    expected = final_loss(optax.adamw(RATE), loss, params, inputs, STEPS)
    start = float(loss(params, *inputs))
    assert expected < 0.3 * start  # there is something to learn
    assert final_loss(bounded, loss, params, inputs, 3 * STEPS) <= max(expected, 1e-3 * start)


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    assert_ends_where_adamw_does(*CASES[name])


class ViT(nn.Module):
    """As big_vision's: patches, learned positions, a head that starts at zero."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (4, 4), strides=(4, 4), padding="VALID")(images)
        x = x.reshape(len(x), -1, 32)
        x += self.param("positions", nn.initializers.normal(32**-0.5), (1, x.shape[1], 32))
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(4)(y, y)
        x += nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(5, kernel_init=nn.initializers.zeros, name="head")(x.mean(1))


class DiTBlock(nn.Module):
    """A block whose branch is gated, scaled and shifted by a condition, with a start at zero."""

    @nn.compact
    def __call__(self, x, condition):
        shift, scale, gate = jnp.split(
            nn.Dense(3 * D, kernel_init=nn.initializers.zeros)(nn.silu(condition)), 3, -1
        )
        y = (1 + scale) * nn.LayerNorm(use_bias=False, use_scale=False)(x) + shift
        return x + gate * nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(y)))


@pytest.mark.slow
def test_a_vit_whose_head_starts_at_zero():
    images, labels = normal(8, 40, 8, 8, 3), jnp.arange(40) % 5
    params = ViT().init(jax.random.key(9), images)["params"]

    def loss(params, images):
        logits = ViT().apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    assert_ends_where_adamw_does(loss, params, images)


@pytest.mark.slow
def test_a_dit_block_whose_modulation_starts_at_zero():
    condition = normal(10, SAMPLES, 16)
    target = X + jnp.tanh(condition @ normal(11, 16, D, std=0.25)) * BRANCH
    params = DiTBlock().init(jax.random.key(12), X, condition)["params"]

    def loss(params, x, condition):
        return square(DiTBlock().apply({"params": params}, x, condition), target)

    assert_ends_where_adamw_does(loss, params, X, condition)
