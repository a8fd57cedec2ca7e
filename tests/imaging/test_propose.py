"""Studies proposed for folders of MRI and CT, and that they can be run as they are."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.ct_files import PATIENT, PATIENT_ID, setting, write_series
from tests.ct_hospitals import make_ct_hospitals, save_dicom, save_nifti, thorax
from tests.imaging.test_ct_projections import SHORT, scan, write_projections
from tests.real_images import root_folder
from typer.testing import CliRunner

from wardround.cli import app
from wardround.errors import DataError
from wardround.imaging.acquisition.ct.geometry import check_geometry, field_of_view_radius
from wardround.imaging.convert import inspect_path
from wardround.imaging.propose import propose_study
from wardround.imaging.propose_ct import ct_sites
from wardround.study.ct import CTAcquisition
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import load_sites

MakeSite = Callable[..., Path]


def test_the_proposed_study_and_sites_are_valid(make_site: MakeSite, tmp_path: Path) -> None:
    make_site("CS", 3, contrasts=("flair", "t1ce", "seg"))
    make_site("DU", 2, contrasts=("flair", "seg"))
    make_site("1 mean", 1, contrasts=("flair", "t2"))
    study_text, sites_text = propose_study(tmp_path)
    (tmp_path / "study.yaml").write_text(study_text)
    (tmp_path / "sites.yaml").write_text(sites_text)
    study, sites = load_study(tmp_path / "study.yaml"), load_sites(tmp_path / "sites.yaml")
    assert study.training_sites == ("CS", "DU")
    assert study.unseen_sites == ("S-1-mean",)
    assert study.task.model_dump()["contrasts"] == ("flair",)
    assert study.task.model_dump()["size"] == (32, 32)
    assert sites.of("S-1-mean").data == ((tmp_path / "1 mean").resolve(),)
    assert "MUELLER" not in study_text + sites_text
    assert study_text.count("#") >= 5


def test_one_site_is_a_study_too(make_site: MakeSite) -> None:
    study_text, sites_text = propose_study(make_site("CS", 3))
    assert "CS: {role: train}" in study_text
    assert "/CS" in sites_text


def test_nothing_is_proposed_where_nothing_can_be_trained(make_site: MakeSite, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SITE/PATIENT/CONTRAST"):
        propose_study(tmp_path)
    make_site("CS", 1)
    with pytest.raises(DataError, match="no site can train"):
        propose_study(tmp_path)
    np.save(tmp_path / "CS" / "scan.npy", np.zeros((1, 4, 4), np.complex64))
    with pytest.raises(DataError, match="1 file of raw data lies beside NIfTI images and is left out"):
        propose_study(tmp_path)
    assert "1 file of raw data lies beside" in str(inspect_path(tmp_path))
    make_site("DU", 2, contrasts=("t2",))
    with pytest.raises(DataError, match="no contrast is common"):
        propose_study(tmp_path)


def test_ct_beside_mri_is_no_contrast(make_site: MakeSite) -> None:
    site = make_site("CS", 2, contrasts=("flair",))
    for patient in site.iterdir():
        save_nifti([thorax(1)], patient / "ct.nii.gz")
    assert 'contrasts: ["flair"]' in propose_study(site)[0]


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _proposed(folder: Path, out: Path) -> tuple[Study, str]:
    """What `init` writes for a folder: the study as it is read, and its text."""
    study, sites = propose_study(folder)
    out.mkdir(exist_ok=True)
    (out / "study.yaml").write_text(study, encoding="utf-8")
    (out / "sites.yaml").write_text(sites, encoding="utf-8")
    load_sites(out / "sites.yaml")
    return load_study(out / "study.yaml"), study


def _geometry(study: Study, site: str) -> Any:
    acquisition = study.acquisition_of(site)
    assert isinstance(acquisition, CTAcquisition)
    check_geometry(acquisition.geometry)
    return acquisition.geometry


def test_a_ct_study_is_proposed_and_checked(tmp_path: Path) -> None:
    """A in DICOM, B in NIfTI, C with one patient."""
    make_ct_hospitals(tmp_path / "data")
    save_dicom(thorax(7), tmp_path / "data" / "C" / "Doe-Jane-9" / "0.dcm")
    out = tmp_path / "study"
    result = _run("init", tmp_path / "data", "--out", out)
    assert result.exit_code == 0, result.output
    text = (out / "study.yaml").read_text(encoding="utf-8")
    study = load_study(out / "study.yaml")
    assert (study.training_sites, study.unseen_sites) == (("A", "B"), ("C",))
    assert study.modality == "ct"
    assert study.model.kind == "learn"
    for line in ("A:   # 5 patients, 7 slices\n", "B:   # 4 patients, 8 slices\n", "C:   # 1 patient, 1 slice\n"):
        assert line in text
    assert "ACQUISITIONS ARE SIMULATED" in text
    assert "siemens_definition_as_plus" in text
    assert "Jane" not in text
    assert len({_geometry(study, site) for site in "ABC"}) == 3
    assert {_geometry(study, site).size for site in "ABC"} == {(128, 128)}
    checked = _run("check", out / "study.yaml", "--sites", out / "sites.yaml")
    assert checked.exit_code == 0, checked.output


@pytest.mark.slow
def test_a_proposed_ct_study_runs(tmp_path: Path) -> None:
    """One site of two patients, and the smallest network: a proposed scanner takes a second to build."""
    for number in range(2):
        save_dicom(thorax(number), tmp_path / "A" / f"p{number}" / "0.dcm")
    _proposed(tmp_path / "A", tmp_path)
    files = (tmp_path / "study.yaml", "--sites", tmp_path / "sites.yaml")
    small = ("schedule.rounds=1", "local.steps=1", "model.preset=tiny", "task.evaluation.baselines=[fbp]")
    fewer = ("task.evaluation.slices.per_patient=1",)
    settings = [part for setting_ in (*small, *fewer) for part in ("--set", setting_)]
    ran = _run("run", *files, "--out", tmp_path / "out", "--engine", "local", *settings)
    assert ran.exit_code == 0, ran.output
    assert "building operators: " in ran.stderr
    assert (tmp_path / "out" / "models" / "federated.safetensors").is_file()


@pytest.mark.parametrize(
    ("pixels", "spacing", "size"),
    [(80, 4.5, 128), (512, 0.9, 256), (256, 1.8, 128)],
    ids=["coarse", "clinical", "between"],
)
def test_the_field_of_view_holds_the_largest_body(pixels: int, spacing: float, size: int, tmp_path: Path) -> None:
    for number in range(2):
        save_dicom(thorax(number, pixels, spacing), tmp_path / "A" / f"p{number}" / "0.dcm", spacing=spacing)
    save_dicom(thorax(3, pixels, spacing), tmp_path / "A" / "p3" / "0.dcm", spacing=1.2 * spacing)
    study, text = _proposed(tmp_path, tmp_path)
    geometry = _geometry(study, "A")
    assert geometry.size == (size, size)
    # 150 mm at most from the middle, and a fifth more in the third patient.
    reach = float(text.split("reaches ")[1].split(" mm")[0])
    assert reach == pytest.approx(180, rel=0.05)
    assert reach < size * geometry.pixel / 2 < reach + 0.05 * size + 0.02 * reach
    assert field_of_view_radius(geometry) < 1.15 * size * geometry.pixel / 2
    assert geometry.views % 4 == 0


def test_distances_are_those_of_the_headers(tmp_path: Path) -> None:
    """They name a source 570 mm and a detector 470 mm from the isocentre; nonsense is not taken over."""
    for number in range(2):
        own = {"PixelSpacing": ["4", "4"], "StudyInstanceUID": f"1.2.{number}"}
        write_series(tmp_path / "A" / f"p{number}", change=setting(**own))
        write_series(
            tmp_path / "B" / f"p{number}",
            change=setting(**own, DistanceSourceToPatient="1", DistanceSourceToDetector="2"),
        )
    study, text = _proposed(tmp_path, tmp_path)
    assert (_geometry(study, "A").source_distance, _geometry(study, "A").detector_distance) == (570, 470)
    assert (_geometry(study, "B").source_distance, _geometry(study, "B").detector_distance) == (541, 408.1)
    assert "distances are those of a site's DICOM headers" in text
    assert PATIENT not in text
    assert PATIENT_ID not in text


@pytest.mark.parametrize("below", ["", "study", "study/series"])
def test_sites_patients_and_series_are_told_apart(below: str, tmp_path: Path) -> None:
    """By where files lie, and where that is not enough, by whose they are."""
    wide = {"PixelSpacing": ["4", "4"]}
    for site in "AB":
        for patient in "01":
            of = setting(**wide, PatientID=site + patient, StudyInstanceUID=f"1.2.{patient}")
            for series in ("1", "2") if below else (".",):
                write_series(tmp_path / site / patient / below / series, change=of)
    assert [path.name for path in ct_sites(tmp_path)] == ["A", "B"]
    assert ct_sites(tmp_path / "A") == [tmp_path / "A"]
    assert "A:   # 2 patients, " in propose_study(tmp_path)[0]
    assert "A:   # 2 patients, " in propose_study(tmp_path / "A")[0]


def test_many_sites_of_wide_bodies_have_possible_scanners(tmp_path: Path) -> None:
    for site in range(6):
        for number in range(2):
            path = tmp_path / f"site {site}" / f"p{number}" / "ct.nii.gz"
            save_nifti([thorax(number)], path, spacing=4.5 * 2.3)
    study, _ = _proposed(tmp_path, tmp_path)
    for site in study.sites:
        geometry = _geometry(study, site)
        assert geometry.source_distance > math.hypot(*geometry.size) * geometry.pixel / 2
    assert len(study.sites) == 6


def test_one_ct_site_is_a_study_too(tmp_path: Path) -> None:
    for site in make_ct_hospitals(tmp_path / "data"):
        study, _ = _proposed(tmp_path / "data" / site, tmp_path)
        assert tuple(study.sites) == (site,)


def _one_patient_each(root: Path) -> None:
    for site in "AB":
        save_dicom(thorax(0), root / site / "p0" / "0.dcm")


def _nothing_but_air(root: Path) -> None:
    air = np.random.default_rng(0).normal(-990, 5, (40, 40)).astype(np.int16)
    for number in range(2):
        save_dicom(air, root / "A" / f"p{number}" / "0.dcm")


def _one_patients_series(root: Path) -> None:
    for series in "12":
        write_series(root / series)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_one_patient_each, "no site can train: each has 1 patient"),
        (_one_patients_series, "1 folders of a site hold the same examination of the same patient"),
        (lambda root: write_series(root), r"\(this is CT images in DICOM\).*SITE/PATIENT/\*\.dcm"),
        (
            lambda root: write_projections(root / "A" / "p0", scan(SHORT), SHORT),
            "site A: a DICOM file holds CT projections",
        ),
        (_nothing_but_air, "no body was found in any image"),
    ],
    ids=["one patient", "a patient", "a series", "projections", "nothing but air"],
)
def test_ct_that_cannot_be_used_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        propose_study(tmp_path)
    assert not any(secret in str(error.value) for secret in (PATIENT, PATIENT_ID, "anna", "p0"))


@pytest.mark.data("luad-ct")
def test_a_study_is_proposed_for_real_hospitals(tmp_path: Path) -> None:
    shutil.copytree(root_folder() / "luad-ct" / "34", tmp_path / "data" / "34")
    study, text = _proposed(tmp_path / "data", tmp_path / "out")
    assert _geometry(study, "S-34").size == (256, 256)
    assert "TCGA" not in text
    result = _run("check", tmp_path / "out" / "study.yaml", "--sites", tmp_path / "out" / "sites.yaml")
    assert result.exit_code == 0, result.output
