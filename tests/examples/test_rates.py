import dataclasses

import numpy as np
import optax

from examples import optimizers


def test_rates_decay_by_a_cosine_or_in_the_last_fifth():
    settings = optimizers.Settings(learning_rate=0.3, warmup=10)
    steps = np.arange(101)

    def rates(name, decay):
        of = dataclasses.replace(settings, decay=decay)
        return optimizers.OPTIMIZERS[name].schedule(of, 100)(steps)

    cosine = optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 100)(steps)
    np.testing.assert_allclose(rates("adamw_warmup", "cosine"), cosine, atol=1e-7)
    np.testing.assert_allclose(
        rates("adamw2", "cosine"), 0.15 * (1 + np.cos(np.pi * steps / 100)), atol=1e-7
    )
    linear = np.interp(steps, [0, 10, 80, 100], [0, 0.3, 0.3, 0])
    np.testing.assert_allclose(rates("adamw_warmup", "wsd"), linear, atol=1e-7)
    linear = np.interp(steps, [0, 80, 100], [0.3, 0.3, 0])
    np.testing.assert_allclose(rates("adamw2", "wsd"), linear, atol=1e-7)


def test_a_warmup_longer_than_the_constant_part_leaves_it_out():
    settings = optimizers.Settings(learning_rate=0.3, warmup=90, decay="wsd")
    found = optimizers.OPTIMIZERS["adamw_warmup"].schedule(settings, 100)(np.arange(101))
    np.testing.assert_allclose(
        found, np.interp(np.arange(101), [0, 90, 100], [0, 0.3, 0]), atol=1e-7
    )
