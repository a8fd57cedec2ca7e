"""`--adapt-to-scan`: a released network learns from the scan that it is about to reconstruct, and says so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import wardround
from tests.mri_hospitals import SIZE, head, save
from tests.runs.test_depth import STUDY as ROUGH
from tests.runs.test_depth import _kspace as rough_kspace
from wardround.cli import app
from wardround.errors import StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.models.build import build_model
from wardround.runs.adapting import adapted, checked_steps, splitting
from wardround.runs.depth import look
from wardround.study.load import load_study
from wardround.study.schema import Study

STUDY: dict[str, Any] = {
    "name": "adapted",
    "sites": {"Alpha": {}, "Beta": {"supervision": {"kind": "split", "share": 0.3}}},
    "acquisition": {"coils": 3, "mask": {"calibration": 0.1}},
    "task": {"contrasts": ["flair"], "size": [SIZE, SIZE]},
    "model": {"preset": "tiny"},
}


def _release(path: Path, settings: dict[str, Any]) -> Path:
    """A released model as `wardround run` writes it, untrained: there is something left to learn from a scan."""
    study = load_study(settings)
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model).state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return path


def _kspace(study: Study, slices: int = 2) -> np.ndarray:
    volume = head(1, slices).astype(np.float32) / head(1, slices).max()
    acquisition = study.acquisition_of("Alpha")
    scans = [simulate(volume[..., z], acquisition, np.random.default_rng(z)).kspace for z in range(slices)]
    return torch.stack(scans).numpy()


def _label(path: Path) -> str:
    return nib.load(path).header["descrip"].tobytes().rstrip(b"\0").decode()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.slow
def test_an_adapted_image_says_so_is_the_same_again_and_leaves_the_release_as_it_was(tmp_path: Path) -> None:
    model = _release(tmp_path / "model.safetensors", STUDY)
    before = hashlib.sha256(model.read_bytes()).hexdigest()
    np.save(tmp_path / "scan.npy", _kspace(load_study(STUDY)))
    np.save(tmp_path / "named-otherwise.npy", _kspace(load_study(STUDY)))
    (plain,) = wardround.reconstruct(model, tmp_path / "scan.npy", tmp_path / "plain.nii.gz")
    (done,) = wardround.reconstruct(model, tmp_path / "scan.npy", tmp_path / "one.nii.gz", adapt_to_scan=15)
    fit = done.fit
    assert plain.fit is None
    assert "Adapted" not in plain.said
    assert _label(plain.output) == ""
    assert fit is not None
    assert 0 < fit.kept <= fit.steps <= 15
    assert fit.slices == 2
    assert fit.after < fit.before
    assert fit.said in done.said.splitlines()
    assert _label(done.output) == f"Network adapted to this scan: step {fit.kept} of {fit.steps}"
    told = json.loads((tmp_path / "one.model.json").read_text())
    assert told.pop("adapted_to_scan") == {"one.nii.gz": fit.to_json()}
    assert told == json.loads((tmp_path / "plain.model.json").read_text())
    images = [nib.load(one.output).get_fdata() for one in (plain, done)]  # type: ignore[attr-defined]
    assert not np.array_equal(*images)
    # By the command, of two files: each has its own, of the released network, whatever its name.
    paths = [tmp_path / "scan.npy", tmp_path / "named-otherwise.npy"]
    arguments = ["predict", model, *paths, "--out", tmp_path / "out", "--adapt-to-scan", 15]
    said = CliRunner().invoke(app, [str(one) for one in arguments])
    assert said.exit_code == 0, said.output
    assert said.stdout.count(fit.said) == 2
    for path in paths:
        assert (tmp_path / "out" / f"{path.stem}.nii.gz").read_bytes() == done.output.read_bytes()
    told = json.loads((tmp_path / "out" / "model.json").read_text())["adapted_to_scan"]
    assert told == {f"{path.stem}.nii.gz": fit.to_json() for path in paths}
    assert hashlib.sha256(model.read_bytes()).hexdigest() == before


@pytest.mark.slow
def test_simulated_scans_are_adapted_to(tmp_path: Path) -> None:
    model = _release(tmp_path / "model.safetensors", STUDY)
    save(head(1, 1), tmp_path / "flair.nii.gz")
    (done,) = wardround.reconstruct(model, tmp_path / "flair.nii.gz", tmp_path / "out.nii.gz", adapt_to_scan=1)
    assert done.fit is not None
    assert done.fit.steps == 1


@pytest.mark.slow
def test_total_variation_still_takes_the_place_of_an_adapted_network_out_of_its_depth(tmp_path: Path) -> None:
    model = _release(tmp_path / "model.safetensors", ROUGH)
    np.save(tmp_path / "rough.npy", rough_kspace(load_study(ROUGH), rough=True))
    for name, steps in (("adapted", 1), ("released", None)):
        (done,) = wardround.reconstruct(
            model, tmp_path / "rough.npy", tmp_path / f"{name}.nii.gz", fallback="tv", adapt_to_scan=steps
        )
        assert done.out_of_depth
    assert (tmp_path / "adapted.nii.gz").read_bytes() == (tmp_path / "released.nii.gz").read_bytes()
    assert _label(tmp_path / "adapted.nii.gz") == ""


@pytest.mark.slow
def test_a_scan_of_too_few_samples_is_one_error_and_nothing_is_written(tmp_path: Path) -> None:
    model = _release(tmp_path / "model.safetensors", STUDY)
    kspace = _kspace(load_study(STUDY), 1)
    lines = np.zeros(SIZE, np.float32)
    for others, message in (([], "0 lines"), ([50], "1 lines")):
        lines[[*range(29, 35), *others]] = 1
        np.save(tmp_path / "few.npy", np.where(lines, kspace + 1e-3, 0))
        with pytest.raises(StudyError, match=f"--adapt-to-scan: {message} of a slice were measured outside"):
            wardround.reconstruct(model, tmp_path / "few.npy", tmp_path / "out" / "few.nii.gz", adapt_to_scan=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"model": {"kind": "unet", "preset": "tiny"}}, 10, "network unet does not hold its images to the measured"),
        ({"model": {"kind": "generative_prior"}}, 10, "network generative_prior does not hold"),
        (
            {
                "acquisition": {"kind": "ct"},
                "sites": {"A": {}},
                "model": {"kind": "learn"},
                "task": {"size": [256, 256]},
            },
            10,
            "splits samples of MRI on a Cartesian grid, and this model's scanner is ct",
        ),
        ({}, 0, "is a number of steps from 1 to 1000; got 0"),
        ({}, 1001, "is a number of steps from 1 to 1000; got 1001"),
    ],
)
def test_models_and_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], steps: int, message: str) -> None:
    plain = {**STUDY, "sites": {"Alpha": {}}, "task": {"contrasts": ["flair"], "size": [SIZE, SIZE]}}
    with pytest.raises(StudyError, match=rf"^--adapt-to-scan.*{message}"):
        checked_steps(load_study(plain | changes), steps)


def test_samples_are_split_as_the_study_does_where_it_learns_from_them() -> None:
    study = load_study(STUDY)
    assert splitting(study, None) == splitting(study, "Alpha")
    assert (splitting(study, None).share, splitting(study, "Beta").share) == (0.4, 0.3)
    assert splitting(study, "Alpha").splits


class Times(nn.Module):
    """The zero-filled image, times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, operator: CartesianMRI, data: Tensor) -> Tensor:
        return self.factor * operator.A_adjoint(data)


def test_an_empty_volume_teaches_nothing() -> None:
    operator = CartesianMRI(torch.ones(1, 1, 8, 8, dtype=torch.complex64), torch.ones(8, 8))
    nothing, network = torch.zeros(1, 1, 8, 8, dtype=torch.complex64), Times(1.0)
    found = adapted(network, [lambda: (operator, nothing)], splitting(load_study(STUDY), None), 5, 0)
    assert found == (network, None)


def test_what_is_usual_says_the_released_network_and_not_the_adapted_one() -> None:
    operator = CartesianMRI(torch.ones(1, 1, 8, 8, dtype=torch.complex64), torch.ones(8, 8))
    data = operator.A(torch.ones(1, 8, 8, dtype=torch.complex64))
    found = look(
        Times(0.5), [lambda: (operator, data)], Times(0.9), lambda _, image: (operator, data), usual=Times(0.8)
    )
    assert found is not None
    assert found.expected is not None
    assert found.measured.network[0] == pytest.approx(0.5, abs=1e-5)
    assert found.expected.network[0] == pytest.approx(0.2, abs=1e-5)
    assert found.fires
