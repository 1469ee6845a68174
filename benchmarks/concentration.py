"""What spectral energy concentration costs, beside the SVD of the full d x d products."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import measure
from weyl_optax.dynamics import spectral_energy_concentration


@dataclasses.dataclass(frozen=True)
class Flags:
    """Time SEC of all heads, and the full SVD of one head."""

    width: int = 4096
    """d."""
    heads: int = 32
    """The head dimension is d over their number."""
    s: int = 4
    """Directions that count."""
    out: Path = Path("runs/benchmarks/concentration.json")
    """The file for the table."""


@jax.jit
def full_svd(query: jax.Array, key: jax.Array) -> jax.Array:
    """The singular values of one head's W_q^T W_k, from the d x d product."""
    product = jnp.matmul(query, key.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.svd(product, compute_uv=False)


def main(flags: Flags) -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    shape = (2, flags.width, flags.heads, flags.width // flags.heads)
    query, key = jnp.asarray(rng.normal(size=shape), jnp.float32)
    thin = measure.seconds(
        {"thin": lambda: spectral_energy_concentration(query, key, flags.s)}, budget=5
    )["thin"]
    compiled = full_svd.lower(query[:, 0], key[:, 0]).compile()
    start = time.perf_counter()
    energy = np.square(np.float64(compiled(query[:, 0], key[:, 0])))
    full = time.perf_counter() - start
    found = float(spectral_energy_concentration(query, key, flags.s)[0])
    measure.report(
        [
            {
                "d": flags.width,
                "heads": flags.heads,
                "all heads, s": thin,
                "full SVD of one head, s": full,
                "full SVD of all heads / ours": flags.heads * full / thin,
                "difference": abs(found - energy[: flags.s].sum() / energy.sum()),
            }
        ],
        flags.out,
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
