"""NIfTI in and out, and every way a file can be unusable."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from wardround.errors import DataError
from wardround.imaging.readers.volume import Volume, read_volume, write_nifti

AFFINE = np.array([[0, 2.0, 0, -5], [-2.0, 0, 0, 7], [0, 0, 3.0, 1], [0, 0, 0, 1]])
RAMP = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)


def save(array: np.ndarray, path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    return path


@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    write_nifti(Volume(RAMP, (2.0, 2.0, 3.0), AFFINE), tmp_path / "P1" / name, np.uint8)
    volume = read_volume(tmp_path / "P1" / name)
    np.testing.assert_array_equal(volume.data, RAMP)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.data.dtype == np.float32
    assert volume.spacing == (2.0, 2.0, 3.0)
    assert [path.name for path in (tmp_path / "P1").iterdir()] == [name]


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(Volume(RAMP, (2.0, 2.0, 3.0), AFFINE), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.nii.gz"
    write_nifti(Volume(RAMP, (2.0, 2.0, 3.0), AFFINE), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(nibabel, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_nifti(Volume(RAMP * 2, (2.0, 2.0, 3.0), AFFINE), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not fit the type uint8"):
        write_nifti(Volume(RAMP + 0.5, (1.0, 1.0, 1.0), AFFINE), tmp_path / "x.nii", np.uint8)


def test_a_single_frame_is_squeezed(tmp_path: Path) -> None:
    assert read_volume(save(RAMP[..., None], tmp_path / "a.nii")).data.shape == (4, 5, 3)


def test_scale_factors_are_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(RAMP.astype(np.int16), AFFINE)
    image.header.set_slope_inter(2.0, 10.0)
    nibabel.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").data, 2 * RAMP + 10)


def bad(kind: str, folder: Path) -> Path:
    path = folder / "MUELLER_HANS.nii.gz"
    if kind == "nan":
        broken = RAMP.copy()
        broken[0, 0, 0] = np.nan
        return save(broken, path)
    if kind == "infinite":
        return save(np.where(RAMP > 3, np.inf, RAMP), path)
    if kind == "constant":
        return save(np.full_like(RAMP, 7), path)
    if kind == "frames":
        return save(np.stack([RAMP, RAMP], axis=3), path)
    if kind == "flat":
        return save(RAMP[..., 0], path)
    if kind == "complex":
        return save(RAMP.astype(np.complex64), path)
    if kind == "coloured":
        return save(np.zeros((4, 5, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), path)
    if kind == "truncated":
        noise = np.random.default_rng(0).normal(size=(32, 32, 8)).astype(np.float32)
        data = save(noise, path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data = bytearray(save(RAMP, path).read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(bytes(data))
    elif kind == "text":
        path.write_bytes(b"not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nan", "NaN or infinite"),
        ("infinite", "NaN or infinite"),
        ("constant", "constant"),
        ("frames", "not 3-D"),
        ("flat", "not 3-D"),
        ("complex", "complex or coloured"),
        ("coloured", "complex or coloured"),
        ("truncated", "damaged"),
        ("flipped", "damaged"),
        ("text", "damaged"),
        ("empty", "damaged"),
        ("absent", "does not exist"),
    ],
)
def test_unusable_files_are_refused_without_naming_the_patient(tmp_path: Path, kind: str, expected: str) -> None:
    path = bad(kind, tmp_path)
    with pytest.raises(DataError, match=expected) as caught:
        read_volume(path)
    assert "MUELLER" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert "MUELLER" in caught.value.detail
