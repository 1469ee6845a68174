"""One jitted, donated update of an optimizer, by itself."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import trees


class Update:
    """An optimizer with its own parameters, ready for `optimizer.update`.

    Its state is donated, and so are the updates of the call before, in whose place the new ones
    are written: see `measure.keep_freed_memory`.
    """

    def __init__(self, optimizer: optax.GradientTransformation, tree: trees.Tree, grads: Any):
        self.grads = grads
        self.params = trees.fill(tree, seed=0)
        self.state = jax.jit(optimizer.init)(self.params)
        self.state_bytes = trees.num_bytes(self.state)
        self.updates = jax.tree.map(jnp.zeros_like, grads)

        def update(place: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            del place
            return optimizer.update(grads, state, params)

        jitted = jax.jit(update, donate_argnums=(0, 2), keep_unused=True)
        start = time.process_time()  # of all threads: what else runs does not count
        lowered = jitted.lower(self.updates, self.grads, self.state, self.params)
        self._update = lowered.compile()
        self.compile_seconds = time.process_time() - start

    def step(self) -> Any:
        """Makes an update; the parameters stay."""
        self.updates, self.state = self._update(self.updates, self.grads, self.state, self.params)
        return self.updates, self.state

    @property
    def bytes_moved(self) -> float:
        """What the instructions of the program read and write, by XLA's own count.

        A loop counts once.
        """
        return self._update.cost_analysis()["bytes accessed"]
