"""Tables on a terminal."""

from collections.abc import Sequence


def layout(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, with the columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
