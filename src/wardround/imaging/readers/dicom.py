"""CT images in DICOM: one slice, or a series as a volume, in Hounsfield units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from wardround.errors import DataError
from wardround.imaging.readers.ct_protocol import CTProtocol, protocol_of
from wardround.imaging.readers.dicom_file import (
    is_lossy,
    is_projection,
    no_pixels,
    numbers,
    open_dicom,
    path_of,
    pixels,
    required,
    text,
)
from wardround.imaging.readers.hounsfield import AIR, check_air, check_tissue, to_hounsfield
from wardround.imaging.readers.places import Place, regular_gaps, unevenness
from wardround.imaging.readers.volume import FloatArray, Volume
from wardround.wire.files import reason

__all__ = ["AIR", "CTSeries", "CTSlice", "read_series", "read_slice", "series_files"]

_CT = "1.2.840.10008.5.1.4.1.1.2"
_TILT = 0.01  # degrees; vendors write -0.0 and 1e-5


@dataclass(frozen=True, eq=False)
class CTSlice:
    """One axial CT image.

    `hu` is float32 (rows, columns) in HU, cut off below at -1024, padding outside the scan included. `spacing` is
    the distance of rows and of columns in mm, `place` where the slice lies along its normal. `series` is the identifier
    of its series and `patient` of its patient; both stay at the site. `lowest` is the lowest value
    (permille 1) of what was scanned.
    """

    hu: FloatArray
    spacing: tuple[float, float]
    place: Place
    protocol: CTProtocol
    series: str
    lowest: float
    patient: str = ""


@dataclass(frozen=True, eq=False)
class CTSeries:
    """The slices of one series, sorted along their normal, as one volume.

    `data` is float32 (rows, columns, slices) in HU, `spacing` mm along the same axes, `affine` (4, 4) from voxel
    indices to mm in RAS, as in NIfTI. `headers` are the slices' headers, in order and without pixels; they name the
    patient and stay at the site. `lossy`: some slice was once compressed with loss. `gaps` says why slices may be
    missing though the steps are even, where headers give a reason; empty otherwise.
    """

    data: FloatArray
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    protocol: CTProtocol
    headers: tuple[FileDataset, ...]
    lossy: bool
    gaps: str

    @property
    def volume(self) -> Volume:
        """The same voxels without headers."""
        return Volume(self.data, self.spacing, self.affine)


@dataclass(frozen=True, eq=False)
class Placed:
    """A slice with its place: corner and axes in DICOM's patient coordinates (LPS), mm."""

    header: FileDataset
    hu: FloatArray
    air: float
    lossy: bool
    corner: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.along_row, self.along_column)

    @property
    def position(self) -> float:
        return float(self.corner @ self.normal)

    @property
    def place(self) -> Place:
        return Place.of(self.position, self.header)


def read_slice(path: Path, *, alone: bool = True) -> CTSlice:
    """Read one CT image, whatever series it belongs to.

    Raises DataError, whose message never names the file, where it is missing, no DICOM, cut short, no single
    greyscale CT image, tilted, or its rescale gives no Hounsfield units. A slice that is read `alone` must show air;
    otherwise that is for `check_air` to say of all slices of a patient.
    """
    placed = _read(path)
    series = text(placed.header, "SeriesInstanceUID") or ""
    if alone:
        check_air({series: [placed.air]}, path)
    patient = text(placed.header, "PatientID") or ""
    return CTSlice(placed.hu, placed.spacing, placed.place, protocol_of(placed.header), series, placed.air, patient)


def read_series(source: Path | Sequence[Path]) -> CTSeries:
    """Read a whole series: a folder that holds nothing else, or its files.

    Raises DataError for what `read_slice` refuses, and for mixed series or geometries, slices that are missing,
    doubled or unevenly spaced.
    """
    paths = series_files(source) if isinstance(source, Path) else list(source)
    if not paths:
        raise DataError("a series has no DICOM file", detail=str(source))
    slices = [_read(path) for path in paths]
    one_series(slices)
    slices.sort(key=lambda placed: placed.position)
    step = step_of(slices)
    check_air({"": [placed.air for placed in slices]}, path_of(slices[0].header))
    check_tissue((placed.hu for placed in slices), path_of(slices[0].header))
    first = slices[0]
    data = np.stack([placed.hu for placed in slices], axis=-1)
    return CTSeries(
        data=data,
        spacing=(*first.spacing, step),
        affine=affine_of(first, step),
        protocol=protocol_of(first.header),
        headers=tuple(placed.header for placed in slices),
        lossy=any(placed.lossy for placed in slices),
        gaps=regular_gaps(placed.place for placed in slices),
    )


def series_files(folder: Path) -> list[Path]:
    """The files of a series' folder, sorted; hidden files and DICOMDIR are left out. Raises DataError."""
    if not folder.is_dir():
        raise DataError("a series' folder does not exist", detail=str(folder))
    try:
        names = [path for path in sorted(folder.iterdir()) if path.is_file()]
    except OSError as error:
        raise DataError(
            f"a series' folder cannot be read ({reason(error)}); let this user read it", detail=str(folder)
        ) from error
    return [path for path in names if not path.name.startswith(".") and path.name.upper() != "DICOMDIR"]


def _read(path: Path) -> Placed:
    dataset = open_dicom(path)
    _check_ct(dataset)
    return placed(dataset, *to_hounsfield(pixels(dataset), dataset))


def placed(dataset: FileDataset, values: FloatArray, air: float = 0.0) -> Placed:
    """A slice with these values (rows, columns), where its header puts it. Raises DataError for a header that does not.

    The header stays in memory for derived images; its pixels need not, and are deleted.
    """
    path = str(path_of(dataset))
    lossy = is_lossy(dataset)
    directions = np.array(required(dataset, "ImageOrientationPatient", 6)).reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        raise DataError("a DICOM image's rows and columns are not perpendicular", detail=path)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    between_rows, between_columns = required(dataset, "PixelSpacing", 2)
    if min(between_rows, between_columns) <= 0:
        raise DataError("a DICOM image's PixelSpacing is not positive", detail=path)
    corner = np.array(required(dataset, "ImagePositionPatient", 3))
    spacing = (between_rows, between_columns)
    return Placed(_without_pixels(dataset), values, air, lossy, corner, directions[0], directions[1], spacing)


def _without_pixels(dataset: FileDataset) -> FileDataset:
    del dataset.PixelData
    # pydicom keeps the decoded array, too.
    dataset._pixel_array = None
    return dataset


def _check_ct(header: Dataset) -> None:
    path = str(path_of(header))
    modality, kind = text(header, "Modality"), text(header, "SOPClassUID")
    if modality is None and "PixelData" not in header:
        raise no_pixels(path_of(header))
    if modality != "CT":
        shown = modality if modality and re.fullmatch("[A-Z]{2,4}", modality) else "missing or unknown"
        raise DataError(f"a DICOM file is not CT (its modality is {shown}); move it out of the folder", detail=path)
    # A public identifier of a class of files, not of a patient.
    if kind == f"{_CT}.1":
        raise DataError("a DICOM file is enhanced multi-frame CT; export it as classic CT", detail=path)
    if is_projection(header):
        raise DataError(
            "a DICOM file holds CT projections, not an image; training takes images, and `wardround reconstruct` a "
            "folder of projections alone",
            detail=path,
        )
    if kind != _CT:
        raise DataError("a DICOM file is of CT but no CT image (raw data or a report); move it away", detail=path)
    if "LOCALIZER" in (text(header, "ImageType") or "").upper().split("/"):
        raise DataError("a CT image is a localizer, not a slice; move it out of the folder", detail=path)
    tilt = numbers(header, "GantryDetectorTilt", 1)
    if tilt is not None and abs(tilt[0]) > _TILT:
        raise DataError(
            f"a CT image was acquired with a gantry tilt of {tilt[0]:g} degrees, which is not supported; "
            "use an untilted series, or resample it to untilted slices first",
            detail=path,
        )


def one_series(slices: Sequence[Placed]) -> None:
    """Raises DataError for slices of several series or patients, or of different size, spacing or orientation."""
    count = len({text(placed.header, "SeriesInstanceUID") for placed in slices})
    if count > 1:
        raise DataError(
            f"{count} series are mixed in one folder; give each series a folder of its own",
            detail=str(path_of(slices[0].header).parent),
        )
    patients = len({text(placed.header, "PatientID") for placed in slices})
    if patients > 1:
        raise DataError(
            f"slices of one series are of {patients} patients; give each patient's series a folder of its own",
            detail=str(path_of(slices[0].header).parent),
        )
    first = slices[0]
    for placed in slices:
        same = (
            placed.hu.shape == first.hu.shape
            and np.allclose(placed.spacing, first.spacing, rtol=1e-4)
            and np.allclose(placed.along_row, first.along_row, atol=1e-3)
            and np.allclose(placed.along_column, first.along_column, atol=1e-3)
        )
        if not same:
            raise DataError(
                "slices of one series differ in size, pixel spacing or orientation; split them into series",
                detail=str(path_of(placed.header)),
            )


def step_of(slices: Sequence[Placed]) -> float:
    """Distance of neighbouring slices in mm. Raises DataError unless they stand at even steps on one normal."""
    folder = str(path_of(slices[0].header).parent)
    if len(slices) == 1:
        return protocol_of(slices[0].header).slice_thickness or 1.0
    positions = np.array([placed.position for placed in slices])
    if fault := unevenness(placed.place for placed in slices):
        raise DataError(f"{fault}; export the series again, or remove what does not belong to it", detail=folder)
    corners, steps = np.stack([placed.corner for placed in slices]), np.diff(positions)
    aside = np.diff(corners, axis=0) - steps[:, None] * slices[0].normal
    if (np.linalg.norm(aside, axis=1) > np.maximum(0.01, 0.01 * steps)).any():
        raise DataError(
            "slices of a series are shifted against each other, as a gantry tilt does, which is not supported; "
            "use an untilted series, or resample it first",
            detail=folder,
        )
    return float(steps.mean())


def affine_of(first: Placed, step: float) -> NDArray[np.float64]:
    """From indices (row, column, slice) to RAS, mm (DICOM PS3.3, equation C.7.6.2.1-1, with x and y turned)."""
    affine = np.eye(4)
    # Going down the rows is going along a column.
    affine[:3, 0] = first.along_column * first.spacing[0]
    affine[:3, 1] = first.along_row * first.spacing[1]
    affine[:3, 2] = first.normal * step
    affine[:3, 3] = first.corner
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
