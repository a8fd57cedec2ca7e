"""Drift at a site: what is measured of patients, how it is tested, and what is said; all of it stays there."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.outlines import make_outlines, outline_study
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.results.schema import Result
from wardround.runs.drift import drift
from wardround.runs.session import run
from wardround.site import drift as site_drift
from wardround.site.drift import Looked, Reference, compare
from wardround.site.lineage import Lineage
from wardround.storage.cipher import StoreCipher
from wardround.study.sites import SitesFile
from wardround.tasks.confidence import Said
from wardround.tasks.task import MetricSpec

# Whole runs: `make test-all` has them.
pytestmark = pytest.mark.slow

DICE = MetricSpec("dice", 0.0, 1.0, 1e-6, True, "Dice", may_be_absent=True)
NO_EDGES = np.zeros(0)


def looked(**rows: Any) -> Looked:
    return Looked({name: np.asarray(values, dtype=np.float64) for name, values in rows.items()}, NO_EDGES)


def normal(seed: int, size: tuple[int, ...], shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size) + shift


# How it is tested ---------------------------------------------------------------------------------------------------


def test_a_p_is_that_of_every_deal_counted_out() -> None:
    old, new = normal(1, (6, 1)), normal(2, (5, 1), 1.2)
    (moved,) = compare(looked(noise=old), looked(noise=new), ())
    rows = np.concatenate([old, new])[:, 0]
    distances = []
    for chosen in combinations(range(11), 5):
        recent = np.zeros(11, bool)
        recent[list(chosen)] = True
        distances.append(abs(rows[recent].mean() - rows[~recent].mean()))
    exact = float(np.mean(np.array(distances) >= abs(new.mean() - old.mean()) - 1e-12))
    assert moved.distance == pytest.approx(abs(new.mean() - old.mean()))
    assert (moved.before, moved.now) == (pytest.approx(old.mean()), pytest.approx(new.mean()))
    assert moved.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 4999) + 1 / 5000)
    assert moved.patients == (6, 5)


def test_many_measures_are_adjusted_for() -> None:
    """Holm: the least of m p-values counts m times, the next m - 1 times, and none less than the one before."""
    same, far = normal(3, (8, 1)), normal(4, (8, 1), 6.0)
    alone = compare(looked(noise=same), looked(noise=far), ())[0].p
    two = compare(looked(noise=same, entropy=same), looked(noise=far, entropy=normal(5, (8, 1))), ())
    by_name = {moved.measure: moved for moved in two}
    assert alone is not None
    assert by_name["noise"].p == pytest.approx(2 * alone)
    assert by_name["noise"].drifted
    assert by_name["entropy"].p == pytest.approx(
        max(2 * alone, compare(looked(entropy=same), looked(entropy=normal(5, (8, 1))), ())[0].p or 0.0)
    )
    assert not by_name["entropy"].drifted


def test_patients_of_one_kind_raise_few_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 5 % of sites whose patients did not change: of 100, more than 12 would come once in a thousand times."""
    monkeypatch.setattr(site_drift, "_DRAWS", 199)
    alarms = 0
    for seed in range(100):
        groups = [
            looked(noise=normal(10 * seed + n, (7, 1)), spectrum=normal(10 * seed + n + 3, (7, 4))) for n in (1, 2)
        ]
        alarms += any(moved.drifted for moved in compare(*groups, ()))
    assert alarms <= 12


def test_a_histogram_a_metric_and_a_calibration_by_hand() -> None:
    old, new = np.tile([0.5, 0.5, 0.0], (6, 1)), np.tile([0.25, 0.25, 0.5], (6, 1))
    # Ten groups of probability: two of them filled, right as often as it says before, and never now.
    before = np.zeros((6, 3, 10))
    before[:, :, 6], before[:, :, 9] = (0.5, 0.325, 0.325), (0.5, 0.475, 0.475)
    now = before.copy()
    now[:, 2] = 0.0
    dices = np.array([0.9, 0.8, 0.7, 0.9, 0.8, np.nan])
    found = {
        m.measure: m
        for m in compare(
            looked(intensity=old, calibration=before, dice=dices),
            looked(intensity=new, calibration=now, dice=dices - 0.5),
            (DICE,),
        )
    }
    assert found["intensity"].distance == pytest.approx(0.5)
    assert (found["intensity"].before, found["intensity"].now) == (None, None)
    assert (found["calibration"].before, found["calibration"].now) == (pytest.approx(0.0), pytest.approx(0.8))
    # A patient without a value has no part in it: five are left of six.
    assert found["dice"].patients == (5, 5)
    assert (found["dice"].before, found["dice"].now) == (pytest.approx(0.82), pytest.approx(0.32))
    assert all(m.drifted for m in found.values())


def test_too_few_patients_say_nothing() -> None:
    (moved,) = compare(looked(noise=normal(1, (9, 1))), looked(noise=normal(2, (4, 1), 9.0)), ())
    assert (moved.drifted, moved.p, moved.distance, moved.patients) == (None, None, None, (9, 4))


# What is measured ---------------------------------------------------------------------------------------------------


def test_noise_and_spectrum_of_an_image_by_hand() -> None:
    y, x = np.mgrid[0:64, 0:64] / 64.0
    smooth = 3.0 * y + 2.0 * x * y
    noisy = smooth + 0.3 * np.random.default_rng(0).standard_normal((64, 64))
    assert site_drift._noise(smooth) == pytest.approx(0.0, abs=1e-12)
    # The mean of 62 x 62 magnitudes that depend on each other: within 4 %.
    assert site_drift._noise(noisy) == pytest.approx(0.3, rel=0.04)
    wave = np.cos(2 * np.pi * 8 * x)
    spectrum = 10 ** site_drift._spectrum(wave)
    # 8 of 64 cycles a voxel are a quarter of the highest frequency: the fifth of 16 rings.
    assert spectrum[4] == pytest.approx(1.0, abs=1e-6)


def test_confidence_of_classes_and_of_voxels_by_hand() -> None:
    p, truth = torch.tensor([[0.72, 0.18, 0.1], [0.4, 0.52, 0.08]]), torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = site_drift._of_said(Said(p, truth, exclusive=True))
    assert found["confidence"] == pytest.approx(0.62)
    assert found["entropy"] == pytest.approx(float(-(p * p.log()).sum(dim=1).mean()))
    # One right of one with 0.72, none of one with 0.52.
    assert found["calibration"][:, 7] == pytest.approx([0.5, 0.36, 0.5])
    assert found["calibration"][:, 5] == pytest.approx([0.5, 0.26, 0.0])
    # Voxels that are background beyond doubt are left out; of an unknown truth there is no calibration.
    voxels = torch.tensor([[[[0.01, 0.9], [0.2, 0.02]]]])
    outlined = site_drift._of_said(Said(voxels, torch.full_like(voxels, torch.nan), exclusive=False))
    assert outlined["confidence"] == pytest.approx(0.85)
    assert "calibration" not in outlined
    assert site_drift._of_said(Said(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), exclusive=False)) == {}


# At a site ----------------------------------------------------------------------------------------------------------

Hospital = tuple[Result, SitesFile]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A release that a site of 14 patients trained, validated and tested, and its folders."""
    root = tmp_path_factory.mktemp("drift")
    sites = make_outlines(root / "data", {"A": 14}, slices=2)
    entry = sites.sites["A"].model_copy(update={"history": root / "history"})
    sites = sites.model_copy(update={"sites": {"A": entry}})
    study = outline_study({"A": {}}, schedule={"rounds": 1}, local={"steps": 2, "batch": 2})
    result = run(study, sites, root / "out", engine="local", quiet=True)
    return result, sites


def arrive(sites: SitesFile, count: int, noise: float, name: str) -> list[Path]:
    """Patients who came since: copies of the first ones with more noise."""
    (folder,) = sites.sites["A"].data
    new = []
    for number in range(count):
        old, place = folder / f"DOE-{number:02d}", folder / f"{name}-{number:02d}"
        place.mkdir()
        image = nibabel.load(old / "image.nii.gz")
        random = np.random.default_rng(number)
        values = image.get_fdata() + 3 + noise * random.standard_normal(image.shape)
        nibabel.save(
            nibabel.Nifti1Image(np.clip(values, 0, 255).astype(np.uint8), image.affine), place / "image.nii.gz"
        )
        (place / "mask.nii.gz").write_bytes((old / "mask.nii.gz").read_bytes())
        new.append(place)
    return new


def leave(folders: list[Path]) -> None:
    for folder in folders:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_recent_patients_are_compared_with_the_releases_own(hospital: Hospital, tmp_path: Path) -> None:
    result, sites = hospital
    with pytest.raises(DataError, match=r"0 patients of site A came since the release, and a test needs 5"):
        drift(result.out, "A", sites)
    alike = arrive(sites, 6, 1.0, "ALIKE")
    quiet = drift(result.out, "A", sites)
    # The first call has put on record what those gave who validated and tested the release.
    assert quiet.recorded
    assert quiet.drifted == ()
    leave(alike)
    noisy = arrive(sites, 6, 60.0, "NOISY")
    found = drift(result.out / "models" / "federated.safetensors", "A", sites, out=tmp_path / "drift.json")
    assert {"noise", "spectrum"} <= set(found.drifted)
    told = json.loads((tmp_path / "drift.json").read_text())
    assert told["drifted"] == list(found.drifted)
    assert "NOISY" not in json.dumps(told)
    # Once on record, the images of the release's own patients are needed no more.
    (folder,) = sites.sites["A"].data
    away = [p.rename(tmp_path / p.name) for p in folder.glob("DOE-*")]
    assert drift(result.out, "A", sites).moved == found.moved
    with pytest.raises(DataError, match="no patient whom site A has now validated or tested the release"):
        drift(result.out, "A", sites, again=True)
    for place in away:
        place.rename(folder / place.name)
    leave(noisy)


def test_the_command_says_what_drifted(hospital: Hospital, tmp_path: Path) -> None:
    result, sites = hospital
    noisy = arrive(sites, 6, 60.0, "NOISY")
    entry = sites.sites["A"]
    file = tmp_path / "sites.yaml"
    file.write_text(f"sites:\n  A: {{data: {entry.data[0]}, history: {entry.history}}}\n")
    said = CliRunner().invoke(app, ["site", "drift", str(result.out), "--site", "A", "--sites", str(file)])
    assert said.exit_code == 1
    assert "drifted" in said.output
    assert "wardround update RELEASE STUDY" in said.output
    assert "NOISY" not in said.output
    leave(noisy)


def test_a_release_that_the_site_does_not_know(hospital: Hospital, tmp_path: Path) -> None:
    result, sites = hospital
    elsewhere = sites.sites["A"].model_copy(update={"history": tmp_path / "history"})
    with pytest.raises(DataError, match="site A has no record of this release: it was not delivered here"):
        drift(result.out, "A", sites.model_copy(update={"sites": {"A": elsewhere}}))
    with pytest.raises(StudyError, match="the model's study has no such site"):
        drift(result.out, "B", sites.model_copy(update={"sites": {"B": sites.sites["A"]}}))


def test_what_is_kept_is_sealed_and_names_nobody(tmp_path: Path) -> None:
    cipher = StoreCipher.of(bytes(range(32)))
    kept = Reference(tmp_path, cipher)
    assert kept.of("ab" * 32) is None
    rows = looked(noise=[[0.125], [np.nan]], dice=[0.5, 1.0])
    kept.keep("ab" * 32, rows)
    again = kept.of("ab" * 32)
    assert again is not None
    assert all(np.array_equal(again.rows[name], rows.rows[name], equal_nan=True) for name in rows.rows)
    assert b"looked" not in kept.path("ab" * 32).read_bytes()
    with pytest.raises(DataError, match="delete it and it is made anew from the data"):
        Reference(tmp_path, StoreCipher.of(bytes(32))).of("ab" * 32)
    assert Lineage(tmp_path).ancestors("ab" * 32) == ()
