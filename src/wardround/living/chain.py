"""The chain of releases: which model came of which, what stood at the gate, and which one is in use.

A folder with a log that can be added to and not changed unnoticed (`storage.hash_log`), signed after every entry, and
each model once, by its hash. Nothing in it is of a patient: it holds hashes, names of sites and means over patients.
The key lies beside the log: a signature shows that its writer had the key, and a person who has the folder has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from wardround.errors import JournalError, StudyError
from wardround.living.release import Release, short
from wardround.plan.weights import file_sha256, model_sha256, open_model
from wardround.protection.identity import KEY_BYTES, Identity
from wardround.results.schema import Result
from wardround.site.own_parts import second_name
from wardround.storage.hash_log import LOG, HashLog, begun_by
from wardround.storage.hash_log import Entry as Record
from wardround.storage.verify import read_log

Kind = Literal["released", "refused", "rollback"]
KINDS: tuple[Kind, ...] = ("released", "refused", "rollback")
_ACTOR, _CHAIN = "the chain of releases", "wardround releases"
_KEY = "chain.key"
_LEAST_HASH = 4


@dataclass(frozen=True)
class Entry:
    """One entry of a chain.

    `released` and `refused` are of new models; `rollback` puts an earlier release (`release`) back into use. `metrics`
    are means over the test patients of each site, by site and metric; `sites` are those that trained.
    """

    number: int
    kind: Kind
    release: str
    parent: str | None
    study: str = ""
    study_sha256: str = ""
    sites: tuple[str, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] | None = None
    promoted: bool | None = None
    reason: str = ""
    file_sha256: str = ""
    frozen_sha256: str | None = None
    time: str = ""

    @property
    def short(self) -> str:
        """The name by which people call its release."""
        return short(self.release)

    def to_json(self) -> dict[str, Any]:
        """For programs: `wardround releases list --json` prints it."""
        return {**asdict(self), "sites": list(self.sites)}

    @staticmethod
    def of(record: Record) -> Entry:
        """The entry of a record; raises `KeyError` and the like for a record that no version wrote."""
        payload = dict(record.payload)
        return Entry(**{**payload, "sites": tuple(payload["sites"])}, time=record.time)

    @property
    def payload(self) -> dict[str, Any]:
        """What the log keeps of it; the log itself says when."""
        fields = self.to_json()
        del fields["time"]
        return fields


class Chain:
    """The chain of releases in a folder, which is made with its first entry.

    Everything that reads it raises `JournalError` where the chain is broken: an entry was changed, its signature is
    gone, a parent is missing, or a model's file is gone or another.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def is_chain(folder: Path) -> bool:
        """Whether a folder holds a chain of releases."""
        try:
            with (folder / LOG).open("rb") as file:
                return _CHAIN in str(json.loads(file.readline()).get("payload", {}).get("study", ""))
        except (OSError, ValueError, AttributeError):
            return False

    # Reading ---------------------------------------------------------------------------------------------------------

    def entries(self) -> tuple[Entry, ...]:
        """All entries, the oldest first; their models' files are not read (`check`)."""
        path = self.folder / LOG
        if not path.exists():
            return ()
        log = read_log(path, LOG)
        if log.damages:
            raise self._broken(log.damages[0])
        found: list[Entry] = []
        for record in log.entries:
            if record.event in KINDS:
                found.append(self._entry(record, found))
        # What was added without the key has no signature.
        if log.entries and log.entries[-1].event in KINDS:
            raise self._broken("its last entry is not signed")
        return tuple(found)

    def _entry(self, record: Record, before: list[Entry]) -> Entry:
        try:
            entry = Entry.of(record)
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"record {record.seq} is no entry of it") from None
        if entry.number != len(before) + 1 or entry.kind != record.event:
            raise self._broken(f"entry {entry.number} stands out of order")
        known = {one.release for one in before}
        if before and entry.kind != "rollback" and entry.parent is not None and entry.parent not in known:
            raise self._broken(f"the parent of entry {entry.number}, {short(entry.parent)}, is missing")
        if entry.kind == "rollback" and entry.release not in known:
            raise self._broken(f"entry {entry.number} goes back to {entry.short}, which is missing")
        return entry

    def check(self) -> tuple[Entry, ...]:
        """All entries, once every model's file was read and found to be what its entry says."""
        found = self.entries()
        for entry in found:
            if entry.kind != "rollback":
                self.model(entry)
        return found

    def model(self, entry: Entry) -> Path:
        """The file of an entry's model, which was read and is the one that was put there."""
        path = self._model(entry.release)
        if not path.is_file():
            raise self._broken(f"the model of release {entry.short} is gone")
        recorded = next(one for one in self.entries() if one.release == entry.release and one.kind != "rollback")
        if file_sha256(path) != recorded.file_sha256 or model_sha256(*open_model(path)) != entry.release:
            raise self._broken(f"the model of release {entry.short} was changed")
        return path

    def current(self) -> Entry | None:
        """The release in use: the last one that was released, or that a rollback went back to."""
        return next((entry for entry in reversed(self.entries()) if entry.kind != "refused"), None)

    def find(self, named: str) -> Entry:
        """The entry of a release by number, by the first digits of its hash, or `current`.

        Raises `StudyError` where the chain has none or several of the name.
        """
        entries = self.entries()
        if named == "current" and (current := self.current()) is not None:
            return current
        models = [entry for entry in entries if entry.kind != "rollback"]
        if named.isdecimal() and len(named) < _LEAST_HASH:
            fitting = [entry for entry in entries if entry.number == int(named)]
        else:
            fitting = [entry for entry in models if len(named) >= _LEAST_HASH and entry.release.startswith(named)]
        if len({entry.release for entry in fitting}) != 1:
            why = "several releases" if fitting else "no release"
            known = ", ".join(f"{entry.number} ({entry.short})" for entry in models) or "none"
            raise StudyError(f"the chain has {why} called {named!r}; it has {known}")
        return fitting[-1]

    def ancestry(self, entry: Entry) -> tuple[Entry, ...]:
        """A release and those that it came of, the nearest first."""
        models = {one.release: one for one in self.entries() if one.kind != "rollback"}
        found: dict[str, Entry] = {}
        release: str | None = entry.release
        while release is not None and release in models and release not in found:
            found[release] = models[release]
            release = models[release].parent
        return tuple(found.values())

    def last_without(self, site: str) -> Entry | None:
        """The last release in whose ancestry a site never trained; `None` where it trained them all.

        An ancestor that is not in the chain may have been trained by the site: such a release does not count.
        """
        for entry in reversed([one for one in self.entries() if one.kind == "released"]):
            line = self.ancestry(entry)
            if line[-1].parent is None and all(site not in one.sites for one in line):
                return entry
        return None

    # Writing ---------------------------------------------------------------------------------------------------------

    def add(self, release: Release) -> Entry:
        """Put the model of a finished run into the chain: released where the gate promoted it or there was none.

        What is in the chain already is not added again. Raises `StudyError` for a model's file without its run, and
        for one whose parent is not in the chain.
        """
        result = release.result
        if result is None:
            raise StudyError(
                "the chain keeps releases with their results: give the folder of the run, not the model's file",
                detail=str(release.model),
            )
        entries = self.entries()
        known = next((one for one in entries if one.release == release.sha256 and one.kind != "rollback"), None)
        if known is not None:
            return known
        parent = release.parent
        if entries and parent is not None and all(one.release != parent for one in entries):
            raise StudyError(
                f"the release came of {short(parent)}, which the chain does not have; add the run of that one first"
            )
        path = self._model(release.sha256)
        second_name(release.model, path)
        if (part := release.frozen_part) is not None:
            second_name(part, self.folder / "weights" / part.name)
        return self._append(_entry_of(len(entries) + 1, release, result, parent, file_sha256(path)))

    def rollback(self, named: str, reason: str = "") -> Entry:
        """Put an earlier release back into use; nothing is deleted. Raises `StudyError` for one that may not be."""
        entry = self.find(named)
        if entry.kind == "refused":
            raise StudyError(f"release {entry.short} was refused at the gate, so it was never in use; name another")
        current = self.current()
        if current is not None and current.release == entry.release:
            raise StudyError(f"release {entry.short} is in use already")
        self.model(entry)
        return self._append(
            Entry(
                number=len(self.entries()) + 1,
                kind="rollback",
                release=entry.release,
                parent=None if current is None else current.release,
                study=entry.study,
                study_sha256=entry.study_sha256,
                reason=reason,
            )
        )

    def _append(self, entry: Entry) -> Entry:
        path = self.folder / LOG
        if path.exists() and read_log(path, LOG).key != self._identity.public.hex():
            raise self._broken("its key is another than the one that began it")
        self._log.note(entry.kind, entry.payload, sync=True)
        return self.entries()[-1]

    @cached_property
    def _identity(self) -> Identity:
        """The key that signs, made with the first entry."""
        path = self.folder / _KEY
        if not path.exists():
            if (self.folder / LOG).exists():
                raise self._broken("its key is gone, so nothing can be added")
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(Identity.generate().private.hex())
                file.flush()
                os.fsync(file.fileno())
        try:
            private = bytes.fromhex(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            private = b""
        if len(private) != KEY_BYTES:
            raise self._broken("its key is damaged")
        return Identity(private)

    @property
    def _log(self) -> HashLog:
        return HashLog(self.folder / LOG, _ACTOR, begun_by(self._identity, KINDS, study=_CHAIN), lambda: self._identity)

    def _model(self, release: str) -> Path:
        return self.folder / "models" / f"{release}.safetensors"

    def _broken(self, what: str) -> JournalError:
        return JournalError(
            f"the chain of releases is broken: {what}; restore the folder from a copy", detail=str(self.folder)
        )


def _entry_of(number: int, release: Release, result: Result, parent: str | None, file: str) -> Entry:
    gate = result.gate
    return Entry(
        number=number,
        kind="released" if gate is None or gate.promoted else "refused",
        release=release.sha256,
        parent=parent,
        study=result.study,
        study_sha256=result.study_sha256,
        sites=result.participants,
        metrics=dict(_metrics(result)),
        promoted=None if gate is None else gate.promoted,
        reason="" if gate is None else gate.reason,
        file_sha256=file,
        frozen_sha256=result.frozen_sha256,
    )


def _metrics(result: Result) -> Iterator[tuple[str, dict[str, float]]]:
    """By site and aggregate, the value of each metric of the released model."""
    for site, row in result.metrics.get("federated", {}).items():
        if found := {name: one.value for name, one in (row or {}).items() if one is not None}:
            yield site, found
