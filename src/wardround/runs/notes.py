"""The notes of a run: what a reader of its results must know of single rounds, each said once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wardround.results.schema import RoundLine
from wardround.results.units import in_rounds


def notes_of(lines: Sequence[RoundLine]) -> list[str]:
    """From the lines of rounds.jsonl, in order; what is said of several rounds or arms stands once, with a count."""
    found: dict[str, list[tuple[str, int]]] = {}
    for line in lines:
        for text in _said(line):
            found.setdefault(text, []).append((line.arm, line.round))
    notes = []
    for text, places in found.items():
        arms = {arm: [number for other, number in places if other == arm] for arm, _ in places}
        where = "; ".join(f"{arm}, {in_rounds(numbers)}" for arm, numbers in arms.items())
        notes.append(f"{where}: {text}" + (f" ({len(places)} times)" if len(places) > 1 else ""))
    return notes


def _said(line: RoundLine) -> Iterator[str]:
    for site, reason in line.missing.items():
        yield f"without {site} ({reason})"
    yield from line.notes
