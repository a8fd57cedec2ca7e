"""Which patients of a site withdrew, over all its runs and studies: `withdrawn.jsonl` in its history folder.

A patient who withdrew is never dealt to a part again, though the images may still lie there for a while. The record
holds a keyed digest of the name, the secret beside it, and the parts in which the patient was: with those the site can
tell a run whose data changed by withdrawals alone, which goes on, from one whose data changed otherwise, which does
not. Nothing of it is in a message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from wardround.errors import DataError
from wardround.imaging.datasets.split import SPLIT_NAMES, SplitName
from wardround.site.measured import folder_key, keyed
from wardround.wire.lines import locked, whole_lines

WITHDRAWN, KEY = "withdrawn.jsonl", "withdrawn.key"


@dataclass(frozen=True)
class Begun:
    """What a run began with at a site whose patients withdrew since: numbers that it goes on by, and never smaller.

    `examples` and `patients` are those of training. With them as they were, the site's weight and its noise say nothing
    of a withdrawal.
    """

    examples: int
    patients: int


@dataclass(frozen=True)
class _Gone:
    patient: str
    parts: Mapping[str, SplitName]


@dataclass(frozen=True)
class _Step:
    """Data of one fingerprint became those of another by withdrawals alone."""

    before: str
    after: str
    begun: Begun


class Withdrawn:
    """The record of a site; looking at it writes nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: tuple[tuple[int, int, int], tuple[_Gone, ...], tuple[_Step, ...]] | None = None

    def count(self) -> int:
        """How many patients withdrew so far; they have an order, so `count` says which were gone at a time."""
        return len(self._lines()[0])

    def of(self, names: Sequence[str], first: int | None = None) -> frozenset[str]:
        """Those of some names that withdrew, or that are among the `first` who did."""
        gone = {one.patient for one in self._lines()[0][:first]}
        if not gone:
            return frozenset()
        secret = folder_key(self._folder, KEY, WITHDRAWN)
        return frozenset(name for name in names if keyed(secret, name) in gone)

    def places(self, names: Sequence[str]) -> list[int]:
        """How many had withdrawn before each of some names who did."""
        gone = [one.patient for one in self._lines()[0]]
        if not gone:
            return []
        secret = folder_key(self._folder, KEY, WITHDRAWN)
        return [gone.index(known) for name in names if (known := keyed(secret, name)) in gone]

    def parts(self, rule: str, names: Sequence[str]) -> dict[str, SplitName]:
        """In which part those of some names who withdrew were, by a rule of parting (`site.splits`)."""
        gone = {one.patient: one.parts[rule] for one in self._lines()[0] if rule in one.parts}
        if not gone:
            return {}
        secret = folder_key(self._folder, KEY, WITHDRAWN)
        found = ((name, gone.get(keyed(secret, name))) for name in names)
        return {name: part for name, part in found if part is not None}

    def add(self, name: str, parts: Mapping[str, SplitName]) -> bool:
        """Put a patient on record, in the parts that he had by each rule; whether he was not there yet."""

        def line(secret: bytes, gone: Sequence[_Gone]) -> dict[str, Any] | None:
            known = keyed(secret, name)
            return None if any(one.patient == known for one in gone) else {"patient": known, "parts": dict(parts)}

        return self._append(line)

    def step(self, before: str, after: str, begun: Begun) -> None:
        """Put on record that data of a fingerprint became those of another by withdrawals alone."""

        def line(secret: bytes, gone: Sequence[_Gone]) -> dict[str, Any]:
            return {
                "before": keyed(secret, before),
                "after": keyed(secret, after),
                "examples": begun.examples,
                "patients": begun.patients,
            }

        if self.begun(before, after) is None:
            self._append(line)

    def begun(self, before: str, now: str) -> Begun | None:
        """What data of the fingerprint `before` were that withdrawals alone turned into those of `now`.

        `None` where no record says so, and for the same data.
        """
        steps = self._lines()[1]
        if not steps or before == now:
            return None
        secret = folder_key(self._folder, KEY, WITHDRAWN)
        goal, reached = keyed(secret, now), {keyed(secret, before): cast("Begun | None", None)}
        # A record has few lines, in the order in which things happened.
        for _ in steps:
            for one in steps:
                if one.before in reached and one.after not in reached:
                    reached[one.after] = reached[one.before] or one.begun
        return reached.get(goal)

    def _append(self, line: Callable[[bytes, Sequence[_Gone]], dict[str, Any] | None]) -> bool:
        try:
            with locked(self._folder / WITHDRAWN) as file:
                content = whole_lines(file)
                secret = folder_key(self._folder, KEY, WITHDRAWN)
                new = line(secret, self._parsed(content)[0])
                if new is None:
                    return False
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(new).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                return True
        except OSError as error:
            raise DataError("the site's history folder cannot be read or written", detail=str(error)) from error

    def _lines(self) -> tuple[tuple[_Gone, ...], tuple[_Step, ...]]:
        path = self._folder / WITHDRAWN
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            # It is looked at with every message.
            if self._read is None or self._read[0] != stamp:
                content = path.read_bytes()
                self._read = (stamp, *self._parsed(content[: content.rfind(b"\n") + 1]))
        except (FileNotFoundError, NotADirectoryError):
            return (), ()
        except OSError as error:
            raise DataError("the site's history folder cannot be read", detail=str(error)) from error
        return self._read[1:]

    def _parsed(self, content: bytes) -> tuple[tuple[_Gone, ...], tuple[_Step, ...]]:
        gone: list[_Gone] = []
        steps: list[_Step] = []
        try:
            for line in content.splitlines():
                value = json.loads(line)
                if "patient" in value:
                    parts = {str(rule): cast(SplitName, part) for rule, part in value["parts"].items()}
                    if not set(parts.values()) <= set(SPLIT_NAMES):
                        raise ValueError("no part")
                    gone.append(_Gone(str(value["patient"]), parts))
                else:
                    begun = Begun(int(value["examples"]), int(value["patients"]))
                    steps.append(_Step(str(value["before"]), str(value["after"]), begun))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "the site's record of patients who withdrew is damaged; restore it",
                detail=str(self._folder / WITHDRAWN),
            ) from error
        return tuple(gone), tuple(steps)
