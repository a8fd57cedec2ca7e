"""Inspecting, proposing and converting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wardround.errors import DataError
from wardround.imaging.convert import convert_lgg, inspect_path
from wardround.imaging.readers.volume import Volume, read_volume, write_nifti

MakeSite = Callable[..., Path]


def fake_download(root: Path, cases: tuple[str, ...], slices: int = 2) -> Path:
    for seed, case in enumerate(cases):
        random = np.random.default_rng(seed)
        folder = root / "kaggle_3m" / case
        folder.mkdir(parents=True)
        for number in range(1, slices + 1):
            image = random.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            mask = np.zeros((256, 256), dtype=np.uint8)
            mask[100:121, 60:80] = 255
            Image.fromarray(image).save(folder / f"{case}_{number}.tif")
            Image.fromarray(mask).save(folder / f"{case}_{number}_mask.tif")
    (root / "kaggle_3m" / "data.csv").write_text("Patient,age\n")
    return root


def test_lgg_becomes_sites_and_patients(tmp_path: Path) -> None:
    cases = ("TCGA_CS_4941_19960909", "TCGA_DU_5849_19950405", "TCGA_CS_4942_19970222")
    report = convert_lgg(fake_download(tmp_path / "in", cases, slices=11), tmp_path / "lgg")
    assert report.patients == {"CS": 2, "DU": 1}
    assert report.without_t1ce == 0
    assert (tmp_path / "lgg" / "clinical.csv").read_text() == "Patient,age\n"
    patient = tmp_path / "lgg" / "CS" / "TCGA_CS_4941"
    assert sorted(path.name for path in patient.iterdir()) == ["flair.nii.gz", "seg.nii.gz", "t1ce.nii.gz"]
    source = Image.open(tmp_path / "in" / "kaggle_3m" / cases[0] / f"{cases[0]}_10.tif")
    pixels = np.asarray(source, dtype=np.float64)
    for name, channel in (("flair", 1), ("t1ce", 2)):
        volume = read_volume(patient / f"{name}.nii.gz").data
        assert volume.shape == (128, 128, 11)
        expected = pixels[20:22, 40:42, channel].mean()
        assert abs(volume[10, 20, 9] - expected) <= 0.5
    seg = read_volume(patient / "seg.nii.gz").data
    assert set(np.unique(seg)) == {0, 1}
    assert seg[:, :, 0].sum() == 11 * 10


def test_lgg_counts_patients_whose_t1ce_is_flair(tmp_path: Path) -> None:
    case = "TCGA_HT_7473_19970826"
    download = fake_download(tmp_path / "in", (case,))
    for number in (1, 2):
        path = download / "kaggle_3m" / case / f"{case}_{number}.tif"
        pixels = np.asarray(Image.open(path)).copy()
        pixels[..., 2] = pixels[..., 1]
        Image.fromarray(pixels).save(path)
    assert convert_lgg(download / "kaggle_3m", tmp_path / "lgg").without_t1ce == 1


@pytest.mark.parametrize("fault", ["no cases", "no mask", "shape", "damaged"])
def test_lgg_faults_are_named_without_the_patient(tmp_path: Path, fault: str) -> None:
    case = "TCGA_CS_4941_19960909"
    download = (
        fake_download(tmp_path / "in", () if fault == "no cases" else (case,)) if fault != "no cases" else tmp_path
    )
    folder = download / "kaggle_3m" / case
    if fault == "no mask":
        (folder / f"{case}_2_mask.tif").unlink()
    if fault == "shape":
        Image.fromarray(np.zeros((128, 128, 3), dtype=np.uint8)).save(folder / f"{case}_2.tif")
    if fault == "damaged":
        (folder / f"{case}_2.tif").write_bytes(b"II*\x00")
    with pytest.raises(DataError) as caught:
        convert_lgg(download, tmp_path / "lgg")
    assert "4941" not in str(caught.value)
    assert "download" in str(caught.value)


def test_a_folder_of_sites_is_summarised_without_patients(make_site: MakeSite, tmp_path: Path) -> None:
    make_site("CS", 3)
    make_site("DU", 2, size=(40, 32))
    (tmp_path / "DU" / "MUELLER_0001" / "t1ce.nii.gz").write_bytes(b"broken")
    (tmp_path / "CS" / "MUELLER_0001" / "flair.nii.gz").rename(tmp_path / "CS" / "MUELLER_0001" / "mueller.nii.gz")
    found = inspect_path(tmp_path)
    assert found.kind == "a folder of 2 sites"
    assert found.sites["CS"].patients == 3
    assert found.sites["CS"].contrasts["flair"] == 2
    assert found.sites["CS"].complete == {"t1ce"}
    assert found.sites["DU"].sizes == {(40, 32): 3}
    assert found.sites["DU"].slices == (5, 5)
    assert len(found.sites["DU"].problems) == 1
    text = str(found)
    assert "site DU: 2 patients" in text
    assert "damaged" in text
    assert "mueller" not in text.lower()


def test_single_files_are_recognised(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site("CS", 1)
    assert "32 x 32 x 5 voxels of 1 x 1 x 4 mm" in str(inspect_path(site / "MUELLER_0000" / "flair.nii.gz"))
    assert inspect_path(site).kind == "a site's folder"
    kspace = np.zeros((2, 8, 8), dtype=np.complex64)
    kspace[:, ::4] = 3 + 4j
    kspace[:, 4, 4] *= 2
    np.save(tmp_path / "k.npy", kspace)
    said = str(inspect_path(tmp_path / "k.npy"))
    assert "NumPy: 1 slice of 8 x 8 samples, 2 coils" in said
    assert "25.0% of a slice measured" in said
    (tmp_path / "bad.nii").write_bytes(b"x")
    assert "damaged" in str(inspect_path(tmp_path / "bad.nii"))
    (tmp_path / "bad.npy").write_bytes(b"x")
    assert "not a NumPy array" in str(inspect_path(tmp_path / "bad.npy"))
    (tmp_path / "none.npy").write_bytes(b"")
    assert "is empty" in str(inspect_path(tmp_path / "none.npy"))
    np.save(tmp_path / "real.npy", np.ones((2, 3)))
    assert "an array of real numbers" in str(inspect_path(tmp_path / "real.npy"))
    (tmp_path / "other.txt").write_text("x")
    assert inspect_path(tmp_path / "other.txt").kind == "unknown"
    with pytest.raises(DataError, match="nothing at the given path"):
        inspect_path(tmp_path / "absent")


def test_an_empty_drawing_is_no_problem(make_site: MakeSite) -> None:
    path = make_site("CS", 2, contrasts=("flair",))
    empty = Volume(np.zeros((32, 32, 5), dtype=np.float32), (1, 1, 1), np.eye(4))
    write_nifti(empty, path / "MUELLER_0000" / "seg.nii.gz", np.uint8)
    assert not inspect_path(path).sites["CS"].problems
