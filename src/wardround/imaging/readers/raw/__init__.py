"""Readers of MRI raw data: fastMRI and ISMRMRD (HDF5), BART, NumPy and MATLAB."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from wardround.imaging.readers.raw.arrays import read_mat, read_npy
from wardround.imaging.readers.raw.bart import read_bart
from wardround.imaging.readers.raw.fastmri import KSPACE, read_fastmri
from wardround.imaging.readers.raw.hdf5 import opened
from wardround.imaging.readers.raw.ismrmrd_file import groups_of, read_ismrmrd
from wardround.imaging.readers.raw.slices import RawSlices, ScanFacts, raw_error
from wardround.imaging.readers.raw.trajectory import BESIDE

__all__ = ["ENDINGS", "KINDS", "RawSlices", "ScanFacts", "is_raw", "open_raw", "raw_files"]

#: What is looked for, for people.
KINDS = "fastMRI or ISMRMRD (.h5), BART (.cfl with .hdr), .npy or .mat"
_DEPTH = 4


def read_hdf5(path: Path) -> RawSlices:
    """Open fastMRI's or ISMRMRD's HDF5, whichever it is. Raises DataError for a file of another kind."""
    with opened(path) as file:
        fastmri, ismrmrd = KSPACE in file, bool(groups_of(file))
    if fastmri:
        return read_fastmri(path)
    if ismrmrd:
        return read_ismrmrd(path)
    raise raw_error("an HDF5 file holds neither fastMRI's `kspace` nor ISMRMRD's readouts", path)


_READERS: Mapping[str, Callable[[Path], RawSlices]] = MappingProxyType(
    {
        ".h5": read_hdf5,
        ".hdf5": read_hdf5,
        ".mrd": read_hdf5,
        ".cfl": read_bart,
        ".npy": read_npy,
        ".mat": read_mat,
    }
)
#: The endings of files that may be raw data.
ENDINGS = tuple(_READERS)


def is_raw(path: Path) -> bool:
    """Whether a file's name ends as those of raw data do; the trajectory beside another file is none by itself."""
    named = path.suffix.lower() in _READERS and not path.name.startswith(".")
    return named and not (path.stem.endswith(BESIDE) and path.suffix.lower() in (".cfl", ".npy"))


def open_raw(path: Path) -> RawSlices:
    """Open a file of raw data; its slices are read when asked for.

    Raises DataError, whose message names no file, for one that is missing, damaged, empty or of another kind, and
    `MissingExtra` where reading it needs a package that is not installed.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise raw_error(f"a file holds no raw data that is known; give {KINDS}", path)
    return reader(path)


def raw_files(folder: Path) -> list[Path]:
    """All raw data files in a folder and in folders in it, by path. Raises OSError where one cannot be read."""
    return sorted(_found(folder, _DEPTH))


def _found(folder: Path, depth: int) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if depth > 0:
                yield from _found(entry, depth - 1)
        elif is_raw(entry):
            yield entry
