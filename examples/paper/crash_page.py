"""The page of a crash: one HTML file with all that was watched, crashed beside successful.

By hand, since it must open anywhere without a network: a page of Plotly's loads its program from
one, or brings another five megabytes of it along.
"""

import base64
import html
import io
import json
import math
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples import plots, recorder
from examples.optimizers import LABELS
from weyl_optax.dynamics import CollapseMode

RUNS = ("adamw", "qk_clip", "adamw2", "adamw2_cap")  # the first crashes, the last two do not
TERMS = {
    "W_q": r"$\|W_q\|_2$",
    "W_k": r"$\|W_k\|_2$",
    "W_v": r"$\|W_v\|_2$",
    "W_o": r"$\|W_o\|_2$",
    "W_1": r"$\|W_1\|_2$",
    "W_2": r"$\|W_2\|_2$",
    "W_qW_k": r"$\|W_q^\top W_k\|_2$",
    "W_oW_v": r"$\|W_o W_v\|_2$",
    "W_2W_1": r"$\|W_2 W_1\|_2$",
    "gamma_1": r"$\|\gamma_1\|_2$",
    "beta_1": r"$\|\beta_1\|_2$",
    "gamma_2": r"$\|\gamma_2\|_2$",
    "beta_2": r"$\|\beta_2\|_2$",
    "x": r"$\|x\|_2$",
    "grad_x": r"$\|\partial L/\partial x\|_2$",
}
INK = "#0b0c0d"  # the page turns it into the color of its text
INKED = tuple(
    "text.color axes.edgecolor axes.labelcolor grid.color xtick.color ytick.color".split()
)


class Run(NamedTuple):
    """What a run left: logged lines, and snapshots along a first axis of frames."""

    lines: plots.Lines
    steps: np.ndarray  # (F,) of the snapshots
    entropy: np.ndarray  # (F, L, B, N) of attention, for every block, example and head
    effective_rank: np.ndarray  # (F, L, B, N)
    mode: np.ndarray  # (F, L, B, N)
    maps: np.ndarray  # (F, L, N, T, T) of the first example
    energy: np.ndarray  # (F, L, N, S) spectral energy concentration for s = 1 to S

    def term(self, block: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a watched term."""
        return plots.curve(self.lines, f"watch/blocks/{block}/{name}")

    def largest(self, name: str) -> np.ndarray:
        """A watched term over the steps, in the block where it is largest."""
        return np.max([self.term(block, name)[1] for block in range(self.depth)], axis=0)

    @property
    def depth(self) -> int:
        return self.entropy.shape[1]


def read(folder: Path, name: str) -> Run:
    """The run of that name in a folder."""
    files = sorted((folder / "snapshots" / name).glob("*.npz"), key=lambda file: int(file.stem))
    frames = [dict(np.load(file)) for file in files]
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    steps = np.array([int(file.stem) for file in files])
    return Run(recorder.read_metrics(folder, name), steps, **stacked)


class Sign(NamedTuple):
    """A sign of a crash, and what was seen of it."""

    name: str  # HTML
    values: list[str]  # for each run
    seen: list[bool]


MAPS = "Over a tenth of the maps collapse"
QK = "‖W<sub>q</sub>ᵀW<sub>k</sub>‖₂"


def _number(x: float) -> str:
    """Two digits of small numbers, all of large ones; a power of ten where neither reads well."""
    if x == 0 or 1e-3 <= x < 100 or not math.isfinite(x):
        return f"{x:.2g}"
    if 100 <= x < 1e6:
        return f"{x:,.0f}"
    digits, exponent = f"{x:.1e}".split("e")
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{digits} · 10{str(int(exponent)).translate(superscripts)}"


def find_signs(runs: dict[str, Run], entropy: float) -> list[Sign]:
    """Which of the paper's signs of a crash the runs show, in numbers."""

    def sign(name: str, of: Callable[..., tuple[str, bool]], **arguments: Any) -> Sign:
        values, seen = zip(*(of(run, **arguments) for run in runs.values()), strict=True)
        return Sign(name, list(values), list(seen))

    def loss(run: Run) -> tuple[str, bool]:
        losses, validation = (plots.curve(run.lines, key)[1] for key in ("loss", "val_loss"))
        start, highest = losses[0], np.nanmax(losses)
        end = validation[-1] if len(validation) else np.nan  # a run that diverged has none
        text = f"{start:.2f} at the start, at most {highest:.2f}, validation {end:.2f} at the end"
        return text, bool(highest > start + 1 or not end < entropy)

    def growth(run: Run, term: str) -> tuple[str, bool]:
        values = run.largest(term)
        start, most = values[0], np.nanmax(values)
        text = f"{_number(start)} at the start, at most {_number(most)} ({most / start:,.0f} times)"
        return text, bool(most > 100 * start)

    def attention(run: Run) -> tuple[str, bool]:
        means = run.entropy.mean((2, 3))  # over examples and heads
        block = int(np.argmin(means.min(0)))
        start, lowest = means[0, block], means[:, block].min()
        return f"block {block}: {start:.2f} nats at the start, at least {lowest:.2f}", bool(
            lowest < start / 10
        )

    def collapsed(run: Run, mode: CollapseMode) -> tuple[str, bool]:
        shares = (run.mode == mode).mean((1, 2, 3))
        text = f"{shares[-1]:.0%} of the maps at the end, at most {shares.max():.0%}"
        return text, bool(shares.max() > 0.1)

    def concentration(run: Run) -> tuple[str, bool]:
        s = max(1, run.energy.shape[-1] // 8)
        shares = run.energy[..., s - 1].mean((1, 2))  # of one head alone it may be high in health
        text = f"{shares[0]:.0%} in {s} directions at the start, at most {shares.max():.0%}"
        return text, bool(shares.max() > 0.9)

    def vanishing(run: Run) -> tuple[str, bool]:
        values = np.array([run.term(block, "grad_x")[1] for block in range(run.depth)])
        block = int(np.argmin(np.nanmin(values, axis=1) / values[:, 0]))
        start, least = values[block, 0], np.nanmin(values[block])
        text = f"block {block}: {_number(start)} at the start, at least {_number(least)}"
        return text, bool(least < start / 100)

    return [
        sign(f"The loss turns up, or ends above the targets' entropy, {entropy:.2f} nats", loss),
        sign(f"{QK} grows more than a hundredfold", growth, term="W_qW_k"),
        sign("Its energy concentrates: over 90 % in an eighth of the directions", concentration),
        sign("The entropy of attention falls below a tenth", attention),
        sign(f"{MAPS} malignantly: sparse, low-rank", collapsed, mode=CollapseMode.MALIGNANT),
        sign(f"{MAPS} benignly: sparse, not low-rank", collapsed, mode=CollapseMode.BENIGN),
        sign("‖x‖₂ grows more than a hundredfold", growth, term="x"),
        sign("‖∂L/∂x‖₂ vanishes: below a hundredth", vanishing),
    ]


def _blocks(run: Run) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, run.depth // 2, run.depth - 1})


def _grid(rows: int, **share: bool) -> tuple[Figure, np.ndarray]:
    """A row has a panel for each of three blocks, or for each of three terms."""
    return plots.grid(rows, 3, (12, 0.4 + 2.2 * rows), **share)


def terms(runs: dict[str, Run]) -> Figure:
    """The terms of three blocks over the steps, both runs in each panel."""
    first = next(iter(runs.values()))
    found = [name for name in TERMS if f"watch/blocks/0/{name}" in first.lines[0]]
    figure, axes = _grid(-(-len(found) // 3), sharex=True)
    for ax, name in zip(axes.flat, found, strict=False):
        for run_name, run in runs.items():
            for block, shade in zip(_blocks(run), (0.35, 0.65, 1.0), strict=False):
                label = f"{LABELS[run_name]}, block {block}"
                ax.plot(
                    *run.term(block, name), color=plots.COLORS[run_name], alpha=shade, label=label
                )
        ax.set_yscale("symlog" if name.startswith("beta") else "log")
        ax.set_title(TERMS[name])
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def energy(runs: dict[str, Run]) -> Figure:
    """Spectral energy concentration over s in three blocks, a line for each step."""
    figure, axes = _grid(len(runs), sharex=True, sharey=True)
    colors = matplotlib.colormaps["plasma"]
    for row, (name, run) in zip(axes, runs.items(), strict=True):
        for ax, block in zip(row, _blocks(run), strict=True):
            shown = np.unique(np.linspace(0, len(run.steps) - 1, 9).astype(int))
            for frame in shown:
                concentration = run.energy[frame, block].mean(0)  # over the heads
                place = 0.1 + 0.75 * frame / max(shown[-1], 1)
                s = np.arange(1, concentration.size + 1)
                ax.plot(s, concentration, color=colors(place), label=f"step {run.steps[frame]}")
            ax.set_title(f"{LABELS[name]}, block {block}")
        row[0].set_ylabel("SEC")
    for ax in axes[-1]:
        ax.set_xlabel("s")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def entropy(runs: dict[str, Run]) -> Figure:
    """The entropy of attention over the steps in three blocks, a thin line for each head."""
    figure, axes = _grid(1, sharey=True)
    for name, run in runs.items():
        for ax, block in zip(axes[0], _blocks(run), strict=True):
            heads = run.entropy[:, block].mean(1)  # over the examples
            color = plots.COLORS[name]
            ax.plot(run.steps, heads, color=color, alpha=0.4, linewidth=0.8)
            ax.plot(run.steps, heads.mean(-1), color=color, linewidth=2, label=LABELS[name])
            ax.set_title(f"block {block}")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("attention entropy in nats")
    axes[0, 0].legend(frameon=False)
    return figure


def svg(figure: Figure, name: str) -> str:
    """A picture for the page, in the colors of its text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text, count=1)


def animation(runs: dict[str, Run]) -> dict[str, Any]:
    """The maps of one head over the steps, for the script of the page.

    It is the head whose entropy is lowest at the end of the first run. A byte is the root
    of a weight, so that small ones show.
    """
    entropies = next(iter(runs.values())).entropy[-1, :, 0]
    block, head = (int(i) for i in np.unravel_index(np.argmin(entropies), entropies.shape))

    def encode(values: np.ndarray) -> str:
        return base64.b64encode(np.round(255 * values).astype(np.uint8).tobytes()).decode()

    def frames(name: str, run: Run) -> dict[str, Any]:
        maps = run.maps[:, block, head].astype(np.float32)
        here = np.index_exp[:, block, 0, head]
        return {
            "label": LABELS[name],
            "maps": encode(np.sqrt(np.clip(np.nan_to_num(maps), 0, 1))),
            "captions": [
                f"step {step}: entropy {entropy:.2f}, effective rank {rank:.1f}, "
                f"{CollapseMode(mode).name.lower().replace('_', '-')}"
                for step, entropy, rank, mode in zip(
                    run.steps,
                    run.entropy[here],
                    run.effective_rank[here],
                    run.mode[here],
                    strict=True,
                )
            ],
        }

    return {
        "head": f"head {head} of block {block}",
        "size": next(iter(runs.values())).maps.shape[-1],
        "colors": encode(matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]),
        "runs": [frames(name, run) for name, run in runs.items()],
    }


def write(folder: Path, name: str, settings: Any, target_entropy: float) -> tuple[str, Path]:
    """Makes the page of the runs in a folder.

    Args:
        folder: With a finished run of each of `RUNS`.
        name: What was trained.
        settings: With `learning_rate` and `tau`.
        target_entropy: Of the frequencies of the targets, in nats.

    Returns:
        The signs as text, and the path of the page.
    """
    runs = {run: read(folder, run) for run in RUNS}
    signs = find_signs(runs, target_entropy)
    with matplotlib.rc_context(
        dict.fromkeys(INKED, INK) | {"font.size": 9, "legend.frameon": False}
    ):
        pictures = {
            "loss": plots.loss({run: runs[run].lines for run in RUNS}, target_entropy),
            "entropy": entropy(runs),
            "energy": energy(runs),
            "terms": terms(runs),
            "learning_rates": plots.learning_rates(runs["adamw2"].lines),
        }
        drawn = {f"{key}_picture": svg(figure, key) for key, figure in pictures.items()}
    maps = animation(runs)
    template = string.Template(Path(__file__).with_suffix(".html").read_text())
    path = folder / "index.html"
    path.write_text(
        template.substitute(
            drawn,
            name=name,
            learning_rate=f"{settings.learning_rate:g}",
            tau=f"{settings.tau:g}",
            runs="".join(f"<th>{html.escape(LABELS[run])}</th>" for run in RUNS),
            signs=_rows(signs),
            head=maps["head"],
            animation=json.dumps(maps),
        )
    )
    return _text(signs), path


def _rows(signs: list[Sign]) -> str:
    """The signs as rows of the page's table."""
    rows = []
    for sign in signs:
        cells = "".join(
            f'<td class="{"seen" if seen else "unseen"}"><b>{"seen" if seen else "not seen"}</b>'
            f"<br>{html.escape(value)}</td>"
            for value, seen in zip(sign.values, sign.seen, strict=True)
        )
        rows.append(f"<tr><th>{sign.name}</th>{cells}</tr>")
    return "\n".join(rows)


def _text(signs: list[Sign]) -> str:
    """The signs for a terminal."""
    lines = []
    for sign in signs:
        lines.append(re.sub("<[^>]*>", "", sign.name))
        for run, value, seen in zip(RUNS, sign.values, sign.seen, strict=True):
            lines.append(f"  {LABELS[run]:30} {'seen' if seen else 'not seen':9} {value}")
    return "\n".join(lines)
