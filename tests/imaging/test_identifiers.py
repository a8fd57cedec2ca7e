"""Identifiers in files: each kind is found, what was cleaned holds none, and no finding says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from tests.hospitals.fake_archive import encoded, image

from wardround.errors import DataError
from wardround.imaging.identifiers.clean import Mapping, cleaned
from wardround.imaging.identifiers.findings import Level
from wardround.imaging.identifiers.headers import look_at_dicom
from wardround.imaging.identifiers.lint import lint_folders
from wardround.imaging.identifiers.others import look_at_nifti, look_at_notes, look_at_picture, look_at_table
from wardround.imaging.identifiers.profile import BASIC_PROFILE, MOVABLE, Action
from wardround.imaging.identifiers.words import DATE, NAME, NUMBER, identifying

KEY = bytes(range(32))


def _image(**values: Any) -> FileDataset:
    return image("PAT-7731", "1.2.999.1", "1.2.999.1.1", 1, **values)


def _clean(made: FileDataset, mapping: Mapping | None = None) -> FileDataset:
    return pydicom.dcmread(BytesIO(cleaned(made, mapping or Mapping(KEY))))


def _found(made: FileDataset, path: Path) -> dict[str, Level]:
    made.save_as(path, enforce_file_format=True)
    return {finding.what: finding.level for finding in look_at_dicom(path)}


# The table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_the_standards() -> None:
    # Rows of PS3.15 table E.1-1 as they are printed.
    printed = {
        0x00080050: Action.Z,  # Accession Number
        0x00100010: Action.Z,  # Patient's Name
        0x00100020: Action.Z_D,  # Patient ID
        0x00100030: Action.Z,  # Patient's Birth Date
        0x00101010: Action.X,  # Patient's Age
        0x0020000D: Action.U,  # Study Instance UID
        0x00080018: Action.U,  # SOP Instance UID
        0x00081140: Action.X_Z_U,  # Referenced Image Sequence
        0x00080080: Action.X_Z_D,  # Institution Name
        0x00080021: Action.X_D,  # Series Date
        0x00204000: Action.X,  # Image Comments
    }
    assert {tag: BASIC_PROFILE[tag] for tag in printed} == printed
    assert len(BASIC_PROFILE) > 600
    assert BASIC_PROFILE.keys() >= MOVABLE


# Finding -----------------------------------------------------------------------------------------------------------


def test_a_scanners_own_file_is_refused(tmp_path: Path) -> None:
    made = _image(SOPInstanceUID="1.3.12.2.1107.5.2.1")
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    found = _found(made, tmp_path / "a.dcm")
    for name in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName"):
        assert found[f"DICOM: {name} is filled"] is Level.REFUSE
    assert found["DICOM: InstitutionName is filled"] is Level.WARN
    assert found["DICOM: private attributes, of which the standard says nothing"] is Level.WARN
    assert found["DICOM: dates or times of the examination are filled"] is Level.WARN
    assert any("UIDs" in what for what in found)
    said = " ".join(found)
    for secret in ("MUELLER", "7731", "1951", "Elsewhere", "1107"):
        assert secret not in said


def test_identifiers_within_sequences_are_found(tmp_path: Path) -> None:
    made, item = _clean(_image()), Dataset()
    item.PatientID = "PAT-7731"
    item.OtherPatientIDs = "7731"
    made.RequestAttributesSequence = Sequence([item])
    made.PatientIdentityRemoved = "NO"
    found = _found(made, tmp_path / "a.dcm")
    assert found["DICOM: OtherPatientIDs is filled"] is Level.REFUSE


def test_what_stands_in_place_of_a_name_is_no_finding_once_identity_was_removed(tmp_path: Path) -> None:
    assert _found(_clean(_image()), tmp_path / "a.dcm") == {}
    assert _found(_clean(_image(), Mapping(KEY, shift=True)), tmp_path / "b.dcm") == {}
    unsaid = _clean(_image())
    del unsaid.PatientIdentityRemoved
    assert _found(unsaid, tmp_path / "c.dcm")["DICOM: PatientName is filled"] is Level.REFUSE


def test_a_true_name_in_a_file_that_claims_to_have_none_is_found(tmp_path: Path) -> None:
    made = _clean(_image())
    made.PatientName, made.PatientBirthDate = "MUELLER^ANNA", "19510423"
    found = _found(made, tmp_path / "a.dcm")
    assert set(found.values()) == {Level.WARN}
    assert len(found) == 2


@pytest.mark.parametrize("name", ["", "ANONYMOUS", "Anon^^", "XXXX", "removed", "N/A", "unknown"])
def test_words_that_stand_for_nothing_name_nobody(tmp_path: Path, name: str) -> None:
    assert "DICOM: PatientName is filled" not in _found(_image(PatientName=name), tmp_path / "a.dcm")


@pytest.mark.parametrize(
    ("values", "said", "level"),
    [
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation is YES", Level.REFUSE),
        ({"Modality": "US"}, "no BurnedInAnnotation", Level.WARN),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "no BurnedInAnnotation", Level.WARN),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "documents", Level.WARN),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "documents", Level.WARN),
        ({"RecognizableVisualFeatures": "YES"}, "a face may be seen", Level.WARN),
    ],
)
def test_what_pixels_and_documents_may_show(tmp_path: Path, values: dict[str, str], said: str, level: Level) -> None:
    made = _clean(_image())
    for name, value in values.items():
        setattr(made, name, value)
    found = _found(made, tmp_path / "a.dcm")
    assert [found[what] for what in found if said in what] == [level]


def test_overlays_are_found(tmp_path: Path) -> None:
    made = _clean(_image())
    made.add_new(0x60003000, "OW", b"\1\0" * 8)
    assert any("overlay" in what for what in _found(made, tmp_path / "a.dcm"))


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(encoded(_image())[:400])
    assert [finding.level for finding in look_at_dicom(path)][:1] == [Level.WARN]
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 300)
    assert [finding.level for finding in look_at_dicom(path)] == [Level.WARN]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("MUELLER^ANNA", NAME),
        ("Doe_John", NAME),
        ("Doe-John-1", NAME),
        ("MÜLLER ANNA", NAME),
        ("O'Brien, Mary", NAME),
        ("19510423", DATE),
        ("scan_23.04.1951", DATE),
        ("1951-04-23", DATE),
        ("mrn0012345678", NUMBER),
        ("P-7731842", NUMBER),
        ("TCGA_CS_4941", ""),
        ("BraTS20_Training_001", ""),
        ("Left_Hippocampus", ""),
        ("sub-01_ses-02_T1w", ""),
        ("imagesTr", ""),
        ("1.2.840.113619.2.55.3", ""),
        ("T1 Post Contrast", ""),
        ("p-bcdfghjklmnpqr", ""),
    ],
)
def test_names_dates_and_numbers_are_known_by_their_shape(text: str, kind: str) -> None:
    assert identifying(text) == kind


def _nifti(path: Path, make: Callable[[Any], None], kind: type = nibabel.Nifti1Image) -> Path:
    made = kind(np.zeros((2, 2, 2), dtype=np.uint8), np.eye(4))
    make(made)
    nibabel.save(made, path)
    return path


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_texts_in_nifti_headers_are_found(tmp_path: Path, kind: type, ending: str) -> None:
    def name(made: Any) -> None:
        made.header["descrip"], made.header["aux_file"] = b"MUELLER^ANNA", b"settings.txt"

    path = _nifti(tmp_path / f"a{ending}", name, kind)
    found = {finding.what: finding.level for finding in look_at_nifti(path)}
    assert found == {
        "NIfTI: `descrip` looks like a person's name": Level.WARN,
        "NIfTI: `aux_file` is filled": Level.NOTE,
    }
    assert look_at_nifti(_nifti(tmp_path / f"b{ending}", lambda made: None, kind)) == []


@pytest.mark.parametrize(("code", "level"), [(2, Level.REFUSE), (6, Level.WARN)])
def test_extensions_of_nifti_are_found(tmp_path: Path, code: int, level: Level) -> None:
    def add(made: Any) -> None:
        made.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"MUELLER^ANNA"))

    path = _nifti(tmp_path / "a.nii", add)
    data = bytearray(path.read_bytes())
    data[356:360] = code.to_bytes(4, "little")
    path.write_bytes(data)
    assert [finding.level for finding in look_at_nifti(path)] == [level]


@given(st.binary(max_size=600))
def test_any_bytes_are_looked_at_as_nifti(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.nii"
    for start in (b"", (348).to_bytes(4, "little"), (540).to_bytes(4, "big")):
        path.write_bytes(start + data)
        look_at_nifti(path)


@pytest.mark.parametrize(
    ("line", "levels"),
    [
        ("Patient,age,gender", []),
        ("Patient ID;Last Name;age", [Level.REFUSE, Level.WARN]),
        ("dob\temail", [Level.REFUSE, Level.REFUSE]),
        ("image,lesion,StudyDate", [Level.WARN]),
        ("name,label", [Level.WARN]),
        ("", []),
        ('"', []),
    ],
)
def test_columns_of_tables_are_known_by_their_names(tmp_path: Path, line: str, levels: list[Level]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{line}\nAnna,Müller,1\n")
    assert sorted(finding.level for finding in look_at_table(path)) == levels


def test_notes_beside_images_and_in_pictures_are_found(tmp_path: Path) -> None:
    notes = {"PatientName": "Müller", "PatientBirthDate": "", "EchoTime": 0.01, "InstitutionName": "St. Elsewhere"}
    (tmp_path / "a.json").write_text(json.dumps(notes))
    found = {finding.what: finding.level for finding in look_at_notes(tmp_path / "a.json")}
    assert found == {"JSON: PatientName is filled": Level.REFUSE, "JSON: InstitutionName is filled": Level.WARN}
    (tmp_path / "b.json").write_text("[" * 100_000)
    assert look_at_notes(tmp_path / "b.json") == []

    picture, exif = Image.new("RGB", (4, 4)), Image.Exif()
    exif[0x013B] = "Anna Müller"
    picture.save(tmp_path / "a.jpg", exif=exif)
    picture.save(tmp_path / "b.jpg")
    assert [finding.level for finding in look_at_picture(tmp_path / "a.jpg")] == [Level.WARN]
    assert look_at_picture(tmp_path / "b.jpg") == []


# A folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_looked_through_by_samples_or_whole(tmp_path: Path) -> None:
    series = tmp_path / "Doe_John" / "t1"
    series.mkdir(parents=True)
    for number in range(6):
        one = _clean(_image())
        if number == 3:
            one.PatientIdentityRemoved = "NO"
        one.save_as(series / f"{number}.dcm")
    (tmp_path / "Doe_John" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "MUELLER^ANNA.csv").write_text("name\n")
    sample = lint_folders([tmp_path])
    assert (sample.opened, sample.files, sample.refused) == (2, 6, False)
    assert sample.findings.lines() == ["warn          1  names: a folder's name looks like a person's name"]
    assert "Doe_John" in sample.findings.detail()
    whole = lint_folders([tmp_path], everything=True)
    assert (whole.opened, whole.refused) == (6, True)
    few = lint_folders([tmp_path], most=1)
    assert (few.opened, few.files) == (1, 6)


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        lint_folders([tmp_path / "none"])


# Cleaning ----------------------------------------------------------------------------------------------------------


def test_cleaning_keeps_what_training_reads() -> None:
    before, after = _image(), _clean(_image())
    for name in ("PixelData", "ImagePositionPatient", "PixelSpacing", "Modality", "Rows", "SOPClassUID"):
        assert after.get(name) == before.get(name) or name == "SOPClassUID"
    assert after.PatientIdentityRemoved == "YES"
    assert after.LongitudinalTemporalInformationModified == "REMOVED"
    assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID


def test_uids_are_mapped_alike_in_all_files_and_not_without_the_key() -> None:
    first, second = _clean(_image()), _clean(_image())
    assert first.StudyInstanceUID == second.StudyInstanceUID != "1.2.999.1"
    other = _clean(_image(), Mapping(bytes(32)))
    assert other.StudyInstanceUID != first.StudyInstanceUID
    assert other.PatientID != first.PatientID
    assert first.SOPClassUID == _image().SOPClassUID
    assert len(first.StudyInstanceUID) <= 64
    assert first.StudyInstanceUID.is_valid


def test_references_in_sequences_are_mapped_and_their_texts_removed() -> None:
    made, item = _image(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = made.SOPClassUID, "1.2.999.5"
    item.add_new(0x00091010, "LO", "MUELLER")
    made.ReferencedImageSequence = Sequence([item])
    (after,) = _clean(made).ReferencedImageSequence
    assert after.ReferencedSOPInstanceUID == Mapping(KEY).uid("1.2.999.5")
    assert after.ReferencedSOPClassUID == made.SOPClassUID
    assert (0x0009, 0x1010) not in after


def test_no_filled_attribute_of_the_table_is_left() -> None:
    """Every attribute of the table, filled with the patient's name or number: nothing of it is in the file."""
    made = _image()
    texts = {"UR": "http://PAT-7731", "AE": "PAT-7731", "CS": "PAT7731", "UI": "1.2.999.7731"}
    filled = 0
    for tag in BASIC_PROFILE:
        vr = pydicom.datadict.dictionary_VR(tag).split()[0]
        if vr in ("SQ", "OB", "OW", "UN", "OB or OW") or tag in made or tag < 0x00080000:
            continue
        if vr in ("LO", "SH", "LT", "ST", "UT", "UC", "UR", "PN", *texts):
            made.add_new(tag, vr, texts.get(vr, "MUELLER 7731"))
            filled += 1
        elif vr in ("DA", "DT"):
            made.add_new(tag, vr, "19510423")
            filled += 1
    assert filled > 400
    data = cleaned(made, Mapping(KEY))
    for secret in (b"MUELLER", b"PAT-7731", b"PAT7731", b"19510423", b"1.2.999"):
        assert secret not in data
    left = {finding.level for finding in _look(data)}
    assert left <= {Level.NOTE}


def _look(data: bytes) -> list[Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        path.write_bytes(data)
        return look_at_dicom(path)


def test_a_text_with_the_patients_name_goes_wherever_it_stands() -> None:
    made = _image(ConvolutionKernel="Mueller", SequenceName="*tfl3d", ScanOptions="PFP")
    after = _clean(made)
    assert "ConvolutionKernel" not in after
    assert after.SequenceName == "*tfl3d"


@given(st.text(max_size=64), st.text(max_size=64))
def test_pseudonyms_are_names_of_folders(patient: str, issuer: str) -> None:
    name = Mapping(KEY).pseudonym(patient, issuer)
    assert name[:2] == "p-"
    assert len(name) == 16
    assert name[2:].isalpha()
    assert identifying(name) == ""
    assert 1 <= Mapping(KEY).days(patient, issuer) <= 3650


@pytest.mark.parametrize(
    ("value", "moved"), [("20200131", True), ("2020", False), ("00010101", False), ("yesterday", False)]
)
def test_dates_are_moved_or_gone(value: str, moved: bool) -> None:
    made = _image()
    made.add_new(0x00080020, "DA", "")
    made[0x00080020]._value = value
    after = _clean(made, Mapping(KEY, shift=True))
    assert bool(after.get("StudyDate")) == moved
    assert after.get("StudyDate") != value


@pytest.mark.parametrize("shift", [False, True])
def test_dates_that_the_table_does_not_list_go_or_move(shift: bool) -> None:
    made = _image()
    tag = next(
        tag
        for tag, entry in sorted(pydicom.datadict.DicomDictionary.items())
        if entry[0] == "DA" and tag not in BASIC_PROFILE and tag > 0x00080000
    )
    made.add_new(tag, "DA", "20200131")
    after = _clean(made, Mapping(KEY, shift=shift))
    assert (tag in after) == shift
    assert not shift or after[tag].value < "20200131"


def test_what_is_no_image_or_shows_text_is_not_cleaned() -> None:
    with pytest.raises(DataError, match="shows text"):
        cleaned(_image(Modality="US"), Mapping(KEY))
    without = _image()
    del without.PixelData
    with pytest.raises(DataError, match="no image"):
        cleaned(without, Mapping(KEY))
