"""A derived series keeps whose it is and says what it is."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from tests.ct_files import setting, write_series

from wardround.errors import DataError
from wardround.imaging.readers.dicom import CTSeries, read_series, read_slice
from wardround.imaging.writers.dicom import write_derived

KEPT = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "StudyInstanceUID",
    "StudyDate",
    "AccessionNumber",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "KVP",
    "InstanceNumber",
)


def _series(folder: Path, change: object = id) -> CTSeries:
    return read_series(write_series(folder, (0.0, 5.0, 10.0), change=change))


def test_a_derived_series_comes_back_where_its_source_lies(tmp_path: Path) -> None:
    source = _series(tmp_path / "in")
    images = source.data + 0.4
    images[0, 0, 0], images[0, 1, 0] = -3000, 2999.6
    files = write_derived(source, images, tmp_path / "site" / "out", "denoised")
    assert [path.name for path in files] == ["slice_0001.dcm", "slice_0002.dcm", "slice_0003.dcm"]
    found = read_series(tmp_path / "site" / "out")
    np.testing.assert_array_equal(found.data, np.rint(np.maximum(images, -1024)))
    assert found.data[0, 1, 0] == 3000
    np.testing.assert_array_equal(found.affine, source.affine)
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["out"]


def _private(header: FileDataset) -> None:
    header.private_block(0x0029, "SOME VENDOR", create=True).add_new(1, "LO", "secret of the scanner")
    header.OperatorsName = "SMITH^X"
    header.PatientName, header.SpecificCharacterSet = "MÜLLER^ANNA", "ISO_IR 192"


def test_identity_is_kept_and_the_rest_says_what_it_is(tmp_path: Path) -> None:
    source = _series(tmp_path / "in", _private)
    files = write_derived(source, source.data, tmp_path / "out", "reconstructed by a federated model")
    images = [pydicom.dcmread(path) for path in files]
    for image, header in zip(images, source.headers, strict=True):
        for keyword in KEPT:
            assert image[keyword].value == header[keyword].value, keyword
        assert image.SOPInstanceUID == image.file_meta.MediaStorageSOPInstanceUID != header.SOPInstanceUID
        assert image.SeriesInstanceUID != header.SeriesInstanceUID
        assert list(image.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert image.DerivationDescription == "Wardround, research use only: reconstructed by a federated model"
        assert "research use only" in image.SeriesDescription
        assert len(image.SeriesDescription) <= 64
        assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
        ours, scanner = image.ContributingEquipmentSequence
        assert ours.ContributionDescription == "Wardround, research use only"
        assert (scanner.Manufacturer, scanner.ManufacturerModelName) == ("SIEMENS", "Sensation 16")
        assert image.Manufacturer == "Wardround"
        assert image.LossyImageCompression == "00"
        assert not any(element.tag.is_private for element in image.iterall())
        assert "OperatorsName" not in image
    assert len({image.SOPInstanceUID for image in images}) == 3
    assert len({image.SeriesInstanceUID for image in images}) == 1
    assert images[0].PatientName == "MÜLLER^ANNA"
    assert read_slice(files[0]).protocol.kvp == 120


def test_loss_is_not_forgotten(tmp_path: Path) -> None:
    lossy = setting(LossyImageCompression="01", LossyImageCompressionRatio="10")
    source = _series(tmp_path / "in", lossy)
    assert source.lossy
    image = pydicom.dcmread(write_derived(source, source.data, tmp_path / "out", "x")[0])
    assert (image.LossyImageCompression, image.LossyImageCompressionRatio) == ("01", 10)


def test_odd_headers_can_be_written_again(tmp_path: Path) -> None:
    odd = setting(PixelSpacing=["006.445312e-01", "006.445312e-01"], SeriesNumber=None, Manufacturer=None, KVP="000120")
    source = _series(tmp_path / "in", odd)
    write_derived(source, source.data, tmp_path / "out", "x" * 2000)
    assert read_series(tmp_path / "out").spacing == (0.6445312, 0.6445312, 5.0)


@pytest.mark.parametrize("fault", ["shape", "nan", "high", "exists"])
def test_what_is_no_ct_is_not_written(tmp_path: Path, fault: str) -> None:
    source = _series(tmp_path / "in")
    images, out = source.data.copy(), tmp_path / "out"
    if fault == "shape":
        images = images[..., :2]
    if fault == "nan":
        images[0, 0, 0] = np.nan
    if fault == "high":
        images[0, 0, 0] = 40000
    if fault == "exists":
        out.mkdir()
    with pytest.raises(DataError):
        write_derived(source, images, out, "x")
    assert not out.exists() or not list(out.iterdir())


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _series(tmp_path / "in")
    real, calls = Path.write_bytes, []

    def write_bytes(self: Path, data: bytes) -> int:
        calls.append(self)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(DataError, match="disk is full"):
        write_derived(source, source.data, tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("zone", ["-0500", "+1345", None, "nonsense"])
def test_times_are_those_of_the_sources_zone(tmp_path: Path, zone: str | None) -> None:
    """An offset holds for all times of a header, so the copied ones decide."""
    source = _series(tmp_path / "in", setting(TimezoneOffsetFromUTC=zone) if zone else id)
    before = datetime.now().astimezone()
    image = pydicom.dcmread(write_derived(source, source.data, tmp_path / "out", "x")[0])
    zone = None if zone == "nonsense" else zone
    assert image.get("TimezoneOffsetFromUTC") == zone
    assert (image.StudyDate, image.StudyTime) == ("20190214", "101500")
    local = before if zone is None else before.astimezone(datetime.strptime(zone, "%z").tzinfo)
    said = datetime.strptime(image.ContentDate + image.ContentTime, "%Y%m%d%H%M%S").replace(tzinfo=local.tzinfo)
    assert abs(said - before) < timedelta(minutes=1)
    assert (image.SeriesDate, image.InstanceCreationTime) == (image.ContentDate, image.ContentTime)
    contributed = datetime.strptime(image.ContributingEquipmentSequence[0].ContributionDateTime, "%Y%m%d%H%M%S%z")
    assert abs(contributed - before) < timedelta(minutes=1)


# Type 2 in the modules that a CT image must have (DICOM PS3.3, A.3): there, though perhaps empty.
TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
    "SliceThickness",
    "InstanceNumber",
    "AcquisitionNumber",
    "KVP",
    "PatientPosition",
    "SeriesNumber",
    "Manufacturer",
)


def test_what_nobody_knows_is_there_and_empty(tmp_path: Path) -> None:
    absent = [name for name in TYPE_2 if name != "AcquisitionNumber"]
    source = _series(tmp_path / "in", setting(**dict.fromkeys(absent), FrameOfReferenceUID=None))
    images = [pydicom.dcmread(path) for path in write_derived(source, source.data, tmp_path / "out", "x")]
    for name in TYPE_2:
        assert name in images[0], name
        if name not in ("SeriesNumber", "Manufacturer"):
            assert images[0][name].VM == 0, name
    # A frame of reference is never empty: one of their own, which the source is not in.
    (frame,) = {image.FrameOfReferenceUID for image in images}
    assert frame
    assert read_series(tmp_path / "out").data.shape == source.data.shape


@pytest.mark.parametrize("uid", [None, ""])
def test_a_source_of_no_study_or_of_several_is_refused(tmp_path: Path, uid: str | None) -> None:
    source = _series(tmp_path / "in", setting(StudyInstanceUID=uid))
    with pytest.raises(DataError, match=r"must belong to one study, but its source's headers name none"):
        write_derived(source, source.data, tmp_path / "out", "x")
    source.headers[0].StudyInstanceUID = source.headers[1].StudyInstanceUID = "1.2.3"
    source.headers[2].StudyInstanceUID = "1.2.4"
    with pytest.raises(DataError, match=r"headers name 2 \(StudyInstanceUID\)"):
        write_derived(source, source.data, tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()
