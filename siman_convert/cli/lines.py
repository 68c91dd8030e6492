"""Text as wide as the terminal; elsewhere, as it needs. Nothing is ever cut, and no line ends in blanks."""

import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

GAP = 2  # blanks between columns, one where that makes a table fit
NARROWEST = 12  # of a first column that does not hold all its cells


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, whatever FORCE_COLOR says; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(rows: Sequence[Sequence[str]], width: int | None, right: Collection[int] = ()) -> list[str]:
    """One text for each row of equally many cells, titles first; the columns `right` are aligned to the right.

    Where a table does not fit, a first cell that is too long gets a line of its own, and its row goes on in the next.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = GAP
    if width is not None:
        gap = GAP if sum(widths) + GAP * (len(widths) - 1) <= width else 1
        rest = sum(widths[1:]) + gap * (len(widths) - 1)
        widths[0] = min(widths[0], max(width - rest, NARROWEST))
    return [_row(row, widths, gap, right) for row in rows]


def _row(row: Sequence[str], widths: Sequence[int], gap: int, right: Collection[int]) -> str:
    first, *others = row
    alone = len(first) > widths[0]
    cells = ["" if alone else first, *others]
    aligned = [
        cell.rjust(width) if place in right else cell.ljust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    line = (" " * gap).join(aligned).rstrip()
    return f"{first}\n{line}".rstrip() if alone else line


def folded(text: str, width: int | None, indent: int = 0) -> str:
    """`text` broken between words, its further lines indented; a word that is longer than the terminal stays whole."""
    if width is None:
        return text
    filled = textwrap.wrap(
        text,
        max(width, indent + 1),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(filled)
