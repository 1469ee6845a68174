"""Three modes of attention from one W: normal, malignantly collapsed, benignly collapsed.

Figure 3 and appendix G of arXiv 2505.21910. With W = U S V^T, tokens X of shape (d, n) and
P = X^T W X:

- Normal: W as it is drawn.
- Malignant: W grown in two of its directions. All queries take the few keys that lie
  furthest along these.
- Benign: W grown in all directions, with the same singular values, and turned into the
  quasi-definite V S V^T. Then x^T W x is near tr W, and x^T W y near 0: each query takes its
  own key.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from examples import plots, program, run_folder
from weyl_optax.dynamics import CollapseMode, attention_entropy, collapse_mode, effective_rank


@dataclasses.dataclass(frozen=True)
class Flags:
    """Draw normal, malignant and benign attention from one W."""

    seed: int = 0
    """Of W and of the tokens."""
    out: Path = Path("runs/attention_modes")
    """The folder for the picture."""


def make_weights(seed: int, width: int = 64, growth: float = 50.0) -> dict[str, np.ndarray]:
    """W_q^T W_k of the three modes, (width, width)."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, width, width)) / width**0.5
    u, s, vt = np.linalg.svd(query.T @ key)
    few = np.where(np.arange(width) < 2, growth * s, s / growth)
    return {
        "normal": u * s @ vt,
        "malignant": u * few @ vt,
        "benign": vt.T * (growth * s) @ vt,
    }


def draw(weights: dict[str, np.ndarray], tokens: np.ndarray) -> tuple[Figure, str]:
    """A map and a spectrum for each W, and the same as text. The tokens are (width, n)."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    maps, spectra = figure.subplots(2, len(weights), height_ratios=(3, 1), sharey="row")
    lines = []
    for name, above, below in zip(weights, maps, spectra, strict=True):
        w = weights[name]
        attention = jax.nn.softmax(jnp.asarray(tokens.T @ w @ tokens) / len(w) ** 0.5)
        caption = (
            f"entropy {attention_entropy(attention):.2f} of {np.log(tokens.shape[1]):.2f}, "
            f"effective rank {effective_rank(attention):.1f} of {tokens.shape[1]}\n"
            f"{CollapseMode(int(collapse_mode(attention))).name.lower()}"
        )
        above.imshow(np.sqrt(attention), vmin=0, vmax=1)
        above.set_title(name)
        above.set_xlabel(caption)
        above.set_xticks([])
        above.set_yticks([])
        below.semilogy(np.linalg.svd(w, compute_uv=False), color=plots.COLORS["adamw2"])
        below.set_xlabel("singular values of $W_q^\\top W_k$")
        plots.style(below)
        lines.append(f"{name:10} {caption}".replace("\n", ": "))
    maps[0].set_ylabel("queries (the color is the root of the weight)")
    return figure, "\n".join(lines)


def prepare(flags: Flags) -> dict[str, np.ndarray]:
    """The W of each mode."""
    run_folder.check_folder(flags.out)
    return make_weights(flags.seed)


def main(flags: Flags, weights: dict[str, np.ndarray]) -> None:
    """Draws and prints the three modes."""
    width = len(weights["normal"])
    tokens = np.random.default_rng(flags.seed + 1).normal(size=(width, 48))
    figure, text = draw(weights, tokens)
    flags.out.mkdir(parents=True, exist_ok=True)
    print(text)
    print(f"\nPicture: {plots.save(figure, flags.out / 'attention_modes.png')}")


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
