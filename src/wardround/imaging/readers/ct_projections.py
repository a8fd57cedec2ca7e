"""Raw CT projections in DICOM-CT-PD, the open format of the public low-dose collections.

Chen et al., "Development and validation of an open data format for CT projection data", Med. Phys. 2015, and Moen
et al., "Low-dose CT image and projection dataset", Med. Phys. 2021: one file a view, geometry in private elements.

The format states the focal spot in cylindrical coordinates (rho, phi, z) and not how these lie in the patient. Here x
runs to the patient's left, y to the back and z to the head (DICOM's patient coordinates around the isocentre) and

- the focal spot stands at (rho sin phi, -rho cos phi, z): before the patient at phi = 0, on the left at a quarter turn;
- columns are counted in the direction in which the detector moves as phi grows, (-cos phi, -sin phi, 0);
- rows are counted against z.

So reads PyTomography, which reports that the scan of a patient lying feet first and supine then lies where the
scanner's own images do, and that views contradict each other if columns or rows are turned. No real file has been read
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset

from wardround.errors import DataError
from wardround.imaging.readers.ct_protocol import CTProtocol, protocol_of
from wardround.imaging.readers.dicom import series_files
from wardround.imaging.readers.dicom_file import (
    is_projection,
    number,
    open_dicom,
    path_of,
    pixels,
    raw_numbers,
    raw_text,
    text,
)
from wardround.imaging.readers.volume import FloatArray
from wardround.study.ct import MU_WATER, CTGeometry

_ROWS, _COLUMNS = (0x7029, 0x1010), (0x7029, 0x1011)
_TRANSVERSE, _AXIAL, _SHAPE = (0x7029, 0x1002), (0x7029, 0x1006), (0x7029, 0x100B)
_ANGLE, _HEIGHT, _SOURCE_DISTANCE = (0x7031, 0x1001), (0x7031, 0x1002), (0x7031, 0x1003)
_WHOLE_DISTANCE, _CENTRE = (0x7031, 0x1031), (0x7031, 0x1033)
_SHIFTS, _FOCAL_SPOT = ((0x7033, 0x100B), (0x7033, 0x100C), (0x7033, 0x100D)), (0x7033, 0x100E)
_PER_TURN, _PHOTONS = (0x7033, 0x1013), (0x7033, 0x1065)
_PATH, _BEAM, _MU_WATER = (0x7037, 0x1009), (0x7037, 0x100A), (0x7041, 0x1001)

_KINDS = {"CYLINDRICAL": "fan_arc", "FLAT": "fan_flat"}
_POSITIONS = frozenset(f"{first}{side}" for first in ("HF", "FF") for side in ("S", "P", "DL", "DR"))
_STILL = 0.01  # mm by which the table may seem to move in an axial scan
# Line integrals: noise falls a little below zero, and e^-30 of a beam is no photon.
_LEAST, _MOST = -2.0, 30.0


@dataclass(frozen=True, eq=False)
class CTProjections:
    """One turn of an axial scan.

    `sinogram` is float32 (views, rows, bins): line integrals of attenuation, without unit. `photons` is float32
    (views, bins), the photons that would reach each bin through air, or None. `mu_water` is in 1/mm. `central_row`
    is where, from 0, the plane of the source cuts the detector, `row_pitch` the distance of its rows in mm, measured at
    the detector, and `height` where the source's plane lies along the axis of rotation in mm, as the file counts it.
    `position` is how the patient lies (PatientPosition, as HFS), None where that is not said.
    """

    sinogram: FloatArray
    geometry: CTGeometry
    photons: FloatArray | None
    mu_water: float
    protocol: CTProtocol
    central_row: float
    row_pitch: float
    height: float
    position: str | None

    @property
    def slice_spacing(self) -> float:
        """Distance in mm of the slices that neighbouring rows measure: that of the rows as seen at the isocentre."""
        source, beyond = self.geometry.source_distance or math.inf, self.geometry.detector_distance or 0.0
        return self.row_pitch / (1 + beyond / source)

    def row_height(self, row: int) -> float:
        """Where the slice of a detector row lies at the isocentre, along the axis of rotation, in mm."""
        return self.height - (row - self.central_row) * self.slice_spacing

    def row_geometry(self, row: int) -> CTGeometry:
        """The two-dimensional geometry of a detector row.

        Raises DataError where, at the edge of the field of view, its rays leave the slice by more than the slice is
        thick: those rows measure a cone, which no two-dimensional reconstruction serves.
        """
        radius = min(self.geometry.size) * self.geometry.pixel / 2
        near = (self.geometry.source_distance or math.inf) / radius
        if not 0 <= row < self.sinogram.shape[1]:
            raise DataError(f"there is no detector row {row}; the projections have {self.sinogram.shape[1]}")
        if abs(row - self.central_row) > near:
            raise DataError(
                f"detector row {row} lies {abs(row - self.central_row):.1f} rows off the plane of the source: cone "
                f"beams are not supported yet; use rows within {near:.1f} of {self.central_row:g}"
            )
        return self.geometry


@dataclass(frozen=True)
class _Scanner:
    """What all views of a scan must share."""

    rows: int
    columns: int
    bin: float
    row: float
    kind: str
    source: float
    whole: float
    centre: tuple[float, float]
    per_turn: int
    mu_water: float


@dataclass(frozen=True, eq=False)
class _View:
    scanner: _Scanner
    angle: float
    height: float
    data: FloatArray
    photons: tuple[float, ...] | None
    header: FileDataset


def read_projections(folder: Path, *, size: tuple[int, int] = (512, 512)) -> CTProjections:
    """Read one turn of projections, a folder of DICOM-CT-PD files, one a view.

    The geometry's image has `size` pixels over the circle that the detector sees. Angles become those of `CTGeometry`
    for an image shown as DICOM shows it (see the top of this module): view angle = pi - the file's angle, bins as
    stored. Coordinates are taken for the patient's however the patient lies.
    Raises DataError, which names no file, where the folder holds anything else, the geometry changes, views are
    missing or doubled, values are impossible, or the scan is helical, more or less than a turn, or has a flying
    focal spot.
    """
    paths = series_files(folder)
    if not paths:
        raise DataError("a folder of projections has no DICOM file", detail=str(folder))
    views = [_view(path) for path in paths]
    scanner = views[0].scanner
    if any(view.scanner != scanner for view in views):
        raise DataError("the views of a scan differ in geometry; put each scan into its own folder", detail=str(folder))
    heights = [view.height for view in views]
    if max(heights) - min(heights) > _STILL:
        raise _unsupported(
            f"the table moves by {max(heights) - min(heights):.1f} mm between the views (a helical scan)", folder
        )
    angles = (np.pi - np.array([view.angle for view in views])) % (2 * np.pi)
    _check_turn(angles, scanner.per_turn, folder)
    order = np.argsort(angles)
    photons = _photons([views[index] for index in order], scanner)
    return CTProjections(
        sinogram=np.stack([views[index].data for index in order]),
        geometry=_geometry(scanner, float(angles[order[0]]), len(views), size),
        photons=photons,
        mu_water=scanner.mu_water,
        protocol=protocol_of(views[0].header),
        central_row=scanner.centre[1] - 1,
        row_pitch=scanner.row,
        height=float(np.mean(heights)),
        position=_position(views[0].header),
    )


def _view(path: Path) -> _View:
    dataset = open_dicom(path)
    if not is_projection(dataset):
        raise DataError(
            "a DICOM file holds no CT projections (DICOM-CT-PD); move it out of the folder", detail=str(path)
        )
    _check_supported(dataset, path)
    scanner = _scanner(dataset)
    stored = pixels(dataset)
    # The format stores bins down and rows across; some writers turn it.
    if stored.shape == (scanner.columns, scanner.rows):
        stored = stored.T
    elif stored.shape != (scanner.rows, scanner.columns):
        raise DataError(
            f"a view has {stored.shape[0]} x {stored.shape[1]} values, its detector {scanner.rows} rows of "
            f"{scanner.columns} bins",
            detail=str(path),
        )
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    if slope is None or intercept is None or slope <= 0:
        raise DataError("wrong rescale: a view lacks RescaleSlope or RescaleIntercept", detail=str(path))
    data = np.ascontiguousarray(stored.astype(np.float64) * slope + intercept, dtype=np.float32)
    if not (data.min() >= _LEAST and data.max() <= _MOST):
        raise DataError(
            f"a view's line integrals run from {data.min():g} to {data.max():g}: its counts were not positive, or its "
            "rescale is wrong; convert the scan again",
            detail=str(path),
        )
    photons = raw_numbers(dataset, _PHOTONS, "f")
    if photons is not None and min(photons) <= 0:
        raise DataError("a view's photon statistics are not positive; the scan is not calibrated", detail=str(path))
    del dataset.PixelData
    return _View(scanner, _one(dataset, _ANGLE), _one(dataset, _HEIGHT), data, photons, dataset)


def _check_supported(header: FileDataset, path: Path) -> None:
    if raw_text(header, _PATH) == "HELICAL":
        raise _unsupported("a helical scan", path)
    if (raw_text(header, _BEAM) or "FANBEAM") != "FANBEAM":
        raise _unsupported("a geometry other than that of fan beams", path)
    moved = any(abs(shift) > 1e-6 for tag in _SHIFTS for shift in raw_numbers(header, tag, "f") or ())
    if moved or (raw_text(header, _FOCAL_SPOT) or "FFSNONE") not in ("FFSNONE", "NONE"):
        raise _unsupported("a flying focal spot", path)
    if raw_text(header, _SHAPE) not in _KINDS:
        raise _unsupported("a detector neither cylindrical nor flat", path)


def _scanner(header: FileDataset) -> _Scanner:
    centre = raw_numbers(header, _CENTRE, "f")
    if centre is None or len(centre) != 2:
        raise DataError("a view does not say which detector element is central", detail=str(path_of(header)))
    water = raw_numbers(header, _MU_WATER, "f")
    found = _Scanner(
        rows=int(_one(header, _ROWS, "H")),
        columns=int(_one(header, _COLUMNS, "H")),
        bin=_one(header, _TRANSVERSE),
        row=_one(header, _AXIAL),
        kind=_KINDS[raw_text(header, _SHAPE) or ""],
        source=_one(header, _SOURCE_DISTANCE),
        whole=_one(header, _WHOLE_DISTANCE),
        centre=(centre[0], centre[1]),
        per_turn=int(_one(header, _PER_TURN, "H")),
        mu_water=MU_WATER if water is None else water[0],
    )
    possible = (
        min(found.rows, found.columns, found.per_turn) >= 1
        and min(found.bin, found.row, found.source, found.mu_water) > 0
        and found.whole > found.source
    )
    if not possible:
        raise DataError(
            "a view describes no possible scanner: counts, spacings, distances and water's attenuation must be "
            "positive and the detector beyond the isocentre",
            detail=str(path_of(header)),
        )
    return found


def _check_turn(angles: NDArray[np.float64], per_turn: int, folder: Path) -> None:
    """Raise DataError unless angles (radians, any order) are one even turn."""
    count = len(angles)
    if count > per_turn:
        raise _unsupported(f"a scan of {count / per_turn:.2f} turns (one turn has {per_turn} views)", folder)
    ordered = np.sort(angles)
    steps = np.diff(ordered, append=ordered[0] + 2 * np.pi) * per_turn / (2 * np.pi)
    if (steps < 0.5).any() and count > 1:
        raise DataError(f"{(steps < 0.5).sum()} views of a scan stand where another does", detail=str(folder))
    if count < per_turn:
        raise DataError(
            f"{per_turn - count} of {per_turn} views of a turn are missing; a part of a turn is not supported yet",
            detail=str(folder),
        )
    if (np.abs(steps - 1) > 0.1).any():
        raise _unsupported("views at uneven angles", folder)


def _geometry(scanner: _Scanner, start: float, views: int, size: tuple[int, int]) -> CTGeometry:
    offset = scanner.centre[0] - (scanner.columns + 1) / 2
    reach = (scanner.columns / 2 - abs(offset)) * scanner.bin / scanner.whole
    fan = min(reach, math.pi / 2) if scanner.kind == "fan_arc" else math.atan(reach)
    radius = scanner.source * math.sin(fan)
    if radius <= 0:
        raise DataError("a scan's central ray misses its detector; its central element is wrong")
    return CTGeometry(
        kind="fan_arc" if scanner.kind == "fan_arc" else "fan_flat",
        size=size,
        # A trace less than the circle, so that rounding does not put its rim beyond the detector.
        pixel=2 * radius * (1 - 1e-6) / min(size),
        views=views,
        start=math.degrees(start),
        bins=scanner.columns,
        bin=scanner.bin,
        offset=offset,
        source_distance=scanner.source,
        detector_distance=scanner.whole - scanner.source,
    )


def _photons(views: Sequence[_View], scanner: _Scanner) -> FloatArray | None:
    stated = [view.photons for view in views]
    if all(photons is None for photons in stated):
        return None
    found = np.zeros((len(views), scanner.columns), dtype=np.float32)
    for index, photons in enumerate(stated):
        if photons is None or len(photons) not in (1, scanner.columns):
            raise DataError("photon statistics are missing from some views, or are not one value a bin")
        found[index] = photons
    return found


def _position(header: FileDataset) -> str | None:
    """One of the terms of DICOM (PS3.3, C.7.3.1.1.2); what else somebody wrote there counts for nothing."""
    said = (text(header, "PatientPosition") or "").upper()
    return said if said in _POSITIONS else None


def _one(header: FileDataset, tag: tuple[int, int], kind: str = "f") -> float:
    values = raw_numbers(header, tag, kind)
    if values is None or len(values) != 1:
        raise DataError(
            f"a view lacks the element ({tag[0]:04X},{tag[1]:04X}) of DICOM-CT-PD; convert the scan again",
            detail=str(path_of(header)),
        )
    return values[0]


def _unsupported(what: str, path: Path) -> DataError:
    return DataError(
        f"{what} is not supported yet: only single turns of axial scans can be reconstructed in two dimensions",
        detail=str(path),
    )
