"""Where the samples of a radial or spiral scan lie: the points of a file, in whatever unit, as cycles per pixel.

No format fixes the unit. Two are taken, and how far the points reach says which: cycles per pixel, to 0.5 (gpuNUFFT,
Gadgetron), and cycles per field of view, to half as many as the image has pixels (BART, sigpy, MRpro). Anything else is
refused: an image that is reconstructed in a wrong unit looks like one of another size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import DataError
from wardround.imaging.readers.raw.slices import ComplexArray, RawSlices, ScanFacts, raw_error
from wardround.imaging.readers.volume import FloatArray

Array = npt.NDArray[Any]
#: What the name of a file of points ends with, beside that of its samples: scan.npy and scan_traj.npy.
BESIDE = "_traj"
_EDGE = 0.5001  # half a cycle per pixel, in 32 bits
# Points in cycles per field of view reach as far at least: a smaller image is none.
_LEAST = 8.0
_MOST_SIZE = 2048
# Neighbours on a readout lie a cycle per field of view apart at most, else the image folds; a little for rounding.
_FOLDS = 1.05
_LOOSE = 1.5  # the same where a header says the field of view, which some round
_FLAT = 1e-3  # of the reach: what an axis may vary by that is none
_STRAIGHT = 0.02  # of the reach: what a line may miss the centre by
_SAME = 5e-3
_DISC = 1.1
_UNITS = (
    "give cycles per pixel (to 0.5), or cycles per field of view (to half as many as the image has pixels): 1/m times "
    "the field of view in m, radians per pixel over 2 pi"
)


@dataclass(frozen=True)
class Grid:
    """The pixels (H, W) of the image that a trajectory is for, and what its points are times to be cycles per pixel."""

    matrix: tuple[int, int]
    factor: float

    def placed(self, points: Array, path: Path) -> FloatArray:
        """Points (readouts, samples, 2) in cycles per pixel, float32. Raises DataError where they lie farther out."""
        found = np.asarray(points * self.factor, np.float32)
        if not np.isfinite(found).all() or np.abs(found).max() > _EDGE:
            raise raw_error("the trajectory of a slice reaches farther than that of the first one, or holds NaN", path)
        return found


def points_file(path: Path) -> Path:
    """The file with the points of samples in `path`, for formats of one array a file."""
    return path.with_name(f"{path.stem}{BESIDE}{path.suffix}")


def grid_of(points: Array, path: Path) -> Grid:
    """The grid of points (..., samples, 2) of a file that says nothing of its image.

    In cycles per field of view they reach to half as many as the image has pixels. In cycles per pixel the field of
    view is the largest that does not fold: one over the step along a readout, which so has as many pixels as a line has
    samples. Raises DataError for another unit.
    """
    reach, step = _extent(points, path)
    if reach <= _EDGE:
        return Grid(_square(1.0 / max(step, 1e-9), path), 1.0)
    if reach < _LEAST:
        raise raw_error(
            f"the trajectory of a raw data file reaches {reach:.3g}, which is in no unit that is taken; {_UNITS}", path
        )
    if step > _FOLDS:
        raise raw_error(
            f"the trajectory of a raw data file reaches {reach:.4g}, and samples on a readout lie {step:.3g} apart; in "
            f"cycles per field of view that is 1 at most; {_UNITS}",
            path,
        )
    matrix = _square(2 * _radius(points, reach), path)
    return Grid(matrix, 1.0 / matrix[0])


def grid_of_header(points: Array, encoded: int, matrix: tuple[int, int], pixel: float | None, path: Path) -> Grid:
    """The grid of points (..., samples, 2) of a scan whose header says it.

    encoded: pixels of the encoded field of view along the readout. matrix: those of the image, of the same size.
    pixel: that size in mm, where it is known. Raises DataError where the points are in neither unit.
    """
    reach, step = _extent(points, path)
    radius = _radius(points, reach)
    if pixel is not None and abs(pixel - 1.0) > 2 * _SAME and abs(radius * pixel / 0.5 - 1.0) < _SAME:
        raise raw_error(
            f"the trajectory of a raw data file reaches {radius:.4g}, which is half a cycle over the voxel of "
            f"{pixel:.3g} mm: cycles per mm; {_UNITS}",
            path,
        )
    if reach <= _EDGE:
        factor = 1.0
    elif max(_LEAST, encoded / 8) <= reach <= 2 * _EDGE * encoded / 2:
        factor = 1.0 / encoded
    else:
        raise raw_error(
            f"the trajectory of a raw data file reaches {reach:.4g}, and its header says an encoded field of view of "
            f"{encoded} pixels; {_UNITS}",
            path,
        )
    if step * factor * max(matrix) > _LOOSE:
        raise raw_error(
            f"samples on a readout of a raw data file lie {step * factor * max(matrix):.3g} cycles per field of view "
            f"apart, by the header's {matrix[0]} x {matrix[1]} pixels: its trajectory is in another unit, or another "
            f"scan's; {_UNITS}",
            path,
        )
    return Grid(matrix, factor)


def flat(points: Array, path: Path, *, weights: bool = False) -> Array:
    """The first two axes of points (..., axes), of a scan in one plane. Raises DataError for one in three dimensions.

    A third axis that is the same everywhere says nothing. With `weights` it may hold weights of samples, as
    Gadgetron has them in ISMRMRD; they are not used, for the points say them.
    """
    plane = points[..., :2]
    if points.shape[-1] > 2:
        third = points[..., 2]
        varies = float(np.ptp(third)) > _FLAT * max(float(np.abs(plane).max()), 1e-9)
        if varies and not (weights and third.min() >= 0):
            raise not_flat(path)
    return plane


def not_flat(path: Path) -> DataError:
    """What is said of a scan in three dimensions."""
    return raw_error(
        "raw data were measured along a trajectory in three dimensions, and two are reconstructed here; transform the "
        "third axis of a stack of stars or spirals first, and store its slices",
        path,
    )


def scan_along(array: Array, points: Array, kind: str, path: Path, *beside: Path) -> RawSlices:
    """The scan of samples (slices, coils, readouts, samples) at points (slices or 1, readouts, samples, 2).

    Of a file without a header, in the format `kind`; `beside` are its further files. Raises DataError where the two do
    not fit, and for a unit that is not taken (`grid_of`).
    """
    slices, coils, readouts, samples = array.shape
    if points.shape[1:3] != (readouts, samples) or points.shape[0] not in (1, slices):
        raise raw_error(
            f"a trajectory has {points.shape[1]} readouts of {points.shape[2]} samples in {points.shape[0]} slices, "
            f"and its k-space {readouts} readouts of {samples} samples in {slices}; one is of another scan, or its "
            "axes are in another order",
            path,
        )
    grid = grid_of(points, path)

    def stored(number: int) -> ComplexArray:
        return np.ascontiguousarray(array[number], np.complex64)

    return RawSlices(
        f"{kind}, {course_of(points[0])}",
        (slices, coils, readouts, samples),
        stored,
        ScanFacts(matrix=grid.matrix),
        trajectory=lambda number: grid.placed(points[number if len(points) > 1 else 0], path),
        files=(path, *beside),
    )


def course_of(points: Array) -> str:
    """How readouts (readouts, samples, 2) run: `radial`, lines through the centre, `spiral`, from it, or `other`."""
    reach = max(float(np.abs(points).max()), 1e-9)
    along = points[:, -1] - points[:, 0]
    along = along / np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
    off = np.abs(points[..., 0] * along[:, None, 1] - points[..., 1] * along[:, None, 0])
    if off.max() < _STRAIGHT * reach:
        return "radial"
    ends = np.linalg.norm(points[:, [0, -1]], axis=-1).min(axis=1)
    return "spiral" if ends.max() < _STRAIGHT * reach else "other"


def _extent(points: Array, path: Path) -> tuple[float, float]:
    """How far points reach along an axis, and the largest step between neighbours on a readout."""
    if not np.isfinite(points).all():
        raise raw_error("the trajectory of a raw data file holds NaN or infinite values", path)
    if points.shape[-2] < 2:
        raise raw_error("a readout of a scan along a trajectory has at least two samples", path)
    reach = float(np.abs(points).max())
    if reach == 0.0:
        raise raw_error("the trajectory of a raw data file holds nothing but zeros", path)
    return reach, float(np.linalg.norm(np.diff(points, axis=-2), axis=-1).max())


def _radius(points: Array, reach: float) -> float:
    """How far points of a disc reach, whichever way their outermost lie; of another region, along an axis."""
    radius = float(np.hypot(points[..., 0], points[..., 1]).max())
    return radius if radius < _DISC * reach else reach


def _square(pixels: float, path: Path) -> tuple[int, int]:
    """As many pixels, rounded up to an even number; what a file's rounding adds is no pixel."""
    size = 2 * int(np.ceil(pixels / 2 - 0.01))
    if not 2 * _LEAST <= size <= _MOST_SIZE:
        raise raw_error(
            f"the trajectory of a raw data file is that of an image of {size} x {size} pixels, which is none; {_UNITS}",
            path,
        )
    return size, size
