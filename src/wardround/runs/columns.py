"""Text in columns for a terminal of eighty characters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

WIDTH = 80
_ROOM = 20  # a column that is narrower than this is no place for words
_LABEL = 15


def entry(label: str, text: str) -> str:
    """A labelled paragraph."""
    return wrapped(text, f"  {label:<{_LABEL - 2}}")


def wrapped(text: str, first: str) -> str:
    """A paragraph that begins with `first`."""
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers to the right. What the last one has no room for is wrapped."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    right = [all(cell.replace(",", "").isdigit() for cell in column[1:]) for column in columns]
    before = 2 + sum(width + 2 for width in widths[:-1])

    def line(cells: Sequence[str]) -> str:
        aligned = []
        for cell, width, to_right in zip(cells, widths, right, strict=True):
            spare = " " * (width - cell_len(cell))
            aligned.append(spare + cell if to_right else cell + spare)
        whole = "  " + "  ".join(aligned).rstrip()
        if cell_len(whole) <= WIDTH or len(cells) == 1:
            return whole
        first = "  " + "".join(f"{cell}  " for cell in aligned[:-1])
        if WIDTH - before >= _ROOM:
            return wrapped(cells[-1], first)
        return f"{first.rstrip()}\n{wrapped(cells[-1], '      ')}"

    return "\n".join(line(cells) for cells in (header, *rows))
