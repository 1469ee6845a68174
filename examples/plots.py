"""The pictures of the examples."""

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.optimizers import ALONE, LABELS

matplotlib.use("agg")

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = {
    "adamw": "#D55E00",
    "adamw_warmup": "#999999",
    "adamw2": "#0072B2",
    "radam": "#CC79A7",
    "lion": "#E69F00",
    "lamb": "#009E73",
    "unit_clip": "#56B4E9",
    "schedule_free": "#F0E442",
    "muon": "#000000",
    # And Tol's.
    "muon_warmup": "#8B4513",
    "muon_h": "#44AA99",
    "gi_adamw": "#882255",
    "noise_share": "#999933",
    "soft_clip": "#117733",
    "qk_clip": "#332288",
    "keep_norm": "#88CCEE",
    "adam_h": "#AA4499",
    "lion_a": "#DDCC77",
    "lion_ar": "#CC6677",
}
COLORS |= {name: COLORS[alone] for name, alone in ALONE.items() if name != "adamw2"}
KINDS = {
    "attention/query": "$W_q$",
    "attention/key": "$W_k$",
    "attention/value": "$W_v$",
    "attention/out": "$W_o$",
    "mlp/up": "$W_1$",
    "mlp/down": "$W_2$",
}

Lines = list[dict[str, Any]]


def curve(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, NaN where it was not finite."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([s for s, _ in found]), np.array([v for _, v in found], float)


def style(ax: Axes) -> None:
    """Two spines and a faint grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def grid(
    rows: int, columns: int, size: tuple[float, float], **share: bool
) -> tuple[Figure, np.ndarray]:
    """A figure, and its panels (rows, columns), whose horizontal axes are steps."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    for ax in axes.flat:
        style(ax)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    return figure, axes


def _axes(columns: int, sharey: bool = True) -> tuple[Figure, Any]:
    figure, axes = grid(1, columns, (4.6 * columns if columns > 1 else 7, 4.2), sharey=sharey)
    return figure, axes[0] if columns > 1 else axes[0, 0]


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture, and gives its path."""
    figure.savefig(path, dpi=150)
    return path


def loss(runs: dict[str, Lines], target_entropy: float | None = None) -> Figure:
    """Training and validation loss of every run, and beside them the validation accuracy.

    A line shows the entropy of the targets' frequencies, if it is given.
    """
    has_accuracy = any("val_accuracy" in line for lines in runs.values() for line in lines)
    figure, axes = _axes(2 if has_accuracy else 1, sharey=False)
    ax, *beside = np.atleast_1d(axes)
    for name, lines in runs.items():
        ax.plot(*curve(lines, "loss"), color=COLORS[name], alpha=0.8, label=LABELS[name])
        ax.plot(*curve(lines, "val_loss"), "o", color=COLORS[name], markersize=5)
        for right in beside:
            right.plot(*curve(lines, "val_accuracy"), "o-", color=COLORS[name], label=LABELS[name])
            right.set_ylabel("validation accuracy")
    if target_entropy is not None:
        ax.axhline(
            target_entropy,
            color=rcParams["text.color"],
            linestyle=":",
            label="entropy of the targets",
        )
    ax.set_ylabel("cross entropy in nats (dots: validation)")
    ax.legend(frameon=False)
    return figure


def qk_sigma(runs: dict[str, Lines]) -> Figure:
    """The spectral norm of W_q W_k^T in every block, a panel for each run."""
    figure, axes = _axes(len(runs))
    for ax, (name, lines) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        steps, sigmas = curve(lines, "qk_sigma")
        for block, sigma in enumerate(sigmas.T):
            shade = 0.25 + 0.75 * (block + 1) / sigmas.shape[1]
            label = f"block {block}" if block in (0, sigmas.shape[1] - 1) else None
            ax.plot(steps, sigma, color=COLORS[name], alpha=shade, label=label)
        ax.set_yscale("log")
        ax.set_title(LABELS[name])
        ax.legend(frameon=False)
    np.atleast_1d(axes)[0].set_ylabel(r"$\sigma_1(W_q W_k^\top)$")
    return figure


def learning_rates(lines: Lines) -> Figure:
    """The actual learning rate of every kind of weight in three blocks of an AdamW² run."""
    steps, rate = curve(lines, "learning_rate")
    last = f"/{next(iter(KINDS))}/kernel/scale"
    stacks = [key.removesuffix(last) for key in lines[0] if key.endswith(last)]
    scales = {  # by kind: (step, block), through all stacks
        kind: np.concatenate(
            [curve(lines, f"{stack}/{kind}/kernel/scale")[1] for stack in stacks], axis=1
        )
        for kind in KINDS
    }
    depth = next(iter(scales.values())).shape[1]
    figure, axes = _axes(3)
    for ax, block in zip(axes, (0, depth // 2, depth - 1), strict=True):
        for (kind, label), color in zip(KINDS.items(), COLORS.values(), strict=False):
            ax.plot(steps, rate * scales[kind][:, block], color=color, label=label)
        ax.plot(steps, rate, "--", color=rcParams["text.color"], label="schedule")
        ax.set_yscale("log")
        ax.set_ylim(bottom=1e-4 * rate.max())
        ax.set_title(f"block {block}")
    axes[0].set_ylabel("actual learning rate")
    axes[-1].legend(frameon=False, ncols=2)
    return figure


def learning_rate_sweep(losses: dict[str, dict[float, float | None]]) -> Figure:
    """Validation loss over peak learning rate, a line per optimizer."""
    figure, ax = _axes(1)
    _draw_losses(ax, losses)
    _end_above_the_best(ax, losses)
    ax.set_ylabel("validation loss in nats per token")
    ax.legend(frameon=False, fontsize="small")
    return figure


def with_and_without(losses: dict[str, dict[float, float | None]]) -> Figure:
    """The same, a panel for each optimizer that was trained with and without the bound."""
    pairs = [(alone, name) for name, alone in ALONE.items() if {name, alone} <= losses.keys()]
    pairs.sort(key=lambda pair: list(LABELS).index(pair[0]))
    columns = max(1, min(4, len(pairs)))
    rows = max(1, -(-len(pairs) // columns))
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax, pair in zip(axes.flat, pairs, strict=False):
        _draw_losses(ax, {name: losses[name] for name in pair})
        ax.set_title(LABELS[pair[0]].removesuffix(", no warmup"), fontsize="medium")
        ax.tick_params(labelbottom=True)
        style(ax)
    _end_above_the_best(axes[0, 0], {name: losses[name] for pair in pairs for name in pair})
    for ax in axes.flat[len(pairs) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss")
    if pairs:
        handles = [
            Line2D([], [], color=rcParams["text.color"], linestyle=line) for line in ("--", "-")
        ]
        axes[0, 0].legend(handles, ["alone", "with the bound"], frameon=False, fontsize="small")
    return figure


def _draw_losses(ax: Axes, losses: dict[str, Any]) -> None:
    """Losses over peak rates; what has the bound is solid."""
    for name, by_rate in losses.items():
        values = [np.nan if loss is None else loss for loss in by_rate.values()]
        width = 3 if name == "adamw2" else 1.5
        line = "o-" if name in ALONE else "o--"
        ax.plot(list(by_rate), values, line, color=COLORS[name], label=LABELS[name], lw=width)
    ax.set_xscale("log")
    ax.set_xlabel("peak learning rate")


def _end_above_the_best(ax: Axes, losses: dict[str, Any]) -> None:
    """Ends the axis a little above the best loss of every optimizer: higher runs have failed."""
    found = [[loss for loss in by_rate.values() if loss is not None] for by_rate in losses.values()]
    best = [min(values) for values in found if values]
    if best:
        margin = 0.1 * max(best)
        ax.set_ylim(min(best) - margin, max(best) + 3 * margin)


def tau_ablation(runs: dict[str, dict[float, Lines]]) -> Figure:
    """Training loss of AdamW², a panel for each model and a line for each tau."""
    figure, axes = _axes(len(runs), sharey=False)
    for ax, (model, by_tau) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        for (tau, lines), color in zip(by_tau.items(), cycle(COLORS.values()), strict=False):
            ax.plot(*curve(lines, "loss"), color=color, label=rf"$\tau$ = {tau:g}")
        ax.set_title({"gpt": "GPT", "swin": "Swin"}[model])
        ax.set_ylabel("training loss in nats")
        ax.legend(frameon=False)
    return figure
