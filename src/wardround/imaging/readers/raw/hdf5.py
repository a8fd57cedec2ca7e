"""HDF5 files, opened for a moment: nothing stays open between slices. h5py is a part of the extra `raw`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from wardround.errors import DataError, MissingExtra
from wardround.imaging.readers.raw.slices import raw_error

DAMAGED = "a raw data file is damaged or cut short; copy it again from its source"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An HDF5 file to read. Raises DataError for one that cannot be, and `MissingExtra` without h5py."""
    h5py = library()
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DataError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        # h5py's own words name the file.
        said = type(error).__name__ if error.errno is None else os.strerror(error.errno)
        raise raw_error(f"a raw data file cannot be read ({said})", path) from error
    # h5py raises these for damaged trees, chunks and names, and for a group where an array is expected.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise raw_error(DAMAGED, path, str(error)) from error


def library() -> ModuleType:
    """The package h5py."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("reading raw data in HDF5 (fastMRI, ISMRMRD, MATLAB 7.3)", "raw") from error
    module: ModuleType = h5py
    return module


def text_of(value: Any) -> str | None:
    """An attribute or a data set that holds a text, without white space around it; `None` for an empty one."""
    while hasattr(value, "shape") and value.shape not in ((), None):
        if value.size != 1:
            return None
        value = value[0]
    if hasattr(value, "item"):
        value = value.item()
    said = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return said.strip() or None
