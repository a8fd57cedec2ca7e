"""The notes of a run: what a reader of its results must know of single rounds and of who took part, each said once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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


def left_out(lines: Sequence[RoundLine], training: Mapping[str, int | None]) -> list[str]:
    """Of each site that rounds of an arm went without: of how many, and what share of the training patients it holds.

    And of asynchronous rounds, whose updates came late.

    `lines` are those of one arm; `training` has the numbers of patients of all its sites, where they gave them.
    """
    notes = []
    for site in sorted(training):
        late = [line.staleness[site] for line in lines if line.staleness.get(site)]
        if late:
            notes.append(
                f"{lines[0].arm}: {len(late)} update{'s' if len(late) > 1 else ''} of {site} came late, by {max(late)} "
                f"round{'s' if max(late) > 1 else ''} at most, and counted less for it; it is in "
                f"{sum(site in line.participants for line in lines)} of {len(lines)} rounds"
            )
        # A site that is at work on an older round is not left out: rounds do not wait for it.
        numbers = [line.round for line in lines if site not in line.participants and site not in line.at_work]
        if numbers:
            notes.append(
                f"{lines[0].arm}: {site} was left out of {len(numbers)} of {len(lines)} rounds ({in_rounds(numbers)}); "
                f"{_share(site, training)}"
            )
    return notes


def _share(site: str, training: Mapping[str, int | None]) -> str:
    own, known = training[site], [count for count in training.values() if count is not None]
    if own is None:
        return "what share of the training patients it holds is not known: it did not give their number"
    if len(known) < len(training):
        return f"it holds {own} of the training patients, and not every site gave their number"
    total = sum(known)
    share = own / total if total else 0.0
    return f"it holds {'less than 1%' if 0.0 < share < 0.01 else f'{share:.0%}'} of the {total} training patients"


def _said(line: RoundLine) -> Iterator[str]:
    for site, reason in line.missing.items():
        yield f"without {site} ({reason})"
    yield from line.notes
