"""A folder of DICOM is told in counts and protocol, without patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.ct_files import setting, write_series, write_slice
from tests.imaging.test_ct_projections import SHORT, scan, write_projections
from tests.real_images import root_folder
from typer.testing import CliRunner

from wardround.cli import app
from wardround.imaging.convert import inspect_path


def _spoken(text: str) -> None:
    for secret in ("MUELLER", "PAT-7731", "19510423", "20190214", "1.2.826", "ACC-4471", "DOE", "CHEST"):
        assert secret not in text


def test_images_are_counted_and_no_patient_is_named(tmp_path: Path) -> None:
    write_series(tmp_path / "MUELLER_ANNA", (0.0, 5.0, 10.0))
    other = setting(PatientID="PAT-2", SeriesInstanceUID="1.2.826.0.1.44", KVP="100", Manufacturer="GE")
    write_slice(tmp_path / "b" / "x.dcm", change=other)
    write_slice(tmp_path / "b" / "mr.dcm", change=setting(Modality="MR"))
    (tmp_path / "b" / "broken.dcm").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("MUELLER")
    found = inspect_path(tmp_path)
    assert found.kind == "CT images in DICOM"
    text = str(found)
    assert "6 files, 4 of them CT slices, of 2 patients in 2 series" in text
    assert "in plane 64 x 64 (4); pixels of 0.6 to 0.8 mm" in text
    assert "scanners SIEMENS Sensation 16 (3), GE Sensation 16 (1)" in text
    assert "tube voltage 120 kV (3), 100 kV (1)" in text
    assert "kernel B20f (4)" in text
    assert "source to isocentre 570 mm (4)" in text
    assert len(found.problems) == 2
    assert "its modality is MR" in text
    _spoken(text)


def test_one_file_and_the_command(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "IM0001")
    answer = CliRunner().invoke(app, ["inspect", str(path)])
    assert answer.exit_code == 0
    assert "1 files, 1 of them CT slices" in answer.output
    _spoken(answer.output)


def test_slices_without_air_are_judged_with_the_patients_others(tmp_path: Path) -> None:
    tissue = np.random.default_rng(0).normal(20, 30, (64, 64)).astype(np.int16)
    write_slice(tmp_path / "a" / "0.dcm")
    write_slice(tmp_path / "a" / "1.dcm", tissue, change=setting(SeriesInstanceUID="1.2.826.0.1.44"))
    assert not inspect_path(tmp_path).problems
    write_slice(tmp_path / "b" / "2.dcm", tissue, change=setting(PatientID="PAT-2"))
    found = inspect_path(tmp_path)
    assert "3 files, 2 of them CT slices, of 1 patients in 2 series" in str(found)
    (problem,) = found.problems
    assert problem.startswith("wrong rescale: a CT image is not in HU, it shows no air near -1000")
    assert problem.endswith("(1 files)")


def test_projections_are_recognised(tmp_path: Path) -> None:
    write_projections(tmp_path / "MUELLER" / "a", scan(SHORT), SHORT)
    text = str(inspect_path(tmp_path))
    assert "1 scans" in text
    assert "24 views of 1 rows of 160 bins of 3.2 mm, fan_arc, source 595 mm" in text
    _spoken(text)


def test_a_folder_without_images_stays_unknown(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=1)
    (tmp_path / "IM1").write_text("no DICOM")
    assert inspect_path(tmp_path).kind == "unknown"


@pytest.mark.data("luad-ct")
def test_a_real_collection() -> None:
    root = root_folder() / "luad-ct"
    found = inspect_path(root)
    assert not found.problems
    assert "SIEMENS" in str(found)
    assert "TCGA" not in str(found)
