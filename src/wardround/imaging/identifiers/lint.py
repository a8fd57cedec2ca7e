"""A look through a site's folders: headers, names and columns, in counts. No pixel, cell or value is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.identifiers.findings import Finding, Findings, Level
from wardround.imaging.identifiers.headers import look_at_dicom
from wardround.imaging.identifiers.others import LOOKS, UNREAD
from wardround.imaging.identifiers.words import identifying
from wardround.imaging.readers.dicom_signs import is_dicom
from wardround.wire.files import reason

#: How many files are opened, unless all are asked for.
MOST = 2000
# Of the DICOM files of a folder, which are mostly one series; names of files are looked at before that.
_EACH = 2
_DEPTH = 16
# A folder of more files than this is no site's.
_MOST_FILES = 5_000_000
_Look = Callable[[Path], list[Finding]]


@dataclass(frozen=True)
class Looked:
    """What was found, and in how many of the files that could have been opened."""

    findings: Findings = field(default_factory=Findings)
    files: int = 0
    opened: int = 0

    @property
    def refused(self) -> bool:
        """Whether something was found that no data should hold which others compute with."""
        return any(finding.level is Level.REFUSE for finding in self.findings.counts)


def lint_folders(
    folders: Sequence[Path], tables: Sequence[Path] = (), *, most: int = MOST, everything: bool = False
) -> Looked:
    """Look through folders and tables for what tells who a patient is.

    Names of all files and folders are looked at. Of DICOM the first and the last file of each folder are opened, of
    others each one, and no more than `most` in all, spread evenly; with `everything` every file is. Raises DataError
    for a folder that is missing or cannot be read.
    """
    findings = Findings()
    known: list[tuple[Path, _Look]] = []
    files = 0
    for folder in folders:
        for here, names in _walk(folder):
            _names(findings, here, names, top=here == folder)
            dicom: list[Path] = []
            for name in names:
                path, look = here / name, _look(name)
                if look is not None:
                    known.append((path, look))
                elif name.lower().endswith(UNREAD):
                    findings.add([Finding(Level.NOTE, "documents and tables that were not looked into")], path)
                elif name.upper() != "DICOMDIR" and is_dicom(path):
                    dicom.append(path)
                elif name.upper() == "DICOMDIR":
                    findings.add([Finding(Level.WARN, "DICOM: a DICOMDIR, which lists patients")], path)
            files += len(dicom)
            chosen = dicom if everything or len(dicom) <= _EACH else [dicom[0], dicom[-1]]
            files -= len(chosen)
            known += [(path, look_at_dicom) for path in chosen]
    known += [(path, look) for path in tables if (look := _look(path.name)) is not None]
    files += len(known)
    chosen_files = known if everything or len(known) <= most else [known[n * len(known) // most] for n in range(most)]
    for path, look in chosen_files:
        findings.add(look(path), path)
    return Looked(findings, files, len(chosen_files))


def _look(name: str) -> _Look | None:
    return next((look for endings, look in LOOKS if name.lower().endswith(endings)), None)


def _names(findings: Findings, here: Path, names: Sequence[str], *, top: bool) -> None:
    """What names look like: of a folder within the data folder, and of its files without their endings."""
    if not top and (kind := identifying(here.name)):
        findings.add([Finding(Level.WARN, f"names: a folder's name looks like {kind}")], here)
    for name in names:
        stem = name.split(".")[0] if _look(name) is not None else name.removesuffix(".dcm")
        if kind := identifying(stem):
            findings.add([Finding(Level.WARN, f"names: a file's name looks like {kind}")], here / name)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder once, links followed, with the names of its files, both in order; hidden ones are left out."""
    if not folder.is_dir():
        raise DataError("a data folder does not exist; correct the path", detail=str(folder))
    seen: set[tuple[int, int]] = set()
    count = 0
    level = [folder]
    for _ in range(_DEPTH):
        below: list[Path] = []
        for here in level:
            try:
                status = here.stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(here) as entries:
                    found = sorted((e.name, e.is_dir(), e.is_file()) for e in entries if not e.name.startswith("."))
            except OSError as error:
                raise DataError(
                    f"a folder of the data cannot be read ({reason(error)}); let this user read it", detail=str(here)
                ) from error
            names = [name for name, _, is_file in found if is_file]
            count += len(names)
            if count > _MOST_FILES:
                raise DataError(f"a data folder holds more than {_MOST_FILES:,} files; name the site's own folder")
            yield here, names
            below += [here / name for name, is_folder, _ in found if is_folder]
        level = below
