"""Text in columns for a terminal of a hundred characters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_WIDTH = 100
_LABEL = 15


def entry(label: str, text: str) -> str:
    """A labelled paragraph."""
    return wrapped(text, f"  {label:<{_LABEL - 2}}")


def wrapped(text: str, first: str) -> str:
    """A paragraph that begins with `first`."""
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell.replace(",", "").isdigit() for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return "  " + "  ".join(aligned).rstrip()

    return "\n".join(line(cells) for cells in (header, *rows))
