"""Patients whose files cannot be used: set aside one by one, so that a damaged one does not cost its hospital.

Who it is and where the file lies stay at the site; the reason is fixed text and may leave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from wardround.errors import DataError


@dataclass(frozen=True)
class Aside:
    """A patient who cannot be used and why; `patient` is empty where the files do not say whose they are."""

    patient: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Group:
    """Patients who are set aside for one reason."""

    reason: str
    count: int


def groups(aside: Sequence[Aside]) -> tuple[Group, ...]:
    """How often each reason is given, the most frequent first."""
    return tuple(Group(reason, count) for reason, count in Counter(one.reason for one in aside).most_common())


def refuse(site: str, total: int, aside: Sequence[Aside]) -> None:
    """What a task that stands alone makes of patients who cannot be used: it takes none. Raises DataError."""
    if aside:
        raise too_many(site, aside)


def too_many(site: str, aside: Sequence[Aside], limit: str = "") -> DataError:
    """The error of a site that stops: its most frequent reason, no numbers; who it is about is in the detail."""
    reasons = groups(aside)
    more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
    return DataError(
        f"{place(site)}{limit}{reasons[0].reason}{more}",
        detail="; ".join(_named(one) for one in aside[:20]) + ("; ..." if len(aside) > 20 else ""),
    )


def place(site: str) -> str:
    """How a message about a site's files begins; nothing where there is no site, as at a clinic."""
    return f"site {site}: " if site else ""


def _named(one: Aside) -> str:
    return ": ".join(part for part in (one.patient, one.detail) if part)
