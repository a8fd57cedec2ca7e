"""A process that spends from a ledger; it imports no more than that needs, for a test starts several."""

from __future__ import annotations

from pathlib import Path

from wardround.protection.ledger import Charge, Ledger
from wardround.storage.store import SiteStore


def entry(number: int, study: str = "s") -> Charge:
    """What ten steps of a round cost."""
    return Charge(study, "federated", number, 10, 0.1, 1.0, "cohort", f"{study}/{number}", "2026-01-01T00:00:00+00:00")


def anything(entries: object) -> None:
    """No budget."""


def spend_many(folder: Path, study: str) -> None:
    """Five rounds of a study."""
    ledger = Ledger(folder / "ledger.jsonl", SiteStore(folder / "store"))
    for number in range(5):
        ledger.spend(entry(number, study), anything)
