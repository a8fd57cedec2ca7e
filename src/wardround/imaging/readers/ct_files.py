"""Which files in a patient's folder are CT images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

#: What is looked for, for people.
KINDS = ("*.dcm", "ct.nii.gz")
NIFTI = ("ct.nii.gz", "ct.nii")
_SUFFIXES = frozenset({"", ".dcm", ".dicom", ".ima"})
_DEPTH = 6  # archives export PATIENT/STUDY/SERIES, some with folders in between


def patient_files(folder: Path) -> list[Path]:
    """A patient's NIfTI volumes, those nearest to the top and one a folder, or else all DICOM files, by path.

    Folders within the patient's are looked through, six levels in all; links are followed, to each place once.
    """
    dicom: list[Path] = []
    for level in _levels(folder):
        files = [path for path in level if path.is_file()]
        # Of two in one folder, the first.
        if volumes := {path.parent: path for path in reversed(files) if path.name in NIFTI}:
            return sorted(volumes.values())
        dicom += [path for path in files if path.name.upper() != "DICOMDIR" and _is_dicom(path)]
    return sorted(dicom)


def _levels(folder: Path) -> Iterator[list[Path]]:
    """What lies in a folder, then in the folders within it, and so on, each folder once; hidden things are left out."""
    seen: set[Path] = set()
    level = [folder]
    for _ in range(_DEPTH):
        inside: list[Path] = []
        for here in level:
            # A link may lead back up, or twice to the same folder.
            if (real := here.resolve()) not in seen:
                seen.add(real)
                inside += [path for path in sorted(here.iterdir()) if not path.name.startswith(".")]
        yield inside
        level = [path for path in inside if path.is_dir()]


def _is_dicom(path: Path) -> bool:
    # Names of exported files may end in a number, as identifiers with dots do.
    suffix = path.suffix.lower()
    return suffix in _SUFFIXES or re.fullmatch(r"\.\d+", suffix) is not None
