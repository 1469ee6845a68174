"""Haiku: embedding, attention and MLP, with Optax's step as in its README."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from table import DENSE, case, plain_training, version

from weyl_optax import dimension_numbers_from

TOKENS = jnp.arange(12).reshape(2, 6) % 7


@case(f"Haiku {version('dm-haiku')}, Embed, MultiHeadAttention, MLP")
def attention():
    def forward(tokens):
        x = hk.Embed(7, 8)(tokens)
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x += hk.MultiHeadAttention(2, 5, model_size=8, w_init=hk.initializers.VarianceScaling())(
            y, y, y
        )
        return hk.nets.MLP([12, 7])(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), TOKENS)

    def loss(params, tokens):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    numbers = dimension_numbers_from(loss, params, TOKENS)
    return (
        numbers,
        params,
        {"embed/embeddings": DENSE, "*/w": DENSE},
        plain_training(loss, params, TOKENS),
    )
