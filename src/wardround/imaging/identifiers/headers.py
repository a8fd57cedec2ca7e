"""What of a DICOM header still tells who a patient is, by the table of PS3.15 annex E."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from wardround.errors import DataError
from wardround.imaging.identifiers.findings import Finding, Level, words
from wardround.imaging.identifiers.profile import BASIC_PROFILE, Action
from wardround.imaging.identifiers.words import DATE, NAME, identifying
from wardround.imaging.readers.dicom_file import guarded, open_dicom, text

# Those that name a person by themselves, or a record in a hospital's books.
_DIRECT = words(
    """
    AccessionNumber AdmissionID ConsultingPhysicianName CurrentPatientLocation
    InsurancePlanIdentification MedicalRecordLocator MilitaryRank NameOfPhysiciansReadingStudy
    OperatorsName OrderCallbackPhoneNumber OtherPatientIDs OtherPatientIDsSequence OtherPatientNames
    PatientAddress PatientBirthDate PatientBirthName PatientID PatientMotherBirthName PatientName
    PatientTelecomInformation PatientTelephoneNumbers PerformingPhysicianName PersonAddress PersonName
    PersonTelephoneNumbers PhysiciansOfRecord ReferringPhysicianAddress ReferringPhysicianName
    ReferringPhysicianTelephoneNumbers RequestingPhysician ResponsiblePerson
    ScheduledPerformingPhysicianName ScheduledPatientInstitutionResidence
    """
)
# Of a patient, and of no one patient alone.
_CHARACTERISTICS = words(
    """
    Allergies EthnicGroup PatientAge PatientSex PatientSexNeutered PatientSize PatientWeight
    PregnancyStatus SmokingStatus
    """
)
# What programs write in place of a name.
_BLANK = re.compile(r"[\W_0xX]*|anon\w*|removed|unknown|none|null|n/?a|no ?name|test|phantom|patient", re.IGNORECASE)
# Roots of UIDs that makers of scanners and archives count up: GE, Siemens, Philips, Canon, Hitachi, Agfa, Sectra,
# Hologic, Carestream and others.
_MAKERS = re.compile(
    r"(1\.2\.840\.113619|1\.3\.12\.2\.1107|1\.3\.46\.670589|1\.2\.392\.200036|1\.2\.392\.200046|1\.3\.51\.0|1\.2\.124"
    r"\.113532|1\.2\.752\.24|1\.2\.840\.113681|1\.3\.6\.1\.4\.1\.9590|1\.2\.840\.113564)\."
)
# Modalities whose pixels often show text (PS3.3 C.7.6.1.1.3).
_DRAWN_ON = words(
    """
    BMUS CR DX ECG ES GM HC IO IVUS MG OP OT PX RF RG SC US XA XC
    """
)
_SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
_DOCUMENTS = ("1.2.840.10008.5.1.4.1.1.88.", "1.2.840.10008.5.1.4.1.1.104.")
_DATES = frozenset({"DA", "DT", "TM"})
_OUT_OF_REACH = "a header cannot be read to its end, so it was not looked through"


def look_at_dicom(path: Path) -> list[Finding]:
    """What is found in one file's header; its pixels are not read. A file that cannot be read is a finding."""
    found: list[Finding] = []
    try:
        header = open_dicom(path, pixels=False)
        with guarded(_OUT_OF_REACH, path):
            for finding in _look(header):
                found.append(finding)  # one by one: what comes before a broken element counts
    except DataError:
        found.append(Finding(Level.WARN, f"DICOM: {_OUT_OF_REACH}"))
    return found


def _look(header: Dataset) -> Iterator[Finding]:
    marked = text(header, "PatientIdentityRemoved") == "YES"
    moved = text(header, "LongitudinalTemporalInformationModified") in ("REMOVED", "MODIFIED") and marked
    yield from _marks(header, marked)
    yield from _shown(header, marked)
    for element in header.iterall():
        yield from _element(element, marked, moved)


def _element(element: DataElement, marked: bool, moved: bool) -> Iterator[Finding]:
    tag = element.tag
    if tag.is_private:
        yield Finding(Level.WARN, "DICOM: private attributes, of which the standard says nothing")
        return
    if 0x6000 <= tag.group <= 0x60FF and tag.element == 0x3000:
        yield Finding(Level.WARN, "DICOM: an overlay, which may show text")
        return
    action = BASIC_PROFILE.get(int(tag))
    if element.VR == "UI":
        if any(_MAKERS.match(uid) for uid in _texts(element)):
            yield Finding(Level.WARN, "DICOM: UIDs as a scanner's or an archive's maker counts them; map them")
        return
    if (action is None and element.VR != "PN") or not _filled(element):
        return
    name = keyword_for_tag(tag) or f"({tag.group:04X},{tag.element:04X})"
    # Where identifiers were replaced, what stands in their place cannot be told from a true one but by its shape.
    if marked and action not in (None, Action.X):
        if name in _DIRECT and identifying(" ".join(_texts(element))) in (NAME, DATE):
            yield Finding(Level.WARN, f"DICOM: {name} looks like a true one, though PatientIdentityRemoved is YES")
        return
    if name in _DIRECT:
        yield Finding(Level.REFUSE, f"DICOM: {name} is filled")
    elif element.VR in _DATES:
        if not moved:
            yield Finding(Level.WARN, "DICOM: dates or times of the examination are filled")
    elif element.VR == "PN":
        yield Finding(Level.REFUSE, f"DICOM: {name} is filled")
    elif name in _CHARACTERISTICS:
        yield Finding(Level.NOTE, f"DICOM: {name} is filled")
    else:
        yield Finding(Level.WARN, f"DICOM: {name} is filled")


def _marks(header: Dataset, marked: bool) -> Iterator[Finding]:
    if not marked:
        yield Finding(Level.WARN, "DICOM: PatientIdentityRemoved is not YES")
    elif not (text(header, "DeidentificationMethod") or header.get("DeidentificationMethodCodeSequence")):
        yield Finding(Level.NOTE, "DICOM: no DeidentificationMethod says how identifiers were removed")


def _shown(header: Dataset, marked: bool) -> Iterator[Finding]:
    """What pixels and documents may show."""
    kind, burned = text(header, "SOPClassUID") or "", text(header, "BurnedInAnnotation")
    if kind.startswith(_DOCUMENTS):
        level = Level.WARN if marked else Level.REFUSE
        yield Finding(level, "DICOM: structured reports or documents, whose text is not looked through")
    if burned == "YES":
        yield Finding(Level.REFUSE, "DICOM: BurnedInAnnotation is YES: the pixels show text")
    elif burned is None and burnt_in(header):
        yield Finding(Level.WARN, "DICOM: no BurnedInAnnotation in a kind of image that often shows text")
    if text(header, "RecognizableVisualFeatures") == "YES":
        yield Finding(Level.WARN, "DICOM: RecognizableVisualFeatures is YES: a face may be seen")


def burnt_in(header: Dataset) -> bool:
    """Whether an image shows text, by its header, or is of a kind that often does and does not say otherwise."""
    burned = text(header, "BurnedInAnnotation")
    drawn = text(header, "Modality") in _DRAWN_ON or (text(header, "SOPClassUID") or "").startswith(_SECONDARY)
    return burned == "YES" or (burned != "NO" and drawn)


def of_keyword(name: str) -> Level | None:
    """How much it matters that a value of this DICOM keyword is filled, in a file that is no DICOM; None where not."""
    if name in _DIRECT:
        return Level.REFUSE
    tag = _tags().get(name)
    if tag is None or name in _CHARACTERISTICS:
        return None
    return Level.WARN


def _tags() -> dict[str, int]:
    return {keyword_for_tag(tag): tag for tag in BASIC_PROFILE}


def _texts(element: DataElement) -> list[str]:
    value = element.value
    if value is None:
        return []
    return [str(part) for part in value] if not isinstance(value, str | bytes) and element.VM > 1 else [str(value)]


def _filled(element: DataElement) -> bool:
    """Whether something is said: not nothing, and not a word that stands for nothing."""
    if element.VR == "SQ":
        return len(element.value or ()) > 0
    if element.is_empty:
        return False
    if element.VR in ("OB", "OW", "UN", "OF", "OD", "OL", "OV"):
        return True
    return not all(_BLANK.fullmatch(part.strip(" ^")) for part in _texts(element))
