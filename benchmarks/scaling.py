"""How the cost of an update grows with the width, the depth and the number of leaves."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from optax.contrib import MuonDimensionNumbers

from benchmarks import measure, peers, trees, updates
from examples import plots


@dataclasses.dataclass(frozen=True)
class Flags:
    """Time updates of growing trees, with adamw2 and with optax.adamw in turns."""

    seconds: float = 3.0
    """Time for each tree."""
    out: Path = Path("runs/benchmarks/scaling.json")
    """The file for the table; the picture is beside it."""


def tree(num_leaves: int, *shape: int) -> trees.Tree:
    """Leaves of one shape."""
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    names = [str(i) for i in range(num_leaves)]
    return trees.Tree(
        dict.fromkeys(names, leaf), dict.fromkeys(names, MuonDimensionNumbers(-2, -1))
    )


COLORS = {peers.BASE: plots.COLORS["adamw"], peers.OURS: plots.COLORS["adamw2"]}
AXES: Mapping[str, Mapping[int, trees.Tree]] = {
    "width (12 square matrices)": {d: tree(1, 12, d, d) for d in (128, 256, 512, 1024, 2048)},
    "depth (matrices of width 512)": {n: tree(1, n, 512, 512) for n in (3, 6, 12, 24, 48)},
    "leaves (of 64 by 64)": {n: tree(n, 64, 64) for n in (4, 8, 16, 32, 64, 128)},
}


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of a line through the points, in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main(flags: Flags) -> None:
    """Prints the table, and draws the picture."""
    rows: list[dict[str, Any]] = []
    figure, axes = plots.grid(1, len(AXES), (12, 3.6))
    for ax, (name, by_size) in zip(axes[0], AXES.items(), strict=True):
        times: dict[str, list[float]] = {peers.BASE: [], peers.OURS: []}
        for size, grown in by_size.items():
            grads = trees.fill(grown, seed=1)
            found = measure.seconds(
                {
                    which: updates.Update(peers.OPTIMIZERS[which](grown.numbers), grown, grads).step
                    for which in times
                },
                flags.seconds,
            )
            for which, seconds in found.items():
                times[which].append(seconds)
            rows.append(
                {"axis": name, "size": size} | {f"{w}, ms": 1e3 * s for w, s in found.items()}
            )
        for which, seconds in times.items():
            label = f"{which}, slope {slope(list(by_size), seconds):.2f}"
            milliseconds = [1e3 * s for s in seconds]
            ax.loglog(list(by_size), milliseconds, "o-", color=COLORS[which], label=label)
        ax.set_xticks(list(by_size), labels=list(map(str, by_size)))
        ax.minorticks_off()
        ax.set_xlabel(name)
        ax.legend(frameon=False)
    axes[0, 0].set_ylabel("ms for an update")
    measure.report(rows, flags.out)
    print(f"Picture: {plots.save(figure, flags.out.with_suffix('.png'))}")


if __name__ == "__main__":
    main(tyro.cli(Flags))
