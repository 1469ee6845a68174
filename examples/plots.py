"""The pictures of the examples."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.optimizers import ALONE, LABELS

matplotlib.use("agg")

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = {
    "adamw": "#D55E00",
    "adamw_warmup": "#999999",
    "adamw2": "#0072B2",
    "adamw2_warmup": "#33BBEE",
    "adamw2_cap": "#004488",
    "adamw_cap": "#DDAA33",
    "radam": "#CC79A7",
    "lion": "#E69F00",
    "lamb": "#009E73",
    "unit_clip": "#56B4E9",
    "schedule_free": "#F0E442",
    "muon": "#000000",
    # And Tol's.
    "muon_warmup": "#8B4513",
    "muon_h": "#44AA99",
    "scion": "#661100",
    "normuon": "#6699CC",
    "gi_adamw": "#882255",
    "noise_share": "#999933",
    "soft_clip": "#117733",
    "qk_clip": "#EE99AA",
    "keep_norm": "#88CCEE",
    "adam_h": "#AA4499",
    "lion_a": "#DDCC77",
    "lion_ar": "#CC6677",
}
COLORS |= {name: COLORS[alone] for name, alone in ALONE.items() if name not in COLORS}
# Kinds of weights, in colors of Tol's that no optimizer has.
KINDS = {
    "attention/query": ("$W_q$", "#AA3377"),
    "attention/key": ("$W_k$", "#66CCEE"),
    "attention/value": ("$W_v$", "#CCBB44"),
    "attention/out": ("$W_o$", "#228833"),
    "mlp/up": ("$W_1$", "#EE6677"),
    "mlp/down": ("$W_2$", "#332288"),
}

Lines = list[dict[str, Any]]
Losses = dict[str, dict[float, list[float]]]  # by optimizer and peak rate: those of the seeds


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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """The actual learning rate of every kind of weight in up to three blocks of an AdamW² run."""
    scales = _scales(lines)
    depth = next(iter(scales.values())).shape[1]
    blocks = sorted({0, depth // 2, depth - 1})
    figure, axes = _axes(len(blocks))
    axes = np.atleast_1d(axes)
    for ax, block in zip(axes, blocks, strict=True):
        _draw_rates(ax, lines, scales, block)
        ax.set_title(f"block {block}")
    axes[0].set_ylabel("actual learning rate")
    axes[-1].legend(frameon=False, ncols=2, loc="lower center")
    return figure


def _scales(lines: Lines) -> dict[str, np.ndarray]:
    """The factor on the updates of each kind of weight, (step, block), through all stacks."""
    last = f"/{next(iter(KINDS))}/kernel/scale"
    stacks = [key.removesuffix(last) for key in lines[0] if key.endswith(last)]
    return {
        kind: np.concatenate(
            [curve(lines, f"{stack}/{kind}/kernel/scale")[1] for stack in stacks], axis=1
        )
        for kind in KINDS
    }


def _draw_rates(ax: Axes, lines: Lines, scales: dict[str, np.ndarray], block: int) -> None:
    """The actual learning rates in a block, below the schedule."""
    steps, rate = curve(lines, "learning_rate")
    for kind, (label, color) in KINDS.items():
        ax.plot(steps, rate * scales[kind][:, block], color=color, label=label)
    ax.plot(steps, rate, "--", color=rcParams["text.color"], label="schedule")
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-4 * rate.max())


def overview(pairs: dict[str, str], losses: dict[str, dict[float, float]], lines: Lines) -> Figure:
    """Loss over peak rate of optimizers alone and with the bound, and where the bound acts."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    panels = left.subplots(2, 2, sharex=True, sharey=True)
    for ax, pair in zip(panels.flat, pairs.items(), strict=True):
        for name, label, marker in zip(
            pair, ("alone", "with the bound"), ("o--", "o-"), strict=True
        ):
            color = COLORS["adamw2"] if name == pair[1] else "#777777"
            ax.plot(
                list(losses[name]), list(losses[name].values()), marker, color=color, label=label
            )
        style(ax)
        ax.set_xscale("log")
        ax.set_title(LABELS[pair[0]].removesuffix(", no warmup"))
    panels[0, 0].set_ylim(2.0, 3.05)
    panels[0, 0].legend(frameon=False)
    left.supxlabel("peak learning rate, without warmup")
    left.supylabel("validation loss, nats per byte")
    ax = right.subplots()
    style(ax)
    _draw_rates(ax, lines, _scales(lines), 0)
    ax.set_title("The rates that the bound gives a block")
    ax.set_xlabel("step")
    ax.set_ylabel("actual learning rate")
    ax.legend(frameon=False, ncols=2, loc="lower center")
    return figure


def learning_rate_sweep(losses: Losses) -> Figure:
    """Validation loss over peak learning rate, a line per optimizer with its label at its end.

    The lines are of the first seed. A bar is the range over the seeds, where there are several.
    """
    figure, axes = grid(1, 1, (9, 4.8))
    ax = axes[0, 0]
    _draw_losses(ax, losses)
    _end_above_the_best(ax, losses)
    _label_ends(ax, losses)
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("validation loss in nats per byte")
    return figure


def by_steps_and_seconds(runs: dict[str, Lines], steps: int) -> Figure:
    """Training loss over steps, and over CPU seconds: means over runs, each with its parts."""
    figure, axes = _axes(2)
    for name, lines in runs.items():
        losses = np.mean([np.asarray(line["train_losses"], float) for line in lines], axis=0)
        done = (np.arange(len(losses)) + 0.5) / len(losses)
        seconds = np.median([line["cpu_seconds"] for line in lines])
        for ax, total in zip(axes, (steps, seconds), strict=True):
            ax.plot(total * done, losses, _line(name), color=COLORS[name], label=LABELS[name])
    axes[0].set_ylabel("training loss in nats per byte")
    axes[1].set_xlabel("CPU seconds")
    if runs:
        axes[1].legend(frameon=False, fontsize="small")
    return figure


def _draw_losses(ax: Axes, losses: Losses) -> None:
    """Losses over peak rates; what has the bound is solid."""
    for name, by_rate in losses.items():
        first = [seeds[0] for seeds in by_rate.values()]
        width = 3 if name == "adamw2" else 1.5
        ax.plot(list(by_rate), first, f"o{_line(name)}", color=COLORS[name], ms=4, lw=width)
        for rate, seeds in by_rate.items():
            if len(seeds) > 1:
                ax.plot([rate, rate], [min(seeds), max(seeds)], "_-", color=COLORS[name], ms=12)
    ax.set_xscale("log")


def _line(name: str) -> str:
    return "-" if name in ALONE else "--"


def _end_above_the_best(ax: Axes, losses: Losses) -> None:
    """Ends the axis a little above the best loss of every optimizer: higher runs have failed."""
    best = [min(seeds[0] for seeds in by_rate.values()) for by_rate in losses.values()]
    best = [loss for loss in best if np.isfinite(loss)]
    if best:
        margin = 0.05 * max(best)
        ax.set_ylim(min(best) - margin, max(best) + 3 * margin)


def _label_ends(ax: Axes, losses: Losses) -> None:
    """The label of every line right of the axes, as high as its end, but none over another."""
    (_, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ends = {}
    for name, by_rate in losses.items():
        rate, (loss, *_) = list(by_rate.items())[-1]
        ends[name] = (rate, loss) if loss < top else (right, top)
    names = sorted(losses, key=lambda name: (ends[name][1], min(losses[name].values())))
    heights = [(ends[name][1] - bottom) / (top - bottom) for name in names]
    apart = 0.035
    for i in range(1, len(names)):
        heights[i] = max(heights[i], heights[i - 1] + apart)
    above = 1 + apart
    for i in reversed(range(len(names))):
        above = heights[i] = min(heights[i], above - apart)
    for name, height in zip(names, heights, strict=True):
        ax.annotate(
            LABELS[name],
            ends[name],
            (1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            arrowprops={
                "arrowstyle": "-",
                "color": COLORS[name],
                "linestyle": _line(name),
                "relpos": (0, 0.5),
            },
        )


def tau_ablation(runs: dict[str, dict[float, Lines]]) -> Figure:
    """Training loss of AdamW², a panel for each model and a line for each tau, larger is darker."""
    figure, axes = _axes(len(runs), sharey=False)
    for ax, (model, by_tau) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        shades = colormaps["viridis_r"](np.linspace(0.1, 1, len(by_tau)))
        for tau, shade in zip(sorted(by_tau), shades, strict=True):
            ax.plot(*curve(by_tau[tau], "loss"), color=shade, label=rf"$\tau$ = {tau:g}")
        ax.set_title({"gpt": "GPT", "swin": "Swin"}[model])
        ax.set_ylabel("training loss in nats")
    ax.legend(frameon=False)
    return figure
