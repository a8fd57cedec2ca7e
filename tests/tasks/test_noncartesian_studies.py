"""Studies of non-Cartesian MRI: what a batch holds, what is repeatable, whole runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.apart import comparable
from tests.mri_hospitals import head, make_hospitals, save, write_study

import wardround
from wardround.errors import DataError, Interrupted, StudyError
from wardround.study import Study
from wardround.study.hashes import study_sha256
from wardround.study.load import load_study
from wardround.study.noncartesian import NonCartesianAcquisition
from wardround.study.sites import load_sites
from wardround.tasks.build import build_task
from wardround.tasks.noncartesian import NonCartesianBatch, NonCartesianReconstruction

RADIAL: dict[str, Any] = {"kind": "radial", "spokes": 20}
SPIRAL: dict[str, Any] = {"kind": "spiral", "interleaves": 4, "turns": 4, "exponent": 1.5}
OWN: dict[str, Any] = {"kind": "mri_noncartesian", "coils": 4, "trajectory": RADIAL}
OTHER: dict[str, Any] = {"kind": "mri_noncartesian", "coils": 6, "trajectory": SPIRAL}


def _study(**changes: Any) -> Study:
    study: dict[str, Any] = {
        "name": "paths",
        "sites": {"A": {}, "B": {"acquisition": OTHER}},
        "acquisition": OWN,
        "task": {"contrasts": ["flair"], "size": [32, 32], "slices": {"minimum_foreground": 0.01}},
        "model": {"preset": "tiny"},
    }
    return Study.model_validate(study | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    for number in range(3):
        save(head(number, slices=2)[::2, ::2], root / f"Doe-John-{number}" / "flair.nii.gz")
    return root


def test_scans_of_unlike_sites_make_one_batch_and_each_stays_what_it_is(folder: Path) -> None:
    task = build_task(_study())
    assert isinstance(task, NonCartesianReconstruction)
    sets = {site: task.dataset(site, (folder,)) for site in "AB"}
    pooled = task.pooled([sets["A"], sets["B"]])
    count = len(sets["A"])
    batch = pooled.batch([0, count], np.random.default_rng(0))
    assert batch.maps.shape[:2] == (2, 6)
    alone = [pooled.batch([index], np.random.default_rng(seed)) for seed, index in ((0, 0), (1, count))]
    flips = np.random.default_rng(0).random(2) < 0.5, np.random.default_rng(0).random(1) < 0.5
    assert flips[0][0] == flips[1][0]
    assert batch.weights.shape[1] == max(each.weights.shape[1] for each in alone)
    model = task.build_model()
    first = alone[0]
    torch.testing.assert_close(task.reconstruct(model, batch)[:1], task.reconstruct(model, first), rtol=0, atol=1e-4)
    again = NonCartesianBatch.joined([first])
    assert torch.equal(again.kspace, first.kspace)
    assert torch.equal(batch.part(0, 1).target, first.target)


def test_training_and_results_have_a_tolerance_of_their_own(folder: Path) -> None:
    task = build_task(_study())
    batch = task.dataset("A", (folder,)).batch([0], np.random.default_rng(0))
    assert batch.operator.tolerance == 1e-4
    assert batch.precise.tolerance == 1e-6
    baseline = task.baseline("zero_filled", None, batch)
    torch.testing.assert_close(baseline, batch.precise.initial(batch.kspace).abs())
    # Gridding, which makes up for the density of samples: about on the scale of the image, as a network expects it.
    inside = batch.head > 0
    ratio = baseline[inside].mean() / batch.target[inside].mean()
    assert 0.7 < ratio < 1.1


def test_a_study_says_its_trajectory_and_others_hash_as_before() -> None:
    study = _study()
    assert study.modality == "mri"
    assert study.baselines == ("zero_filled", "cg_sense", "tv")
    assert "radial, 20 golden spokes, 4 coils" in study.acquisition_of("A").describe()
    assert "spiral, 4 interleaves of 4 turns" in study.acquisition_of("B").describe()
    facts = study.acquisition_of("A").facts()
    assert facts == {"trajectory": "radial", "spokes": 20.0, "angles": "golden", "oversampling": 2.0, "coils": 4.0}
    assert study_sha256(study) == study_sha256(Study.model_validate_json(study.model_dump_json(exclude_unset=True)))


@pytest.mark.parametrize(
    ("acquisition", "fix"),
    [
        ({**OWN, "mask": {"acceleration": 4}}, "chooses lines of a Cartesian scan"),
        ({**OWN, "trajectory": {"kind": "rosette"}}, "rosette"),
        ({**OWN, "trajectory": {"kind": "radial", "spokes": 1}}, "spokes"),
    ],
)
def test_what_is_no_such_scanner_is_refused(acquisition: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError, match=fix):
        _study(acquisition=acquisition)


def test_a_centre_too_thin_for_coil_maps_is_refused_before_anything_is_scanned() -> None:
    thin = {**OWN, "trajectory": {"kind": "radial", "spokes": 3}}
    with pytest.raises(StudyError, match="more spokes"):
        build_task(_study(acquisition=thin))
    build_task(_study(acquisition={**thin, "maps": "true"}))
    with pytest.raises(StudyError, match="carry the phase"):
        build_task(_study(acquisition={**thin, "maps": "true"}, model={"preset": "tiny", "image": "real"}))


def test_a_network_of_cartesian_kspace_is_refused_before_it_sees_a_scan() -> None:
    with pytest.raises(StudyError, match="e2e_varnet takes Cartesian k-space alone"):
        build_task(_study(model={"kind": "e2e_varnet", "preset": "tiny"}))


@pytest.mark.parametrize("kind", ["cascade", "varnet", "swin_denoiser", "unet"])
def test_other_networks_of_mri_take_a_trajectory(kind: str, folder: Path) -> None:
    task = build_task(_study(model={"kind": kind, "preset": "tiny"}))
    batch = task.dataset("A", (folder,)).batch([0], np.random.default_rng(0))
    image = task.reconstruct(task.build_model(), batch)
    assert image.isfinite().all()
    inside = batch.head > 0
    assert 0.5 < image[inside].mean() / batch.target[inside].mean() < 1.5


def test_a_study_has_one_kind_of_scanner() -> None:
    with pytest.raises(ValidationError, match="one modality"):
        _study(sites={"A": {}, "B": {"acquisition": {"kind": "mri"}}})


class _Stops:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def round(self, report: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_two_sites_train_stop_resume_and_are_applied(tmp_path: Path) -> None:
    """Spokes at one, spirals at the other, with fewer coils: a federated, a pooled and a local arm beside baselines."""
    hospitals = make_hospitals(tmp_path / "data")
    study, sites = write_study(
        tmp_path / "study", hospitals, sites={"Alpha": {}, "Beta": {"acquisition": OTHER}}, acquisition=OWN
    )
    task = {"contrasts": ["flair"], "size": [64, 64], "evaluation": {"tuning_slices": 1, "slices": {"per_patient": 1}}}
    task["evaluation"] |= {"tv_weights": [0.001], "cg_weights": [0.01]}
    values = json.loads(load_study(study).model_dump_json(exclude_unset=True)) | {"task": task}
    plain, places = Study.model_validate(values), load_sites(sites)
    options: dict[str, Any] = {"engine": "local", "quiet": True, "compare": ("pooled", "local")}
    whole = wardround.run(plain, places, tmp_path / "whole", **options)
    psnr = {arm: whole.metric(arm, "mean", "psnr") for arm in whole.metrics}
    assert psnr.keys() >= {"federated", "pooled", "local", "zero_filled", "cg_sense", "tv"}
    assert min(psnr.values()) > 10.0
    assert psnr["cg_sense"] > psnr["zero_filled"]
    with pytest.raises(Interrupted):
        wardround.run(plain, places, tmp_path / "cut", **{**options, "quiet": False}, watcher=_Stops())
    again = wardround.run(plain, places, tmp_path / "cut", **options, resume=True)
    assert comparable(again.values) == comparable(whole.values)
    model = tmp_path / "whole" / "models" / "federated.safetensors"
    source = hospitals / "Alpha" / "Doe-John-0" / "flair.nii.gz"
    (applied,) = wardround.reconstruct(model, source, tmp_path / "image.nii.gz")
    assert (tmp_path / "image.nii.gz").exists()
    assert "radial, 20 golden spokes" in applied.said
    assert applied.metrics["network"]["psnr"] > 10.0


def test_raw_data_without_a_trajectory_are_refused() -> None:
    with pytest.raises(DataError, match="trajectory"):
        NonCartesianAcquisition().read(np.zeros((2, 3), np.complex64))
