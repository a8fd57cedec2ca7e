"""What a look through files finds: kinds and counts for everybody at the site, places for a file that stays there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

# Of each kind; a list of more is read by no person.
_MOST_PLACES = 10_000


class Level(StrEnum):
    """How much a finding matters."""

    REFUSE = "refuse"
    WARN = "warn"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """A kind of finding in fixed words and public names of attributes: no value, name or path is in it."""

    level: Level
    what: str


@dataclass
class Findings:
    """Findings with their counts, and where each was."""

    counts: Counter[Finding] = field(default_factory=Counter)
    places: dict[Finding, list[str]] = field(default_factory=dict)

    def add(self, found: Iterable[Finding], path: Path, where: str = "") -> None:
        """Count what was found in one file, each kind once."""
        for finding in dict.fromkeys(found):
            self.counts[finding] += 1
            places = self.places.setdefault(finding, [])
            if len(places) < _MOST_PLACES:
                places.append(f"{path}{where and f': {where}'}")

    def of(self, level: Level) -> list[tuple[Finding, int]]:
        """The findings of a level, the most frequent first."""
        found = [(finding, count) for finding, count in self.counts.items() if finding.level == level]
        return sorted(found, key=lambda one: (-one[1], one[0].what))

    def lines(self) -> list[str]:
        """The findings for people: level, count and kind."""
        return [f"{level:<7} {count:>7,}  {finding.what}" for level in Level for finding, count in self.of(level)]

    def detail(self) -> str:
        """Every place, by finding: for a file that stays at the site."""
        parts = [
            f"{level}: {finding.what} ({count})\n" + "".join(f"  {place}\n" for place in self.places[finding])
            for level in Level
            for finding, count in self.of(level)
        ]
        return "\n".join(parts)


def words(text: str) -> frozenset[str]:
    """The words of a text, for a table of them."""
    return frozenset(text.split())
