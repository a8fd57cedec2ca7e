"""CT values in Hounsfield units, refusing a rescale that cannot be right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from wardround.errors import DataError
from wardround.imaging.readers.dicom_file import number, path_of, text
from wardround.imaging.readers.volume import FloatArray

# Where CT values end below; scanners cut off here.
AIR = -1024.0
_LOWEST = -1100.0
_HIGHEST = 32767.0
_NOISE = 0.01  # share of pixels that may lie below the lowest value for no reason known here
_NOISY_AIR, _NOISY = -1200.0, 0.35  # how low half of those is at most where noise is the reason; their share of air
_RIM = 0.05  # the same of a volume, where resampling blurs the edge of padding
_TISSUE, _AIR_ALONE = -500.0, -900.0
_THIN = -700.0  # the thinnest thing in any slice of a patient is air, outside or inside


def to_hounsfield(stored: NDArray[np.generic], header: Dataset) -> tuple[FloatArray, float]:
    """Return an image in HU, float32 (rows, columns), cut off at -1024, and its lowest value (permille 1).

    Padding outside the circle of reconstruction becomes -1024, whether the header declares it (GE: -2000, also
    written 63536) or not. Raises DataError ("wrong rescale") where the slope or intercept is missing or the values
    lie outside [-1100, 32767]. Whether there is air is for `check_air` to say.
    """
    path = path_of(header)
    slope, intercept = number(header, "RescaleSlope"), number(header, "RescaleIntercept")
    if slope is None or intercept is None:
        raise DataError(
            "wrong rescale: a CT header has no RescaleSlope or RescaleIntercept, so its values are no HU; "
            "export it again",
            detail=str(path),
        )
    if slope <= 0:
        raise _wrong(f"its slope is {slope:g}", path)
    if (text(header, "RescaleType") or "HU").upper() != "HU":
        raise _wrong("its values are said to be something else than HU", path)
    hu = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    padding = _padding(stored, hu, header)
    scanned = hu[~padding]
    if not scanned.size:
        raise _wrong("every pixel is padding", path)
    below = _too_low(scanned)
    if below > _NOISE:
        raise _wrong(f"{below:.0%} of its pixels lie below {_LOWEST:g}", path)
    if scanned.max() > _HIGHEST:
        raise _wrong(f"its values reach {scanned.max():g}", path)
    return np.maximum(hu, np.float32(AIR)), float(np.percentile(scanned, 0.1))


def check_hounsfield(data: NDArray[np.uint8] | FloatArray, path: Path) -> None:
    """Raise DataError ("wrong rescale") where the values of a volume, of any axes, are no HU.

    Constant values in the corners of the volume are padding, however low they are.
    """
    low, most, high = (float(value) for value in (*np.percentile(data, [0.1, 99]), data.max()))
    if low > _THIN or high > _HIGHEST:
        raise _wrong_volume(f"its values reach from {low:g} to {high:g} where air is -1000", path)
    if data.min() < _LOWEST:
        corners = data[np.ix_(*([0, -1] for _ in data.shape))]
        scanned = data[~np.isin(data, corners[corners < _LOWEST])]
        below = _too_low(scanned) if scanned.size else 1.0
        if below > _RIM:
            raise _wrong_volume(f"{below:.0%} of its voxels lie below {_LOWEST:g}, where nothing is", path)
        low, most = (float(value) for value in np.percentile(scanned, [0.1, 99]))
    # Padding is no air; where nothing else is thin, fat and the noise of water still are.
    if low >= 0:
        raise _wrong_volume(f"its values reach from {low:g} to {high:g} where air is -1000", path)
    # Air alone is a scan of nobody, not of another unit.
    if most < _TISSUE and (high > _AIR_ALONE or data.min() < _LOWEST):
        raise _wrong_volume(f"there is no tissue in it, 99% of its voxels lie below {most:g}", path)


def without_air(series: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """What is wrong with the series of one patient, by the lowest values of their slices; empty where nothing is.

    Somewhere in a patient's slices there is air, but a slice or a series may be of soft tissue alone, as of a spine:
    fat and the noise of water reach below 0.
    """
    least = {name: min(lowest) for name, lowest in series.items()}
    if min(least.values()) > _THIN:
        unless = ", or it is of soft tissue alone, which cannot be told without other slices of the patient"
        return {
            name: f"it shows no air near -1000, its lowest value is {low:g}{unless if low < 0 else ''}"
            for name, low in least.items()
        }
    # In a series of a patient with air, even a slice of soft tissue has fat and the noise of water.
    return {
        name: f"the lowest value of one of its slices is {max(lowest):g}"
        for name, lowest in series.items()
        if max(lowest) >= 0
    }


def check_air(series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Raise DataError ("wrong rescale") where `without_air` finds something wrong."""
    for what in without_air(series).values():
        raise _wrong(what, path)


def check_tissue(slices: Iterable[FloatArray], path: Path) -> None:
    """Raise DataError ("wrong rescale") where the slices of a patient, in HU, show something, and no tissue."""
    most = -math.inf
    for image in slices:
        most = max(most, float(np.percentile(image, 99)))
        if most >= _TISSUE:
            return
    if most > _AIR_ALONE:
        raise _wrong(f"there is no tissue in it, 99% of every slice lie below {most:g}", path)


def _too_low(scanned: FloatArray | NDArray[np.uint8]) -> float:
    """The share of values below any that CT has; 0 where they are air with the noise of a sharp kernel.

    Noise spreads evenly about -1000: few of the values of air are that low, and half of those not by far.
    """
    below = scanned[scanned < _LOWEST]
    if not below.size:
        return 0.0
    noisy = float(np.median(below)) > _NOISY_AIR and below.size < _NOISY * (scanned < _THIN).sum()
    return 0.0 if noisy else below.size / scanned.size


def _padding(stored: NDArray[np.generic], hu: FloatArray, header: Dataset) -> NDArray[np.bool_]:
    """Pixels that hold no measurement: (rows, columns)."""
    # Padding in the range of real values does no harm, and vendors declare real values as padding.
    impossible = hu < _LOWEST
    value, limit = number(header, "PixelPaddingValue"), number(header, "PixelPaddingRangeLimit")
    declared = np.zeros(hu.shape, dtype=np.bool_)
    if value is not None:
        ends = [_as_stored(end, stored.dtype) for end in (value, value if limit is None else limit)]
        values = stored.astype(np.float64)
        declared = impossible & (values >= min(ends)) & (values <= max(ends))
    rest = impossible & ~declared
    if not rest.any():
        return declared
    constant = rest & (hu == hu[rest].min())
    # What else is too low is noise, or an intercept applied twice: that is judged next.
    if _outside(constant) and float(np.percentile(hu[~constant], 99)) > -300:
        return np.asarray(declared | constant, dtype=np.bool_)
    return declared


def _outside(padding: NDArray[np.bool_]) -> bool:
    """Whether pixels lie as padding does: in a corner, and not much beyond what a circle leaves of a square (21 %).

    Air around a patient whose intercept was subtracted twice may be constant, too, but there is more of it.
    """
    corners = padding[[0, 0, -1, -1], [0, -1, 0, -1]]
    return bool(corners.any()) and float(padding.mean()) < 0.35


def _as_stored(value: float, kind: np.dtype[np.generic]) -> int:
    """A padding value as the pixels store it: -2000 may stand as 63536 for signed pixels, or the other way round."""
    if kind.kind not in "iu":
        return int(value)
    bits = 8 * int(kind.itemsize)
    wrapped = int(value) % (1 << bits)
    return wrapped - (1 << bits) if kind.kind == "i" and wrapped >= 1 << (bits - 1) else wrapped


def _wrong(what: str, path: Path) -> DataError:
    return DataError(wrong_rescale(what), detail=str(path))


def wrong_rescale(what: str) -> str:
    """The sentence of a CT image that is not in HU."""
    return f"wrong rescale: a CT image is not in HU, {what}; export it again"


def _wrong_volume(what: str, path: Path) -> DataError:
    return DataError(
        f"wrong rescale: a CT volume is not in HU, {what}; convert it again, with its intercept applied once",
        detail=str(path),
    )
