"""Arrays in .npz files, within what the file can hold: an array's header is looked at before memory is taken for it."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# What all arrays of one archive may come to.
MOST_BYTES = 1 << 32


def read_npz(path: Path, most: int = MOST_BYTES) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file by name; never unpickles.

    Raises OSError, ValueError, KeyError and zipfile.BadZipFile where it is damaged, holds Python objects, an array that
    says more than its entry holds, or more than `most` bytes in all.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > most:
            raise ValueError(f"the arrays come to {total:,} bytes, and at most {most:,} are read")
        for entry in entries:
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"an array's header says {shape} of {dtype}, and its entry holds less")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
