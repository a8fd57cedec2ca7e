"""A damaged patient does not cost a hospital: set aside with a reason at the site, and counted as its rules allow."""

from __future__ import annotations

import csv
import gzip
import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.diagnoses import diagnosis_study, make_diagnoses
from tests.dicom_series import as_dicom
from tests.outlines import make_outlines, outline_study
from wardround.errors import DataError
from wardround.runs.machine import Machine
from wardround.site.egress import EgressRules
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.task import SetsAside

SPLITS = ("train", "validation", "test")


def damage(folder: Path) -> None:
    """Patients 0 to 3: a cut-off file, one that is no gzip, a mask of another shape, and no mask."""
    image = folder / "DOE-00" / "image.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    (folder / "DOE-01" / "image.nii.gz").write_bytes(gzip.compress(b"nothing")[:12])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), folder / "DOE-02" / "mask.nii.gz")
    (folder / "DOE-03" / "mask.nii.gz").unlink()


def outlines(root: Path, count: int = 12, **rules: object) -> tuple[Study, SitesFile]:
    make_outlines(root / "data", {"A": count}, slices=2)
    damage(root / "data" / "A")
    entry = SiteData.model_validate({"data": root / "data" / "A", "quarantine": 0.4, **rules})
    return outline_study({"A": {}}), SitesFile(sites={"A": entry})


def test_damaged_patients_are_set_aside_listed_at_the_site_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, sites = outlines(tmp_path)
    host = Machine(study, sites, tmp_path / "out", ())
    with caplog.at_level(logging.WARNING):
        facts = host.agent("A").facts()
    assert facts.set_aside == 4
    assert facts.patients is not None
    assert sum(getattr(facts.patients, split) for split in SPLITS) == 8
    with (tmp_path / "out" / "sites" / "A" / "set_aside.csv").open() as file:
        rows = {row["patient"]: row for row in csv.DictReader(file)}
    assert list(rows) == [f"DOE-{number:02d}" for number in (3, 0, 1, 2)]
    assert "damaged" in rows["DOE-00"]["reason"]
    assert "image.nii.gz" in rows["DOE-01"]["file or row"]
    assert "differ in shape" in rows["DOE-02"]["reason"]
    assert "lacks the file 'mask'" in rows["DOE-03"]["reason"]
    # What may leave, and the log, name no patient and no file.
    assert "some patients are set aside" in caplog.text
    assert "DOE" not in caplog.text + facts.model_dump_json()


def test_a_mended_patient_changes_nobody_else_s_part(tmp_path: Path) -> None:
    whole = make_outlines(tmp_path / "whole", {"A": 12}, slices=2)
    study, sites = outlines(tmp_path)
    before = Machine(study, sites, tmp_path / "one", ()).dataset("A")
    after = Machine(study, whole, tmp_path / "two", ()).dataset("A")
    for split in SPLITS:
        names = (set(data.names(split)) for data in (before, after))  # type: ignore[attr-defined]
        assert next(names) == {name for name in next(names) if name not in {f"DOE-0{n}" for n in range(4)}}
    assert isinstance(before, SetsAside)
    assert sum(before.set_aside().values()) == 4
    assert before.fingerprint() != after.fingerprint()


def test_too_many_stop_the_site_with_one_error_that_counts_nothing(tmp_path: Path) -> None:
    study, sites = outlines(tmp_path, quarantine=0.3)
    host = Machine(study, sites, tmp_path / "out", ())
    with pytest.raises(DataError, match=r"site A: more of its patients cannot be used.*`quarantine`: 30 %") as caught:
        host.dataset("A")
    assert "DOE-00" in caught.value.detail
    said = str(caught.value)
    assert "DOE" not in said
    assert not any(number in said for number in ("4 ", "12 "))
    # The agent survives it, says that nothing can be counted, and keeps the list.
    facts = host.agent("A").facts()
    assert (facts.patients, facts.set_aside, facts.fingerprint) == (None, None, None)
    assert (tmp_path / "out" / "sites" / "A" / "set_aside.csv").is_file()


def test_the_default_share_is_a_twentieth(tmp_path: Path) -> None:
    assert SiteData(data=tmp_path).quarantine == 0.05  # type: ignore[arg-type]


def test_a_handful_set_aside_is_not_told_and_neither_is_what_would_give_it_away(tmp_path: Path) -> None:
    study, sites = outlines(tmp_path, egress={"minimum_cohort": 5})
    host = Machine(study, sites, tmp_path / "out", ())
    dataset = host.dataset("A")
    assert isinstance(dataset, SetsAside)
    facts = host.agent("A").facts()
    assert facts.set_aside is None
    assert facts.patients is not None
    for split, count in dataset.set_aside().items():
        if count:
            assert getattr(facts.patients, split) is None


def test_counts_with_some_set_aside() -> None:
    rules = EgressRules(minimum_cohort=5)
    counts = rules.counts_without({"train": 30, "validation": 30, "test": 30}, {"train": 0, "validation": 4, "test": 5})
    assert counts == {"train": 30, "validation": None, "test": 30}
    assert EgressRules().counts_without({"train": 9}, {"train": 1}) == {"train": 9}


def test_a_site_that_encrypts_its_records_writes_no_list(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("ab" * 32)
    study, sites = outlines(tmp_path, encryption_key=str(tmp_path / "key"))
    assert Machine(study, sites, tmp_path / "out", ()).agent("A").facts().set_aside == 4
    assert not (tmp_path / "out" / "sites").exists()


def test_pictures_are_read_at_the_start(tmp_path: Path) -> None:
    """A cut-off picture, one of another number of channels, and a class that the study does not have."""
    made = make_diagnoses(tmp_path, {"A": (6, 6, 6)})
    folder = tmp_path / "A"
    first, second = sorted((folder / "images").glob("i0000*.png"))[0], folder / "images" / "i00020.png"
    first.write_bytes(first.read_bytes()[:100])
    from PIL import Image

    Image.new("L", (16, 16)).save(second)
    table = folder / "labels.csv"
    table.write_text(table.read_text().replace("DOE2000,bright", "DOE2000,purple"))
    entry = made.of("A").model_copy(update={"quarantine": 0.2})
    host = Machine(diagnosis_study({"A": {}}), SitesFile(sites={"A": entry}), tmp_path / "out", ())
    host.dataset("A")
    reasons = {one.patient: one.reason for one in host.datasets.aside("A")}
    assert reasons.keys() == {"DOE0000", "DOE0002", "DOE2000"}
    assert "neither PNG nor JPEG" in reasons["DOE0000"]
    assert "an image has 1 channels, and the study's have 3" in reasons["DOE0002"]
    assert "names a class that task.classes does not list" in reasons["DOE2000"]


def test_a_damaged_series_and_a_seg_of_another_scan_are_set_aside_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As DICOM: a slice missing, one cut short, the SEG of another patient, and none."""
    pytest.importorskip("highdicom")
    make_outlines(tmp_path / "nifti", {"A": 8}, slices=4)
    as_dicom(tmp_path / "nifti", tmp_path / "data")
    folder = tmp_path / "data" / "A"
    (folder / "DOE-00" / "image" / "07.dcm").unlink()  # the second of four
    cut = folder / "DOE-01" / "image" / "07.dcm"
    cut.write_bytes(cut.read_bytes()[:-100])
    shutil.copy(folder / "DOE-05" / "mask.dcm", folder / "DOE-02" / "mask.dcm")
    (folder / "DOE-03" / "mask.dcm").unlink()
    entry = SiteData.model_validate({"data": folder, "quarantine": 0.6})
    host = Machine(outline_study({"A": {}}), SitesFile(sites={"A": entry}), tmp_path / "out", ())
    with caplog.at_level(logging.WARNING):
        facts = host.agent("A").facts()
    reasons = {one.patient: one.reason for one in host.datasets.aside("A")}
    assert reasons.keys() == {f"DOE-0{number}" for number in range(4)}
    assert "1 of 4 slices of a series are missing" in reasons["DOE-00"]
    assert "damaged or cut short" in reasons["DOE-01"]
    assert "SEG is of another frame of reference" in reasons["DOE-02"]
    assert "lacks the file 'mask'" in reasons["DOE-03"]
    assert facts.set_aside == 4
    said = caplog.text + facts.model_dump_json() + "".join(reasons.values())
    for secret in ("DOE", "MUELLER", "PAT-7731", str(tmp_path), "1.2.826"):
        assert secret not in said
