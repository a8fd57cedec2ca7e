"""Compares the logs of a run with themselves and with each other: edits, deletions, reorder, truncation.

A log alone shows what was changed inside it. What was cut from its end, or written anew from some record on, only the
others' logs show: they hold heads of it (anchors). What came after the last anchor nobody else has seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from wardround.errors import StudyError
from wardround.protection.identity import frame
from wardround.storage.hash_log import (
    CHECKPOINT,
    CHECKPOINT_EVERY,
    KEY,
    LOG,
    PURPOSE,
    START,
    Damaged,
    Entry,
    signed_events,
)
from wardround.wire.canonical import digest


@dataclass(frozen=True)
class Log:
    """One log as far as it can be read, what is wrong inside it, and where it lies in the folder."""

    name: str
    entries: Sequence[Entry]
    damages: Sequence[str]
    note: str = ""
    roster: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def hashes(self) -> Mapping[str, Entry]:
        """Every record by its hash."""
        return {entry.hash: entry for entry in self.entries}

    def told(self, event: str) -> Iterator[Entry]:
        """The records of an event."""
        return (entry for entry in self.entries if entry.event == event)

    @property
    def study(self) -> str:
        """The study and arm it is of; empty when that cannot be read."""
        return str(self.entries[0].payload.get("study", "")) if self.entries else ""

    @property
    def key(self) -> str | None:
        """The public key that its signatures are made with, in hex; nothing for a log without any."""
        key = self.entries[0].payload.get(KEY) if self.entries else None
        return None if key is None else str(key)

    @property
    def signatures(self) -> int:
        """How many of its records are signatures."""
        return sum(1 for _ in self.told(CHECKPOINT))

    @property
    def secure(self) -> bool:
        """Whether it tells of secure sums, which have a roster of keys."""
        return bool(self.roster) or any(self.told("survivors"))

    @property
    def site(self) -> str | None:
        """The site whose log it is; nothing for a coordinator's."""
        site = self.entries[0].payload.get("site") if self.entries else None
        return None if site is None else str(site)


@dataclass(frozen=True)
class Verification:
    """The logs that were found, everything that is wrong, and how many anchors agree."""

    logs: Sequence[Log]
    damages: Sequence[str]
    anchors: int


def verify(where: Path) -> Verification:
    """Verify one log, or all logs below a run's folder; raises `StudyError` when there is none."""
    paths = [where] if where.is_file() else sorted(where.rglob(LOG))
    if not paths:
        raise StudyError(f"the folder holds no log ({LOG})", detail=str(where))
    base = where.parent if where.is_file() else where
    logs = [read_log(path, str(path.relative_to(base))) for path in paths]
    damages = [f"{log.name}: {damage}" for log in logs for damage in log.damages]
    anchors = 0
    for study in dict.fromkeys(log.study for log in logs):
        found, agreeing = _compare([log for log in logs if log.study == study]) if where.is_dir() else ([], 0)
        damages += found
        anchors += agreeing
    return Verification(logs, damages, anchors)


def read_log(path: Path, name: str) -> Log:
    """One log, checked in itself."""
    entries: list[Entry] = []
    damages: list[str] = []
    note = ""
    head, expected = START, 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                note = "the last one is unfinished, as after a crash"
                break
            try:
                entry = Entry.of_line(line)
            except Damaged as damage:
                damages.append(f"record {number} {damage}")
                head, expected = "", expected + 1
                continue
            damages += _place(entry, number, expected, head)
            entries.append(entry)
            head, expected = entry.hash, entry.seq + 1
    if not entries and not damages:
        damages.append("the log is empty")
    roster: Mapping[str, str] = {}
    with suppress(OSError, ValueError, RecursionError):
        told = json.loads((path.parent / "roster.json").read_text(encoding="utf-8"))
        roster = told if isinstance(told, dict) else {}
    return Log(name, entries, damages + list(_checkpoints(entries)), note, roster)


def _place(entry: Entry, number: int, expected: int, head: str) -> Iterator[str]:
    """What is wrong with where a record stands."""
    if entry.seq > expected:
        yield f"records {expected} to {entry.seq - 1} are missing before line {number + 1}"
    elif entry.seq < expected:
        yield f"record {entry.seq} stands out of order in line {number + 1}"
    elif head and entry.prev != head:
        yield f"record {entry.seq} does not follow the one before it: something was put in its place"


def _checkpoints(entries: Sequence[Entry]) -> Iterator[str]:
    """What is wrong with the signatures of a log: every one that is there must be good, and none may be missing."""
    first = entries[0].payload if entries else {}
    key, signs = first.get(KEY), signed_events(first)
    before = ""
    for entry in entries:
        due = key is not None and entry.seq > 0 and (entry.seq % CHECKPOINT_EVERY == 0 or before in signs)
        if (due or entry.event == CHECKPOINT) and not (entry.event == CHECKPOINT and _signed(entry, str(key))):
            yield f"record {entry.seq} is not signed with the key of its log"
        before = entry.event


def _signed(entry: Entry, key: str) -> bool:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(
            bytes.fromhex(str(entry.payload.get("signature"))), frame(PURPOSE, entry.actor, entry.seq, entry.prev)
        )
    except (ValueError, InvalidSignature):
        return False
    return True


def _compare(logs: Sequence[Log]) -> tuple[list[str], int]:
    """What one party's log holds of another's that the other's lacks, and how many anchors agree."""
    damages: dict[str, None] = {}
    agreeing = 0
    sites = {log.site: log for log in logs if log.site is not None}
    for one, other in combinations([log for log in logs if log.entries], 2):
        # A whole copy beside a spoilt log would otherwise answer for it.
        if one.site == other.site:
            whose = "the coordinator" if one.site is None else f"site {one.site}"
            damages[f"{one.name} and {other.name} are both of {whose}: only one of them can be its log"] = None
    for coordinator in (log for log in logs if log.entries and log.site is None):
        for entry in coordinator.told("accepted"):
            site = str(entry.payload.get("site"))
            if site not in sites:
                damages[
                    f"the log of site {site} is missing; {coordinator.name} holds its head of round {entry.round}"
                ] = None
            elif entry.payload.get("head") in sites[site].hashes:
                agreeing += 1
            else:
                damages[_lacks(sites[site], entry, coordinator)] = None
        for site, log in sites.items():
            # Without a secure sum there is no roster: keys are then known by the logs alone.
            if coordinator.secure and coordinator.roster.get(site) != log.key:
                damages[f"{log.name}: the key in its first record is not the one on the roster"] = None
            for entry in log.told("anchored"):
                anchor = coordinator.hashes.get(str(entry.payload.get("anchor")))
                if anchor is None:
                    damages[_lacks(coordinator, entry, log)] = None
                elif digest(anchor.payload.get("heads")) != entry.payload.get("heads"):
                    damages[f"{log.name}: record {entry.seq} was shown other heads than {coordinator.name} holds"] = (
                        None
                    )
                else:
                    agreeing += 1
    if sites and not any(log.entries and log.site is None for log in logs):
        anchored = next((e for log in sites.values() for e in log.told("anchored")), None)
        if anchored is not None:
            damages["the coordinator's log is missing; sites hold heads of it"] = None
    return list(damages), agreeing


def _lacks(log: Log, entry: Entry, witness: Log) -> str:
    return (
        f"{log.name}: cut off or written anew: it lacks a record that {witness.name} saw of it in round {entry.round} "
        f"(record {entry.seq} there); it ends at record {log.entries[-1].seq if log.entries else '-'}"
    )
