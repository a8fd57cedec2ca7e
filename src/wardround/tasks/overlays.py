"""Pictures of a segmentation for people: a slice in grey with the outlines of what was drawn and what was marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

ArrayT = TypeVar("ArrayT", bound=np.generic)
Masks = NDArray[np.bool_]
Colour = tuple[int, int, int]
# Sky blue and orange of Okabe and Ito, told apart with any colour vision.
DRAWN: Colour = (86, 180, 233)
MARKED: Colour = (230, 159, 0)
OUTLINES = (("drawn at the site", DRAWN), ("marked by the network", MARKED))
_SIDE, _LINE = 320, 3


def overlay(
    image: NDArray[np.floating], drawn: Masks, marked: Masks | None = None, size: Sequence[float] = (1.0, 1.0)
) -> NDArray[np.uint8]:
    """A slice (H, W) with outlines of `drawn` (K, H, W) and, where there is a network, `marked`: uint8 (h, w, 3).

    `size` is that of a pixel along rows and columns: the picture has square ones, 320 of them along its longer side. A
    line is 3 wide. What is drawn has it inside its edge, what is marked outside, so that equal ones show both.
    """
    shape = square_pixels(image.shape, size, _SIDE)
    # Half of the greys, so that they and both colours fit into a palette.
    picture = np.repeat(_resized(levels(image), shape, Image.Resampling.BICUBIC)[..., None] & 0xFE, 3, axis=2)
    for masks, colour, outside in ((marked, MARKED, True), (drawn, DRAWN, False)):
        for mask in () if masks is None else masks:
            large = _resized(mask.astype(np.uint8), shape, Image.Resampling.NEAREST) > 0
            # What a picture's edge cuts off has no line along the edge.
            other = (
                ndimage.binary_dilation(large, iterations=_LINE)
                if outside
                else ndimage.binary_erosion(large, iterations=_LINE, border_value=1)
            )
            picture[large != other] = colour
    return picture


def slice_overlay(
    image: NDArray[np.floating], drawn: Masks, marked: Masks | None, spacing: Sequence[float]
) -> NDArray[np.uint8]:
    """The same of a picture (`spacing` of two axes), or of an axial slice of a volume, slices first: turned upright."""
    rows, columns = spacing[-2:]
    if len(spacing) == 2:
        return overlay(image, drawn, marked, (rows, columns))
    turned = None if marked is None else upright(marked)
    return overlay(upright(image), upright(drawn), turned, (columns, rows))


def coloured(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """An image (C, H, W) for people: its three channels as colours, else the first in grey: uint8 (H, W, 3)."""
    channels = image if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    return np.ascontiguousarray(np.stack([levels(channel) for channel in channels], axis=-1))


def levels(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """From black to white over all but the last half per cent at both ends."""
    low, high = np.quantile(image, (0.005, 0.995))
    shown = np.clip((image - low) / max(float(high - low), 1e-6) * 255.0, 0.0, 255.0)
    return np.asarray(shown.round(), dtype=np.uint8)


def fullest(masks: Masks) -> int:
    """The slice along the last axis of masks (K, H, W, D) that shows most of the structures; else the middle one."""
    areas = masks.any(axis=0).sum(axis=(0, 1))
    return int(areas.argmax()) if areas.any() else int(len(areas) // 2)


def upright(array: NDArray[ArrayT]) -> NDArray[ArrayT]:
    """The last two axes of an axial slice, (..., right, front), as radiologists look at it: front on top."""
    return np.swapaxes(array, -1, -2)[..., ::-1, ::-1]


def square_pixels(shape: tuple[int, ...], size: Sequence[float], side: int) -> tuple[int, int]:
    """Rows and columns, the more of them `side`, of a picture with square pixels; `size` is that of a pixel now."""
    rows, columns = (count * each for count, each in zip(shape, size, strict=True))
    scale = side / max(rows, columns)
    return max(1, round(rows * scale)), max(1, round(columns * scale))


def _resized(array: NDArray[np.uint8], shape: tuple[int, int], how: Image.Resampling) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(array).resize(shape[::-1], how))
