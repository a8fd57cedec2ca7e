"""A picture of what a model outlined: one slice in grey, the edges of the structures in colour, their names below."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from wardround.imaging.readers.labelled import LabelledImage
from wardround.tasks.contrasts import first_shown
from wardround.tasks.overlays import fullest, levels, square_pixels, upright
from wardround.wire.files import written

# Okabe and Ito's colours, which most people tell apart.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_SIDE = 512  # pixels of the longer side, at least
_LINE = 16  # of a name


def write_overlay(image: LabelledImage, marked: NDArray[np.bool_], names: Sequence[str], path: Path) -> None:
    """Write a PNG of the first channel, or of a picture's colours, with the edges of `marked` (K, *shape).

    Of a volume it is the slice across the body with most marked voxels, the middle one where none is; the patient's
    right is on the left, the front above. Whole or not at all; raises `OSError`.
    """
    shown, masks, size = _slice(image, marked)
    grey = Image.fromarray(shown).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    canvas = np.asarray(grey).copy()
    for number, mask in enumerate(masks):
        large = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        # The edge lies inside: what is outlined is what is marked.
        canvas[large & ~ndimage.binary_erosion(large, iterations=2)] = _COLOURS[number % len(_COLOURS)]
    legend = Image.new("RGB", (size[0], size[1] + _LINE * len(names)))
    legend.paste(Image.fromarray(canvas))
    pen = ImageDraw.Draw(legend)
    for number, name in enumerate(names):
        pen.text((4, size[1] + _LINE * number + 2), _plain(name), fill=_COLOURS[number % len(_COLOURS)])
    buffer = BytesIO()
    legend.save(buffer, "PNG")
    with written(path) as file:
        file.write(buffer.getbuffer())


def _slice(
    image: LabelledImage, marked: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], tuple[int, int]]:
    """Grey or colour (rows, columns[, 3]), masks (K, rows, columns), and the size (width, height) of the picture."""
    if marked.ndim == 3:
        channels = image.channels
        colour = len(channels) == 3 and channels.dtype == np.uint8
        grey = channels[first_shown(image.absent)].astype(np.float32)
        shown = np.moveaxis(channels, 0, -1) if colour and not image.absent else levels(grey)
        return np.ascontiguousarray(shown), marked, _size(marked.shape[1:], (1.0, 1.0))
    number, spacing = fullest(marked), image.space.spacing or (1.0, 1.0, 1.0)
    masks = np.ascontiguousarray(upright(marked[..., number]))
    shown = levels(upright(image.channels[first_shown(image.absent)][..., number]).astype(np.float32))
    return np.ascontiguousarray(shown), masks, _size(masks.shape[1:], (spacing[1], spacing[0]))


def _size(shape: tuple[int, ...], spacing: tuple[float, float]) -> tuple[int, int]:
    """Width and height in which a pixel is as wide as high."""
    rows, columns = square_pixels(shape, spacing, max(_SIDE, *shape))
    return columns, rows


def _plain(name: str) -> str:
    return name.encode("latin-1", "replace").decode("latin-1")
