"""One jitted, donated update of an optimizer, by itself."""

import time
from typing import Any

import jax
import optax

from benchmarks import trees


class Update:
    """An optimizer with its own parameters, ready to take a step."""

    def __init__(self, optimizer: optax.GradientTransformation, tree: trees.Tree, grads: Any):
        params = trees.fill(tree, seed=0)
        self.grads = grads
        self.carry = params, jax.jit(optimizer.init)(params)
        self.state_bytes = trees.num_bytes(self.carry[1])

        def update(carry: tuple[Any, Any], grads: Any) -> tuple[Any, Any]:
            params, state = carry
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = time.process_time()  # of all threads: what else runs does not count
        self._update = jax.jit(update, donate_argnums=0).lower(self.carry, grads).compile()
        self.compile_seconds = time.process_time() - start

    def step(self) -> Any:
        """Takes a step."""
        self.carry = self._update(self.carry, self.grads)
        return self.carry

    @property
    def bytes_moved(self) -> float:
        """What the instructions of the program read and write, by XLA's own count.

        A loop counts once.
        """
        return self._update.cost_analysis()["bytes accessed"]
