"""Which patients a site measured, over all runs and studies: sums over sets that differ by few give those away.

Two means of one model over n and n + 1 patients give the value of one patient. Over several sets it need not be a plain
difference: every weighted sum of the sets' sums can be made. A site therefore keeps keyed digests of every set it gave
results of, and refuses a new one where some weighted sum of all of them is over fewer than so many patients.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from wardround.errors import DataError
from wardround.wire.lines import locked, whole_lines

SETS, KEY = "measured.jsonl", "measured.key"
_DIGEST = 16
# Ways to choose sets of patients up to which the fewest patients are found exactly.
_MOST_CHOICES = 100_000
_BATCH = 4096

Patients = frozenset[str]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Set:
    """A line of the record: digests of the patients' names, or where data have none the digest of their fingerprint.

    A `group` is a part of a split's patients, one of several.
    """

    split: str
    named: bool
    patients: Patients
    group: bool = False

    @classmethod
    def of(cls, line: bytes) -> _Set:
        value = json.loads(line)
        patients = frozenset(map(str, value["patients"]))
        return cls(str(value["split"]), bool(value["named"]), patients, bool(value.get("group", False)))

    @property
    def line(self) -> bytes:
        told = {"split": self.split, "named": self.named, "patients": sorted(self.patients)}
        return json.dumps(told | ({"group": True} if self.group else {})).encode() + b"\n"


class MeasuredSets:
    """The record in a site's history folder; it survives a power cut, and several runs may share it.

    Names of patients are in it as HMAC-SHA256 under a secret that lies beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def join(self, split: str, names: Sequence[str] | None, fingerprint: str, least: int) -> str | None:
        """Record that a set of patients is measured; the reason where it is refused, and then nothing is recorded.

        `names` is `None` for data whose patients have none: then a set can only be the one that was measured before,
        by `fingerprint`. Raises `DataError` where the record cannot be read or written.
        """
        with self._opened() as (file, secret, known):
            same = [one for one in known if one.split == split]
            ours = [one.patients for one in same if one.named]
            others: Patients = frozenset().union(*(one.patients for one in same if not one.named))
            if names is None:
                asked = frozenset({keyed(secret, fingerprint)})
                if asked <= others:
                    return None
                if others or ours:
                    return "its patients cannot be told from those it measured before (its data name none)"
            else:
                asked = frozenset(keyed(secret, name) for name in names)
                if asked in ours:
                    return None
                if others:
                    return "its patients cannot be told from those it measured before (its data named none then)"
                if fewest_told([*ours, asked], least) < least:
                    return (
                        f"its {split} patients differ from those it measured before by fewer than {least} "
                        "(patients join and leave a measured set in groups of that size)"
                    )
            _append(file, [_Set(split, names is not None, asked)])
            return None

    def join_groups(self, split: str, groups: Sequence[Sequence[str]], least: int) -> str | None:
        """Record that groups of a split's patients, none in two, are measured; the reason where they are refused.

        All of them or none, for a group follows from the whole and the others. More is asked of them than of whole
        sets: the groups of all runs part the patients into cells, and each cell has none of them or `least`. So nothing
        that follows from groups, be it no sum, is about fewer. Raises `DataError` as `join`.
        """
        with self._opened() as (file, secret, known):
            same = [one for one in known if one.split == split]
            if any(not one.named for one in same):
                return "its patients cannot be told from those it measured before (its data named none then)"
            before = [one.patients for one in same if one.group]
            asked = [frozenset(keyed(secret, name) for name in names) for names in groups]
            new = [one for one in asked if one not in before]
            if not new:
                return None
            fewest = int(_groups([*before, *new])[1].min())
            if fewest >= least:
                fewest = fewest_told([*(one.patients for one in same), *new], least)
            if fewest < least:
                return (
                    f"with groups that it gave before, these part its {split} patients into sets of fewer than {least}"
                )
            _append(file, [_Set(split, True, one, group=True) for one in new])
            return None

    @contextmanager
    def _opened(self) -> Iterator[tuple[BinaryIO, bytes, list[_Set]]]:
        """The record, this process's alone, its key and its sets."""
        try:
            with locked(self._folder / SETS) as file:
                yield file, folder_key(self._folder, KEY, SETS), self._read(file)
        except OSError as error:
            raise DataError("the site's history folder cannot be read or written", detail=str(error)) from error

    def _read(self, file: BinaryIO) -> list[_Set]:
        """The recorded sets. A last line that a crash cut off is taken out: its results had not left."""
        try:
            return [_Set.of(line) for line in whole_lines(file).splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "the site's record of measured patients is damaged; restore it", detail=str(self._folder / SETS)
            ) from error


def _append(file: BinaryIO, sets: Sequence[_Set]) -> None:
    """Put sets on record before anything of them can leave."""
    file.seek(0, os.SEEK_END)
    file.write(b"".join(one.line for one in sets))
    file.flush()
    os.fsync(file.fileno())


def fewest_told(sets: Sequence[Patients], least: int) -> int:
    """The fewest patients that a weighted sum of the sets' sums can be over, or a smaller number.

    The sets' indicator vectors span a space; a vector of the fewest non-zero entries vanishes on a hyperplane of the
    patients' rows, so those that go through r - 1 rows (r the rank) are all there are to try. Patients with the same
    rows are one. Where that is too much to try, the answer is the size of the smallest group of patients who are in the
    same sets: no weighted sum can tell its members apart, nor be over a part of it.
    """
    rows, sizes = _groups(sets)
    smallest = int(sizes.min())
    if smallest >= least:
        return smallest
    rows = _independent(rows)
    rank = rows.shape[1]
    if math.comb(len(rows), rank - 1) > _MOST_CHOICES:
        return smallest
    if rank == 1:
        return int(sizes.sum())
    fewest = int(sizes.sum())
    choices = combinations(range(len(rows)), rank - 1)
    while batch := list(islice(choices, _BATCH)):
        _, values, right = np.linalg.svd(rows[np.array(batch)], full_matrices=True)
        # The hyperplane's normal, where the rows span one.
        normals = right[values[:, -1] > 1e-9][:, -1]
        told = (np.abs(normals @ rows.T) > 1e-9) @ sizes
        fewest = min(fewest, int(told.min(initial=fewest)))
    return fewest


def _groups(sets: Sequence[Patients]) -> tuple[Array, Array]:
    """Which sets the patients are in, (groups, sets), and how many patients there are of each kind."""
    everybody: Collection[str] = frozenset().union(*sets)
    rows = np.array([[name in one for one in sets] for name in sorted(everybody)], dtype=np.float64)
    return np.unique(rows, axis=0, return_counts=True)


def _independent(rows: Array) -> Array:
    """Columns that span what all columns do."""
    chosen: list[int] = []
    for column in range(rows.shape[1]):
        if np.linalg.matrix_rank(rows[:, [*chosen, column]]) > len(chosen):
            chosen.append(column)
    return rows[:, chosen]


def folder_key(folder: Path, name: str, record: str) -> bytes:
    """The key of the digests in a record of the history folder, made at the first use. Called under the record's lock.

    Raises `DataError` where it is damaged, or gone from a record that has lines.
    """
    path = folder / name
    with suppress(FileNotFoundError):
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
        if len(secret) != 32:
            raise DataError("the key of the site's history is damaged; restore it", detail=str(path))
        return secret
    if (folder / record).stat().st_size:
        raise DataError(
            "the key of the site's history is gone, and with it which patients are in it; restore it", detail=str(path)
        )
    secret = secrets.token_bytes(32)
    draft = path.with_name(path.name + ".draft")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secret.hex())
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    return secret


def keyed(secret: bytes, name: str) -> str:
    """The digest of a patient's name in a record."""
    return hmac.digest(secret, name.encode("utf-8", "surrogateescape"), "sha256").hex()[: 2 * _DIGEST]
