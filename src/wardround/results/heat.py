"""A table of numbers between sites, darker the larger they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeatCell:
    """A number as text, how dark it is from 0 to 1, and what stands below it; `own` is a site with itself."""

    text: str
    share: float = 0.0
    below: str = ""
    own: bool = False


@dataclass(frozen=True)
class HeatTable:
    """Rows by name, with a cell for each column; `corner` says what rows and columns are."""

    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]


EMPTY = HeatCell("–")
