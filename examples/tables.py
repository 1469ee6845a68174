"""Tables on a terminal."""

from collections.abc import Sequence


def layout(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, with the columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a table of Markdown, the first row its head."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    head, *others = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
    return "\n".join([head, "| " + " | ".join("-" * width for width in widths) + " |", *others])
