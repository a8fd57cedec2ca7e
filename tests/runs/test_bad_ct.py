"""Bad CT files through the command line: one clear message each, wherever they turn up, and nothing left behind."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.ct_files import PATIENT, PATIENT_ID, body, setting, write_series, write_slice
from tests.ct_hospitals import ct_study, make_ct_hospitals, save_dicom, save_nifti, thorax
from tests.imaging.test_ct_projections import FAULTS, SHORT, scan, write_projections
from wardround.cli import app
from wardround.federation.release import FORMAT
from wardround.models.build import build_model
from wardround.study.load import load_study

WIDE = {"PixelSpacing": ["4", "4"]}
Make = Callable[[Path], Any]


def _mixed(folder: Path) -> None:
    write_series(folder, change=setting(**WIDE))
    write_slice(folder / "other", position=20, number=9, change=setting(**WIDE, SeriesInstanceUID="1.2.3.4"))


def _projections(fault: str) -> Make:
    return lambda folder: write_projections(folder, scan(SHORT), SHORT, spoil=FAULTS[fault][0])


def _series(*positions: float, **changes: Any) -> Make:
    places = positions or (0.0, 5.0, 10.0, 15.0)
    return lambda folder: write_series(folder, places, change=setting(**WIDE | changes))


# What a folder holds; what `inspect` and `reconstruct` say of it.
FOLDERS: dict[str, tuple[Make, str, str]] = {
    "wrong intercept": (
        _series(RescaleIntercept="0"),
        r"problem: wrong rescale: a CT image is not in HU, it shows no air near -1000, .* \(4 files\)",
        "error: wrong rescale: a CT image is not in HU",
    ),
    "no rescale": (
        _series(RescaleIntercept=None),
        r"problem: wrong rescale: a CT header has no RescaleSlope or RescaleIntercept.* \(4 files\)",
        "error: wrong rescale: a CT header has no RescaleSlope",
    ),
    "missing slices": (
        _series(0, 5, 10, 20, 25),
        r"mind: 1 of 6 slices of a series are missing \(1 series\): `wardround reconstruct` takes whole series",
        "error: 1 of 6 slices of a series are missing; export the series again",
    ),
    "mixed series": (
        _mixed,
        "mind: 1 of 1 folders mix several series, up to 2: `wardround reconstruct` takes one series a folder",
        "error: 2 series are mixed in one folder; give each series a folder of its own",
    ),
    "gantry tilt": (
        _series(GantryDetectorTilt="12"),
        r"problem: a CT image was acquired with a gantry tilt of 12 degrees, which is not supported.*\(4 files\)",
        "error: a CT image was acquired with a gantry tilt of 12 degrees, which is not supported; use an untilted",
    ),
    "negative counts": (
        _projections("unscaled"),
        "problem: a view's line integrals run from .* its counts were not positive",
        "error: a view's line integrals run from .* its counts were not positive, or its rescale is wrong; convert",
    ),
    "uncalibrated photons": (
        _projections("negative photons"),
        "problem: a view's photon statistics are not positive",
        "error: a view's photon statistics are not positive; the scan is not calibrated",
    ),
}


def _said(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def _refused(*arguments: object) -> str:
    """The error of a command: one line, another with the place, nothing on stdout."""
    result = _said(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    said = result.stderr.rstrip("\n").split("\n")
    first, *rest = [line for line in said if not line.startswith(("reading: ", "building operators: ", "training: "))]
    assert len(rest) <= 1
    assert not any(secret in first for secret in (PATIENT, PATIENT_ID, "Doe-Jane", "1.2.826"))
    return str(first)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    study = load_study(ct_study())
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model, "ct").state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return path


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_is_told_and_refused(name: str, model: Path, tmp_path: Path) -> None:
    make, told, refused = FOLDERS[name]
    make(tmp_path / PATIENT_ID)
    inspected = _said("inspect", tmp_path / PATIENT_ID)
    assert inspected.exit_code == 0
    (problem,) = (line.strip() for line in inspected.stdout.splitlines() if re.search("problem:|mind:", line))
    assert re.match(told, problem), problem
    error = _refused("reconstruct", model, tmp_path / PATIENT_ID, tmp_path / "out.nii.gz")
    assert re.match(refused, error), error
    assert not (tmp_path / "out.nii.gz").exists()


def test_a_dose_that_is_no_share_or_of_an_image_is_refused(model: Path, tmp_path: Path) -> None:
    series, out = write_series(tmp_path / "series"), tmp_path / "out.nii.gz"
    assert "above 0 and below 1; got 2" in _refused("reconstruct", model, series, out, "--dose", "2")
    assert "lowers the dose of measured projections" in _refused("reconstruct", model, series, out, "--dose", "0.5")
    assert not out.exists()


# What becomes of a patient's folder, and what `check` and `run` say.
PATIENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "wrong intercept": (
        lambda root: save_dicom(thorax(1), root / "A" / "Doe-Jane-0" / "0.dcm", intercept=0.0),
        "site A: wrong rescale: a CT image is not in HU, it shows no air",
    ),
    "shifted NIfTI": (
        lambda root: save_nifti([thorax(1) + 1024], root / "B" / "Roe-Jim-0" / "ct.nii.gz"),
        "site B: wrong rescale: a CT volume is not in HU, its values reach from",
    ),
    "intercept of NIfTI twice": (
        lambda root: save_nifti([thorax(1) - 1024], root / "B" / "Roe-Jim-0" / "ct.nii.gz"),
        "site B: wrong rescale: a CT volume is not in HU, 33% of its voxels lie below -1100",
    ),
    "a body that does not fit": (
        lambda root: save_dicom(thorax(1), root / "A" / "Doe-Jane-0" / "0.dcm", spacing=9.0),
        "site A: in 1 of 7 slices the body does not fit the field of view: it reaches 295 mm from its middle",
    ),
    "gantry tilt": (
        lambda root: _series(GantryDetectorTilt="12")(root / "A" / "Doe-Jane-0"),
        "site A: a CT image was acquired with a gantry tilt of 12 degrees",
    ),
    "projections": (
        lambda root: write_projections(root / "A" / "Doe-Jane-9", scan(SHORT), SHORT),
        "site A: a DICOM file holds CT projections, not an image; training takes images",
    ),
}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospitals")
    make_ct_hospitals(root)
    return root


def _files(place: Path, root: Path, study: dict[str, Any] | None = None) -> tuple[Path, Path]:
    (place / "study.yaml").write_text(yaml.safe_dump(study or ct_study()), encoding="utf-8")
    entries = {site: {"data": str(root / site)} for site in "AB"}
    (place / "sites.yaml").write_text(yaml.safe_dump({"sites": entries}), encoding="utf-8")
    return place / "study.yaml", place / "sites.yaml"


@pytest.mark.parametrize("name", PATIENTS)
def test_a_bad_patient_stops_a_run_before_it_begins(name: str, hospitals: Path, tmp_path: Path) -> None:
    spoil, message = PATIENTS[name]
    root = Path(shutil.copytree(hospitals, tmp_path / "data"))
    spoil(root)
    study, sites = _files(tmp_path, root)
    assert _refused("check", study, "--sites", sites).startswith(f"error: {message}")
    assert _refused("run", study, "--sites", sites, "--out", tmp_path / "out").startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_where_a_body_does_not_fit_is_said_to_local_eyes(hospitals: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(hospitals, tmp_path / "data"))
    PATIENTS["a body that does not fit"][0](root)
    study, sites = _files(tmp_path, root)
    error, place = _said("check", study, "--sites", sites).stderr.rstrip("\n").split("\n")
    assert "Doe-Jane" not in error
    assert place.strip() == f"({root / 'A' / 'Doe-Jane-0'})"


def test_mixed_series_train_image_by_image_and_check_says_so(hospitals: Path, tmp_path: Path) -> None:
    """Made-up patients with two slices have two series: patients 1 and 3."""
    study, sites = _files(tmp_path, hospitals)
    said = " ".join(_said("check", study, "--sites", sites).stdout.split())
    assert "A: 2 of 5 patients' folders mix several series; every image is an example." in said
    assert said.count("mix several series") == 1


def _every_other(folder: Path, **changes: Any) -> Path:
    """Slices 1, 3, 5 and 7 of a series of 5 mm."""
    for number in (1, 3, 5, 7):
        place = {"position": 5.0 * (number - 1), "number": number}
        write_slice(folder / f"{number}.dcm", body(seed=number), **place, change=setting(**WIDE | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({}, "their numbers rise by 2", marks=pytest.mark.slow),
        (
            {"SpacingBetweenSlices": "5"},
            "slices stand 10 mm apart where their headers say 5 mm and their numbers rise by 2",
        ),
        pytest.param(
            {"SpacingBetweenSlices": "-5", "InstanceNumber": ""},
            "slices stand 10 mm apart where their headers say 5 mm",
            marks=pytest.mark.slow,
        ),
        ({"SpacingBetweenSlices": "10", "InstanceNumber": ""}, ""),
    ],
)
def test_slices_missing_at_even_steps_are_told(
    changes: dict[str, Any], told: str, model: Path, hospitals: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(hospitals, tmp_path / "data"))
    folder = _every_other(root / "A" / PATIENT_ID, **changes)
    said = _said("reconstruct", model, folder, tmp_path / "out.nii.gz").stdout
    inspected = _said("inspect", folder).stdout
    checked = " ".join(_said("check", *_files(tmp_path, root)[:1], "--sites", tmp_path / "sites.yaml").stdout.split())
    remark = "A: in 1 of 8 series slices may be missing: their distances or numbers are not those of neighbours"
    assert (f"Mind: slices of the series may be missing: {told}.\n" in said) == bool(told)
    assert (f"mind: slices may be missing: {told} (1 series)\n" in inspected) == bool(told)
    assert (remark in checked) == bool(told)
    assert bool(told) == ("may be missing" in said + inspected + checked)


def test_gaps_are_told_by_check(hospitals: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(hospitals, tmp_path / "data"))
    _series(0, 5, 10, 25, 30)(root / "A" / "Doe-Jane-9")
    study, sites = _files(tmp_path, root)
    said = " ".join(_said("check", study, "--sites", sites).stdout.split())
    assert "A: in 1 of 8 series slices are missing, doubled or uneven; every image is an example." in said


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 12}, "the field of view misses the patient: the detector sees"),
        ({"sweep": 240.0}, "filtered back projection of kind=fan_flat knows no weights for a sweep of 240 degrees"),
        (
            {"kind": "parallel", "sweep": 270.0, "source_distance": None, "detector_distance": None},
            "filtered back projection of kind=parallel knows no weights for a sweep of 270 degrees",
        ),
    ],
)
def test_a_geometry_that_cannot_be_used_is_refused_by_its_key(
    command: str, change: dict[str, Any], message: str, hospitals: Path, tmp_path: Path
) -> None:
    study = ct_study()
    study["acquisition"]["geometry"].update(change)
    files = _files(tmp_path, hospitals, study)
    more = () if command == "check" else ("--out", tmp_path / "out")
    error = _refused(command, files[0], "--sites", files[1], *more)
    assert error.startswith(f"error: site A, acquisition.geometry: {message}")
    assert not (tmp_path / "out").exists()


def test_inspect_looks_at_values_and_at_every_folder(hospitals: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(hospitals, tmp_path / "data"))
    PATIENTS["shifted NIfTI"][0](root)
    said = _said("inspect", root).stdout
    assert "a folder of 1 sites" in said
    assert "1 more folders hold DICOM; inspect each by itself" in said
    assert "problem: wrong rescale: a CT volume is not in HU" in said
