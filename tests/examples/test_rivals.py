"""Scion and NorMuon against the formulas of their papers, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from examples import optimizers

SHAPES = {
    "embed": {"embedding": (5, 6)},
    "blocks": {"kernel": (2, 6, 4), "scale": (2, 4)},
    "head": {"kernel": (4, 5)},
}
NUMBERS = {  # an embedding, a stack of two kernels from 6 to 4, two vectors, a head
    "embed": {"embedding": MuonDimensionNumbers(0, 1)},
    "blocks": {"kernel": MuonDimensionNumbers(1, 2), "scale": MuonDimensionNumbers((), 1)},
    "head": {"kernel": MuonDimensionNumbers(0, 1)},
}
RATE, DECAY = 0.1, 0.3
rng = np.random.default_rng(0)
IS_SHAPE = {"is_leaf": lambda x: isinstance(x, tuple)}
PARAMS = jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, **IS_SHAPE)
GRADS = [jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, **IS_SHAPE) for _ in range(3)]


def newton_schulz(m):
    """Five of Muon's quintic steps."""
    x = m / np.linalg.norm(m)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def trained(name):
    """The params after three updates at a constant rate."""
    settings = optimizers.Settings(weight_decay=DECAY, b1=0.8, sign_share=2.0, clip=0.0)
    optimizer = optimizers.make_at(name, lambda _: RATE, settings, NUMBERS)
    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)
    for grads in GRADS:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_scion_is_that_of_its_paper():
    """Algorithm 2 with its linear minimization oracles; its radius is 1 / DECAY."""
    found = trained("scion")
    for layer in range(2):
        w, d = PARAMS["blocks"]["kernel"][layer], 0.0
        v, e = PARAMS["blocks"]["scale"][layer], 0.0
        for grads in GRADS:
            d = 0.8 * d + 0.2 * grads["blocks"]["kernel"][layer]
            w = (1 - RATE * DECAY) * w - RATE * np.sqrt(4 / 6) * newton_schulz(d)
            e = 0.8 * e + 0.2 * grads["blocks"]["scale"][layer]
            v = v - RATE * e / np.sqrt(np.mean(e**2))
        np.testing.assert_allclose(found["blocks"]["kernel"][layer], w, atol=1e-5)
        np.testing.assert_allclose(found["blocks"]["scale"][layer], v, atol=1e-5)
    for group, leaf, share in (("embed", "embedding", 2.0), ("head", "kernel", 2.0 * 10 / 4)):
        w, d = PARAMS[group][leaf], 0.0
        for grads in GRADS:
            d = 0.8 * d + 0.2 * grads[group][leaf]
            w = (1 - RATE * DECAY) * w - RATE * share * np.sign(d)
        np.testing.assert_allclose(found[group][leaf], w, atol=1e-5)


def test_normuon_is_that_of_its_paper():
    """Algorithm 1, with Nesterov's momentum; its m rows are the units, our columns."""
    found = trained("normuon")
    for layer in range(2):
        w, m, v = PARAMS["blocks"]["kernel"][layer], 0.0, np.zeros(4)
        for t, grads in enumerate(GRADS, 1):
            g = grads["blocks"]["kernel"][layer]
            m = 0.95 * m + 0.05 * g
            # Optax corrects for the bias of the average, as Nadam does.
            ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            o = newton_schulz(ahead)
            v = 0.95 * v + 0.05 * np.mean(o**2, axis=0)
            o = o / np.sqrt(v)
            w = w - RATE * DECAY * w - RATE * 0.2 * np.sqrt(o.size) / np.linalg.norm(o) * o
        np.testing.assert_allclose(found["blocks"]["kernel"][layer], w, atol=1e-5)


def test_what_normuon_is_not_for_has_adam():
    adam = optax.adamw(0.1 * RATE, 0.8, 0.95, weight_decay=DECAY, mask=optimizers.is_decayed)
    params = jax.tree.map(jnp.float32, PARAMS)
    state = adam.init(params)
    for grads in GRADS:
        updates, state = adam.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
    found = trained("normuon")
    for group, leaf in (("embed", "embedding"), ("blocks", "scale"), ("head", "kernel")):
        np.testing.assert_allclose(found[group][leaf], params[group][leaf], atol=1e-6)


@pytest.mark.parametrize("name", ["scion", "normuon"])
def test_rivals_start_at_once_and_take_no_gradient_for_none(name):
    """Zero gradients at the start, and for good: weights decay, and nothing is NaN."""
    settings = optimizers.Settings(weight_decay=DECAY)
    optimizer = optimizers.make_at(name, lambda _: RATE, settings, NUMBERS)
    params = jax.tree.map(jnp.float32, PARAMS)
    updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert np.all(np.isfinite(u))
        assert np.all(np.abs(u) <= RATE * DECAY * np.abs(p) + 1e-6)


@pytest.mark.parametrize("name", ["muon", "muon_warmup", "muon_bound", "normuon", "adam_h"])
def test_what_muon_does_not_take_goes_to_adamw_at_a_share_of_the_rate(name):
    settings = optimizers.Settings(weight_decay=DECAY, clip=0.0, adam_share=0.5, tau=1e9)
    found, expected = (
        optimizers.make_at(of, lambda _, rate=rate: rate, settings, NUMBERS)
        for of, rate in ((name, RATE), ("adamw", 0.5 * RATE))
    )
    params = jax.tree.map(jnp.float32, PARAMS)
    states = [optimizer.init(params) for optimizer in (found, expected)]
    for grads in GRADS:
        grads = jax.tree.map(jnp.float32, grads)
        updates, states[0] = found.update(grads, states[0], params)
        of_adamw, states[1] = expected.update(grads, states[1], params)
        for group, leaf in (("embed", "embedding"), ("blocks", "scale"), ("head", "kernel")):
            np.testing.assert_allclose(updates[group][leaf], of_adamw[group][leaf], rtol=1e-5)
