"""A series of MR or CT images in DICOM, one file a slice, as a volume with a place: what a clinic sends to a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset

from wardround.errors import DataError
from wardround.imaging.readers.bounds import MOST_VOXELS
from wardround.imaging.readers.dicom import (
    Placed,
    affine_of,
    one_series,
    placed,
    read_series,
    series_files,
    step_of,
)
from wardround.imaging.readers.dicom_file import number, open_dicom, path_of, pixels, text
from wardround.imaging.readers.places import regular_gaps
from wardround.imaging.readers.volume import FloatArray

_MR = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True, eq=False)
class ImageSeries:
    """The slices of one series along their normal.

    `data` is float32 (rows, columns, slices), CT in HU; `spacing` is mm along the same axes, `affine` (4, 4) from
    indices to mm in RAS. `headers` are the slices' own, in order and without pixels; they name the patient. `gaps` says
    why slices may be missing though the steps are even, where headers give a reason.
    """

    data: FloatArray
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    headers: tuple[FileDataset, ...]
    gaps: str = ""

    @property
    def frame(self) -> str:
        """The identifier of its frame of reference, which stays at the site; empty where headers name none.

        Raises DataError where slices are in several.
        """
        found = {text(header, "FrameOfReferenceUID") or "" for header in self.headers}
        if len(found) > 1:
            raise DataError(
                f"slices of one series are in {len(found)} frames of reference, so they are not of one scan; export "
                "the series again",
                detail=str(path_of(self.headers[0]).parent),
            )
        return found.pop()


def read_image_series(folder: Path) -> ImageSeries:
    """Read the one MR or CT series that a folder holds, or one file of it as a series of one slice.

    Raises DataError, whose message never names the patient, for files that are damaged or of another kind, mixed series
    or geometries, and slices that are missing, doubled or unevenly spaced.
    """
    paths = series_files(folder) if not folder.is_file() else [folder]
    if not paths:
        raise DataError("a series has no DICOM file", detail=str(folder))
    first = open_dicom(paths[0], pixels=False)
    _check_size(first, len(paths))
    modality = text(first, "Modality")
    if modality == "CT":
        ct = read_series(paths)
        return ImageSeries(ct.data, ct.spacing, ct.affine, ct.headers, ct.gaps)
    if modality != "MR":
        shown = modality if modality and re.fullmatch("[A-Z]{2,4}", modality) else "missing or unknown"
        raise DataError(f"a DICOM series is neither MR nor CT (its modality is {shown})", detail=str(folder))
    return _volume([_read_mr(path) for path in paths])


def _check_size(header: FileDataset, count: int) -> None:
    rows, columns = (number(header, keyword) or 0.0 for keyword in ("Rows", "Columns"))
    if rows * columns * count > MOST_VOXELS:
        raise DataError(
            f"a series has {count} slices of {rows:g} x {columns:g} pixels, and at most {MOST_VOXELS:,} voxels are "
            "read; is it one series?",
            detail=str(path_of(header).parent),
        )


def _volume(slices: Sequence[Placed]) -> ImageSeries:
    one_series(slices)
    ordered = sorted(slices, key=lambda one: one.position)
    first, step = ordered[0], step_of(ordered)
    return ImageSeries(
        np.stack([one.hu for one in ordered], axis=-1),
        (*first.spacing, step),
        affine_of(first, step),
        tuple(one.header for one in ordered),
        regular_gaps(one.place for one in ordered),
    )


def _read_mr(path: Path) -> Placed:
    """A slice in the units of its rescale, where it has one."""
    dataset = open_dicom(path)
    modality, kind = text(dataset, "Modality"), text(dataset, "SOPClassUID")
    if modality != "MR":
        raise DataError("a folder mixes MR with files of another kind; give each series its own", detail=str(path))
    if kind == f"{_MR}.1":
        raise DataError("a DICOM file is enhanced multi-frame MR; export it as classic MR", detail=str(path))
    if kind != _MR:
        raise DataError("a DICOM file is of MR but no MR image (spectra or a report); move it away", detail=str(path))
    if (text(dataset, "PhotometricInterpretation") or "") == "MONOCHROME1":
        raise DataError("a DICOM image is stored inverted (MONOCHROME1); export it as MONOCHROME2", detail=str(path))
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    stored = pixels(dataset).astype(np.float64)
    values = stored * (1.0 if slope is None else slope) + (0.0 if intercept is None else intercept)
    if not np.isfinite(values).all():
        raise DataError("an image holds NaN or infinite values", detail=str(path_of(dataset)))
    return placed(dataset, values.astype(np.float32))
