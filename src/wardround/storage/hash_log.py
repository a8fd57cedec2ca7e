"""What a party did and saw, as a chain of hashes in a file: it can be added to, and not changed unnoticed.

    hash = SHA-256(prev || canonical JSON of the record without `hash`)

Every party keeps its own, and they hold each other's ends: an update carries the head of its site's log, the next
request carries the head of the coordinator's and the last one it saw of every site. `federation.verify` compares them.
The log is no part of any result: a record's time decides nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from wardround.errors import JournalError
from wardround.protection.identity import Identity
from wardround.storage.blobs import disk_error
from wardround.wire.canonical import canonical_json, digest
from wardround.wire.files import sync_folder

LOG = "log.jsonl"
START = "0" * 64
# With a key, every record of such a number is a signature over the one before it, and so is the one that follows a
# record of the events that the first record names in `signs`.
CHECKPOINT_EVERY = 100
CHECKPOINT = "checkpoint"
KEY, SIGNS = "key", "signs"
PURPOSE = "wardround log checkpoint"
# Bytes of a log that may wait for a sync while something else keeps them.
MAX_TAIL = 1 << 13
_HASH = re.compile(r"[0-9a-f]{64}")
_KEYS: dict[str, type] = {
    "seq": int,
    "time": str,
    "actor": str,
    "event": str,
    "payload": dict,
    "payload_sha256": str,
    "prev": str,
    "hash": str,
}


def is_hash(value: object) -> bool:
    """Whether a value is a SHA-256 in hex."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


class Damaged(Exception):
    """A record that is not what was written; whoever reads it says where."""


@dataclass(frozen=True)
class Entry:
    """One record. `payload` holds names of sites, numbers and hashes: nothing of a patient."""

    seq: int
    time: str
    actor: str
    event: str
    payload: Mapping[str, Any]
    payload_sha256: str
    prev: str
    hash: str

    @staticmethod
    def make(seq: int, actor: str, event: str, payload: Mapping[str, Any], payload_sha256: str, prev: str) -> Entry:
        """A new record after the one of hash `prev`."""
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        plain = Entry(seq, now, actor, event, payload, payload_sha256, prev, "")
        made = replace(plain, hash=plain.expected)
        # The same but for the hash, which is in neither part.
        made.__dict__["_around_hash"] = plain._around_hash
        return made

    @property
    def expected(self) -> str:
        """The hash that these contents must have."""
        return hashlib.sha256(b"".join((self.prev.encode(), *self._around_hash))).hexdigest()

    @cached_property
    def _around_hash(self) -> tuple[bytes, bytes]:
        """The record as canonical JSON without its hash, in two parts: keys are sorted, and `hash` lies between."""
        values = {**{name: self.__dict__[name] for name in _KEYS}, "payload": dict(self.payload)}
        first = {name: value for name, value in values.items() if name < "hash"}
        last = {name: value for name, value in values.items() if name > "hash"}
        return canonical_json(first)[:-1] + b",", canonical_json(last)[1:]

    @property
    def round(self) -> int:
        """The round it belongs to; -1 for none."""
        number = self.payload.get("round")
        return number if isinstance(number, int) else -1

    def line(self) -> bytes:
        """The record as a line."""
        before, after = self._around_hash
        return b"".join((before, b'"hash":"', self.hash.encode(), b'",', after, b"\n"))

    @staticmethod
    def of_line(line: bytes) -> Entry:
        """The record of a line; raises `Damaged` where it does not fit its own hashes."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise Damaged("is not JSON") from None
        if not isinstance(value, dict) or value.keys() != _KEYS.keys():
            raise Damaged("is not a record")
        # Hashes that fit say nothing of types: whoever writes a chain anew may put anything into it.
        if any(type(value[key]) is not kind for key, kind in _KEYS.items()):
            raise Damaged("is not a record")
        entry = Entry(**value)
        try:
            whole = entry.expected == entry.hash and digest(value["payload"]) == entry.payload_sha256
        except (TypeError, ValueError, AttributeError, RecursionError):
            whole = False
        # Another way to write the same values would be another file with the same hashes.
        if not whole or entry.line() != line:
            raise Damaged("was edited")
        return entry


def begun_by(identity: Identity, signs: Sequence[str], **about: str) -> dict[str, Any]:
    """The first record of a log that is signed with a key, also after every record of the events in `signs`."""
    return {**about, KEY: identity.public.hex(), SIGNS: list(signs)}


def signed_events(begun: Mapping[str, Any]) -> frozenset[str]:
    """The events after which a log is signed, by its first record."""
    told = begun.get(SIGNS)
    return frozenset(event for event in told if isinstance(event, str)) if isinstance(told, list) else frozenset()


@dataclass(frozen=True)
class Tail:
    """The last lines of a log, from a byte of its file on."""

    offset: int
    lines: bytes


class HashLog:
    """The log of one party in one arm.

    `begun` says in its first record whose it is, and with which key it is signed (`begun_by`), if with any. A fact is
    written once: one that is noted again, after a restart that came between log and journal, is found and not repeated.
    Several processes may write, in turn. `tail` is what an earlier process kept of `tail()`: where a power cut took it
    from the file, it is written again.

    Raises `JournalError` when the file is not the chain it was, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        actor: str,
        begun: Mapping[str, Any],
        signer: Callable[[], Identity | None] = lambda: None,
        tail: Tail | None = None,
    ) -> None:
        self.path = path
        self._tail = tail
        self._actor = actor
        self._begun = begun
        self._signer = signer
        self._offset = 0
        self._next = 0
        # What this process does not know to be on disk: bytes, and whether the file's name is.
        self._unsynced, self._named = bytearray(), False
        self.head, self._newest = START, ""
        self._key: str | None = None
        self._signs: frozenset[str] = frozenset()
        self._facts: dict[str, str] = {}
        self._rounds: dict[str, int] = {}
        self._last: dict[str, Entry] = {}

    def note(self, event: str, payload: Mapping[str, Any], *, sync: bool = False) -> str:
        """Write a fact unless the log holds it, with `sync` so that it survives a power cut; the hash of its record."""
        with self._open() as file:
            payload_sha256 = digest(dict(payload))
            known = self._facts.get(_key(event, payload_sha256))
            if known is None:
                if not self._next:
                    self._append(file, "begun", self._begun, digest(dict(self._begun)))
                if self._due():
                    self._checkpoint(file)
                known = self._append(file, event, payload, payload_sha256)
                if self._due():
                    self._checkpoint(file)
            if sync and self._unsynced:
                self._sync(file)
            return known

    def tail(self) -> Tail:
        """What a power cut could take from the file, for a caller that keeps it in a transaction of its own instead.

        It is short: a longer one is synced first, and so is one of a file whose name may not be on disk yet.
        """
        if self._unsynced and (not self._named or len(self._unsynced) > MAX_TAIL):
            with self._open() as file:
                self._sync(file)
        return Tail(self._offset - len(self._unsynced), bytes(self._unsynced))

    def _sync(self, file: int) -> None:
        os.fsync(file)
        if not self._named:
            sync_folder(self.path.parent)
        self._unsynced, self._named = bytearray(), True

    def last(self, event: str) -> Entry | None:
        """The last record of an event."""
        self._look()
        return self._last.get(event)

    def round_of(self, known: str) -> int | None:
        """The round of the record with that hash (-1: of no round); nothing when the log does not hold it."""
        self._look()
        return self._rounds.get(known)

    def entries(self) -> Iterator[Entry]:
        """All records, read from the file; raises `JournalError` where one was changed."""
        if self.path.exists():
            with self.path.open("rb") as file:
                for number, line in enumerate(file):
                    if line.endswith(b"\n"):
                        yield self._entry(line, number)

    # ---------------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        try:
            with self._open(os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW):
                pass
        except FileNotFoundError:
            if self._offset:
                raise self._broken("is gone") from None

    @contextmanager
    def _open(self, flags: int = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CREAT) -> Iterator[int]:
        """The file, locked, with everything read that others wrote; `FileNotFoundError` where it is not to be made."""
        try:
            try:
                file = os.open(self.path, flags, 0o600)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, flags, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._restore(file)
                self._catch_up(file)
                yield file
            finally:
                os.close(file)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise disk_error(error) from error

    def _restore(self, file: int) -> None:
        """Write again what a power cut took from the end of the file, once; anything else is left as it is found."""
        tail, self._tail = self._tail, None
        if tail is None or not tail.lines:
            return
        # A file system may have kept the length of what it lost.
        found = os.pread(file, len(tail.lines), tail.offset).rstrip(b"\0")
        size = os.fstat(file).st_size
        if size >= tail.offset and len(found) < len(tail.lines) and tail.lines.startswith(found):
            os.ftruncate(file, tail.offset + len(found))
            _write(file, tail.lines[len(found) :])

    def _catch_up(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size < self._offset:
            raise self._broken("became shorter")
        if size == self._offset:
            return
        os.lseek(file, self._offset, os.SEEK_SET)
        with os.fdopen(os.dup(file), "rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    # A process died while it wrote; nobody was told of what it did not finish.
                    os.ftruncate(file, self._offset)
                    return
                self._take(line)
                # Whoever wrote it may have died before it was on disk, and so may the file's name.
                self._unsynced += line
                self._named = False

    def _take(self, line: bytes) -> None:
        entry = self._entry(line, self._next)
        if (entry.seq, entry.prev) != (self._next, self.head):
            raise self._broken(f"does not go on at record {self._next}")
        self._remember(entry, len(line))

    def _entry(self, line: bytes, number: int) -> Entry:
        try:
            return Entry.of_line(line)
        except Damaged as damage:
            raise self._broken(f"{damage} in record {number}") from None

    def _remember(self, entry: Entry, nbytes: int) -> None:
        self._offset += nbytes
        if not entry.seq:
            self._key, self._signs = entry.payload.get(KEY), signed_events(entry.payload)
        self._next, self.head, self._newest = entry.seq + 1, entry.hash, entry.event
        self._facts[_key(entry.event, entry.payload_sha256)] = entry.hash
        self._rounds[entry.hash] = entry.round
        self._last[entry.event] = entry

    def _append(self, file: int, event: str, payload: Mapping[str, Any], payload_sha256: str) -> str:
        entry = Entry.make(self._next, self._actor, event, payload, payload_sha256, self.head)
        line = entry.line()
        try:
            _write(file, line)
        except OSError:
            os.ftruncate(file, self._offset)
            raise
        self._unsynced += line
        self._remember(entry, len(line))
        return entry.hash

    def _due(self) -> bool:
        """Whether the next record has to be a signature; never in a log that began without a key."""
        return self._key is not None and (self._newest in self._signs or self._next % CHECKPOINT_EVERY == 0)

    def _checkpoint(self, file: int) -> None:
        identity = self._signer()
        if identity is None or identity.public.hex() != self._key:
            raise self._broken("was begun with another key than the one at hand")
        signature = identity.sign(PURPOSE, self._actor, self._next, self.head).hex()
        payload = {"signature": signature, KEY: self._key}
        self._append(file, CHECKPOINT, payload, digest(payload))

    def _broken(self, what: str) -> JournalError:
        return JournalError(
            f"the log of {self._actor} {what}: it was changed by something else. `wardround log verify` says where; "
            "restore the file to go on",
            detail=str(self.path),
        )


def _write(file: int, data: bytes) -> None:
    written = os.write(file, data)
    if written < len(data):
        os.write(file, data[written:])


def _key(event: str, payload_sha256: str) -> str:
    return f"{event}/{payload_sha256}"
