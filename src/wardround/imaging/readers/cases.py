"""A hospital's images with what was drawn or said of them: which files belong together, and whose they are.

Files are named by patterns relative to a site's folder, without their ending: `{patient}/flair`, `imagesTr/{patient}`,
`{patient}/{id}.jpg`. An image may be a folder that holds a DICOM series, and a mask a DICOM SEG, in a folder of its own
or not. `{patient}` is who it is of; `{id}` tells several images of a patient apart. A pattern without a folder means
`{patient}/PATTERN`. With a table (CSV), `{id}` is what its rows are named by, and a column says whose each image is.
Names and paths stay at the site.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wardround.errors import DataError
from wardround.imaging.readers.aside import Aside, place
from wardround.imaging.readers.dicom_signs import DICOM, holds_dicom, is_dicom
from wardround.imaging.readers.table import table_rows
from wardround.study.images import CaseTable, LabelTable
from wardround.wire.files import reason as reason_of

ENDINGS = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg")
# What reads a file of a package outside: channels (C, *shape), mm along each axis of the shape, and the affine from
# indices to mm, (4, 4); the last two may be `None`.
Reader = Callable[[Path], tuple[Any, Sequence[float] | None, Any]]
_PLACE = re.compile(r"(\{patient\}|\{id\}|\*)")


@dataclass(frozen=True)
class Case:
    """An image of a patient: a file for each channel or contrast, its mask's file where there is one, its label.

    `absent`: the places among the study's contrasts of which there is no file.
    """

    patient: str
    id: str
    images: tuple[Path, ...]
    mask: Path | None = None
    label: str = ""
    readers: Mapping[str, Reader] = field(default_factory=dict, compare=False)
    absent: tuple[int, ...] = ()


class NothingMatches(DataError):
    """A folder holds no file that the patterns name."""


@dataclass(frozen=True)
class Patterns:
    """How a site's files are named; `readers` by ending (".raw") read what the package itself does not.

    `only`: look for this patient and no other. `absent`: places in `images` that are not looked for; `optional`: places
    that may be missing of an image, as long as one is there. `remedy` ends the error of an image that lacks a file.
    """

    images: tuple[str, ...]
    mask: str | None = None
    table: CaseTable | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict, compare=False)
    only: str | None = None
    absent: frozenset[int] = frozenset()
    optional: frozenset[int] = frozenset()
    remedy: str = "complete it, move the patient away, or change `{setting}`"

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files that are looked for."""
        return (*ENDINGS, *sorted(self.readers.keys() - set(ENDINGS)))

    def whole(self, pattern: str) -> str:
        """A pattern with its folder."""
        return pattern if "{" in pattern or "/" in pattern else f"{{patient}}/{pattern}"


@dataclass
class _Found:
    images: dict[int, Path] = field(default_factory=dict)
    mask: Path | None = None
    doubled: str = ""


@dataclass(frozen=True)
class Sorted:
    """A site's images by patient, both in the order of their names, and the patients who cannot be used."""

    cases: dict[str, list[Case]]
    aside: tuple[Aside, ...]


def sort_cases(source: Path | Sequence[Path], site: str, patterns: Patterns) -> Sorted:
    """The images of a site by patient, without the patients whose files are not complete or do not fit the table.

    A patient is set aside as a whole. Raises DataError for a missing folder, for one where nothing matches, for a
    patient in two folders, and for a table that cannot be read; the message counts and never names a patient.
    """
    folders = [source] if isinstance(source, Path) else list(source)
    cases: dict[str, list[Case]] = {}
    aside: list[Aside] = []
    for folder in folders:
        found, without = _in(folder, site, patterns)
        doubled = {case.patient for case in found} & cases.keys()
        if doubled:
            raise DataError(
                f"{place(site)}{len(doubled)} patients are in two of its data folders; give each one folder",
                detail=f"{folder}: {', '.join(sorted(doubled))}",
            )
        for case in sorted(found, key=lambda case: (case.patient, case.id)):
            cases.setdefault(case.patient, []).append(case)
        aside += without
    if not cases and not aside:
        shown = ", ".join(patterns.whole(pattern) for pattern in patterns.images)
        raise NothingMatches(
            f"{place(site)}no file in its data folder matches {shown} ({', '.join(patterns.endings)}, or a folder with "
            "a DICOM series); see `task.images`",
            detail=", ".join(map(str, folders)),
        )
    once = {one.patient: one for one in reversed(aside) if one.patient}
    unknown = [one for one in aside if not one.patient]
    kept = {patient: cases[patient] for patient in sorted(cases) if patient not in once}
    return Sorted(kept, (*(once[patient] for patient in sorted(once)), *unknown))


def _in(folder: Path, site: str, patterns: Patterns) -> tuple[list[Case], list[Aside]]:
    if not folder.is_dir():
        raise DataError(f"{place(site)}its data folder does not exist; see the sites file", detail=str(folder))
    rows = None if patterns.table is None else _rows(folder, site, patterns.table)
    found: dict[tuple[str, str], _Found] = {}
    for number, pattern in enumerate(patterns.images):
        if number in patterns.absent:
            continue
        for key, path in _matches(folder, site, patterns.whole(pattern), patterns):
            case = found.setdefault(key, _Found())
            case.doubled = pattern if number in case.images else case.doubled
            case.images[number] = path
    if patterns.mask is not None:
        for key, path in _matches(folder, site, patterns.whole(patterns.mask), patterns, mask=True):
            if key in found:
                found[key].doubled = patterns.mask if found[key].mask is not None else found[key].doubled
                found[key].mask = path
    cases: list[Case] = []
    aside = [] if rows is None or patterns.table is None else _misfits(found, rows, patterns.table)
    for (patient, name), case in found.items():
        row = None if rows is None else rows.images.get(name)
        if rows is not None and row is None:
            continue
        whose, label = (patient, "") if row is None else row
        if lack := _lacking(case, patterns):
            aside.append(Aside(whose, lack, name))
            continue
        images = tuple(case.images[n] for n in sorted(case.images))
        absent = tuple(n for n in range(len(patterns.images)) if n not in case.images)
        cases.append(Case(whose, name, images, case.mask, label, patterns.readers, absent))
    return cases, aside


def _lacking(case: _Found, patterns: Patterns) -> str:
    """Why an image is not complete; nothing where it is."""
    spared = patterns.absent | (patterns.optional if case.images else frozenset())
    absent = [("task.images", p) for n, p in enumerate(patterns.images) if n not in case.images and n not in spared]
    absent += [("task.mask", patterns.mask)] if patterns.mask is not None and case.mask is None else []
    if case.doubled:
        return f"several files of an image match {case.doubled!r}; keep one of them, or make the pattern narrower"
    if not absent:
        return ""
    setting, pattern = absent[0]
    return f"an image lacks the file {pattern!r}; {patterns.remedy.format(setting=setting)}"


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression; a place that comes again is the same text again."""
    parts: list[str] = []
    for part in _PLACE.split(pattern):
        name = part.strip("{}")
        if not _PLACE.fullmatch(part):
            parts.append(re.escape(part))
        elif part == "*":
            parts.append(r"[^/]*")
        else:
            again = any(name in other for other in parts if other.startswith("(?P<"))
            parts.append(f"(?P={name})" if again else rf"(?P<{name}>[^/]+?)")
    return re.compile("".join(parts))


def _matches(
    folder: Path, site: str, pattern: str, patterns: Patterns, *, mask: bool = False
) -> Iterator[tuple[tuple[str, str], Path]]:
    """What a pattern finds: (patient, id) and path. Hidden files do not count."""
    expression = _expression(pattern)
    patient = "*" if patterns.only is None else glob.escape(patterns.only)
    wild, endings = pattern.replace("{patient}", patient).replace("{id}", "*"), patterns.endings
    named = pattern.endswith((*endings, DICOM))
    try:
        # Without an ending: folders of DICOM, and a SEG that has none.
        for ending in ("",) if named else (*endings, *((DICOM,) if mask and DICOM not in endings else ()), ""):
            for path in sorted(folder.glob(wild + ending)):
                name = path.relative_to(folder).as_posix().removesuffix(ending)
                match = expression.fullmatch(name)
                if match is None or any(part.startswith(".") for part in name.split("/")):
                    continue
                if not (path.is_file() if named or ending else _is_dicom(path, mask)):
                    continue
                groups = match.groupdict()
                if patterns.only is not None and groups.get("patient") != patterns.only:
                    continue
                yield (groups.get("patient") or "", groups.get("id") or ""), path
    except OSError as error:
        raise DataError(
            f"{place(site)}its data folder cannot be read ({reason_of(error)})", detail=str(folder)
        ) from error


def _is_dicom(path: Path, mask: bool) -> bool:
    """Whether a path without an ending of the package's is DICOM: a folder with files of it, or a mask's one file."""
    return holds_dicom(path) if path.is_dir() else mask and not path.suffix and path.is_file() and is_dicom(path)


@dataclass(frozen=True)
class _Rows:
    """Of a table: patient and label of each image, images without a patient, and who is set aside for it."""

    images: dict[str, tuple[str, str]]
    unclear: frozenset[str]
    aside: tuple[Aside, ...]


def _rows(folder: Path, site: str, table: CaseTable) -> _Rows:
    """What a table says. Raises DataError where it cannot be read, lacks a column, or has too many rows."""
    path, where = folder / table.file, f"{place(site)}{table.file}"
    column_of_label = table.label if isinstance(table, LabelTable) else ""
    rows: dict[str, tuple[str, str]] = {}
    unclear: set[str] = set()
    aside: list[Aside] = []
    for number, row in table_rows(path, tuple(filter(None, (table.id, table.patient, column_of_label))), where):
        key, whose = row[table.id], row[table.patient]
        if not key or not whose:
            reason = f"a row of {table.file} names no image, or no patient; complete it"
            aside.append(Aside(whose, reason, f"line {number}"))
            unclear |= {key} if key else set()
        elif key in rows:
            # It may be of either.
            reason = f"{table.file} names an image a second time; keep one of its rows"
            aside += [Aside(each, reason, f"line {number}: {key}") for each in {whose, rows[key][0]}]
        else:
            rows[key] = (whose, row[column_of_label] if column_of_label else "")
    return _Rows(rows, frozenset(unclear - rows.keys()), tuple(aside))


def _misfits(found: Mapping[tuple[str, str], _Found], rows: _Rows, table: CaseTable) -> list[Aside]:
    """Patients of whom table and files do not say the same, and images of whom it says nothing."""
    names = {name for _, name in found}
    without_row = [name for name in names if name not in rows.images and name not in rows.unclear]
    without_file = [name for name in rows.images if name not in names]
    return [
        *rows.aside,
        *(Aside("", f"an image has no row in {table.file}; add it", name) for name in sorted(without_row)),
        *(
            Aside(rows.images[name][0], f"a row of {table.file} has no image; add it, or remove the row", name)
            for name in without_file
        ),
    ]
