"""Sampling masks of Cartesian k-space: which lines, or which points, are measured.

Masks are float32 (H, W), 1 where measured. One-dimensional families are constant along H and choose lines
of the phase-encode axis W. The centre of an axis of length n is index n // 2, as in `fft2c`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wardround.errors import GeometryError
from wardround.study import Mask

FloatArray = NDArray[np.float32]


def sampling_mask(mask: Mask, shape: tuple[int, int], random: np.random.Generator) -> FloatArray:
    """Draw the mask that the study describes, (H, W).

    Raises GeometryError where the calibration region alone exceeds the share that is measured.
    """
    height, width = shape
    if mask.family == "poisson":
        block = (centred_count(mask.calibration, height), centred_count(mask.calibration, width))
        return poisson_disc(shape, round(height * width / mask.acceleration), block, random)
    calibration = centred_count(mask.calibration, width)
    measured = max(round(width / mask.acceleration), calibration)
    draw = random_lines if mask.family == "random" else equispaced_lines
    return np.repeat(draw(width, measured, calibration, random)[None], height, axis=0)


def centred_count(fraction: float, size: int) -> int:
    """Number of calibration lines that a fraction of an axis stands for; at least one."""
    return max(1, round(fraction * size))


def centred(count: int, size: int) -> slice:
    """The `count` central indices of an axis."""
    start = size // 2 - count // 2
    return slice(start, start + count)


def random_lines(size: int, measured: int, calibration: int, random: np.random.Generator) -> FloatArray:
    """Measure the centre and uniformly drawn lines, `measured` in total, as in fastMRI (arXiv:1811.08839)."""
    line = _calibrated_line(size, measured, calibration)
    line[random.choice(np.flatnonzero(line == 0), measured - calibration, replace=False)] = 1
    return line


def equispaced_lines(size: int, measured: int, calibration: int, random: np.random.Generator) -> FloatArray:
    """Measure the centre and evenly spaced lines with a random offset, `measured` in total where possible.

    The spacing need not be a whole number: lines fall on the nearest grid position, and lines inside the
    centre coincide with it. Of all spacings the one whose total is nearest to `measured` is taken.
    """
    centre = _calibrated_line(size, measured, calibration)
    phase = random.random()
    best, miss = centre, measured - calibration
    for lines in range(1, size + 1):
        if miss == 0:
            break
        line = centre.copy()
        line[((np.arange(lines) + phase) * size / lines).astype(np.intp) % size] = 1
        if abs(line.sum() - measured) < miss:
            best, miss = line, abs(int(line.sum()) - measured)
    return best


def poisson_disc(
    shape: tuple[int, int],
    measured: int,
    calibration: tuple[int, int],
    random: np.random.Generator,
    *,
    density_slope: float = 2.0,
) -> FloatArray:
    """Measure a central block and points that keep a distance from each other, `measured` in total.

    The distance grows from r at the centre to (1 + density_slope) r at the edge of the inscribed ellipse;
    density_slope = 0 gives uniform density. Darts are thrown at all points in random order, then again with
    a smaller r, until the total is reached exactly (relaxation dart throwing: McCool and Fiume,
    Graphics Interface 1992).
    """
    height, width = shape
    mask = np.zeros(shape, np.float32)
    block = (centred(calibration[0], height), centred(calibration[1], width))
    mask[block] = 1
    left = measured - int(mask.sum())
    if left < 0:
        raise GeometryError(
            f"a calibration block of {calibration[0]} x {calibration[1]} points exceeds the {measured} "
            "points that are measured; lower `calibration` or `acceleration`"
        )
    y, x = np.mgrid[:height, :width].astype(np.float32)
    eccentricity = np.hypot((y - height // 2) / (height / 2), (x - width // 2) / (width / 2))
    scale = 1 + density_slope * eccentricity
    # `nearest`: squared distance to the nearest measured point, in units of the point's own radius factor.
    nearest = np.where(mask > 0, np.float32(0), np.float32(np.inf))
    radius = 1.5 * float(np.sqrt(height * width / measured))
    reach = int(np.ceil(radius * float(scale.max())))
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    stamp = offsets[:, None] ** 2 + offsets[None] ** 2
    inverse = 1 / scale.astype(np.float32) ** 2
    while left > 0:
        candidates = np.flatnonzero(nearest >= radius**2)
        for point in random.permutation(candidates).tolist():
            row, column = divmod(point, width)
            if nearest[row, column] < radius**2:
                continue
            mask[row, column] = 1
            top, start = max(0, row - reach), max(0, column - reach)
            window = (slice(top, row + reach + 1), slice(start, column + reach + 1))
            part = nearest[window]
            corner = (top - row + reach, start - column + reach)
            patch = stamp[corner[0] : corner[0] + part.shape[0], corner[1] : corner[1] + part.shape[1]]
            np.minimum(part, patch * inverse[window], out=part)
            left -= 1
            if left == 0:
                break
        radius *= 0.85
        # A smaller radius needs smaller stamps; what they leave out is farther than any radius still to come.
        smaller = int(np.ceil(radius * float(scale.max())))
        stamp = stamp[reach - smaller : reach + smaller + 1, reach - smaller : reach + smaller + 1]
        reach = smaller
    return mask


def _calibrated_line(size: int, measured: int, calibration: int) -> FloatArray:
    if not calibration <= measured <= size:
        raise GeometryError(
            f"{calibration} calibration lines and {measured} measured lines do not fit an axis of {size}; "
            "lower `calibration` or `acceleration`"
        )
    line = np.zeros(size, np.float32)
    line[centred(calibration, size)] = 1
    return line
