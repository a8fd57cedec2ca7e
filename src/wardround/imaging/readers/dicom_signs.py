"""Which files and folders are DICOM, by their names or first bytes."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = frozenset({".dcm", ".ima", ".dicom"})
# What a file of several slices, a SEG, is called.
DICOM = ".dcm"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its suffix, or where it has none by its first bytes."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    # Scanners write IM0001 and no suffix, or a UID, whose last number looks like one.
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether files of DICOM lie in a folder itself; hidden ones and a DICOMDIR do not count."""
    try:
        names = (path for path in folder.iterdir() if path.name.upper() != "DICOMDIR")
        entries = sorted(path for path in names if not path.name.startswith("."))
        return any(path.is_file() and is_dicom(path) for path in entries)
    except PermissionError:
        return True  # The reader says that it cannot be read.
    except OSError:
        return False
