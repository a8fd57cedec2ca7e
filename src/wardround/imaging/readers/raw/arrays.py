"""Plain arrays: NumPy (.npy) and MATLAB (.mat), which say nothing of a scan but its samples.

A scan along a trajectory has its points too: in NAME_traj.npy beside NAME.npy, real, along H and along W; in MATLAB in
the same file, named `k`, `traj` or `trajectory`, complex x + i y or real (x, y), x along W. The
module `trajectory` says in which unit.
"""

from __future__ import annotations

import math
import tokenize
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
from scipy.io.matlab import MatReadError

from wardround.errors import DataError
from wardround.imaging.readers.raw.hdf5 import opened
from wardround.imaging.readers.raw.slices import ComplexArray, RawSlices, check_centred, raw_error
from wardround.imaging.readers.raw.trajectory import flat, points_file, scan_along
from wardround.wire.files import reason

Array = npt.NDArray[Any]
_MOST = 1 << 29  # samples of a .mat file, which is read as a whole
# Names of points, in capitals too.
_POINTS = ("k", "traj", "trajectory")
_HDF5, _NUMPY = b"\x89HDF", b"\x93NUMPY"
# What SciPy raises of a file that it cannot read.
_DAMAGED = (
    MatReadError, OSError, EOFError, ValueError, TypeError, KeyError, IndexError, NotImplementedError, zlib.error
)  # fmt: skip


def read_array(source: Path, what: str) -> Array:
    """The array of a .npy file, which is called `what` in errors, mapped. Raises DataError for any other file."""
    try:
        # Mapped: a header that says more than the file holds takes no memory.
        found = np.load(source, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"the {what} file does not exist; check its path", detail=str(source)) from error
    except PermissionError as error:
        raise DataError(f"the {what} file cannot be read ({reason(error)})", detail=str(source)) from error
    # A damaged header is read as Python text.
    except (OSError, EOFError, ValueError, TypeError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"the {what} file {_wrong(source)}", detail=str(source)) from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"the {what} file holds several arrays; store one array as .npy", detail=str(source))
    return found


def _wrong(source: Path) -> str:
    """Why NumPy cannot read a file: its own words name a way to run what a file holds."""
    with source.open("rb") as file:
        start = file.read(len(_NUMPY))
    if not start:
        return "is empty; copy it again from its source"
    if start != _NUMPY:
        return "is not a NumPy array (.npy)"
    return "is cut short, or damaged, or holds Python objects; copy it again from its source, as numbers"


def read_npy(path: Path) -> RawSlices:
    """Open complex (coils, H, W) or (slices, coils, H, W) in .npy.

    Raises DataError for another file or array, and for one that is no centred k-space (`check_centred`).
    """
    array = read_array(path, "k-space")
    points = points_file(path)
    if points.exists():
        return _npy_along(array, path, points)
    if array.ndim not in (3, 4) or not np.iscomplexobj(array) or 0 in array.shape:
        raise raw_error(
            "k-space must be complex, (coils, H, W) or (slices, coils, H, W); "
            f"this is {array.dtype} of shape {array.shape}",
            path,
        )
    whole = array if array.ndim == 4 else array[None]
    _check_coils(whole.shape[1], whole.shape[2:], array.shape, "(coils, H, W) or (slices, coils, H, W)", path)
    # A slice of the middle, for the file is mapped and a look at its header must not read it all.
    check_centred(np.abs(whole[len(whole) // 2]), path)
    return _of(whole, "NumPy", path)


def read_mat(path: Path) -> RawSlices:
    """Open a .mat file with one complex array: (H, W), (H, W, coils) or (H, W, coils, slices).

    Or (samples, readouts), (samples, readouts, coils) or (samples, readouts, coils, slices) with its points (samples,
    readouts), complex, or (samples, readouts, 2). Versions 4 to 7 are read by SciPy, 7.3 is HDF5. Raises DataError
    where there is no such array or more than one, and where it is no centred k-space (`check_centred`).
    """
    found = _arrays(path)
    names = [name for name in found if name.lower() in _POINTS]
    kspace = {name: array for name, array in found.items() if name not in names and np.iscomplexobj(array)}
    if len(names) == 1 and kspace:
        return _mat_along(_only(kspace, path), found[names[0]], path)
    complex_ = {name: array for name, array in found.items() if np.iscomplexobj(array)}
    array = np.asarray(_only(complex_, path), np.complex64)
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise raw_error(
            "k-space in MATLAB must be (H, W), (H, W, coils) or (H, W, coils, slices); "
            f"this has the shape {array.shape}",
            path,
        )
    whole = array.reshape(*array.shape, *[1] * (4 - array.ndim))
    _check_coils(whole.shape[2], whole.shape[:2], array.shape, "(H, W, coils) or (H, W, coils, slices)", path)
    check_centred(np.moveaxis(np.abs(whole), (0, 1), (-2, -1)), path)
    return _of(np.ascontiguousarray(whole.transpose(3, 2, 0, 1)), "MATLAB", path)


def _npy_along(array: Array, path: Path, points: Path) -> RawSlices:
    """Complex (..., coils, readouts, samples) at points (..., readouts, samples, 2), of slices or of one."""
    if array.ndim not in (3, 4) or not np.iscomplexobj(array) or 0 in array.shape:
        raise raw_error(
            "samples of a scan along a trajectory must be complex, (coils, readouts, samples) or (slices, coils, "
            f"readouts, samples); these are {array.dtype} of shape {array.shape}",
            path,
        )
    places = read_array(points, "trajectory")
    if places.ndim not in (3, 4) or places.shape[-1] not in (2, 3) or not _real(places):
        raise raw_error(
            "a trajectory in NumPy must be real, (readouts, samples, 2) or (slices, readouts, samples, 2); this is "
            f"{places.dtype} of shape {places.shape}",
            points,
        )
    whole, placed = (one if one.ndim == 4 else one[None] for one in (array, places))
    return scan_along(whole, flat(placed, path), "NumPy", path, points)


def _mat_along(array: Array, points: Array, path: Path) -> RawSlices:
    """What MATLAB's axes say, as `_npy_along` has it."""
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise raw_error(
            "samples of a scan along a trajectory in MATLAB must be (samples, readouts), (samples, readouts, coils) or "
            f"(samples, readouts, coils, slices); these have the shape {array.shape}",
            path,
        )
    if np.iscomplexobj(points) and points.ndim == 2:
        places = np.stack([points.imag, points.real], axis=-1)
    elif not np.iscomplexobj(points) and points.ndim == 3 and points.shape[2] in (2, 3):
        places = np.concatenate([points[..., 1::-1], points[..., 2:]], axis=-1)
    else:
        raise raw_error(
            "a trajectory in MATLAB must be complex, x + i y (samples, readouts), or real (samples, readouts, 2); this "
            f"is {points.dtype} of shape {points.shape}. An array named {', '.join(_POINTS)} is taken for one: give "
            "k-space another name",
            path,
        )
    whole = array.reshape(*array.shape, *[1] * (4 - array.ndim)).transpose(3, 2, 1, 0)
    return scan_along(whole, flat(places.swapaxes(0, 1)[None], path), "MATLAB", path)


def _real(array: Array) -> bool:
    return np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)


def _check_coils(coils: int, plane: tuple[int, ...], shape: tuple[int, ...], axes: str, path: Path) -> None:
    """Raise DataError where axes seem to stand in another order."""
    if coils > min(plane):
        raise raw_error(f"k-space of shape {shape} has more coils ({coils}) than lines; its axes must be {axes}", path)


def _of(array: Array, kind: str, path: Path) -> RawSlices:
    def stored(number: int) -> ComplexArray:
        return np.ascontiguousarray(array[number], np.complex64)

    slices, coils, height, width = array.shape
    return RawSlices(kind, (slices, coils, height, width), stored, files=(path,))


def _only(arrays: dict[str, Array], path: Path) -> Array:
    if len(arrays) != 1:
        said = f"{len(arrays)} complex arrays" if arrays else "no complex array"
        raise raw_error(
            f"a MATLAB file holds {said}; store the k-space alone, or with its trajectory named `k`",
            path,
            ", ".join(arrays),
        )
    return next(iter(arrays.values()))


def _arrays(path: Path) -> dict[str, Array]:
    """The complex arrays of a file by name, and the real ones that may be points."""
    try:
        with path.open("rb") as file:
            # The preface of version 7.3 takes 512 bytes.
            start = file.read(516)
        if _HDF5 in (start[:4], start[512:]):
            return _arrays_of_hdf5(path)
        shapes = {name: shape for name, shape, _ in scipy.io.whosmat(path)}
        if any(math.prod(shape) > _MOST for shape in shapes.values()):
            raise raw_error(f"a MATLAB file holds an array of more than {_MOST:,} values; is it damaged?", path)
        found = scipy.io.loadmat(path, struct_as_record=True)
    except FileNotFoundError as error:
        raise raw_error("the k-space file does not exist; check its path", path) from error
    except DataError:
        raise
    except _DAMAGED as error:
        raise raw_error("a MATLAB file is damaged or none; copy it again from its source", path, str(error)) from error
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray) and _wanted(name, value)}


def _wanted(name: str, array: Array) -> bool:
    return array.dtype.kind == "c" or (name.lower() in _POINTS and _real(array) and array.ndim == 3)


def _arrays_of_hdf5(path: Path) -> dict[str, Array]:
    found = {}
    with opened(path) as file:
        for name, one in file.items():
            dtype = getattr(one, "dtype", None)
            pair = dtype is not None and dtype.names == ("real", "imag")
            if dtype is None or not (pair or _wanted(name, one)):
                continue
            if math.prod(one.shape) > _MOST:
                raise raw_error(f"a MATLAB file holds an array of more than {_MOST:,} values; is it damaged?", path)
            values = one[()]
            # HDF5 lists MATLAB's axes in reverse.
            found[name] = (values["real"] + 1j * values["imag"] if pair else values).T
    return found
