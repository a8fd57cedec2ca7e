"""A released CT model applied to volumes and to DICOM series; for projections see test_ct_projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.applied import reconstruct
from tests.ct_files import write_series, write_slice
from tests.ct_hospitals import ct_study, save_nifti, thorax
from wardround.errors import DataError, StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.readers.dicom import read_series
from wardround.models.build import build_model
from wardround.study.load import load_study


def _release(path: Path, **changes: Any) -> Path:
    """An untrained model: filtered back projection."""
    study = load_study(ct_study(**changes))
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model, "ct").state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _release(tmp_path / "model.safetensors")


def _read(path: Path) -> Any:
    return nib.load(path)  # type: ignore[attr-defined]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("shift", [pytest.param((0.0, 0.0), marks=pytest.mark.slow), (25.0, -30.0)])
def test_a_volume_comes_back_on_its_own_grid(model: Path, tmp_path: Path, shift: tuple[float, float]) -> None:
    images = [thorax(1, shift=shift), thorax(2, shift=shift)]
    save_nifti(images, tmp_path / "ct.nii.gz")
    said = reconstruct(model, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz")
    assert "2 slices" in said
    assert "24 views" in said
    before, after = _read(tmp_path / "ct.nii.gz"), _read(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(before.affine, after.affine, atol=1e-4)
    assert after.shape == before.shape
    image, truth = after.get_fdata(), before.get_fdata()
    here = _correlation(image, truth)
    assert here > 0.9
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):  # a third of the scanner's pixel aside fits worse
        assert _correlation(np.roll(image, step, axis), truth) < here


@pytest.mark.slow
def test_other_orientations_stay_where_they_are_in_the_room(model: Path, tmp_path: Path) -> None:
    data = np.stack([thorax(1, shift=(20.0, 40.0))], -1)
    affine = np.array([[0, -4.5, 0, 0], [-4.5, 0, 0, 0], [0, 0, 5.0, 0], [0, 0, 0, 1.0]])
    plain = nib.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]
    turned = plain.as_reoriented(nib.orientations.axcodes2ornt(("R", "A", "S"))[[1, 0, 2]])
    nib.save(plain, tmp_path / "plain.nii")
    nib.save(turned, tmp_path / "turned.nii")
    for name in ("plain", "turned"):
        reconstruct(model, tmp_path / f"{name}.nii", tmp_path / f"{name}-out.nii")
    one, other = (nib.as_closest_canonical(_read(tmp_path / f"{n}-out.nii")) for n in ("plain", "turned"))  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)
    np.testing.assert_allclose(one.get_fdata(), other.get_fdata(), atol=0.1)


@pytest.mark.slow
def test_a_dicom_series_becomes_a_derived_series_or_a_volume(model: Path, tmp_path: Path) -> None:
    source = write_series(tmp_path / "series")
    reconstruct(model, source, tmp_path / "derived", site="B")
    reconstruct(model, source, tmp_path / "volume.nii.gz", site="B")
    before, after = read_series(source), read_series(tmp_path / "derived")
    assert after.data.shape == before.data.shape
    assert after.headers[0].PatientID == before.headers[0].PatientID
    assert after.headers[0].SeriesInstanceUID != before.headers[0].SeriesInstanceUID
    np.testing.assert_allclose(after.data, _read(tmp_path / "volume.nii.gz").get_fdata(), atol=0.51)


def test_what_makes_no_sense_is_refused(model: Path, tmp_path: Path) -> None:
    save_nifti([thorax(1)], tmp_path / "ct.nii.gz")
    save_nifti([thorax(1, spacing=7.0, size=80).repeat(2, 0).repeat(2, 1)], tmp_path / "large.nii.gz", spacing=7.0)
    save_nifti([thorax(1) + 1024], tmp_path / "shifted.nii.gz")
    np.save(tmp_path / "k.npy", np.zeros((4, 8, 8), np.complex64))
    for name in ("one.dcm", "IM0001"):
        write_slice(tmp_path / name)
    for source, message in (
        ("large.nii.gz", "the body reaches .* mm"),
        ("shifted.nii.gz", "wrong rescale"),
        ("k.npy", "a model for CT"),
        ("absent.nii.gz", "does not exist"),
        ("absent.dcm", "does not exist"),
        ("one.dcm", "one DICOM file; give the folder of the series"),
        ("IM0001", "one DICOM file; give the folder of the series"),
    ):
        with pytest.raises((DataError, StudyError), match=message):
            reconstruct(model, tmp_path / source, tmp_path / "out.nii.gz")
    everyone = {site: {"acquisition": ct_study()["acquisition"]} for site in "AB"}
    alone = _release(tmp_path / "alone.safetensors", sites=everyone, acquisition={"kind": "mri"})
    with pytest.raises(StudyError, match=r"--site A \| B"):
        reconstruct(alone, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()
