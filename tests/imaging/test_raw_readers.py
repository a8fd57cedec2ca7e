"""Readers of raw data: files of every layout give the k-space that was written, and wrong files one clear error."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from tests.raw_files import (
    SIZE,
    coil_images,
    padded_rows,
    readout,
    root_sum_of_squares,
    scanned,
    spokes,
    transformed,
    write_bart,
    write_fastmri,
    write_ismrmrd,
    xml,
)
from tests.real_images import root_folder

from wardround.errors import DataError
from wardround.imaging.datasets.raw import mirrored
from wardround.imaging.identifiers.findings import Finding, Level
from wardround.imaging.identifiers.lint import lint_folders
from wardround.imaging.raw_inspect import raw_sites, summarise_raw
from wardround.imaging.readers.raw import RawSlices, open_raw
from wardround.imaging.readers.raw.folder import RawFolder
from wardround.imaging.readers.raw.slices import fully_sampled, measured, without_oversampling

IMAGES = coil_images(1)
KSPACE = transformed(IMAGES)
# Of 2 x oversampled readouts, as scanners write them.
RAW = transformed(padded_rows(IMAGES, 2 * SIZE))
HEADER = xml((2 * SIZE, SIZE, 1), recon=(SIZE, SIZE, 1), patient="P7")


def whole(raw: RawSlices) -> np.ndarray:
    found = np.stack([raw.kspace(number) for number in range(len(raw))])
    assert found.shape == raw.shape
    assert found.dtype == np.complex64
    return found


def refused(path: Path, match: str) -> None:
    """An error that says what is wrong, names the file in its detail alone, and comes at the latest with the slices."""
    with pytest.raises(DataError, match=match) as caught:
        whole(open_raw(path))
    assert path.name not in str(caught.value)
    assert path.name in caught.value.detail


def close(one: np.ndarray, other: np.ndarray) -> None:
    """Within the rounding of two transforms of 64 samples in single precision."""
    np.testing.assert_allclose(one, other, atol=8 * np.finfo(np.float32).eps * np.abs(other).max())


# fastMRI


def test_fastmri_comes_back_without_its_oversampling(tmp_path: Path) -> None:
    raw = open_raw(write_fastmri(tmp_path / "a.h5", IMAGES, patient="P1"))
    close(whole(raw), KSPACE)
    assert raw.facts.patient == "P1"
    assert (raw.facts.vendor, raw.facts.field_strength, raw.facts.protocol) == ("Maker", 1.5, "AXT1")
    assert raw.facts.spacing == (2.0, 2.0, 5.0)
    assert "P1" not in repr(raw)
    assert raw.picture is not None
    np.testing.assert_allclose(raw.picture(1), root_sum_of_squares(IMAGES)[1], rtol=1e-6)


def test_fastmri_without_a_header_is_cropped_to_its_reference(tmp_path: Path) -> None:
    close(whole(open_raw(write_fastmri(tmp_path / "a.h5", IMAGES, header=False))), KSPACE)
    raw = open_raw(write_fastmri(tmp_path / "b.h5", IMAGES, header=False, reference=False))
    assert raw.shape[2] == 2 * SIZE


def test_fastmri_of_a_single_coil_and_of_the_test_set(tmp_path: Path) -> None:
    """Where a file holds more than its mask says, the rest was not measured."""
    import h5py

    one = IMAGES[:, :1]
    close(whole(open_raw(write_fastmri(tmp_path / "a.h5", one, single=True))), transformed(one))
    mask = np.zeros(SIZE)
    mask[::3], mask[12:20] = 1, 1
    raw = open_raw(write_fastmri(tmp_path / "b.h5", IMAGES, mask=mask, reference=False))
    kspace = raw.kspace(0)
    close(kspace, KSPACE[0] * mask)
    np.testing.assert_array_equal(raw.mask(0, kspace), np.repeat(mask[None], SIZE, 0))
    assert raw.picture is None
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["kspace"][:] = transformed(padded_rows(IMAGES, 2 * SIZE))
    np.testing.assert_array_equal(open_raw(tmp_path / "b.h5").kspace(0) != 0, (KSPACE[0] != 0) * mask.astype(bool))


# ISMRMRD


def test_readouts_are_sorted_by_their_headers(tmp_path: Path) -> None:
    lines = np.random.default_rng(0).permutation(SIZE).tolist()
    raw = open_raw(write_ismrmrd(tmp_path / "a.mrd", HEADER, scanned(RAW, lines)))
    close(whole(raw), KSPACE)
    assert raw.facts.patient == "P7"
    assert raw.facts.spacing == (2.0, 2.0, 5.0)
    assert fully_sampled(raw.mask(0, raw.kspace(0)))


def test_averages_are_averaged_and_repetitions_are_slices(tmp_path: Path) -> None:
    one = RAW[:1]
    readouts = [*scanned(one), *scanned(3 * one, average=1), *scanned(5 * one, repetition=1)]
    raw = open_raw(write_ismrmrd(tmp_path / "a.h5", HEADER, readouts))
    assert len(raw) == 2
    close(raw.kspace(0), 2 * KSPACE[0])
    close(raw.kspace(1), 5 * KSPACE[0])


def test_lines_that_were_not_measured_are_zero_wherever_the_centre_lies(tmp_path: Path) -> None:
    """A partial Fourier scan of the upper lines, numbered from 0: the header's centre says where they lie."""
    kept = range(SIZE // 4, SIZE)
    header = xml((2 * SIZE, SIZE, 1), recon=(SIZE, SIZE, 1), centre=(SIZE // 4, 0))
    readouts = [readout(RAW[0, :, :, line], line=line - SIZE // 4) for line in kept]
    raw = open_raw(write_ismrmrd(tmp_path / "a.h5", header, readouts))
    expected = KSPACE[0].copy()
    expected[..., : SIZE // 4] = 0
    close(raw.kspace(0), expected)
    np.testing.assert_array_equal(raw.mask(0, expected)[0] > 0, np.arange(SIZE) >= SIZE // 4)


def test_a_partial_echo_lies_where_its_centre_says(tmp_path: Path) -> None:
    cut = SIZE // 2
    readouts = [readout(RAW[0, :, cut:, line], line=line, center_sample=SIZE - cut) for line in range(SIZE)]
    raw = open_raw(write_ismrmrd(tmp_path / "a.h5", HEADER, readouts))
    echo = RAW[0].copy()
    echo[:, :cut] = 0
    close(raw.kspace(0), without_oversampling(echo, SIZE))


def test_samples_to_be_discarded_are_left_out(tmp_path: Path) -> None:
    wider = np.pad(RAW[0], [(0, 0), (3, 2), (0, 0)], constant_values=9)
    kept = {"discard_pre": 3, "discard_post": 2, "center_sample": SIZE + 3}
    readouts = [readout(wider[:, :, line], line=line, **kept) for line in range(SIZE)]
    close(open_raw(write_ismrmrd(tmp_path / "a.h5", HEADER, readouts)).kspace(0), KSPACE[0])


def test_readouts_that_run_backwards_are_turned_round(tmp_path: Path) -> None:
    readouts = [readout(RAW[0, :, ::-1, line], line=line, flags=[22]) for line in range(SIZE)]
    close(open_raw(write_ismrmrd(tmp_path / "a.h5", HEADER, readouts)).kspace(0), KSPACE[0])
    refused(write_ismrmrd(tmp_path / "b.h5", HEADER, [*readouts[1:], *scanned(RAW[:1], [0])]), "run backwards")


def test_noise_scans_whiten_the_coils(tmp_path: Path) -> None:
    """After whitening, the noise itself has the covariance 1 (of real and imaginary parts)."""
    random = np.random.default_rng(0)
    mixing = np.array([[1, 0, 0], [0.5, 1, 0], [0.2j, 0.3, 2]])
    noise = (mixing @ (random.standard_normal((3, 4096, 2)) @ np.array([1, 1j]))).astype(np.complex64)
    scans = [readout(part, flags=[19]) for part in np.split(noise, 8, axis=1)]
    others = [readout(7 * RAW[0, :, :, 0], flags=[flag]) for flag in (20, 23, 24, 27)]
    raw = open_raw(write_ismrmrd(tmp_path / "a.h5", HEADER, [*scans, *others, *scanned(RAW[:1])]))
    assert raw.noise is not None
    np.testing.assert_array_equal(raw.noise, noise)
    factor = np.linalg.cholesky(noise.astype(np.complex128) @ noise.conj().T / (2 * 4096))
    expected = np.linalg.solve(factor, KSPACE[0].reshape(3, -1)).reshape(KSPACE[0].shape)
    np.testing.assert_allclose(raw.kspace(0), expected, atol=1e-4 * np.abs(expected).max())


def test_the_readout_of_a_volume_becomes_its_slices(tmp_path: Path) -> None:
    volume = transformed(np.repeat(IMAGES[0][:, None, :8, :6], 4, axis=1), (-3, -2, -1))  # (C, 4, 8, 6)
    header = xml((4, 8, 6))
    places = [(line, part) for line in range(8) for part in range(6)]
    readouts = [readout(volume[:, :, line, part], line=line, partition=part) for line, part in places]
    raw = open_raw(write_ismrmrd(tmp_path / "a.h5", header, readouts))
    assert raw.shape == (4, 3, 8, 6)
    assert raw.facts.spacing == (2.0, 5.0, 2.0)
    for number in range(4):
        close(raw.kspace(number), transformed(IMAGES[0][:, :8, :6]))
    base = write_bart(tmp_path / "b", volume.transpose(1, 2, 3, 0))
    close(whole(open_raw(base)), whole(raw))


def test_a_trajectory_is_kept_beside_the_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = random.standard_normal((2, 5, 3, 16, 2)).view(np.complex128)[..., 0].astype(np.complex64)
    paths = np.stack([spokes(5, 8), spokes(5, 8)[::-1]]).astype(np.float32)
    lines = [readout(data[z, n], slice=z, traj=paths[z, n]) for n in range(5) for z in range(2)]
    raw = open_raw(write_ismrmrd(tmp_path / "a.mrd", xml((16, 16, 1), trajectory="radial"), lines))
    assert raw.shape == (2, 3, 5, 16)
    assert not raw.cartesian
    assert raw.facts.matrix == (16, 16)
    assert raw.trajectory is not None
    np.testing.assert_array_equal(raw.kspace(1), data[1].swapaxes(0, 1))
    np.testing.assert_array_equal(raw.trajectory(1), paths[1])
    with pytest.raises(DataError, match="along a trajectory"):
        raw.require_cartesian()


# BART, NumPy, MATLAB


def bart_of(kspace: np.ndarray) -> np.ndarray:
    """(slices, coils, H, W) with BART's axes: readout, phase, partition, coil, ..., slice."""
    moved = kspace.transpose(2, 3, 1, 0)
    return moved.reshape(*moved.shape[:2], 1, moved.shape[2], *[1] * 9, moved.shape[3])


def test_bart_numpy_and_matlab_give_what_was_written(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", KSPACE)
    np.save(tmp_path / "one.npy", KSPACE[0])
    scipy.io.savemat(tmp_path / "b.mat", {"kdata": KSPACE.transpose(2, 3, 1, 0), "te": 3.0})
    scipy.io.savemat(tmp_path / "flat.mat", {"kdata": KSPACE[0, 0]})
    np.testing.assert_array_equal(whole(open_raw(write_bart(tmp_path / "c", bart_of(KSPACE)))), KSPACE)
    np.testing.assert_array_equal(whole(open_raw(tmp_path / "a.npy")), KSPACE)
    np.testing.assert_array_equal(whole(open_raw(tmp_path / "one.npy")), KSPACE[:1])
    np.testing.assert_array_equal(whole(open_raw(tmp_path / "b.mat")), KSPACE)
    np.testing.assert_array_equal(whole(open_raw(tmp_path / "flat.mat")), KSPACE[:1, :1])


def test_matlab_7_3_is_hdf5(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        stored = KSPACE.transpose(2, 3, 1, 0).T
        pair = np.empty(stored.shape, [("real", "<f4"), ("imag", "<f4")])
        pair["real"], pair["imag"] = stored.real, stored.imag
        file["kdata"] = pair
    np.testing.assert_array_equal(whole(open_raw(tmp_path / "a.mat")), KSPACE)


@pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")
def test_bart_reads_and_writes_the_same_pairs(tmp_path: Path) -> None:
    """BART's own phantom, by its own transform: the reader gives k-space whose image BART shows, too."""

    def bart(*words: str) -> str:
        return subprocess.run(["bart", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    bart("phantom", "-x", "24", "-s", "4", "-k", "k")
    bart("fft", "-u", "-i", "3", "k", "x")
    raw = open_raw(tmp_path / "k.cfl")
    assert raw.shape == (1, 4, 24, 24)
    images = np.fromfile(tmp_path / "x.cfl", "<c8").reshape((24, 24, 4), order="F").transpose(2, 0, 1)
    close(transformed(images), raw.kspace(0))
    with pytest.raises(DataError, match="no centred k-space"):
        open_raw(tmp_path / "x.cfl")
    write_bart(tmp_path / "w", bart_of(KSPACE))
    assert bart("show", "-d", "3", "w").strip() == "3"
    assert bart("show", "-d", "13", "w").strip() == "2"
    bart("slice", "13", "1", "3", "2", "w", "s")
    np.testing.assert_array_equal(open_raw(tmp_path / "s.cfl").kspace(0)[0], KSPACE[1, 2])


@pytest.mark.data("kspace")
def test_real_scans_are_read() -> None:
    """Fully sampled, and their images are of a head and of a knee: bright in the middle, dark at the corners."""
    folder = root_folder() / "kspace"
    for name, shape in (("larsonlab_se_t1_sag_brain", (256, 256)), ("larsonlab_coronal_fatsat_2D_knee", (332, 640))):
        raw = open_raw(folder / f"{name}.mat")
        assert raw.shape == (1, 1, *shape)
        kspace = raw.kspace(0)
        assert fully_sampled(raw.mask(0, kspace))
    refused(folder / "gpunufft_img_brain_4ch.mat", "far from its middle")
    poisson = open_raw(folder / "sigpy_brain8ch_poisson.npy")
    assert not fully_sampled(measured(poisson.kspace(0)))


# What is refused


def _h5(path: Path, **sets: Any) -> Path:
    import h5py

    with h5py.File(path, "w") as file:
        for name, value in sets.items():
            file[name] = value
    return path


def _cut(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def _nan(path: Path) -> Path:
    bad = KSPACE.copy()
    bad[0, 0, 3, 3] = np.nan
    np.save(path, bad)
    return path


def _nothing() -> Any:
    import h5py

    return h5py.Empty("<c8")


def _copied(path: Path, other: Path) -> Path:
    """A file with the measurement of another as its second."""
    import h5py

    with h5py.File(path, "a") as file, h5py.File(other, "r") as source:
        source.copy("dataset", file, "dataset_2")
    return path


def _header_of_numpy(path: Path) -> Path:
    """An open bracket more, which NumPy's own reader does not catch."""
    np.save(path, KSPACE)
    path.write_bytes(path.read_bytes().replace(b"False", b"Fal(e"))
    return path


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated fastMRI": (lambda d: _cut(write_fastmri(d / "a.h5", IMAGES)), "damaged or cut short"),
    "truncated ISMRMRD": (lambda d: _cut(write_ismrmrd(d / "a.h5", HEADER, scanned(RAW))), "damaged or cut short"),
    "truncated BART": (lambda d: _cut(write_bart(d / "a", bart_of(KSPACE))), "was cut short"),
    "foreign HDF5": (lambda d: _h5(d / "a.h5", images=np.zeros(3)), "neither fastMRI's `kspace` nor ISMRMRD's"),
    "real fastMRI": (lambda d: _h5(d / "a.h5", kspace=np.zeros((2, 3, 4, 4))), "must be complex"),
    "empty fastMRI": (lambda d: _h5(d / "a.h5", kspace=KSPACE[:0]), "is empty"),
    "other reference": (
        lambda d: _h5(d / "a.h5", kspace=KSPACE, reconstruction_rss=np.zeros((3, 4, 4))),
        "other slices than its k-space",
    ),
    "complex reference": (
        lambda d: _h5(d / "a.h5", kspace=KSPACE, reconstruction_rss=KSPACE[:, 0]),
        "is complex, or has other slices",
    ),
    "a group called kspace": (lambda d: _h5(d / "a.h5", **{"kspace/a": KSPACE}), "damaged or cut short"),
    "kspace without values": (lambda d: _h5(d / "a.h5", kspace=_nothing()), "of shape \\(\\)"),
    "other mask": (lambda d: _h5(d / "a.h5", kspace=KSPACE, mask=np.ones(5)), "5 columns and its k-space 32"),
    "no HDF5": (lambda d: (d / "a.h5").write_bytes(b"text") and d / "a.h5", "damaged or cut short"),
    "EPI": (
        lambda d: write_ismrmrd(d / "a.h5", xml((64, 32, 1), trajectory="epi"), scanned(RAW)),
        "EPI need a phase correction",
    ),
    "no images": (lambda d: write_ismrmrd(d / "a.h5", HEADER, [readout(RAW[0, :, :, 0], flags=[19])]), "no readout"),
    "mixed coils": (
        lambda d: write_ismrmrd(d / "a.h5", HEADER, [*scanned(RAW), *scanned(RAW[:, :2])]),
        "differ in their coils",
    ),
    "mixed samples": (
        lambda d: write_ismrmrd(d / "a.h5", HEADER, [*scanned(RAW), *scanned(RAW[:, :, :16])]),
        "differ in their number of samples",
    ),
    "oversampling removed, header as before": (
        lambda d: write_ismrmrd(d / "a.h5", HEADER, scanned(KSPACE)),
        "write 32 as its matrixSize.x",
    ),
    "two measurements": (
        lambda d: _copied(*(write_ismrmrd(d / name, HEADER, scanned(RAW)) for name in ("a.h5", "b.h5"))),
        "holds 2 measurements",
    ),
    "lines beyond": (
        lambda d: write_ismrmrd(d / "a.h5", HEADER, [readout(RAW[0, :, :, 0], line=SIZE)]),
        "its header says 32",
    ),
    "foreign header": (lambda d: write_ismrmrd(d / "a.h5", "<a/>", scanned(RAW)), "no ISMRMRD header"),
    "entities": (
        lambda d: write_ismrmrd(d / "a.h5", "<!DOCTYPE a [<!ENTITY b 'c'>]>" + HEADER, scanned(RAW)),
        "no ISMRMRD header",
    ),
    "BART's echoes": (lambda d: write_bart(d / "a", np.ones((4, 4, 1, 1, 1, 2))), "bart slice"),
    "BART's spokes": (lambda d: write_bart(d / "a", np.ones((1, 8, 5, 2))), "trajectory"),
    "NaN": (lambda d: _nan(d / "a.npy"), "NaN or infinite"),
    "coils last": (lambda d: np.save(d / "a.npy", KSPACE[0].T) or d / "a.npy", "more coils"),
    "coils first in MATLAB": (
        lambda d: scipy.io.savemat(d / "a.mat", {"a": np.roll(KSPACE[0], -14, 2)}) or d / "a.mat",
        "axes must be \\(H, W, coils\\)",
    ),
    "two arrays": (
        lambda d: scipy.io.savemat(d / "a.mat", {"a": KSPACE[0, 0], "b": KSPACE[0, 1]}) or d / "a.mat",
        "2 complex arrays",
    ),
    "images in MATLAB": (
        lambda d: scipy.io.savemat(d / "a.mat", {"a": np.roll(KSPACE[0, 0], 16, 0)}) or d / "a.mat",
        "no centred k-space",
    ),
    "images in NumPy": (lambda d: np.save(d / "a.npy", np.roll(KSPACE[0], 16, 1)) or d / "a.npy", "no centred k-space"),
    "images in BART": (lambda d: write_bart(d / "a", bart_of(np.roll(KSPACE, 16, 2))), "no centred k-space"),
    "empty MATLAB": (lambda d: (d / "a.mat").touch() or d / "a.mat", "damaged or none"),
    "empty NumPy": (lambda d: (d / "a.npy").touch() or d / "a.npy", "is empty"),
    "no NumPy": (lambda d: (d / "a.npy").write_bytes(b"text") and d / "a.npy", "not a NumPy array"),
    "truncated NumPy": (lambda d: _cut(np.save(d / "a.npy", KSPACE) or d / "a.npy"), "cut short"),
    "NumPy's header": (lambda d: _header_of_numpy(d / "a.npy"), "damaged, or holds Python objects"),
    "k-space called k": (
        lambda d: scipy.io.savemat(d / "a.mat", {"k": KSPACE.T, "b": KSPACE[0, 1]}) or d / "a.mat",
        "give k-space another name",
    ),
    "no MATLAB": (lambda d: (d / "a.mat").write_bytes(b"0" * 600) and d / "a.mat", "damaged or none"),
    "unknown": (lambda d: (d / "a.dat").write_bytes(b"0") and d / "a.dat", "no raw data that is known"),
    "missing": (lambda d: d / "a.h5", "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    refused(make(tmp_path), message)


def test_zeros_are_said_where_a_file_has_no_mask_of_its_own(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros_like(KSPACE))
    raw = open_raw(tmp_path / "a.npy")
    with pytest.raises(DataError, match="nothing but zeros"):
        raw.mask(0, raw.kspace(0))


def test_a_header_of_bart_alone_is_refused(tmp_path: Path) -> None:
    base = write_bart(tmp_path / "a", bart_of(KSPACE))
    base.with_suffix(".hdr").unlink()
    with pytest.raises(DataError, match=r"header \(\.hdr\) of a BART file"):
        open_raw(base)


def test_a_header_that_names_its_patient_is_found(tmp_path: Path) -> None:
    named = HEADER.replace("<patientID>", "<patientName>Doe^John</patientName><patientID>")
    write_ismrmrd(tmp_path / "a.mrd", named, scanned(RAW[:1]))
    write_fastmri(tmp_path / "b.h5", IMAGES, patient="P1")
    (tmp_path / "c.h5").write_bytes(b"cut")
    _copied(write_ismrmrd(tmp_path / "d.h5", HEADER, scanned(RAW[:1])), tmp_path / "a.mrd")
    found = lint_folders([tmp_path]).findings
    assert {(one.level.value, one.what) for one in found.counts} >= {
        ("refuse", "raw data: patientName is filled"),
        ("warn", "raw data: patientID is filled"),
        ("note", "raw data: patient_id is filled"),
        ("warn", "raw data: a file cannot be read, so it was not looked through"),
    }
    assert found.counts[Finding(Level.REFUSE, "raw data: patientName is filled")] == 2
    assert "Doe" not in "".join(found.lines())


# Sampling, sites


def test_gaps_make_a_scan_undersampled_and_margins_do_not() -> None:
    whole = np.ones((20, 20), np.float32)
    assert fully_sampled(whole)
    y, x = np.mgrid[-1:1:20j, -1:1:20j]
    assert fully_sampled((x**2 + y**2 < 1).astype(np.float32))
    edge, lines, point = whole.copy(), whole.copy(), np.ones((64, 64), np.float32)
    echo, calibration = whole.copy(), np.zeros((20, 20), np.float32)
    edge[:, :3], edge[:, -3:], lines[:, 3], point[5, 5], echo[:6], calibration[:, 8:12] = 0, 0, 0, 0, 0, 1
    assert fully_sampled(edge)
    assert not fully_sampled(lines)
    assert fully_sampled(point)
    assert fully_sampled(echo)
    assert not fully_sampled(echo.T)
    assert not fully_sampled(calibration)
    assert not fully_sampled(np.zeros((4, 4), np.float32))
    assert all(fully_sampled(np.ones((side, side), np.float32)) for side in range(1, 9))


@pytest.mark.parametrize("width", [8, 9])
def test_turning_an_image_round_turns_its_kspace_round(width: int) -> None:
    random = np.random.default_rng(0)
    image = random.standard_normal((2, 6, width, 2)).view(np.complex128)[..., 0].astype(np.complex64)
    close(transformed(mirrored(image)), mirrored(transformed(image)))


def test_headers_and_folders_say_whose_a_file_is(tmp_path: Path) -> None:
    for name, patient in (("a", "P1"), ("b", "P2"), ("c", "P1")):
        write_fastmri(tmp_path / "A" / f"{name}.h5", IMAGES, patient=patient)
    np.save(tmp_path / "A" / "d.npy", KSPACE)
    folder = RawFolder(tmp_path / "A", "A")
    assert folder.names == ("P1", "P2", "d")
    assert [len(folder.files(n)) for n in range(3)] == [2, 1, 1]
    before = folder.digest(2)
    (tmp_path / "A" / "d.npy").rename(tmp_path / "A" / "e.npy")
    assert RawFolder(tmp_path / "A", "A").digest(2) == before
    for name in ("one", "two"):
        write_fastmri(tmp_path / "B" / name / "a.h5", IMAGES, patient="P1")
    with pytest.raises(DataError, match="two folders name one patient"):
        RawFolder(tmp_path / "B", "B")
    (tmp_path / "C").mkdir()
    with pytest.raises(DataError, match="no patient found"):
        RawFolder(tmp_path / "C", "C")


def test_a_folder_is_a_site_or_one_of_sites(tmp_path: Path) -> None:
    for place in ("A/1.npy", "A/2.npy", "B/x/1.npy", "B/y/1.npy"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / place, KSPACE)
    assert [path.name for path in raw_sites(tmp_path)] == ["A", "B"]
    assert raw_sites(tmp_path / "A") == [tmp_path / "A"]
    assert raw_sites(tmp_path / "B") == [tmp_path / "B"]
    (tmp_path / "A" / "2.npy").write_bytes(b"")
    found = summarise_raw(tmp_path / "A")
    assert (found.patients, found.files, found.full, found.sizes) == (2, 1, 1, {(SIZE, SIZE): 1})
    assert len(found.problems) == 1
