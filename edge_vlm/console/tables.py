"""Text in columns, for people. Nothing but Python, so that every command may print a table."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def columns(rows: Rows, sides: str = "<") -> list[str]:
    """A line for each row, every column as wide as its widest cell, two spaces apart.

    `sides`: "<" or ">" for each column; the last one is also that of those after it. Raises
    ValueError if the rows differ in length.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [
        "  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def markdown(rows: Rows, sides: str = "<") -> list[str]:
    """The same as lines of Markdown; the first row is the head."""
    sides = sides.ljust(len(rows[0]), sides[-1])
    rule = ["---" if side == "<" else "---:" for side in sides]
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:])]
