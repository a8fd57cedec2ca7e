"""Fetching from a real archive, Orthanc, and training's readers on what was fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from typer.testing import CliRunner

from tests.dicom_series import mr_series, seg_of
from tests.hospitals.orthanc import MISSING, PASSWORD, USER, WHY, orthanc, send
from wardround.cli import app
from wardround.errors import StudyError
from wardround.imaging.identifiers.lint import lint_folders
from wardround.imaging.readers.cases import Patterns, sort_cases
from wardround.imaging.readers.labelled import read_case
from wardround.study.sites import load_sites

pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed (extra dicomweb)")
pytestmark = pytest.mark.skipif(MISSING, reason=WHY)


def _examination(folder: Path, number: int) -> list[bytes]:
    """The files of a patient's examination, as an archive has them: two contrasts and the outline of a tumour."""
    made: list[bytes] = []
    random, frame, study = np.random.default_rng(number), f"1.2.999.{number}.9", f"1.2.999.{number}"
    for contrast in ("FLAIR", "T1 post"):
        place = folder / contrast
        headers = mr_series(place, random.integers(0, 500, (16, 12, 5)), frame=frame)
        if contrast == "FLAIR":
            masks = np.zeros((1, 16, 12, 5), dtype=bool)
            masks[0, 4:9, 3:8, 1:4] = True
            seg_of(headers, masks, folder / "seg" / "seg.dcm", ["tumour"])
    for path in sorted(folder.rglob("*.dcm")):
        one = pydicom.dcmread(path)
        one.StudyInstanceUID, one.PatientID, one.PatientName = study, f"PAT-77{number}", f"MUELLER^ANNA{number}"
        one.StudyDate = one.SeriesDate = "20200131"
        one.SeriesDescription = "outline" if one.Modality == "SEG" else f"ax {path.parent.name}"
        one.save_as(path)
        made.append(path.read_bytes())
    return made


def test_patients_of_an_orthanc_are_fetched_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACS", f"{USER}:{PASSWORD}")
    sites = tmp_path / "sites.yaml"
    run = ["site", "fetch", str(sites)]
    with orthanc(tmp_path / "orthanc") as address:
        for number in (1, 2):
            for body in _examination(tmp_path / f"made-{number}", number):
                send(address, "/instances", body)
        archive = {
            "url": f"{address}/dicom-web",
            "folder": "cache",
            "login": "${PACS}",
            "query": {"StudyDate": "20200101-20201231", "PatientName": "MUELLER?ANNA*"},
            "series": {
                "flair": {"Modality": "MR", "SeriesDescription": "*flair*"},
                "t1ce": {"Modality": "MR", "SeriesDescription": "*t1 post"},
                "seg": {"Modality": "SEG"},
            },
        }
        sites.write_text(yaml.safe_dump({"sites": {"A": {"archive": archive}}}))
        with pytest.raises(StudyError, match="wardround site fetch"):
            load_sites(sites)

        first = CliRunner().invoke(app, run)
        assert first.exit_code == 0, first.output
        assert "patients fetched: 2; there before: 0" in first.output
        for secret in ("MUELLER", "PAT-77", "1.2.999"):
            assert secret not in first.output

        again = CliRunner().invoke(app, [*run, "--quiet"])
        assert "patients fetched: 0; there before: 2" in again.output

        monkeypatch.setenv("PACS", f"{USER}:wrong")
        refused = CliRunner().invoke(app, run)
        assert refused.exit_code == 2
        assert "refuses the login" in refused.output

    (folder,) = load_sites(sites).of("A").data
    assert not lint_folders([folder], everything=True).refused
    found = sort_cases(folder, "A", Patterns(images=("flair", "t1ce"), mask="seg"))
    assert len(found.cases) == 2
    assert not found.aside
    for cases in found.cases.values():
        (case,) = cases
        read = read_case(case, "A")
        assert read.channels.shape[0] == 2
        assert read.labels is not None
        assert int((read.labels > 0).sum()) == 5 * 5 * 3
