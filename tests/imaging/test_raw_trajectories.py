"""Raw data along a trajectory: every format gives the samples and points that were written, wrong ones one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from tests.raw_files import (
    readout,
    spokes,
    write_bart,
    write_bart_along,
    write_ismrmrd,
    write_ismrmrd_along,
    write_mat_along,
    write_npy_along,
    xml,
)
from tests.real_images import root_folder

from wardround.errors import DataError
from wardround.imaging.convert import inspect_path
from wardround.imaging.propose_raw import propose_raw
from wardround.imaging.raw_inspect import summarise_raw
from wardround.imaging.readers.raw import open_raw, raw_files

SIZE, READOUTS = 32, 9
POINTS = spokes(READOUTS, SIZE)
_DRAWN = np.random.default_rng(0).standard_normal((2, 3, READOUTS, 2 * SIZE, 2))
SAMPLES = _DRAWN.view(np.complex128)[..., 0].astype(np.complex64)
# An oversampled readout of 64 samples, and the middle half of its field of view is the image's.
HEADER = xml((2 * SIZE, SIZE, 1), recon=(SIZE, SIZE, 1), trajectory="radial")

WRITTEN: dict[str, Callable[[Path], Path]] = {
    "NumPy": lambda d: write_npy_along(d / "a.npy", SAMPLES, SIZE * POINTS),
    "NumPy, points of each slice": lambda d: write_npy_along(d / "a.npy", SAMPLES, SIZE * np.stack([POINTS, POINTS])),
    "MATLAB": lambda d: write_mat_along(d / "a.mat", SAMPLES, SIZE * POINTS),
    "BART": lambda d: write_bart_along(d / "a", SAMPLES, SIZE * POINTS),
    "ISMRMRD, cycles per pixel": lambda d: write_ismrmrd_along(d / "a.mrd", HEADER, SAMPLES, POINTS),
    # Relative to the encoded field of view, of 2 x 32 pixels.
    "ISMRMRD, encoded matrix": lambda d: write_ismrmrd_along(d / "a.h5", HEADER, SAMPLES, 2 * SIZE * POINTS),
    # The flag says how lines of a grid run; here each sample has its own place.
    "ISMRMRD, flagged reversed": lambda d: write_ismrmrd_along(d / "a.h5", HEADER, SAMPLES, POINTS, flags=[22]),
    "ISMRMRD, weights of density": lambda d: write_ismrmrd_along(
        d / "a.h5", HEADER, SAMPLES, np.concatenate([POINTS, np.hypot(*np.moveaxis(POINTS, -1, 0))[..., None]], -1)
    ),
}


# A file of ISMRMRD takes a while to write; its units are read in the quick tests of readers, too.
MORE = {name for name in WRITTEN if name.startswith("ISMRMRD,") and name != "ISMRMRD, encoded matrix"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in MORE)) for n in WRITTEN])
def test_samples_and_points_come_back(name: str, tmp_path: Path) -> None:
    raw = open_raw(WRITTEN[name](tmp_path))
    assert raw.kind == f"{name.split(',')[0]}, radial"
    assert (raw.shape, raw.size, raw.cartesian) == (SAMPLES.shape, (SIZE, SIZE), False)
    assert raw.trajectory is not None
    for number in (0, 1):
        np.testing.assert_array_equal(raw.kspace(number), SAMPLES[number])
        np.testing.assert_allclose(raw.trajectory(number), POINTS, atol=1e-6)
    if name.startswith("ISMRMRD"):
        assert raw.facts.spacing == (2.0, 2.0, 5.0)
    with pytest.raises(DataError, match=r"take a model of acquisition\.kind: mri_noncartesian"):
        raw.require_cartesian()


def test_matlab_of_real_points_and_of_one_coil(tmp_path: Path) -> None:
    path, one = tmp_path / "a.mat", SAMPLES[:1, :1]
    points = np.stack([POINTS[..., 1].T, POINTS[..., 0].T], -1)  # x, y
    scipy.io.savemat(path, {"data": one[0, 0].T, "traj": SIZE * points, "w": np.ones(3)})
    raw = open_raw(path)
    np.testing.assert_array_equal(raw.kspace(0), one[0])
    assert raw.trajectory is not None
    np.testing.assert_allclose(raw.trajectory(0), POINTS, atol=1e-6)
    # Version 7.3 is HDF5, which lists MATLAB's axes in reverse.
    import h5py

    with h5py.File(tmp_path / "b.mat", "w", userblock_size=512) as file:
        pair = np.empty(one[0, 0].shape, [("real", "<f4"), ("imag", "<f4")])
        pair["real"], pair["imag"] = one[0, 0].real, one[0, 0].imag
        file["data"], file["TRAJ"] = pair, (SIZE * points).T
    later = open_raw(tmp_path / "b.mat")
    np.testing.assert_array_equal(later.kspace(0), one[0])
    assert later.trajectory is not None
    np.testing.assert_array_equal(later.trajectory(0), raw.trajectory(0))


def test_a_folder_of_such_scans_is_no_study_to_train(tmp_path: Path) -> None:
    WRITTEN["NumPy"](tmp_path / "site")
    with pytest.raises(DataError, match=r"reconstructed by a model of `acquisition\.kind: mri_noncartesian`"):
        propose_raw("study", {"site": tmp_path / "site"})


def test_the_points_say_how_many_pixels_an_image_has(tmp_path: Path) -> None:
    """In cycles per field of view by their reach, in cycles per pixel by the step along a readout."""
    for number, (points, size) in enumerate(
        [
            (SIZE * POINTS, SIZE),
            ((SIZE - 2) * POINTS, SIZE - 2),
            # Spokes of BART that have no sample at the centre: from -15.5 to 15.5.
            (SIZE * POINTS / 0.5 * (15.5 / 32), SIZE),
            (POINTS, 2 * SIZE),
        ]
    ):
        raw = open_raw(write_npy_along(tmp_path / f"{number}.npy", SAMPLES, points))
        assert raw.size == (size, size), number


def test_a_trajectory_is_no_scan_by_itself_and_inspect_says_what_there_is(tmp_path: Path) -> None:
    for name in ("NumPy", "BART"):
        WRITTEN[name](tmp_path / "site" / name)
    assert [path.name for path in raw_files(tmp_path / "site")] == ["a.cfl", "a.npy"]
    said = str(inspect_path(tmp_path / "site" / "NumPy" / "a.npy"))
    assert "NumPy, radial: 2 slices of 9 readouts of 64 samples, 3 coils" in said
    assert "32 x 32 pixels" in said
    summary = summarise_raw(tmp_path / "site")
    assert (summary.along, summary.sizes, summary.full) == ({(SIZE, SIZE): 2}, {}, 0)
    assert "32 x 32 along a trajectory (2)" in " ".join(summary.lines())


def _bart_without(folder: Path) -> Path:
    path = WRITTEN["BART"](folder)
    (folder / "a_traj.cfl").unlink()
    return path


def _npy(points: Any) -> Callable[[Path], Path]:
    return lambda folder: write_npy_along(folder / "a.npy", SAMPLES, points)


def _mrd(points: np.ndarray, header: str = HEADER) -> Callable[[Path], Path]:
    return lambda folder: write_ismrmrd_along(folder / "a.h5", header, SAMPLES, points)


_NAN = POINTS.copy()
_NAN[3, 4] = np.nan
_DEEP = np.concatenate([POINTS, POINTS[..., :1]], -1)

WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "BART's is missing": (_bart_without, "which is missing: put it beside as NAME_traj.cfl"),
    "ISMRMRD's is missing": (
        lambda d: write_ismrmrd(d / "a.h5", HEADER, [readout(SAMPLES[0, :, n]) for n in range(READOUTS)]),
        "a radial scan lacks its trajectory; write it with each readout",
    ),
    "radians per pixel": (_npy(2 * np.pi * POINTS), "reaches 3.14, which is in no unit .*radians per pixel over 2 pi"),
    "1/m, of 25 cm": (_npy(SIZE * POINTS / 0.25), "lie 2 apart; in cycles per field of view that is 1 at most"),
    "cycles per mm": (_mrd(POINTS / 2), "half a cycle over the voxel of 2 mm: cycles per mm"),
    "radians per m": (_mrd(2 * np.pi * POINTS / 0.002), "its header says an encoded field of view of 64 pixels"),
    "another scan's": (
        _mrd(POINTS, xml((8 * SIZE, SIZE, 1), recon=(8 * SIZE, SIZE, 1), trajectory="radial")),
        "lie 4 cycles per field of view apart, by the header's 256 x 32",
    ),
    "fewer readouts": (_npy(SIZE * POINTS[1:]), "8 readouts of 64 samples in 1 slices, and its k-space 9 readouts"),
    "fewer samples": (
        lambda d: write_mat_along(d / "a.mat", SAMPLES[..., 1:], SIZE * POINTS),
        "9 readouts of 64 samples in 1 slices, and its k-space 9 readouts of 63",
    ),
    "fewer in BART": (
        lambda d: write_bart_along(d / "a", SAMPLES, SIZE * POINTS) and write_bart(d / "a_traj", POINTS[1:].T),
        "as many readouts; they are 2 x 64 x 8 and 1 x 64 x 9",
    ),
    "NaN": (_npy(SIZE * _NAN), "NaN or infinite"),
    "zeros": (_npy(0 * POINTS), "nothing but zeros"),
    "complex points": (_npy(POINTS[..., 0] + 1j * POINTS[..., 1]), "must be real"),
    "three dimensions": (_npy(SIZE * _DEEP), "in three dimensions"),
    "three in ISMRMRD": (_mrd(_DEEP), "in three dimensions"),
    "no image": (_npy(np.where(np.arange(64)[:, None] % 2, 0.5, -0.5) * np.ones((9, 64, 2))), "2 x 2 pixels, which is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_trajectory_of_a_scan_is_refused_in_one_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    make, match = WRONG[name]
    make(tmp_path)
    (path,) = raw_files(tmp_path)
    with pytest.raises(DataError, match=match) as caught:
        open_raw(path)
    assert str(tmp_path) not in str(caught.value)
    assert path.stem in caught.value.detail
    assert "\n" not in str(caught.value)


@pytest.mark.data("kspace")
def test_the_real_heart_is_read() -> None:
    raw = open_raw(root_folder() / "kspace/gpunufft_radial_cardiac_25_projections_12ch.mat")
    assert (raw.kind, raw.shape, raw.size) == ("MATLAB, radial", (1, 12, 25, 256), (256, 256))
