"""A released model of radial scans applied to raw data with a trajectory, in every format, and to a real heart."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

import wardround
from tests.applied import reconstruct
from tests.raw_files import (
    SIZE,
    along,
    arms,
    coil_images,
    root_sum_of_squares,
    spokes,
    transformed,
    write_bart_along,
    write_ismrmrd_along,
    write_mat_along,
    write_npy_along,
    xml,
)
from tests.real_images import root_folder
from wardround.cli import app
from wardround.errors import DataError, MissingExtra, WardroundError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI, gridded_maps
from wardround.imaging.acquisition.mri.trajectories import even_weights, radial_areas, spiral_areas, spoke_radii
from wardround.imaging.acquisition.solvers import cg_sense, tv
from wardround.models.build import build_model
from wardround.runs.measured_along import read_measured_along
from wardround.runs.releases import ReleasedModel
from wardround.study.load import load_study

COILS, SPOKES = 5, 20
IMAGES = coil_images(99, 2, coils=COILS)
TRUTH = np.moveaxis(root_sum_of_squares(IMAGES), 0, -1)
RADIAL = spokes(SPOKES, SIZE)
SAMPLES = along(IMAGES, RADIAL)
HEADER = xml((2 * SIZE, SIZE, 1), recon=(SIZE, SIZE, 1), trajectory="radial")
WRITTEN: dict[str, Callable[[Path], Path]] = {
    "numpy": lambda d: write_npy_along(d / "numpy.npy", SAMPLES, SIZE * RADIAL),
    "matlab": lambda d: write_mat_along(d / "matlab.mat", SAMPLES, SIZE * RADIAL),
    "bart": lambda d: write_bart_along(d / "bart", SAMPLES, SIZE * RADIAL),
    "ismrmrd": lambda d: write_ismrmrd_along(d / "ismrmrd.mrd", HEADER, SAMPLES, RADIAL),
}


def _model(folder: Path, acquisition: dict[str, Any]) -> Path:
    """As `wardround run` writes it; untrained, so that it is regularised least squares."""
    study = load_study(
        {
            "name": "applied",
            "sites": {"Alpha": {}},
            "acquisition": acquisition,
            "task": {"size": [SIZE, SIZE], **({"contrasts": ["flair"]} if acquisition["kind"] != "mri_raw" else {})},
            "model": {"preset": "tiny", "image": "complex"},
        }
    )
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model).state_dict().items()}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    scanner = {"kind": "mri_noncartesian", "coils": COILS, "trajectory": {"kind": "radial", "spokes": SPOKES}}
    return _model(tmp_path, scanner)


def _image(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def _error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _least_squares(samples: np.ndarray, points: np.ndarray, areas: np.ndarray, truth: np.ndarray = TRUTH) -> float:
    """How far CG-SENSE is from the true image, by operators, maps of the centre and areas in closed form."""
    flat = points.reshape(-1, 2)
    weights, whole = (torch.from_numpy(each).float()[None] for each in (even_weights(flat, (SIZE, SIZE)), areas))
    trajectory = torch.from_numpy(flat).float()[None]
    measured = torch.from_numpy(samples).flatten(2)
    maps = [gridded_maps(each[None], trajectory, whole, (SIZE, SIZE)) for each in measured]
    operator = NonCartesianMRI(torch.cat(maps), trajectory, weights)
    found = _error(np.moveaxis(cg_sense(operator, operator.weighed(measured), 0.01).abs().numpy(), 0, -1), truth)
    assert found < 0.08
    return found


def _of_spokes() -> float:
    angles = np.arctan2(RADIAL[:, -1, 0], RADIAL[:, -1, 1])
    return _least_squares(SAMPLES, RADIAL, radial_areas(angles, spoke_radii(2 * SIZE), (SIZE, SIZE)))


def test_a_phantom_comes_back_in_its_own_units(model: Path, tmp_path: Path) -> None:
    """Samples come from the sum that defines them; least squares by hand says how well it can be done."""
    factor = np.float32(1e-4)
    write_npy_along(tmp_path / "scan.npy", factor * SAMPLES[:1], SIZE * RADIAL)
    said = reconstruct(model, tmp_path / "scan.npy", tmp_path / "out.nii.gz")
    assert f"1 slice of 32 x 32 from k-space of 5 coils (NumPy, radial, {SPOKES} readouts of 64 samples)" in said
    assert "Mind" not in said
    assert "of the same anatomy, scanned as in training" in said
    found = _image(tmp_path / "out.nii.gz") / factor
    # A network that learned nothing is least squares with another weight.
    assert _error(found, TRUTH[..., :1]) < 1.2 * _of_spokes()


@pytest.mark.slow
def test_every_format_of_one_scan_gives_one_image(model: Path, tmp_path: Path) -> None:
    files = [make(tmp_path) for make in WRITTEN.values()]
    done = wardround.reconstruct(model, files, tmp_path / "images")
    images = [_image(one.output) for one in done]
    bound = 1.2 * _of_spokes()
    for image in images:
        assert image.shape == TRUTH.shape
        assert _error(image, TRUTH) < bound
        np.testing.assert_allclose(image, images[0], atol=1e-3 * images[0].max())
    assert nib.load(done[-1].output).header.get_zooms() == (2.0, 2.0, 5.0)  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "images/model.json").read_text())["study"] == "applied"


@pytest.mark.slow
def test_spirals_go_through_a_model_of_spokes_and_it_says_so(model: Path, tmp_path: Path) -> None:
    points = arms(8, 3, 300)
    seen = IMAGES[:, :4]
    samples, truth = along(seen, points), np.moveaxis(root_sum_of_squares(seen), 0, -1)
    write_npy_along(tmp_path / "spiral.npy", samples, SIZE * points)
    said = reconstruct(model, tmp_path / "spiral.npy", tmp_path / "out.nii.gz")
    assert "trajectory spiral (trained on radial)" in said
    assert "coils 4 (trained on 5)" in said
    bound = 1.2 * _least_squares(samples, points, spiral_areas(points.reshape(-1, 2), 8, (SIZE, SIZE)), truth)
    assert _error(_image(tmp_path / "out.nii.gz"), truth) < bound


@pytest.mark.slow
def test_where_the_network_is_out_of_its_depth_total_variation_takes_its_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wardround.runs.depth.LIMIT", 0.0)
    source = WRITTEN["bart"](tmp_path)
    assert "WARNING: the network is out of its depth" in reconstruct(model, source, tmp_path / "network.nii.gz")
    said = reconstruct(model, source, tmp_path / "tv.nii.gz", fallback=True)
    assert "the image of total variation" in said
    measured = read_measured_along(source)
    operator, data = measured.scans[1]()
    expected = measured.scale * tv(operator, data, 0.002)[0].abs().numpy()
    np.testing.assert_allclose(_image(tmp_path / "tv.nii.gz")[..., 1], expected, atol=1e-4 * measured.scale)
    # Nothing but TV knows that a head is piecewise even.
    assert _error(expected, TRUTH[..., 1]) < 0.5 * _of_spokes()
    assert np.abs(_image(tmp_path / "network.nii.gz")[..., 1] - expected).max() > 0.01 * measured.scale


def test_a_cartesian_file_and_one_whose_trajectory_is_missing_are_refused(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "k.npy", transformed(IMAGES))
    with pytest.raises(DataError, match=r"needs raw data with their trajectory.*NAME_traj\.npy.*mri or mri_raw") as why:
        reconstruct(model, tmp_path / "k.npy", tmp_path / "out.nii.gz")
    assert "k.npy" in why.value.detail
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize("kind", ["mri", "mri_raw"])
def test_a_model_of_lines_refuses_a_trajectory(kind: str, tmp_path: Path) -> None:
    source = WRITTEN["numpy"](tmp_path)
    with pytest.raises(DataError, match=r"take a model of acquisition\.kind: mri_noncartesian") as caught:
        reconstruct(_model(tmp_path, {"kind": kind}), source, tmp_path / "out.nii.gz")
    assert "numpy.npy" in caught.value.detail


def test_a_centre_too_thin_for_coil_maps_is_refused(model: Path, tmp_path: Path) -> None:
    write_npy_along(tmp_path / "thin.npy", SAMPLES[:, :, :3], SIZE * RADIAL[:3])
    with pytest.raises(DataError, match="not sampled densely enough to estimate coil maps from") as caught:
        reconstruct(model, tmp_path / "thin.npy", tmp_path / "out.nii.gz")
    assert "thin.npy" in caught.value.detail


def test_without_finufft_the_part_to_install_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(MissingExtra, match=r"pip install 'wardround\[nufft\]'"):
        reconstruct(model, WRITTEN["numpy"](tmp_path), tmp_path / "out.nii.gz")


def test_a_file_of_another_kind_says_what_is_taken(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scan.txt").write_text("0", encoding="utf-8")
    with pytest.raises(WardroundError, match=r"takes a NIfTI image, or raw data with their trajectory"):
        reconstruct(model, tmp_path / "scan.txt", tmp_path / "out.nii.gz")


@pytest.mark.slow
@pytest.mark.data("kspace")
def test_a_real_heart_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve coils, 25 spokes, no reference: the image is that of the benchmark's own reader, areas and maps."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    by_hand = importlib.import_module("real_radial")
    source = root_folder() / "kspace/gpunufft_radial_cardiac_25_projections_12ch.mat"
    scanner = {"kind": "mri_noncartesian", "coils": 12, "trajectory": {"kind": "radial", "spokes": 25}}
    model = _model(tmp_path, scanner)
    arguments = ["reconstruct", model, source, tmp_path / "heart.nii.gz"]
    ran = CliRunner().invoke(app, [str(each) for each in arguments])
    assert ran.exit_code == 0, ran.output
    assert "256 x 256 from k-space of 12 coils (MATLAB, radial, 25 readouts of 256 samples)" in ran.output
    assert (tmp_path / "heart.model.json").exists()
    image = _image(tmp_path / "heart.nii.gz")[..., 0]
    scan = by_hand.Spokes.load(source)
    operator = scan.operator(scan.maps())
    data = operator.weighed(scan.data())
    scale = operator.initial(data).abs().amax()
    released = ReleasedModel.opened(model)
    network = released.network(lambda: build_model(released.study.model, released.study.modality), None, None)
    with torch.no_grad():
        expected = (scale * network(operator, data / scale))[0].abs().numpy()
    # Cells are areas in closed form to (pi / 50)^2 / 3 with 25 even spokes.
    assert _error(image, expected) < (np.pi / 50) ** 2 / 3
    # Turned or mirrored it would be another one.
    assert min(_error(other, expected) for other in (image.T, image[::-1], image[:, ::-1])) > 0.5
