"""The ledger: what a site's patients have spent, kept by the site, over rounds and studies.

A text file of one JSON object a line; every line holds the hash of the one before. How many lines there are and the
hash of the last is also written into the site's store (the anchor). So a ledger that was lost, cut or put back from
an old copy is found, and refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from wardround.errors import JournalError
from wardround.protection.accounting import Spending
from wardround.wire.canonical import digest
from wardround.wire.lines import locked, whole_lines

_ANCHOR = "privacy/ledger"
_START = "wardround-ledger-1"


class Anchor(Protocol):
    """Durable facts in the site's own store."""

    def fact(self, name: str) -> str | None:
        """A fact, if it was ever written."""
        ...

    def set_fact(self, name: str, value: str) -> None:
        """Write a fact, durably."""
        ...


@dataclass(frozen=True)
class Charge:
    """One round's steps. `cohort` is the data's fingerprint; `inputs` stands for all that decides the noisy bytes."""

    study: str
    arm: str
    round: int
    steps: int
    rate: float
    noise: float
    cohort: str
    inputs: str
    when: str
    rho: float = 0.0

    @property
    def spending(self) -> Spending:
        """What it costs."""
        return Spending(self.noise, self.rate, self.steps, self.rho)


class Ledger:
    """An append-only file with an anchor; safe for several processes at once."""

    def __init__(self, path: Path, anchor: Anchor) -> None:
        self.path = path
        self._anchor = anchor

    def entries(self) -> tuple[Charge, ...]:
        """Everything spent so far; raises `JournalError` when the ledger and the anchor do not agree."""
        with self._open() as file:
            entries, hashes = self._read(file)
            self._agree(hashes)
            return entries

    def spend(self, entry: Charge, allowed: Callable[[Sequence[Charge]], None]) -> bool:
        """Write an entry, durably, before anything is made of it; whether it was new.

        An entry with the same inputs stands for the same bytes and is not written twice. `allowed` sees all entries
        with the new one and raises what is to stop it. Raises `JournalError` when ledger and anchor do not agree.
        """
        with self._open() as file:
            entries, hashes = self._read(file)
            self._agree(hashes)
            if any(known.inputs == entry.inputs for known in entries):
                return False
            allowed((*entries, entry))
            line = {**asdict(entry), "previous": hashes[-1]}
            head = digest(line)
            file.write(json.dumps({**line, "hash": head}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._anchor.set_fact(_ANCHOR, json.dumps([len(hashes), head]))
            return True

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            # Two arms of a run may spend at once, in two processes.
            with locked(self.path) as file:
                yield file
        except OSError as error:
            raise JournalError(
                "the privacy ledger cannot be written; check its folder and the disk, then resume",
                detail=f"{self.path}: {error}",
            ) from error

    def _read(self, file: BinaryIO) -> tuple[tuple[Charge, ...], list[str]]:
        return _chain(whole_lines(file), self.path)

    def _agree(self, hashes: Sequence[str]) -> None:
        fact = self._anchor.fact(_ANCHOR)
        if fact is None:
            return
        count, head = json.loads(fact)
        # The ledger may be ahead: other studies write it too, and a process may die before it moves the anchor.
        if len(hashes) <= count or hashes[count] != head:
            raise JournalError(
                f"the privacy ledger was lost or put back from an old copy: {count} entries were written and it does "
                "not hold them; restore the newest copy. Without it nobody knows what was spent, so this site does "
                "not train with privacy",
                detail=str(self.path),
            )


def peek(path: Path) -> tuple[Charge, ...]:
    """What a ledger holds, read without a lock and without an anchor: to tell, never to decide on a round.

    Nothing where there is no file yet. Raises `JournalError` for a broken chain or a file that cannot be read.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise JournalError(
            "the privacy ledger cannot be read; check the rights of its file", detail=f"{path}: {error}"
        ) from error
    return _chain(content[: content.rfind(b"\n") + 1], path)[0]


def _chain(content: bytes, path: Path) -> tuple[tuple[Charge, ...], list[str]]:
    entries: list[Charge] = []
    hashes = [_START]
    for line in content.splitlines():
        entry, head = _parse(line, hashes[-1], path)
        entries.append(entry)
        hashes.append(head)
    return tuple(entries), hashes


def _parse(line: bytes, previous: str, path: Path) -> tuple[Charge, str]:
    try:
        values: dict[str, Any] = json.loads(line)
        head = values.pop("hash")
        sound = digest(values) == head and values["previous"] == previous
        entry = Charge(**{field.name: values[field.name] for field in fields(Charge) if field.name in values})
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise JournalError(
            "the privacy ledger was changed: its chain of hashes is broken; restore the newest copy. Without it "
            "nobody knows what was spent, so this site does not train with privacy",
            detail=str(path),
        )
    return entry, str(head)
