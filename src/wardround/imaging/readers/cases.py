"""A hospital's images with what was drawn or said of them: which files belong together, and whose they are.

Files are named by patterns relative to a site's folder, without their ending: `{patient}/flair`, `imagesTr/{patient}`,
`{patient}/{id}.jpg`. `{patient}` is who it is of; `{id}` tells several images of a patient apart. A pattern without a
folder means `{patient}/PATTERN`. With a table (CSV), `{id}` is what its rows are named by, and a column says whose each
image is. Names and paths stay at the site.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from wardround.errors import DataError
from wardround.study.images import CaseTable, LabelTable
from wardround.wire.files import reason

ENDINGS = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg")
# What reads a file of a package outside: channels (C, *shape), mm along each axis of the shape, and the affine from
# indices to mm, (4, 4); the last two may be `None`.
Reader = Callable[[Path], tuple[Any, Sequence[float] | None, Any]]
_PLACE = re.compile(r"(\{patient\}|\{id\}|\*)")
_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Case:
    """An image of a patient: a file for each channel or contrast, its mask's file where there is one, its label."""

    patient: str
    id: str
    images: tuple[Path, ...]
    mask: Path | None = None
    label: str = ""
    readers: Mapping[str, Reader] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Patterns:
    """How a site's files are named; `readers` by ending (".raw") read what the package itself does not."""

    images: tuple[str, ...]
    mask: str | None = None
    table: CaseTable | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict, compare=False)

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


def find_cases(source: Path | Sequence[Path], site: str, patterns: Patterns) -> dict[str, list[Case]]:
    """The images of a site by patient, both in the order of their names.

    Raises DataError for a missing folder, for one where nothing matches, for a patient in two folders, for images that
    lack a file, and for a table that does not fit its files; the message counts and never names a patient.
    """
    folders = [source] if isinstance(source, Path) else list(source)
    cases: dict[str, list[Case]] = {}
    for folder in folders:
        found = list(_in(folder, site, patterns))
        doubled = {case.patient for case in found} & cases.keys()
        if doubled:
            raise DataError(
                f"site {site}: {len(doubled)} patients are in two of its data folders; give each one folder",
                detail=f"{folder}: {', '.join(sorted(doubled))}",
            )
        for case in sorted(found, key=lambda case: (case.patient, case.id)):
            cases.setdefault(case.patient, []).append(case)
    if not cases:
        shown = ", ".join(patterns.whole(pattern) for pattern in patterns.images)
        raise DataError(
            f"site {site}: no file in its data folder matches {shown} ({', '.join(patterns.endings)}); "
            "see `task.images`",
            detail=", ".join(map(str, folders)),
        )
    return dict(sorted(cases.items()))


def _in(folder: Path, site: str, patterns: Patterns) -> Iterator[Case]:
    if not folder.is_dir():
        raise DataError(f"site {site}: its data folder does not exist; see the sites file", detail=str(folder))
    rows = None if patterns.table is None else _rows(folder, site, patterns.table)
    found: dict[tuple[str, str], _Found] = {}
    for number, pattern in enumerate(patterns.images):
        for key, path in _matches(folder, site, patterns.whole(pattern), patterns.endings):
            found.setdefault(key, _Found()).images[number] = path
    if patterns.mask is not None:
        for key, path in _matches(folder, site, patterns.whole(patterns.mask), patterns.endings):
            if key in found:
                found[key].mask = path
    for number, pattern in enumerate(patterns.images):
        _complete(site, found, partial(_has_image, number), pattern, "task.images")
    if patterns.mask is not None:
        _complete(site, found, lambda case: case.mask is not None, patterns.mask, "task.mask")
    if rows is not None and patterns.table is not None:
        _fits(site, found, rows, patterns.table)
    for (patient, name), case in found.items():
        row = None if rows is None else rows[name]
        whose, label = (patient, "") if row is None else row
        images = tuple(case.images[n] for n in range(len(patterns.images)))
        yield Case(whose, name, images, case.mask, label, patterns.readers)


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


def _has_image(number: int, case: _Found) -> bool:
    return number in case.images


def _matches(folder: Path, site: str, pattern: str, endings: tuple[str, ...]) -> Iterator[tuple[tuple[str, str], Path]]:
    """What a pattern finds: (patient, id) and path. Hidden files do not count."""
    expression = _expression(pattern)
    wild = re.sub(r"\{patient\}|\{id\}", "*", pattern)
    seen: dict[tuple[str, str], Path] = {}
    try:
        for ending in ("",) if pattern.endswith(endings) else endings:
            for path in sorted(folder.glob(wild + ending)):
                name = path.relative_to(folder).as_posix().removesuffix(ending)
                match = expression.fullmatch(name)
                if match is None or any(part.startswith(".") for part in name.split("/")) or not path.is_file():
                    continue
                groups = match.groupdict()
                key = (groups.get("patient") or "", groups.get("id") or "")
                if key in seen:
                    raise DataError(
                        f"site {site}: several files of an image match {pattern!r}; keep one of them, or make the "
                        "pattern narrower",
                        detail=f"{seen[key]}, {path}",
                    )
                seen[key] = path
    except OSError as error:
        raise DataError(f"site {site}: its data folder cannot be read ({reason(error)})", detail=str(folder)) from error
    yield from seen.items()


def _complete(
    site: str,
    found: Mapping[tuple[str, str], _Found],
    has: Callable[[_Found], bool],
    pattern: str,
    setting: str,
) -> None:
    lacking = [key for key, case in found.items() if not has(case)]
    if lacking:
        raise DataError(
            f"site {site}: {len(lacking)} of {len(found)} images lack the file {pattern!r}; complete them, move them "
            f"away, or change `{setting}`",
            detail=", ".join("/".join(filter(None, key)) for key in lacking),
        )


def _rows(folder: Path, site: str, table: CaseTable) -> dict[str, tuple[str, str]]:
    """Patient and label of each image. Raises DataError."""
    path, where = folder / table.file, f"site {site}, {table.file}"
    column_of_label = table.label if isinstance(table, LabelTable) else ""
    rows: dict[str, tuple[str, str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for column in filter(None, (table.id, table.patient, column_of_label)):
                if column not in names:
                    raise DataError(f"{where}: there is no column {column!r}; it has {', '.join(names)}")
            for number, row in enumerate(reader, 2):
                key, whose = (row[table.id] or "").strip(), (row[table.patient] or "").strip()
                if not key or not whose or number > _MOST_ROWS:
                    raise DataError(f"{where}: line {number} names no image, or no patient", detail=str(path))
                if key in rows:
                    raise DataError(f"{where}: line {number} names an image a second time", detail=f"{path}: {key}")
                rows[key] = (whose, (row[column_of_label] or "").strip() if column_of_label else "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = reason(error) if isinstance(error, OSError) else "it is no CSV in UTF-8"
        raise DataError(f"{where}: cannot be read ({said})", detail=str(path)) from error
    return rows


def _fits(
    site: str, found: Mapping[tuple[str, str], _Found], rows: Mapping[str, tuple[str, str]], table: CaseTable
) -> None:
    names = Counter(name for _, name in found)
    without_row = [name for name in names if name not in rows]
    without_file = [name for name in rows if name not in names]
    if without_row or without_file:
        raise DataError(
            f"site {site}: {len(without_row)} images have no row in {table.file}, and {len(without_file)} rows of it "
            "have no image; complete one or the other",
            detail=", ".join((without_row + without_file)[:20]),
        )
