"""Taking identifiers out of a DICOM file: the Basic Profile of PS3.15 annex E, pixels left as they are."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from wardround.errors import DataError
from wardround.imaging.identifiers.headers import burnt_in
from wardround.imaging.identifiers.profile import BASIC_PROFILE, MOVABLE, Action
from wardround.imaging.readers.dicom_file import guarded, path_of

# UIDs of the standard itself, which stand for kinds of files and codes.
_STANDARD = "1.2.840.10008."
_DATES = frozenset({"DA", "DT", "TM"})
_TEXTS = frozenset({"LT", "ST", "UT", "UC", "UR"})
_SHORT = frozenset({"LO", "SH", "AE", *_TEXTS})
_DUMMY = {"DA": "19000101", "TM": "000000", "DT": "19000101000000", "AS": "000Y", "DS": "0", "IS": "0"}
_REMOVED = "REMOVED"
_NUMBERS = frozenset({"FL", "FD", "SL", "SS", "UL", "US", "SV", "UV"})
_BYTES = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN"})
_MOST_DAYS = 3650
# No digit and no capital: a name made of these looks like no date, number or person.
_LETTERS = "bcdfghjklmnpqrstvwxz"
_WHOLE = 14
_WORDS = re.compile(r"[^\W_]{4,}")
_METHOD = "Wardround: DICOM PS3.15 2024b, Basic Profile"


@dataclass(frozen=True)
class Mapping:
    """What stands in place of a patient and of UIDs: the same for the same key, and without it not to be undone.

    `key` is 32 bytes that stay at the site; with `shift` dates are moved by days of the patient's own, 1 to 3650 back.
    """

    key: bytes
    shift: bool = False

    def pseudonym(self, patient: str, issuer: str = "") -> str:
        """The name of a patient: `p-` and 14 letters."""
        return f"p-{self._letters('patient', issuer, patient)}"

    def name(self, uid: str) -> str:
        """The name of a file or folder for a UID: 14 letters."""
        return self._letters("name", uid)

    def uid(self, uid: str) -> str:
        """Another UID (of the root 2.25, PS3.5 B.2); those of the standard stay."""
        if not uid or uid.startswith(_STANDARD):
            return uid
        return f"2.25.{int.from_bytes(self._digest('uid', uid)[:16])}"

    def days(self, patient: str, issuer: str = "") -> int:
        """By how many days a patient's dates are moved back."""
        return 1 + int.from_bytes(self._digest("days", issuer, patient)[:8]) % _MOST_DAYS

    def _letters(self, *parts: str) -> str:
        number, letters = int.from_bytes(self._digest(*parts)), []
        for _ in range(_WHOLE):
            number, rest = divmod(number, len(_LETTERS))
            letters.append(_LETTERS[rest])
        return "".join(letters)

    def _digest(self, *parts: str) -> bytes:
        # Lengths are hashed too, so that two lists of parts never run into the same text.
        text = b"".join(len(part.encode()).to_bytes(4) + part.encode() for part in parts)
        return hmac.digest(self.key, text, "sha256")


def cleaned(dataset: FileDataset, mapping: Mapping, issuer: str = "") -> bytes:
    """A DICOM file of this image without identifiers; the dataset is changed on the way.

    Attributes are removed, emptied or replaced as table E.1-1 says; private ones, curves, overlays, names of persons,
    unknown ones and long texts go whatever it says, and so does every text in which the patient's name or number
    stands. UIDs are mapped, dates removed or moved. Pixels and their encoding stay. `issuer` is who gave the patient
    the number, as the archive says, for the pseudonym. Raises DataError for a file that is
    no image, whose pixels show or may show text, or that cannot be read or written.
    """
    path = path_of(dataset)
    with guarded("a DICOM header is damaged, so its identifiers cannot be removed", path):
        if "PixelData" not in dataset:
            raise DataError("a DICOM file is no image with pixels", detail=str(path))
        if burnt_in(dataset):
            raise DataError(
                "an image shows text, or is of a kind that often does and does not say that it shows none "
                "(BurnedInAnnotation)",
                detail=str(path),
            )
        patient = _said(dataset, "PatientID")
        known = frozenset(
            word.casefold()
            for keyword in ("PatientID", "PatientName", "OtherPatientIDs", "AccessionNumber", "PatientBirthDate")
            for word in _WORDS.findall(_said(dataset, keyword))
        )
        syntax = dataset.file_meta.TransferSyntaxUID
        _Cleaner(mapping, mapping.days(patient, issuer) if mapping.shift else None, known).clean(dataset)
        pseudonym = mapping.pseudonym(patient, issuer)
        dataset.PatientName = dataset.PatientID = pseudonym
        _say_so(dataset, mapping.shift)
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = syntax
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
        dataset.file_meta, dataset.preamble = meta, b"\0" * 128
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Cleaner:
    mapping: Mapping
    days: int | None
    known: frozenset[str]

    def clean(self, dataset: Dataset) -> None:
        for tag in list(dataset.keys()):
            # Pixels, at the top and in icons, which are removed with their sequence.
            if tag == 0x7FE00010:
                continue
            # Commands and what belongs at a file's head have no place here; curves and overlays are drawn on images.
            misplaced = tag.group < 8 or 0x5000 <= tag.group <= 0x50FF or 0x6000 <= tag.group <= 0x60FF
            if tag.is_private or misplaced or not self._keeps(dataset[tag]):
                del dataset[tag]

    def _keeps(self, element: DataElement) -> bool:
        """Whether an element stays, changed where it has to be."""
        action, vr = BASIC_PROFILE.get(int(element.tag)), element.VR
        if vr in _DATES and self.days is not None and int(element.tag) in MOVABLE:
            return self._moved(element, self.days)
        match action:
            case None:
                return self._unlisted(element)
            case Action.X | Action.X_D:
                return False
            case Action.U:
                return vr == "UI" and self._map(element)
            case Action.Z | Action.X_Z | Action.X_Z_D:
                element.value = Sequence() if vr == "SQ" else None
                return True
            case Action.X_Z_U:
                return self._items(element)
            case Action.Z_D if vr not in _DUMMY:
                element.value = None
                return True
            case _:
                return self._items(element) if vr == "SQ" else self._dummy(element)

    def _unlisted(self, element: DataElement) -> bool:
        vr = element.VR
        if vr == "SQ":
            return self._items(element)
        if vr == "UI":
            return self._map(element)
        if vr in _DATES:
            return self.days is not None and self._moved(element, self.days)
        if vr in ("PN", "UN") or vr in _TEXTS:
            return False
        return vr not in _SHORT or not self._names_the_patient(element)

    def _names_the_patient(self, element: DataElement) -> bool:
        words = (word.casefold() for part in _parts(element) for word in _WORDS.findall(part))
        return any(word in self.known for word in words)

    def _items(self, element: DataElement) -> bool:
        for item in element.value or ():
            self.clean(item)
        return True

    def _map(self, element: DataElement) -> bool:
        found = [self.mapping.uid(uid) for uid in _parts(element)]
        element.value = found if len(found) > 1 else found[0] if found else None
        return True

    def _dummy(self, element: DataElement) -> bool:
        vr = element.VR
        if vr == "UI":
            return self._map(element)
        element.value = _DUMMY.get(vr, 0 if vr in _NUMBERS else b"\0\0" if vr in _BYTES else _REMOVED)
        return True

    def _moved(self, element: DataElement, days: int) -> bool:
        """Move dates; times of the day stay, for they say nothing without the date. What is no date goes."""
        if element.VR == "TM":
            return True
        try:
            found = [_earlier(part, days) for part in _parts(element)]
        except (ValueError, OverflowError):
            return False
        element.value = found if len(found) > 1 else found[0] if found else None
        return True


def _earlier(text: str, days: int) -> str:
    """A DA or DT that many days earlier; raises ValueError for one without a day."""
    if not text[:8].isdigit() or len(text) < 8:
        raise ValueError
    day = date(int(text[:4]), int(text[4:6]), int(text[6:8])) - timedelta(days=days)
    return f"{day:%Y%m%d}".zfill(8) + text[8:]


def _parts(element: DataElement) -> list[str]:
    value = element.value
    if value is None or value == "":
        return []
    return [str(part) for part in value] if isinstance(value, MultiValue | list | tuple) else [str(value)]


def _said(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def _say_so(dataset: Dataset, shifted: bool) -> None:
    """What PS3.15 E.1.1 asks of a file whose identifiers were removed, with the codes of PS3.16 CID 7050."""
    codes = [("113100", "Basic Application Confidentiality Profile")]
    if shifted:
        codes.append(("113107", "Retain Longitudinal Temporal Information Modified Dates Option"))
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = [_METHOD, *(["dates moved"] if shifted else [])]
    dataset.DeidentificationMethodCodeSequence = Sequence([_code(*code) for code in codes])
    dataset.LongitudinalTemporalInformationModified = "MODIFIED" if shifted else "REMOVED"


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def identifiers_of(dataset: FileDataset, path: Path) -> dict[str, str]:
    """What tells a file apart from others, by keyword, for a comparison at the site. Raises DataError."""
    names = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    with guarded("a DICOM header is damaged", path):
        return {name: _said(dataset, name) for name in names}
