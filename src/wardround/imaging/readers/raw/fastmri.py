"""fastMRI's HDF5 files (Zbontar et al., arXiv:1811.08839): single coil and multi coil; train, validation and test.

`kspace` is complex (slices, coils, rows, columns), or (slices, rows, columns) of a single coil; rows are the readout,
columns the phase encode. `mask`, where there is one, says which columns were measured. `reconstruction_rss` or
`reconstruction_esc` is the reference image, cropped to the field of view that was asked for (320 x 320, mostly).

The rule for the readout, which these files hold with its oversampling (640 rows, mostly): it is cropped to the field of
view of the header's `reconSpace`, or without a header to the rows of the reference. Columns stay as they were measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wardround.errors import DataError
from wardround.imaging.readers.raw.hdf5 import opened, text_of
from wardround.imaging.readers.raw.header import Header, parse_header
from wardround.imaging.readers.raw.slices import (
    ComplexArray,
    RawSlices,
    ScanFacts,
    raw_error,
    without_oversampling,
)
from wardround.imaging.readers.volume import FloatArray

KSPACE = "kspace"
_REFERENCES = ("reconstruction_rss", "reconstruction_esc")


def read_fastmri(path: Path) -> RawSlices:
    """Open a file of fastMRI's layout. Raises DataError for another one, and `MissingExtra` without h5py."""
    with opened(path) as file:
        shape, dtype = _shape(file, KSPACE), file[KSPACE].dtype
        attributes = {name: text_of(file.attrs[name]) for name in ("patient_id", "acquisition") if name in file.attrs}
        xml = text_of(file["ismrmrd_header"][()]) if "ismrmrd_header" in file else None
        reference = next((name for name in _REFERENCES if name in file), None)
        cropped = None if reference is None else _shape(file, reference)
        complex_ = reference is not None and file[reference].dtype.kind == "c"
        columns = np.asarray(file["mask"]).ravel() if "mask" in file else None
    if len(shape) not in (3, 4) or dtype.kind != "c":
        raise raw_error(
            "the data set `kspace` must be complex, (slices, coils, rows, columns) or (slices, rows, columns); "
            f"this is {dtype} of shape {shape}",
            path,
        )
    slices, height, width = int(shape[0]), int(shape[-2]), int(shape[-1])
    coils = int(shape[1]) if len(shape) == 4 else 1
    if cropped is not None and (len(cropped) != 3 or cropped[0] != slices or complex_):
        raise raw_error("the reference image of a raw data file is complex, or has other slices than its k-space", path)
    header = _header(xml, path)
    rows = _rows(header, height, None if cropped is None else int(cropped[1]))

    def stored(number: int) -> ComplexArray:
        with opened(path) as file:
            found = np.asarray(file[KSPACE][number], np.complex64)
        if columns is not None:
            # Some files hold the whole scan, and the mask of another.
            found = found * (columns != 0)
        return without_oversampling(found.reshape(coils, height, width), rows)

    def picture(number: int) -> FloatArray:
        assert reference is not None
        with opened(path) as file:
            return np.asarray(file[reference][number], np.float32)

    return RawSlices(
        "fastMRI HDF5",
        (slices, coils, rows, width),
        stored,
        _facts(header, attributes),
        None if columns is None else _lines(columns, (rows, width), path),
        picture=None if reference is None else picture,
        files=(path,),
    )


def _shape(file: Any, name: str) -> tuple[int, ...]:
    """The shape of an array; of none for a data set without values."""
    shape: tuple[int, ...] | None = file[name].shape
    return shape or ()


def _header(xml: str | None, path: Path) -> Header | None:
    """A header that cannot be read says nothing: the k-space does not depend on it."""
    if xml is None:
        return None
    try:
        return parse_header(xml, path)
    except DataError:
        return None


def _rows(header: Header | None, height: int, reference: int | None) -> int:
    if header is not None and header.encodings[0].matrix[0] == height:
        return header.encodings[0].rows
    return min(height, reference or height)


def _facts(header: Header | None, attributes: dict[str, Any]) -> ScanFacts:
    known = ScanFacts() if header is None else header.facts
    return ScanFacts(
        known.spacing,
        known.field_strength,
        known.vendor,
        attributes.get("acquisition") or known.protocol,
        known.matrix,
        attributes.get("patient_id") or known.patient,
    )


def _lines(columns: Any, shape: tuple[int, int], path: Path) -> Any:
    if columns.size != shape[1]:
        raise raw_error(
            f"the data set `mask` of a raw data file has {columns.size} columns and its k-space {shape[1]}", path
        )
    mask = np.repeat((columns != 0).astype(np.float32)[None], shape[0], axis=0)
    return lambda number: mask
