"""Which patients of a site were in which released model, and which release came of which.

A site keeps it in its history folder, over all studies: without it the models that a patient was in are not known when
the patient withdraws, and a patient who trained a release could test its successor. Names of patients are in it as
HMAC-SHA256 under a secret beside it, and nothing of it leaves the site.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

from wardround.errors import DataError
from wardround.imaging.datasets.split import SPLIT_NAMES, SplitName
from wardround.site.measured import folder_key, keyed
from wardround.wire.lines import locked, whole_lines

LINEAGE, KEY = "lineage.jsonl", "lineage.key"
#: By part, the digests of its patients' names; never the names.
Digests = Mapping[SplitName, Sequence[str]]


@dataclass(frozen=True)
class Use:
    """One part of one release that a patient was in, and when the release reached the site (ISO 8601, UTC)."""

    release: str
    parent: str | None
    study: str
    part: SplitName
    time: str


@dataclass(frozen=True)
class _Line:
    """A line of the record: a release with the patients of this site that were in it."""

    release: str
    parent: str | None
    study: str
    time: str
    parts: Digests
    own: str | None = None

    @classmethod
    def of(cls, line: bytes) -> _Line:
        """The line's values; raises `ValueError` and the like for a line that no site wrote."""
        value = json.loads(line)
        parts = {cast(SplitName, part): tuple(map(str, found)) for part, found in value["parts"].items()}
        parent, own = value["parent"], value.get("own")
        if not parts.keys() <= set(SPLIT_NAMES) or not all(
            one is None or isinstance(one, str) for one in (parent, own)
        ):
            raise ValueError("no line of a lineage")
        return cls(str(value["release"]), parent, str(value["study"]), str(value["time"]), parts, own)

    def written(self) -> bytes:
        """The line, ended."""
        told: dict[str, str | None] = {"release": self.release, "parent": self.parent}
        told |= {"study": self.study, "time": self.time}
        told |= {} if self.own is None else {"own": self.own}
        return json.dumps({**told, "parts": {part: list(found) for part, found in self.parts.items()}}).encode() + b"\n"

    def says(self, other: _Line) -> bool:
        """Whether it says the same as another line, which may have come at another time."""
        mine, theirs = ({part: set(one.parts.get(part, ())) for part in SPLIT_NAMES} for one in (self, other))
        same = (self.release, self.parent, self.study, self.own) == (
            other.release,
            other.parent,
            other.study,
            other.own,
        )
        return same and mine == theirs


@dataclass(frozen=True)
class Lineage:
    """The record of one site; `folder` is its history folder. Looking at it writes nothing.

    It survives a power cut, and several runs may share it. Every method raises `DataError` where the record is damaged,
    its key is gone, or the folder cannot be read or written.
    """

    folder: Path

    def record(self, release: str, parent: str | None, study: str, parts: Mapping[SplitName, Sequence[str]]) -> None:
        """Put on record that a release, its `model_sha256`, had these patients (names by part) of this site.

        `parent` is the release that it began with, `study` the hash of its study. What is on record is not written
        twice.
        """
        self.record_digests(release, parent, study, self.digests(parts))

    def digests(self, parts: Mapping[SplitName, Sequence[str]]) -> dict[SplitName, tuple[str, ...]]:
        """Digests that stand for names, sorted, by part: what a run keeps of its patients until there is a release."""
        with self._locked() as (_, secret):
            return {part: tuple(sorted(keyed(secret, name) for name in names)) for part, names in parts.items()}

    def record_digests(
        self, release: str, parent: str | None, study: str, parts: Digests, own: str | None = None
    ) -> None:
        """`record` of names that `digests` stands for; `own` is the hash of the site's private part of the release."""
        # A study that measures a release and trains nothing ends with the release that it began with.
        parent = None if parent == release else parent
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
        line = _Line(release, parent, study, now, {part: tuple(sorted(found)) for part, found in parts.items()}, own)
        with self._locked() as (file, _):
            if any(line.says(known) for known in self._parsed(whole_lines(file))):
                return
            file.seek(0, os.SEEK_END)
            file.write(line.written())
            file.flush()
            os.fsync(file.fileno())

    def ancestors(self, release: str) -> tuple[str, ...]:
        """The releases that a release came of, the nearest first, as far as the site knows them."""
        parents: dict[str, list[str]] = {}
        for line in self._lines():
            if line.parent is not None:
                parents.setdefault(line.release, []).append(line.parent)
        found: dict[str, None] = {}
        waiting = [release]
        while waiting:
            # A record that goes round in a circle ends here too.
            new = [p for one in waiting for p in parents.get(one, ()) if p not in found and p != release]
            found |= dict.fromkeys(new)
            waiting = list(dict.fromkeys(new))
        return tuple(found)

    def knows(self, release: str) -> bool:
        """Whether the release reached this site."""
        return any(line.release == release for line in self._lines())

    def own_part(self, release: str) -> str | None:
        """The hash of the private part that the site has of a release; `None` where it has none."""
        return next((line.own for line in reversed(self._lines()) if line.release == release and line.own), None)

    def parts(self, release: str, names: Sequence[str], further: Sequence[str] = ()) -> dict[str, SplitName]:
        """Of `names`, those who were in the release or an ancestor of it, each with the part.

        `further` are ancestors of which the site may not know: it was away when one came of the other.

        Of a patient who was in several parts over the years it is the one that a model saw most of: training, then
        validation, then test.
        """
        lineage = {one for each in (release, *further) for one in (each, *self.ancestors(each))}
        lines = [line for line in self._lines() if line.release in lineage]
        if not lines:
            return {}
        secret = self._secret()
        by_digest: dict[str, SplitName] = {}
        for part in reversed(SPLIT_NAMES):
            by_digest |= dict.fromkeys((one for line in lines for one in line.parts.get(part, ())), part)
        known = ((name, by_digest.get(keyed(secret, name))) for name in names)
        return {name: part for name, part in known if part is not None}

    def trained(self, release: str, names: Sequence[str], further: Sequence[str] = ()) -> frozenset[str]:
        """Of `names`, those who trained the release or an ancestor of it; `further` as in `parts`."""
        return frozenset(name for name, part in self.parts(release, names, further).items() if part == "train")

    def uses_of(self, name: str) -> tuple[Use, ...]:
        """The releases that a patient was in, and in which part, in the order in which they reached the site."""
        lines = self._lines()
        if not lines:
            return ()
        digest = keyed(self._secret(), name)
        return tuple(
            Use(line.release, line.parent, line.study, part, line.time)
            for line in lines
            for part in SPLIT_NAMES
            if digest in line.parts.get(part, ())
        )

    # -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[tuple[BinaryIO, bytes]]:
        """The record, this process's alone, and its key."""
        try:
            with locked(self.folder / LINEAGE) as file:
                yield file, folder_key(self.folder, KEY, LINEAGE)
        except OSError as error:
            raise DataError("the site's history folder cannot be read or written", detail=str(error)) from error

    def _secret(self) -> bytes:
        try:
            return folder_key(self.folder, KEY, LINEAGE)
        except OSError as error:
            raise DataError("the site's history folder cannot be read", detail=str(error)) from error

    def _lines(self) -> list[_Line]:
        """The record as it is, without a line that is being written or was cut off: its release is delivered again."""
        try:
            content = (self.folder / LINEAGE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise DataError("the site's history folder cannot be read", detail=str(error)) from error
        return self._parsed(content[: content.rfind(b"\n") + 1])

    def _parsed(self, content: bytes) -> list[_Line]:
        try:
            return [_Line.of(line) for line in content.splitlines()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "the site's record of which releases its patients were in is damaged; restore it",
                detail=str(self.folder / LINEAGE),
            ) from error
