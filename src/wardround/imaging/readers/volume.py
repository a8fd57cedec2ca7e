"""One NIfTI file as one array of slices."""

from __future__ import annotations

import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from wardround.errors import DataError
from wardround.imaging.readers.bounds import check_nifti
from wardround.wire.files import reason

FloatArray = NDArray[np.float32]

_UNREADABLE = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError)


@dataclass(frozen=True, eq=False)
class NiftiSpace:
    """What a NIfTI header says of its coordinates: `xyzt_units`, and the codes of its two transforms."""

    units: int
    sform: int
    qform: int

    @classmethod
    def of(cls, header: nibabel.Nifti1Header) -> NiftiSpace:
        """The space of a file. A qform that says another place than the affine is left out: only one can be kept."""
        affine, qform = header.get_best_affine(), header.get_qform()
        same = np.allclose(affine, qform, rtol=1e-3, atol=1e-3)
        return cls(int(header["xyzt_units"]), int(header["sform_code"]), int(header["qform_code"]) if same else 0)

    def write(self, image: nibabel.Nifti1Image) -> None:
        """Let an image say the same, with its own affine."""
        affine = np.array(image.affine)  # which setting one of the two may change
        image.set_qform(affine if self.qform else None, self.qform)
        image.set_sform(affine if self.sform else None, self.sform)
        image.header["xyzt_units"] = self.units


@dataclass(frozen=True, eq=False)
class Volume:
    """An image of one patient.

    `data` is float32 `(H, W, slices)`, `spacing` the voxel size in mm along the same axes (as the file
    says) and `affine` the `(4, 4)` matrix from voxel indices to scanner coordinates in mm; `space` is kept for a copy.
    """

    data: FloatArray
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    space: NiftiSpace | None = None


def read_volume(path: Path) -> Volume:
    """Read a 3-D NIfTI file; a fourth axis of length one is dropped.

    Raises DataError, whose message never names the file, for anything that is not a finite, varying, real 3-D
    image, and before memory is taken for one whose header says more voxels than its file holds.
    """
    array, spacing, affine, space = read_array(path)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(
            f"an image is not 3-D but has shape {array.shape}; split it into one file per frame",
            detail=str(path),
        )
    if array.dtype.kind not in "biuf":
        raise DataError("an image is complex or coloured; store its magnitude as numbers", detail=str(path))
    data = array.astype(np.float32)
    if not np.isfinite(data).all():
        raise DataError("an image holds NaN or infinite values; replace them at the source", detail=str(path))
    if data.max() == data.min():
        raise DataError("an image is constant; it shows nothing", detail=str(path))
    zooms = (*spacing, 1.0, 1.0, 1.0)
    return Volume(data, (zooms[0], zooms[1], zooms[2]), affine, space)


def space_of(path: Path) -> NiftiSpace | None:
    """What a NIfTI file's header says of its coordinates, without its voxels. Raises DataError as `read_array`."""
    try:
        header = nibabel.load(path).header
    except _UNREADABLE as error:
        raise DataError("an image file is damaged or not NIfTI", detail=f"{path}: {error}") from error
    return NiftiSpace.of(header) if isinstance(header, nibabel.Nifti1Header) else None


def read_array(path: Path) -> tuple[NDArray[np.generic], tuple[float, ...], NDArray[np.float64], NiftiSpace | None]:
    """A NIfTI file's array as it is, its zooms, its affine and its space. Raises DataError, as `read_volume` does."""
    try:
        exists = path.is_file()
    except OSError as error:
        raise DataError(f"an image file cannot be read ({reason(error)})", detail=str(path)) from error
    if not exists:
        raise DataError("an image file does not exist", detail=str(path))
    try:
        check_nifti(path)
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
        zooms = tuple(float(zoom) for zoom in image.header.get_zooms())
        space = NiftiSpace.of(image.header) if isinstance(image.header, nibabel.Nifti1Header) else None
        return array, zooms, np.asarray(image.affine, dtype=np.float64), space
    except PermissionError as error:
        raise DataError(
            f"an image file cannot be read ({reason(error)}); let this user read it", detail=str(path)
        ) from error
    except _UNREADABLE as error:
        raise DataError(
            "an image file is damaged or not NIfTI; copy it again from its source", detail=f"{path}: {error}"
        ) from error


def write_nifti(volume: Volume, path: Path, dtype: type[np.generic] = np.float32, description: str = "") -> None:
    """Write a volume as NIfTI (`.nii` or `.nii.gz`), stored as `dtype`.

    The file appears whole or not at all (written aside, then renamed), and the same volume gives the same
    bytes. `description` is for the header, which holds 79 characters. Raises DataError where `dtype` cannot hold the
    values.
    """
    stored = volume.data.astype(dtype)
    if not np.array_equal(stored.astype(np.float32), volume.data):
        raise DataError(f"an image does not fit the type {np.dtype(dtype).name}; store it as float32")
    image = nibabel.Nifti1Image(stored, volume.affine)
    if volume.space is not None:
        volume.space.write(image)
    image.header.set_zooms(volume.spacing)
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=suffix, prefix=".", dir=path.parent)
    os.close(handle)
    try:
        nibabel.save(image, name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
