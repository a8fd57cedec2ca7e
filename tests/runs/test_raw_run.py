"""From the files that scanners write to a federated model, and back to a file that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

import wardround
from tests.applied import reconstruct
from tests.raw_files import (
    SIZE,
    coil_images,
    padded_rows,
    scanned,
    transformed,
    write_bart,
    write_fastmri,
    write_ismrmrd,
    xml,
)
from wardround.federation.release import FORMAT
from wardround.imaging.propose import propose_study
from wardround.study.load import load_study
from wardround.tasks.mri_raw import RawMRIReconstruction

LINES = np.flatnonzero((np.arange(SIZE) % 3 == 0) | (np.abs(np.arange(SIZE) - SIZE // 2) < 4)).tolist()


def hospitals(root: Path, patients: int = 3) -> Path:
    """Alpha with fastMRI's files of three coils, Beta with ISMRMRD's of four."""
    for number in range(patients):
        write_fastmri(root / "Alpha" / f"{number}.h5", coil_images(number, 1), patient=f"P{number}")
        images = coil_images(20 + number, 1, coils=4)
        header = xml((2 * SIZE, SIZE, 1), recon=(SIZE, SIZE, 1))
        readouts = scanned(transformed(padded_rows(images, 2 * SIZE)))
        write_ismrmrd(root / "Beta" / f"patient-{number}" / "scan.mrd", header, readouts)
    return root


def held_out(folder: Path) -> dict[str, Path]:
    """One undersampled scan of five coils, which no site has, in each format."""
    kspace = transformed(coil_images(99, 2, coils=5))
    kept = np.zeros(SIZE)
    kept[LINES] = 1
    kspace = kspace * kept
    np.save(folder / "numpy.npy", kspace.astype(np.complex64))
    raw = transformed(padded_rows(coil_images(99, 2, coils=5), 2 * SIZE))
    header = xml((2 * SIZE, SIZE, 1), recon=(SIZE, SIZE, 1))
    return {
        "numpy": folder / "numpy.npy",
        "bart": write_bart(folder / "bart", kspace.transpose(2, 3, 1, 0).reshape(SIZE, SIZE, 1, 5, *[1] * 9, 2)),
        "fastmri": write_fastmri(folder / "fastmri.h5", coil_images(99, 2, coils=5), mask=kept, reference=False),
        "ismrmrd": write_ismrmrd(folder / "ismrmrd.mrd", header, scanned(raw, LINES)),
    }


def settings(root: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    study = {
        "name": "raw",
        "sites": {"Alpha": {}, "Beta": {}},
        "acquisition": {"kind": "mri_raw", "mask": {"acceleration": 2, "calibration": 0.25}},
        "task": {
            "size": [SIZE, SIZE],
            "evaluation": {"tuning_slices": 1, "slices": {"per_patient": 1}, "baselines": ["zero_filled"]},
        },
        "model": {"preset": "tiny", "image": "complex"},
        "local": {"steps": 1},
        "schedule": {"rounds": 1},
        **changes,
    }
    return study, {"sites": {name: {"data": str(root / name)} for name in ("Alpha", "Beta")}}


def trained(tmp_path: Path, *, compare: list[str] | None = None, **changes: Any) -> Any:
    study, sites = settings(hospitals(tmp_path / "data"), **changes)
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(sites), encoding="utf-8")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    out = tmp_path / "out"
    return wardround.run(
        tmp_path / "study.yaml", tmp_path / "sites.yaml", out, compare=compare or [], engine="local", quiet=True
    )


def test_a_step_is_trained_on_one_format_and_another_is_reconstructed(tmp_path: Path) -> None:
    """Without a run: a loss of a site's batch, and the model's file applied to a scan of another number of coils."""
    study = load_study(settings(tmp_path)[0])
    for number in range(3):
        write_fastmri(tmp_path / "Alpha" / f"{number}.h5", coil_images(number, 1))
    task = RawMRIReconstruction(study)
    torch.manual_seed(0)
    model = task.build_model()
    task.loss(model, task.dataset("Alpha", tmp_path / "Alpha").batch([0], np.random.default_rng(0))).backward()
    gradients = [value.grad for value in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": FORMAT, "study": study.model_dump_json()})
    said = reconstruct(tmp_path / "m.safetensors", held_out(tmp_path)["ismrmrd"], tmp_path / "out.nii.gz")
    assert "2 slices of 32 x 32 from k-space of 5 coils (ISMRMRD), voxels of 2 x 2 x 5 mm by its header" in said
    assert "Trained on the raw data of Alpha (2× random of full raw data)" in said
    assert nib.load(tmp_path / "out.nii.gz").header.get_zooms() == (2.0, 2.0, 5.0)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_hospitals_train_on_their_scanners_files(tmp_path: Path) -> None:
    result = trained(tmp_path)
    assert result.metrics["federated"]["mean"]["psnr"].value > 10
    (tmp_path / "held").mkdir()
    source = held_out(tmp_path / "held")["ismrmrd"]
    (done,) = wardround.reconstruct(tmp_path / "out/models/federated.safetensors", source, tmp_path / "out.nii.gz")
    image = nib.load(done.output)  # type: ignore[attr-defined]
    assert image.shape == (SIZE, SIZE, 2)
    assert image.header.get_zooms() == (2.0, 2.0, 5.0)
    assert "Trained on the raw data of Alpha (2× random of full raw data)" in done.said
    assert "5 coils (ISMRMRD), voxels of 2 x 2 x 5 mm by its header" in done.said
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Raw data measured by scanners." in report
    assert "Simulated acquisitions" not in report


@pytest.mark.slow
def test_every_format_of_one_scan_gives_one_image(tmp_path: Path) -> None:
    result = trained(tmp_path, compare=["local", "pooled"], local={"steps": 8}, schedule={"rounds": 3})
    mean = result.metrics["federated"]["mean"]["psnr"].value
    assert mean > result.metrics["zero_filled"]["mean"]["psnr"].value - 0.5
    assert "pooled" in result.metrics
    (tmp_path / "held").mkdir()
    files = held_out(tmp_path / "held")
    model = tmp_path / "out/models/federated.safetensors"
    done = wardround.reconstruct(model, list(files.values()), tmp_path / "images")
    images = [np.asarray(nib.load(one.output).dataobj) for one in done]  # type: ignore[attr-defined]
    for image in images[1:]:
        np.testing.assert_allclose(image, images[0], atol=1e-3 * images[0].max())
    assert np.corrcoef(images[0][..., 0].ravel(), _truth()[0].ravel())[0, 1] > 0.9


def _truth() -> np.ndarray:
    return np.sqrt((np.abs(coil_images(99, 2, coils=5)) ** 2).sum(1))


@pytest.mark.slow
def test_a_run_that_is_repeated_and_one_that_is_resumed_are_the_same(tmp_path: Path) -> None:
    first = trained(tmp_path / "one")
    again = trained(tmp_path / "two")
    assert first.model_sha256 == again.model_sha256
    assert trained(tmp_path / "two").model_sha256 == first.model_sha256


@pytest.mark.slow
def test_scans_without_any_true_image_train(tmp_path: Path) -> None:
    """Undersampled as measured, no reference in any file: sites learn from samples that are held out."""
    kept = np.zeros(SIZE)
    kept[LINES] = 1
    for site in ("Alpha", "Beta"):
        for number in range(3):
            images = coil_images(number + 50 * (site == "Beta"), 1)
            write_fastmri(tmp_path / "data" / site / f"{number}.h5", images, mask=kept, reference=False)
    study, sites = propose_study(tmp_path / "data")
    changed = {**yaml.safe_load(study), "local": {"steps": 1}, "schedule": {"rounds": 1}}
    assert changed["acquisition"]["reference"] == "none"
    changed["model"]["preset"] = "tiny"
    for name, content in (("study", changed), ("sites", yaml.safe_load(sites))):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    files = (tmp_path / "study.yaml", tmp_path / "sites.yaml")
    result = wardround.run(*files, tmp_path / "out", engine="local", quiet=True)
    assert 0 < result.metrics["federated"]["mean"]["kspace_residual"].value < 10


def test_a_proposed_study_takes_files_as_most_of_them_are_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    kept = np.zeros(SIZE)
    kept[LINES] = 1
    for number in range(4):
        mask = None if number == 0 else kept
        write_fastmri(tmp_path / "Alpha" / f"{number}.h5", coil_images(number, 1), mask=mask, patient=f"P{number}")
    np.save(tmp_path / "Alpha" / "4.npy", np.zeros((2, SIZE, SIZE), np.complex64))
    study, _ = propose_study(tmp_path)
    assert yaml.safe_load(study)["acquisition"]["sampling"] == "own"
    assert "1 of 4 files are full scans, which this study leaves out; 1 more cannot be read" in study
    for number in (2, 3):
        write_fastmri(tmp_path / "Alpha" / f"{number}.h5", coil_images(number, 1), patient=f"P{number}")
    study, _ = propose_study(tmp_path)
    assert yaml.safe_load(study)["acquisition"]["sampling"] == "retrospective"
    assert "1 of 4 files are no full scans" in study


@pytest.mark.slow
def test_a_proposed_study_is_one_that_runs(tmp_path: Path) -> None:
    study, sites = propose_study(hospitals(tmp_path / "data"))
    read = yaml.safe_load(study)
    assert read["acquisition"]["kind"] == "mri_raw"
    assert read["task"]["size"] == [SIZE, SIZE]
    assert set(yaml.safe_load(sites)["sites"]) == {"Alpha", "Beta"}
    (tmp_path / "study.yaml").write_text(study, encoding="utf-8")
    (tmp_path / "sites.yaml").write_text(sites, encoding="utf-8")
    from wardround.runs.explain import explain

    said = explain(tmp_path / "study.yaml", tmp_path / "sites.yaml", [], [])
    assert "reconstruction of MRI raw data, 32 x 32 pixels" in said
    assert "4× random of full raw data" in " ".join(said.split())


@pytest.mark.slow
def test_a_model_of_raw_data_takes_no_images_and_one_of_images_takes_raw_data(tmp_path: Path) -> None:
    trained(tmp_path)
    nib.save(nib.Nifti1Image(np.ones((SIZE, SIZE, 1), np.float32), np.eye(4)), tmp_path / "a.nii.gz")  # type: ignore[no-untyped-call]
    model = tmp_path / "out/models/federated.safetensors"
    with pytest.raises(wardround.errors.StudyError, match="was trained on raw data and takes raw data"):
        wardround.reconstruct(model, tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
