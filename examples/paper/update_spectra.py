"""What the cap does to an update: singular values of Adam's, before and after."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from examples import optimizers, plots, program, run_folder, tables
from examples.paper import problems
from examples.paper.problems import Problem
from examples.paper.trainer import Trainer
from weyl_optax import scale_by_weyl_bound


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train the nano GPT with the cap, and take an update in the middle apart."""

    steps: int = 200
    """Updates of the run; the one in the middle is shown."""
    cap_rank: int = 32
    """Singular values that are lowered to the last of them."""
    learning_rate: float = 3e-2
    """Peak."""
    tau: float = 0.1
    """Largest relative growth of a spectral norm in an update."""
    seed: int = 0
    """Of the weights and the batches."""
    out: Path = Path("runs/update_spectra")
    """The folder for the picture."""


def prepare(flags: Flags) -> Problem:
    """What to train.

    Raises:
        ValueError: If a flag is out of range.
    """
    run_folder.check_folder(flags.out)
    if flags.steps < 2:
        raise ValueError("--steps must be at least 2.")
    chosen = dataclasses.asdict(flags)
    del chosen["out"]
    return problems.load("gpt", **chosen)


def main(flags: Flags, problem: Problem) -> None:
    """Trains, and shows the table and the picture."""
    before, after = updates(problem)
    flags.out.mkdir(parents=True, exist_ok=True)
    rows = [("", "largest, over before", "largest over median, before", "capped")]
    values = {}
    for kind, (label, _) in plots.KINDS.items():
        pair = [singular_values(tree, kind) for tree in (before, after)]
        values[label] = pair
        medians = [np.median(s[:, 0] / np.median(s, axis=1)) for s in pair]
        ratio = np.median(pair[1][:, 0] / pair[0][:, 0])
        rows.append((kind, f"{ratio:.2f}", *(f"{x:.1f}" for x in medians)))
    print(tables.markdown(rows))
    print(f"\nPicture: {plots.save(draw(values), flags.out / 'update_spectra.png')}")


def updates(problem: Problem) -> tuple[Any, Any]:
    """Adam's update in the middle of a run, and what the cap makes of it."""
    trainer, config = Trainer(problem), problem.config
    settings = {key: getattr(config, key) for key in ("learning_rate", "tau")}
    run, batches = trainer.run("adamw2_cap", settings), trainer.batches(config.seed)
    middle = config.steps // 2
    state, *_ = run.train(run.start(trainer.params(config.seed)), batches[:middle])
    bound_state = jax.tree.map(jnp.copy, optax.tree.get(state[1], "WeylBoundState"))
    state, *_ = run.train(state, batches[middle : middle + 1])

    adam = optax.tree.get(state[1], "ScaleByAdamState")
    mean = optax.tree.bias_correction(adam.mu, config.b1, adam.count)
    square = optax.tree.bias_correction(adam.nu, config.b2, adam.count)
    update = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), mean, square)
    cap = scale_by_weyl_bound(
        jnp.inf,
        weight_dimension_numbers=trainer.numbers,
        cap_rank=config.cap_rank,
        cap_mask=optimizers.is_hidden_kernel,
    )
    return update, cap.update(update, bound_state, state[0])[0]


def singular_values(update: Any, kind: str) -> np.ndarray:
    """Of the kernels of a kind, (layers, n), descending, by an exact SVD in float64."""
    for path, u in jax.tree.leaves_with_path(update):
        if f"{kind}/kernel" in jax.tree_util.keystr(path, simple=True, separator="/"):
            rows = -1 if kind == "attention/out" else u.shape[1]
            columns = u.shape[-1] if kind == "attention/out" else -1
            matrices = np.asarray(u, np.float64).reshape(len(u), rows, columns)
            return np.linalg.svd(matrices, compute_uv=False)
    raise ValueError(f"The update has no kernel of {kind}.")


def draw(values: dict[str, list[np.ndarray]]) -> Figure:
    """A panel for each kind of kernel: every layer's, over its largest before the cap."""
    figure, axes = plots.grid(2, 3, (12, 6.4), sharex=True, sharey=True)
    for ax, (label, (before, after)) in zip(axes.flat, values.items(), strict=True):
        for spectra, name in ((before, "adamw"), (after, "adamw2_cap")):
            ax.semilogy((spectra / before[:, :1]).T, color=plots.COLORS[name], alpha=0.6)
        ax.set_title(label)
        ax.set_ylim(1e-3, 1.5)
    for ax in axes[-1]:
        ax.set_xlabel("singular value")
    for ax in axes[:, 0]:
        ax.set_ylabel("over the largest of Adam's")
    lines = axes[0, 0].get_lines()
    axes[0, 0].legend([lines[0], lines[-1]], ["Adam's update", "capped"], frameon=False)
    return figure


if __name__ == "__main__":
    program.run(lambda: tyro.cli(Flags), prepare, main)
