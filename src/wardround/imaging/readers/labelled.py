"""An image with its mask, from NIfTI, PNG, JPEG or DICOM: arrays in one orientation, and a voxel's size where known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from wardround.errors import DataError
from wardround.imaging.readers.bounds import MOST_PIXELS
from wardround.imaging.readers.cases import ENDINGS, Case, Reader
from wardround.imaging.readers.dicom_image import read_image_series
from wardround.imaging.readers.dicom_seg import Grid, read_seg
from wardround.imaging.readers.dicom_signs import DICOM
from wardround.imaging.readers.volume import read_array
from wardround.wire.files import reason

Array = NDArray[Any]
# Of an affine's entries in mm: what programs lose by writing it as text or in single precision.
_SAME_PLACE = 1e-2


@dataclass(frozen=True, eq=False)
class VoxelSpace:
    """Where an image's voxels lie.

    `spacing`: mm along each axis, `None` where the file does not say. `affine`: (4, 4), indices of the file to mm, and
    `orientation` how the file's axes became those of the array (nibabel's), both `None` for a picture. `frame`: the
    identifier of a DICOM series' frame of reference, which stays at the site; `None` for other files.
    """

    spacing: tuple[float, ...] | None
    affine: NDArray[np.float64] | None = None
    orientation: NDArray[np.float64] | None = None
    frame: str | None = None

    def restored(self, array: Array) -> Array:
        """An array over the last three axes, (..., *shape), turned back to the axes of the file."""
        if self.orientation is None:
            return array
        back = nibabel.orientations.ornt_transform(_RAS, self.orientation)
        return _turned(array, back)


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image and what was drawn on it.

    `channels` (C, *shape), uint8 or float32; `labels` (*shape), the whole numbers of the mask's file, `None` without
    one. `combined`: values of it that stand for several numbers at once, where segments of a DICOM SEG overlap.
    `absent`: channels of which there is no file; they are 0. A volume's axes run to the patient's right, front and head
    (RAS) as far as its header says how the patient lies; a picture's are rows and columns.
    """

    channels: Array
    labels: Array | None
    space: VoxelSpace
    combined: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    absent: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return int(self.channels.nbytes + (0 if self.labels is None else self.labels.nbytes))


_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=np.float64)


def read_case(case: Case, site: str) -> LabelledImage:
    """Read the files of an image.

    Raises DataError, whose message never names a patient or file, for a file that cannot be read or is damaged, for
    channels or a mask of another shape or another place than the first channel, for values that are no numbers, and
    for a mask that holds fractions.
    """
    try:
        return read_image(case)
    except DataError as error:
        raise DataError(f"site {site}: {error}", detail=error.detail) from error


def read_image(case: Case) -> LabelledImage:
    """Read the files of an image; raises DataError as `read_case` does, whose message names no site."""
    first, *others = (_read(path, case.readers) for path in case.images)
    parts = [first[0]]
    for path, (channels, space) in zip(case.images[1:], others, strict=True):
        _same(first, (channels, space), "two channels of an image", path)
        parts.append(channels)
    if case.absent:
        parts = _with_absent(parts, case)
    channels = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if channels.dtype != np.uint8:
        channels = channels.astype(np.float32)
        if not np.isfinite(channels).all():
            raise DataError(
                "an image holds NaN or infinite values; replace them at the source", detail=str(case.images[0])
            )
    if case.mask is not None and _is_seg(case.mask, case.readers):
        return LabelledImage(channels, *_segments(first, case.mask), absent=case.absent)
    labels = None if case.mask is None else _labels(first, case.mask, case.readers)
    return LabelledImage(channels, labels, first[1], absent=case.absent)


def _with_absent(parts: Sequence[Array], case: Case) -> list[Array]:
    """The channels with zeros where a file is missing; raises DataError where a file has several channels."""
    for path, part in zip(case.images, parts, strict=True):
        if len(part) != 1:
            raise DataError(
                f"a file has {len(part)} channels, and of an image that lacks a contrast each file is one channel; "
                "store them one by one",
                detail=str(path),
            )
    there = iter(parts)
    return [
        np.zeros_like(parts[0]) if number in case.absent else next(there)
        for number in range(len(parts) + len(case.absent))
    ]


def placed_image(channels: Array, spacing: tuple[float, ...], affine: NDArray[np.float64]) -> LabelledImage:
    """An image (C, *shape) whose axes lie in space as its affine (4, 4) says; `spacing` is mm along its own axes.

    Raises DataError for an affine that places no volume, and for values that are no numbers.
    """
    array, space = _in_place(channels, spacing, affine, "an image")
    if not np.isfinite(array).all():
        raise DataError("an image holds NaN or infinite values; replace them at the source")
    return LabelledImage(array, None, space)


def _is_seg(path: Path, readers: Mapping[str, Reader]) -> bool:
    own = path.name.endswith(ENDINGS) or any(path.name.endswith(ending) for ending in readers)
    return path.is_dir() or not own


def _segments(image: tuple[Array, VoxelSpace], path: Path) -> tuple[Array, VoxelSpace, Mapping[int, tuple[int, ...]]]:
    """The labels of a DICOM SEG in the image's orientation, the image's space, and what its combined values mean."""
    channels, space = image
    if space.affine is None or space.orientation is None:
        raise DataError(
            "a mask is a DICOM SEG, and its image is a picture, which lies nowhere; give masks of pictures as pictures",
            detail=str(path),
        )
    found = read_seg(path, Grid(space.restored(channels[0]).shape, space.affine, space.frame))
    return _whole(_turned(found.labels, space.orientation)), space, found.combined


def _labels(image: tuple[Array, VoxelSpace], path: Path, readers: Mapping[str, Reader]) -> Array:
    mask = _read(path, readers, colour=False)
    _same(image, mask, "an image and its mask", path)
    if mask[0].shape[0] != 1:
        raise DataError("a mask has several channels; store one whole number a voxel", detail=str(path))
    labels = mask[0][0]
    whole = np.rint(labels)
    if (
        not np.isfinite(whole).all()
        or not np.allclose(labels, whole, atol=1e-3)
        or np.abs(whole).max(initial=0) > 2**15
    ):
        raise DataError("a mask holds fractions or huge values; store one whole number a voxel", detail=str(path))
    return _whole(whole)


def _whole(labels: Array) -> Array:
    """Whole numbers as bytes where they fit."""
    narrowed: Array = np.ascontiguousarray(labels, np.uint8 if labels.min() >= 0 and labels.max() <= 255 else np.int32)
    return narrowed


def _same(image: tuple[Array, VoxelSpace], other: tuple[Array, VoxelSpace], what: str, path: Path) -> None:
    mine, its = image[0].shape[1:], other[0].shape[1:]
    if mine != its:
        raise DataError(
            f"{what} differ in shape ({_times(mine)} and {_times(its)}); resample one to the other", detail=str(path)
        )
    if image[1].frame != other[1].frame and None not in (image[1].frame, other[1].frame):
        raise DataError(
            f"{what} are of unlike frames of reference (DICOM), so equal positions in them are not one place; register "
            "one to the other",
            detail=str(path),
        )
    a, b = image[1].affine, other[1].affine
    if a is not None and b is not None and not np.allclose(a, b, rtol=1e-3, atol=_SAME_PLACE):
        raise DataError(
            f"{what} have the same shape and lie in different places (their affines differ); export them again from "
            "one program, or resample one to the other",
            detail=str(path),
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _read(path: Path, readers: Mapping[str, Reader], colour: bool = True) -> tuple[Array, VoxelSpace]:
    """Channels (C, *shape) and space."""
    if path.is_dir():
        return _series(path)
    if not path.name.endswith(ENDINGS):
        for ending, reader in readers.items():
            if path.name.endswith(ending):
                return _foreign(reader, ending, path)
    if path.name.endswith(DICOM):
        return _series(path)
    return _volume(path) if path.name.endswith((".nii", ".nii.gz")) else _picture(path, colour)


def _foreign(reader: Reader, ending: str, path: Path) -> tuple[Array, VoxelSpace]:
    """What a reader of another package gives, in the package's own orientation."""
    try:
        given, zooms, affine = reader(path)
        channels = np.asarray(given)
        spacing = None if zooms is None else tuple(float(zoom) for zoom in zooms)
        place = None if affine is None else np.asarray(affine, dtype=np.float64)
    except Exception as error:
        # Another package's words may name the file: they stay in the detail.
        raise DataError(f"the plug-in for {ending} files cannot read an image", detail=f"{path}: {error}") from error
    if channels.ndim not in (3, 4) or 0 in channels.shape or channels.dtype.kind not in "biuf":
        raise DataError(f"the plug-in for {ending} files gave no channels (C, *shape) of numbers", detail=str(path))
    axes = channels.ndim - 1
    if spacing is not None and (len(spacing) != axes or not all(np.isfinite(spacing)) or min(spacing) <= 0):
        raise DataError(f"the plug-in for {ending} files gave no positive size for each axis", detail=str(path))
    if place is None:
        return _narrow(np.ascontiguousarray(channels)), VoxelSpace(spacing)
    if axes != 3 or place.shape != (4, 4) or not np.isfinite(place).all() or np.linalg.det(place) == 0:
        raise DataError(f"the plug-in for {ending} files gave an affine that places no volume", detail=str(path))
    orientation = nibabel.orientations.io_orientation(place)
    if spacing is not None:
        spacing = tuple(spacing[int(np.flatnonzero(orientation[:, 0] == axis)[0])] for axis in range(3))
    return _narrow(np.ascontiguousarray(_turned(channels, orientation))), VoxelSpace(spacing, place, orientation)


def _volume(path: Path) -> tuple[Array, VoxelSpace]:
    array, zooms, affine, _ = read_array(path)
    if array.ndim not in (3, 4) or 0 in array.shape or array.dtype.kind not in "biuf":
        raise DataError(
            f"an image is not 3-D, nor 3-D with channels last, but has shape {array.shape}", detail=str(path)
        )
    channels = np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None]
    return _in_place(channels, zooms, affine, str(path))


def _series(path: Path) -> tuple[Array, VoxelSpace]:
    found = read_image_series(path)
    channels, space = _in_place(found.data[None], found.spacing, found.affine, str(path))
    return channels, replace(space, frame=found.frame)


def _in_place(
    channels: Array, zooms: tuple[float, ...], affine: NDArray[np.float64], detail: str
) -> tuple[Array, VoxelSpace]:
    orientation = nibabel.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise DataError("an image's header gives no place to an axis; export it again", detail=detail)
    spacing = tuple(float(zooms[int(np.flatnonzero(orientation[:, 0] == axis)[0])]) for axis in range(3))
    if not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise DataError("an image's header gives a voxel no size; export it again", detail=detail)
    turned = np.ascontiguousarray(_turned(channels, orientation))
    return _narrow(turned), VoxelSpace(spacing, affine, orientation)


def _turned(array: Array, orientation: NDArray[np.float64]) -> Array:
    """The last three axes reordered and reversed as an orientation says."""
    lead = array.ndim - 3
    whole = [[axis, 1] for axis in range(lead)] + [[lead + axis, flip] for axis, flip in orientation]
    turned: Array = nibabel.orientations.apply_orientation(array, np.array(whole))
    return turned


def _narrow(array: Array) -> Array:
    """An array of whole numbers from 0 to 255 as bytes; any other as float32 or, of large whole numbers, as it is."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    low, high = array.min(), array.max()
    if low >= 0 and high <= 255 and (array.dtype.kind in "iu" or np.array_equal(array, np.rint(array))):
        return array.astype(np.uint8)
    return array.astype(np.float32)


def _picture(path: Path, colour: bool) -> tuple[Array, VoxelSpace]:
    try:
        with PILImage.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    f"a picture has {image.width} x {image.height} pixels, and at most {MOST_PIXELS:,} are read",
                    detail=str(path),
                )
            odd = image.mode in ("P", "RGBA", "CMYK", "YCbCr")
            array = np.asarray(image.convert("RGB" if colour else "L") if odd else image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError("an image file does not exist", detail=str(path)) from error
    except PermissionError as error:
        raise DataError(
            f"an image file cannot be read ({reason(error)}); let this user read it", detail=str(path)
        ) from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise DataError(
            "an image file is damaged, or neither PNG nor JPEG; copy it again from its source",
            detail=f"{path}: {error}",
        ) from error
    if not colour and array.ndim == 3:
        array = array.max(axis=2)
    channels = np.moveaxis(array, 2, 0) if array.ndim == 3 else array[None]
    return _narrow(np.ascontiguousarray(channels)), VoxelSpace(None)
