"""Which patients of a site trained, validated and tested, over all runs and studies that split them by one rule.

Without it one more patient would deal all of them out anew, and a test patient of yesterday's model could train
today's. It stays in the site's history folder: names of patients are in it as HMAC-SHA256 under a secret beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import cast

from wardround.errors import DataError
from wardround.imaging.datasets.split import SPLIT_NAMES, Parts, Role, SplitName, deal_in
from wardround.site.measured import folder_key, keyed
from wardround.site.withdrawn import Withdrawn
from wardround.study.tasks import Split
from wardround.wire.canonical import digest
from wardround.wire.lines import locked, replace_lines, whole_lines

SPLITS, KEY = "splits.jsonl", "splits.key"


class KnownParts:
    """The record in a site's history folder. Looking at it writes nothing; `settle` does.

    What was dealt in this process and not yet settled stands, so that every data set of it is the same. Who withdrew is
    dealt to no part; with `first`, as it was when no more than that many had.
    """

    def __init__(self, folder: Path, first: int | None = None) -> None:
        self._folder = folder
        self._first = first
        self._withdrawn = Withdrawn(folder)
        self._dealt: dict[str, dict[str, SplitName]] = {}

    def deal(
        self,
        site: str,
        names: Sequence[str],
        split: Split,
        seed: int,
        role: Role,
        fixed: Mapping[str, SplitName] = MappingProxyType({}),
    ) -> Parts:
        """Who is in which part: those on record where they were, others as `deal_in` says (a `Deal`).

        `fixed` holds, by name, who was in which part of a release that the study continues, whatever its role, seed
        and shares then were. They keep the part: none of them tests what they trained, and where the site does not
        train now, those who trained are in no part.

        Raises DataError where the record is damaged, and as `deal_in` does.
        """
        rule = digest([site, seed, split.validation, split.test, role])
        gone = self._withdrawn.of(names, self._first)
        own = [number for number, name in enumerate(names) if name not in gone]
        if gone and not own:
            raise DataError(f"site {site} has no patient left who did not withdraw")
        here = [names[number] for number in own]
        found = self._deal(rule, site, here, split, seed, role, fixed)
        return {part: tuple(own[number] for number in numbers) for part, numbers in found.items()}

    def _deal(
        self,
        rule: str,
        site: str,
        names: Sequence[str],
        split: Split,
        seed: int,
        role: Role,
        fixed: Mapping[str, SplitName],
    ) -> Parts:
        if role != "train" and "train" in fixed.values():
            return self._held_out(site, names, split, seed, role, fixed)
        known = self._known(rule, names)
        if self._first is not None:
            known = {**self._withdrawn.parts(rule, names), **known}
        parts = deal_in(site, names, split, seed, role, {**known, **fixed})
        # Whoever is always tested needs no record.
        if role != "unseen":
            self._dealt[rule] = {names[i]: part for part in SPLIT_NAMES for i in parts[part] if names[i] not in fixed}
        return parts

    def _held_out(
        self,
        site: str,
        names: Sequence[str],
        split: Split,
        seed: int,
        role: Role,
        fixed: Mapping[str, SplitName],
    ) -> Parts:
        """The parts of a site that trained the release and does not train now: as if it did, without who trained."""
        if role == "unseen":
            tested = tuple(i for i, name in enumerate(names) if fixed.get(name, "test") == "test")
            parts: Parts = {"train": (), "validation": (), "test": tested}
        else:
            parts = {**self.deal(site, names, split, seed, "train", fixed), "train": ()}
        if not (parts["validation"] if role == "evaluate" else parts["test"]):
            raise DataError(
                f"site {site} does not train in this study, and all of its patients trained the release that the study "
                "continues, so none is left to measure on; add patients, or take the site out of the study"
            )
        return parts

    def settle(self) -> None:
        """Put on record what was dealt. Raises DataError where another run has dealt it otherwise since."""
        if not self._dealt:
            return
        try:
            with locked(self._folder / SPLITS) as file:
                content = whole_lines(file)
                secret = folder_key(self._folder, KEY, SPLITS)
                file.seek(0, os.SEEK_END)
                for rule, dealt in self._dealt.items():
                    known = self._read(content).get(rule, {})
                    # Some may have withdrawn since they were dealt.
                    gone = self._withdrawn.of(tuple(dealt))
                    ours = {keyed(secret, name): part for name, part in dealt.items() if name not in gone}
                    if any(known.get(name, part) != part for name, part in ours.items()):
                        raise DataError(
                            "another run has dealt out this site's new patients since this one began: run again"
                        )
                    if new := {name: part for name, part in sorted(ours.items()) if name not in known}:
                        file.write(json.dumps({"rule": rule, "patients": new}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError("the site's history folder cannot be read or written", detail=str(error)) from error

    def holds(self, name: str) -> bool:
        """Whether a patient is on record, by whichever rule."""
        content = self._content()
        if not content:
            return False
        known = keyed(folder_key(self._folder, KEY, SPLITS), name)
        return any(known in patients for patients in self._read(content).values())

    def withdraw(self, name: str) -> bool:
        """Take a patient out of the record, by every rule, and put him among those who withdrew; whether he was not.

        Done again after a crash in between, it does the rest. Raises DataError where a record cannot be read or
        written.
        """
        try:
            with locked(self._folder / SPLITS) as file:
                content = whole_lines(file)
                known = keyed(folder_key(self._folder, KEY, SPLITS), name)
                parts = {rule: found[known] for rule, found in self._read(content).items() if known in found}
                new = self._withdrawn.add(name, parts)
                if parts:
                    replace_lines(self._folder / SPLITS, _without(content, known))
                return new
        except OSError as error:
            raise DataError("the site's history folder cannot be read or written", detail=str(error)) from error

    def _known(self, rule: str, names: Sequence[str]) -> Mapping[str, SplitName]:
        record = self._read(self._content()).get(rule, {})
        if not record:
            return {}
        secret = folder_key(self._folder, KEY, SPLITS)
        found = {}
        for name in names:
            with suppress(KeyError):
                found[name] = record[keyed(secret, name)]
        return found

    def _content(self) -> bytes:
        try:
            content = (self._folder / SPLITS).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            raise DataError("the site's history folder cannot be read", detail=str(error)) from error
        # A line that is being written, or was cut off, is of a run that has not begun.
        return content[: content.rfind(b"\n") + 1]

    def _read(self, content: bytes) -> dict[str, dict[str, SplitName]]:
        """Digest of a patient's name -> part, by rule."""
        found: dict[str, dict[str, SplitName]] = {}
        try:
            for line in content.splitlines():
                value = json.loads(line)
                parts = {str(name): cast(SplitName, part) for name, part in value["patients"].items()}
                if not set(parts.values()) <= set(SPLIT_NAMES):
                    raise ValueError("no part")
                found.setdefault(str(value["rule"]), {}).update(parts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "the site's record of who trains and who tests is damaged; restore it",
                detail=str(self._folder / SPLITS),
            ) from error
        return found


def _without(content: bytes, patient: str) -> bytes:
    """The lines of a record without a patient's digest; other bytes stay as they are."""
    lines = []
    for line in content.splitlines(keepends=True):
        value = json.loads(line)
        if patient in value["patients"]:
            value["patients"].pop(patient)
            line = json.dumps(value).encode() + b"\n"
        lines.append(line)
    return b"".join(lines)
