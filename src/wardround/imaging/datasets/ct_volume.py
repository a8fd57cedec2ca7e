"""A CT volume on the grid that its scan is simulated on, and back: its body in the middle, all slices in line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wardround.imaging.datasets.ct import BodyOutline, Grid, Slice, on_grid
from wardround.imaging.readers.hounsfield import AIR
from wardround.imaging.readers.volume import FloatArray

Middle = tuple[float, float]


def body_of(slices: Sequence[Slice]) -> tuple[Middle, float]:
    """The middle of the body over all slices, in pixels, and its reach from there in mm; 0 where there is none."""
    found = np.any([BodyOutline.of(image).mask for image in slices], axis=0)
    y, x = np.nonzero(found)
    if not len(y):
        return ((found.shape[0] - 1) / 2, (found.shape[1] - 1) / 2), 0.0
    middle = (float(y.min() + y.max()) / 2, float(x.min() + x.max()) / 2)
    rows, columns = slices[0].spacing
    return middle, float(np.hypot((y - middle[0]) * rows, (x - middle[1]) * columns).max())


def scannable(image: Slice, middle: Middle, grid: Grid) -> FloatArray:
    """A slice in HU around `middle` on a grid (rows, columns); what the scanner does not see is air."""
    placed = on_grid(image.hu, image.spacing, middle, grid, AIR)
    return np.asarray(np.where(grid.inside(), placed, np.float32(AIR)), np.float32)


def nearest_on_grid(
    labels: NDArray[np.generic], spacing: tuple[float, float], middle: Middle, grid: Grid
) -> NDArray[np.generic]:
    """Whole numbers (h, w, ...) on a grid, the nearest of each pixel; 0 where there are none."""
    found = labels
    for axis, (count, have, step, centre) in enumerate(zip(grid.size, labels.shape, spacing, middle, strict=False)):
        at = np.rint(centre + (np.arange(count) - (count - 1) / 2) * grid.pixel / step).astype(np.intp)
        taken = np.take(found, np.clip(at, 0, have - 1), axis=axis)
        outside = (at < 0) | (at >= have)
        taken[(slice(None),) * axis + (outside,)] = 0
        found = taken
    return found


def brought_back(image: FloatArray, pixel: float, like: Slice, middle: Middle, outside: float = AIR) -> FloatArray:
    """An image (H, W) around the isocentre, interpolated to the grid of the slice that was scanned."""
    scale = np.array(like.spacing) / pixel
    offset = (np.array(image.shape) - 1) / 2 - scale * np.array(middle)
    found = ndimage.affine_transform(image, scale, offset, like.hu.shape, order=1, cval=outside)
    return np.asarray(found, np.float32)
