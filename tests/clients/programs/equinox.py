"""Equinox: attention and MLP, and a step as its documentation has it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from table import State, case, states, version

from weyl_optax import dimension_numbers_from


class Model(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=keys[0])
        self.mlp = eqx.nn.MLP(8, 3, 12, depth=1, key=keys[1])

    def __call__(self, x):
        return jax.vmap(self.mlp)(self.attention(x, x, x))


@case(f"Equinox {version('equinox')}, MultiheadAttention and MLP")
def attention():
    model = Model(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    def train(tx):
        @eqx.filter_jit
        def step(model, opt_state):
            grads = eqx.filter_grad(loss)(model, x)
            updates, opt_state = tx.update(grads, opt_state, model)
            return eqx.apply_updates(model, updates), opt_state

        start = model, tx.init(eqx.filter(model, eqx.is_array))
        for trained, opt_state in states(start, lambda state: step(*state)):
            yield State(eqx.filter(trained, eqx.is_array), opt_state, tx)

    numbers = dimension_numbers_from(loss, model, x)
    return numbers, eqx.filter(model, eqx.is_array), {"*/weight": ((1,), (0,))}, train
