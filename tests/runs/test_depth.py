"""Whether a model says that it is out of its depth, what it writes then, and many inputs at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

import wardround
from tests.mri_hospitals import SIZE, head, save
from wardround.cli import app
from wardround.errors import StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.mri.coils import birdcage_maps, low_resolution_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c
from wardround.imaging.acquisition.solvers import tv
from wardround.models.build import build_model
from wardround.runs.reconstruct import output_names
from wardround.study.load import load_study
from wardround.study.schema import Study

STUDY: dict[str, Any] = {
    "name": "deep",
    "sites": {"Alpha": {}},
    "acquisition": {"coils": 4, "mask": {"calibration": 0.1, "acceleration": 2}},
    "task": {"contrasts": ["flair"], "size": [SIZE, SIZE]},
    # Its images are real: it cannot follow a phase that the coil maps do not carry.
    "model": {"preset": "tiny", "image": "real"},
}


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(STUDY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, study: Study) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model).state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return path


def _kspace(study: Study, *, rough: bool) -> np.ndarray:
    """One slice; where it is `rough`, its phase turns by half a circle every eight pixels."""
    image = torch.from_numpy(head(1, 1)[..., 0].astype(np.float32) / head(1, 1).max())
    signs = torch.from_numpy(np.kron(np.indices((SIZE // 8, SIZE // 8)).sum(0) % 2, np.ones((8, 8)))) * 2 - 1
    signal = (image * signs if rough else image).to(torch.complex64)
    acquisition = study.acquisition_of("Alpha")
    mask = sampling_mask(acquisition.mask, (SIZE, SIZE), np.random.default_rng(0))  # type: ignore[union-attr]
    maps = torch.from_numpy(birdcage_maps(4, (SIZE, SIZE)))
    noise = torch.randn(4, SIZE, SIZE, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    return np.asarray(((fft2c(maps * signal) + 0.007 * noise) * torch.from_numpy(mask)).numpy())


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_network_out_of_its_depth_says_so_and_total_variation_takes_its_place(
    study: Study, model: Path, tmp_path: Path
) -> None:
    files = {}
    for name, rough in (("smooth", False), ("rough", True)):
        files[name] = tmp_path / f"{name}.npy"
        np.save(files[name], _kspace(study, rough=rough))
    calm = _run("reconstruct", model, files["smooth"], tmp_path / "smooth.nii.gz")
    assert (calm.exit_code, "WARNING" in calm.stdout) == (0, False), calm.output
    assert "Unexplained by the image, |Ax - y| / |y|, on 1 of 1 slices" in calm.stdout
    assert "of the same anatomy, scanned as in training: network 0." in calm.stdout
    loud = _run("reconstruct", model, files["rough"], tmp_path / "rough.nii.gz")
    assert "WARNING: the network is out of its depth" in loud.stdout, loud.output
    (found,) = wardround.reconstruct(model, files["rough"], tmp_path / "tv.nii.gz", fallback="tv")
    assert found.out_of_depth
    assert "the image of total variation" in found.said
    assert found.metrics == {}
    # What is written then is total variation's image, with the study's middle weight.
    data = torch.from_numpy(np.load(files["rough"]))[None]
    mask = (data.abs().sum(1) > 0).float()
    operator = CartesianMRI(low_resolution_maps(data, mask), mask)
    peak = operator.A_adjoint(data).abs().amax()
    expected = (tv(operator, data / peak, 0.002)[0].abs() * peak).numpy()
    written = {name: nib.load(tmp_path / f"{name}.nii.gz").get_fdata()[..., 0] for name in ("tv", "rough")}  # type: ignore[attr-defined]
    np.testing.assert_allclose(written["tv"], expected, atol=1e-4 * float(peak))
    assert np.abs(written["rough"] - expected).max() > 0.1 * float(peak)
    (trusted,) = wardround.reconstruct(model, files["smooth"], tmp_path / "kept.nii.gz", fallback="tv")
    assert not trusted.out_of_depth
    assert (tmp_path / "kept.nii.gz").read_bytes() == (tmp_path / "smooth.nii.gz").read_bytes()


def test_an_image_is_its_own_reference(model: Path, tmp_path: Path) -> None:
    save(head(1), tmp_path / "flair.nii.gz")
    (found,) = wardround.reconstruct(str(model), [tmp_path / "flair.nii.gz"], tmp_path / "out")
    assert found.output == tmp_path / "out" / "flair.nii.gz"
    assert set(found.metrics) == {"network", "tv"}
    before, after = (nib.load(path).get_fdata() for path in (found.source, found.output))  # type: ignore[attr-defined]
    errors = ((after - before) / before.max()) ** 2
    of_slices = [-10 * np.log10(errors[..., z].mean()) for z in range(before.shape[2])]
    assert found.metrics["network"]["psnr"] == pytest.approx(np.mean(of_slices), abs=0.1)
    assert "Against the input, on the same slices: network psnr " in found.said
    assert not found.out_of_depth


@pytest.mark.slow
def test_many_inputs_go_into_one_folder_and_what_fails_is_named_at_the_end(model: Path, tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        save(head(1), tmp_path / "in" / patient / "flair.nii.gz")
    np.save(tmp_path / "in" / "k.npy", np.ones((3, SIZE, SIZE), np.float32))
    inputs = [
        tmp_path / "in" / "p1" / "flair.nii.gz",
        tmp_path / "in" / "k.npy",
        tmp_path / "in" / "p2" / "flair.nii.gz",
    ]
    done = _run("reconstruct", model, *inputs, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "1 of 3 inputs could not be used" in done.stderr
    assert "k-space must be complex" in done.stderr
    assert "k.npy" in done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["model.json", "p1_flair.nii.gz", "p2_flair.nii.gz"]
    assert done.stdout.count("Research use only") == 2
    assert "is where results are written: a folder" in _run("reconstruct", model, *inputs).stderr


def test_outputs_are_named_by_what_tells_inputs_apart(tmp_path: Path) -> None:
    assert output_names([tmp_path / "a.nii", tmp_path / "b.nii.gz", tmp_path / "series"]) == [
        "a.nii.gz",
        "b.nii.gz",
        "series.nii.gz",
    ]
    assert output_names([tmp_path / "x" / "1" / "t1.nii", tmp_path / "y" / "1" / "t1.nii"]) == [
        "x_1_t1.nii.gz",
        "y_1_t1.nii.gz",
    ]
    with pytest.raises(StudyError, match="given twice"):
        output_names([tmp_path / "a.nii", tmp_path / "." / "a.nii"])


@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (4, 1), (0, 2), (3, 0)])
def test_units_and_codes_of_a_nifti_file_are_kept(sform: int, qform: int, model: Path, tmp_path: Path) -> None:
    affine = np.array([[0, -2.0, 0, 40], [2.0, 0, 0, -30], [0, 0, 5.0, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(head(1, 1), None)  # type: ignore[no-untyped-call]
    image.set_sform(affine if sform else None, sform)  # type: ignore[no-untyped-call]
    image.set_qform(affine if qform else None, qform)  # type: ignore[no-untyped-call]
    image.header.set_zooms((2.0, 2.0, 5.0))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "in.nii.gz")  # type: ignore[no-untyped-call]
    wardround.reconstruct(model, tmp_path / "in.nii.gz", tmp_path / "out.nii.gz")
    before, after = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("in", "out"))  # type: ignore[attr-defined]
    for key in ("xyzt_units", "sform_code", "qform_code"):
        assert before.header[key] == after.header[key], key
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-5)
    assert after.header.get_zooms() == before.header.get_zooms()
