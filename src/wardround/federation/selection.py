"""Which round an arm releases: validation means are compared only where they are over the same sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """A validated round: its score, of which a larger one is better, and the sites whose patients it is over."""

    round: int
    score: float
    sites: frozenset[str]


def best_round(scored: Sequence[Scored]) -> int | None:
    """The best of the rounds that the same sites validated; `None` where no two rounds can be compared.

    A mean without the hospital with the hardest patients is better for no merit of the round. Of the sets of sites, the
    one that validated most rounds counts, then the larger, then the later one. A single validated round is the best.
    """
    groups = _by_sites(scored)
    if not groups:
        return None
    chosen = max(groups, key=lambda group: (len(group), len(group[0].sites), group[-1].round))
    return None if len(chosen) == 1 < len(scored) else _best(chosen)


def candidates(scored: Sequence[Scored]) -> set[int]:
    """The rounds that `best_round` may still come to, whichever sites validate the rounds that follow."""
    return {_best(group) for group in _by_sites(scored)}


def _by_sites(scored: Sequence[Scored]) -> list[list[Scored]]:
    groups: dict[frozenset[str], list[Scored]] = {}
    for entry in sorted(scored, key=lambda entry: entry.round):
        groups.setdefault(entry.sites, []).append(entry)
    return list(groups.values())


def _best(group: Sequence[Scored]) -> int:
    return max(group, key=lambda entry: (entry.score, -entry.round)).round
