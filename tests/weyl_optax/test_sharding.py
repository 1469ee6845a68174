"""A sharded weight stays where it is: only vectors cross devices."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from weyl_optax import adamw2

SHAPE = (3, 64, 128)


@pytest.mark.parametrize(
    "spec", [P(None, "x", None), P(None, None, "x"), P(None, "x", "y"), P("x"), P()]
)
def test_sharded_equals_unsharded_and_moves_no_weight(spec):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    shape = (4, *SHAPE[1:]) if spec == P("x") else SHAPE
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    grads = {"w": jax.random.normal(jax.random.key(1), shape)}
    solver = adamw2(0.1, tau=0.01)
    sharding = NamedSharding(mesh, spec)
    sharded_params, sharded_grads = jax.device_put((params, grads), sharding)

    update = jax.jit(solver.update, donate_argnums=1)
    state, sharded_state = solver.init(params), jax.jit(solver.init)(sharded_params)
    for _ in range(3):
        updates, state = update(grads, state, params)
        sharded_updates, sharded_state = update(sharded_grads, sharded_state, sharded_params)
    np.testing.assert_allclose(sharded_updates["w"], updates["w"], rtol=1e-3, atol=1e-6)
    assert sharded_updates["w"].sharding.is_equivalent_to(sharding, 3)

    text = update.lower(sharded_grads, sharded_state, sharded_params).compile().as_text()
    moved = re.findall(
        r"= \(?f32\[([\d,]*)\][^=]* (?:all-gather|all-to-all|collective-permute)", text
    )
    largest = max(
        (int(np.prod([int(n) for n in dims.split(",") if n])) for dims in moved), default=0
    )
    assert largest <= 8 * shape[0] * max(shape[1:])  # a block of vectors, never a weight
