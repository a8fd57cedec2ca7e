"""Files beside DICOM: headers of NIfTI, columns of tables, notes beside images, and notes within pictures."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from wardround.imaging.identifiers.findings import Finding, Level, words
from wardround.imaging.identifiers.headers import of_keyword
from wardround.imaging.identifiers.raw import look_at_raw
from wardround.imaging.identifiers.words import identifying

# Enough for the longest header with its notes, and for the first line of a table.
_START = 1 << 20
_MOST_NOTES = 64
# Texts in the header by version (its first number): where they begin and how long they are.
_TEXTS = {
    348: {"descrip": (148, 80), "aux_file": (228, 24), "intent_name": (328, 16), "db_name": (14, 18)},
    540: {"descrip": (240, 80), "aux_file": (320, 24), "intent_name": (508, 16)},
}
_DICOM_NOTE = 2
_NAMES = words(
    """
    patientname patientsname lastname surname familyname firstname givenname forename
    fullname maidenname nachname vorname nom prenom apellido nombre
    """
)
_RECORDS = words(
    """
    mrn pid medicalrecordnumber medicalrecord recordnumber hospitalnumber hospitalid patientid
    patientnumber nhsnumber ssn socialsecurity socialsecuritynumber insurancenumber healthcardnumber
    accession accessionnumber fallnummer aadhaar cpf nationalid passport
    """
)
_CONTACTS = words(
    """
    address street postcode zipcode zip plz phone telephone telephonenumber phonenumber mobile email
    mail
    """
)
_BIRTHS = words(
    """
    dob birthdate dateofbirth birthday birth birthdatum geburtsdatum patientbirthdate
    """
)
_DAYS = words(
    """
    date studydate scandate examdate admissiondate dischargedate dateofdeath deathdate visitdate
    """
)
_COLUMNS = (
    (_NAMES, Level.REFUSE, "persons' names"),
    # It may be a file's.
    (frozenset({"name", "names"}), Level.WARN, "names"),
    (_RECORDS, Level.WARN, "numbers of patients or records"),
    (_CONTACTS, Level.REFUSE, "addresses or telephone numbers"),
    (_BIRTHS, Level.REFUSE, "dates of birth"),
    (_DAYS, Level.WARN, "dates"),
)


def look_at_nifti(path: Path) -> list[Finding]:
    """Texts and notes in a NIfTI header; the voxels are not read."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            start = file.read(_START)
    except (OSError, EOFError, zlib.error):
        return [Finding(Level.WARN, "NIfTI: a file cannot be read, so it was not looked through")]
    order = next(
        (order for order in "<>" if len(start) >= 4 and struct.unpack(f"{order}i", start[:4])[0] in _TEXTS), ""
    )
    if not order:
        return [Finding(Level.WARN, "NIfTI: a header cannot be read, so it was not looked through")]
    size = struct.unpack(f"{order}i", start[:4])[0]
    found = []
    for name, (offset, length) in _TEXTS[size].items():
        said = start[offset : offset + length].split(b"\0")[0].decode("utf-8", "replace").strip()
        if said and (kind := identifying(said)):
            found.append(Finding(Level.WARN, f"NIfTI: `{name}` looks like {kind}"))
        elif said:
            found.append(Finding(Level.NOTE, f"NIfTI: `{name}` is filled"))
    return [*found, *_notes(start, size, order)]


def _notes(start: bytes, size: int, order: str) -> Iterator[Finding]:
    """Extensions: whole texts and headers that programs put between a NIfTI header and its voxels."""
    if len(start) < size + 4 or start[size] == 0:
        return
    at = size + 4
    for _ in range(_MOST_NOTES):
        if len(start) < at + 8:
            return
        length, code = struct.unpack(f"{order}ii", start[at : at + 8])
        if length < 8 or length % 16:
            return
        if code == _DICOM_NOTE:
            yield Finding(Level.REFUSE, "NIfTI: an extension holds a DICOM header")
        else:
            yield Finding(Level.WARN, "NIfTI: an extension holds text that is not looked through")
        at += length


def look_at_table(path: Path) -> list[Finding]:
    """Columns of a table (CSV, TSV) whose names speak of persons; no cell is read."""
    try:
        with path.open("rb") as file:
            first = file.read(_START).decode("utf-8-sig", "replace").splitlines()[:1]
    except OSError:
        return [Finding(Level.WARN, "table: a file cannot be read, so it was not looked through")]
    line = first[0] if first else ""
    parted = max(",;\t|", key=line.count)
    try:
        names = next(csv.reader(io.StringIO(line), delimiter=parted), [])
    except csv.Error:
        return [Finding(Level.WARN, "table: a first line cannot be read, so it was not looked through")]
    plain = {"".join(letter for letter in name.lower() if letter.isalnum()) for name in names}
    return [
        Finding(level, f"table: a column of {what}, by its name") for known, level, what in _COLUMNS if plain & known
    ]


def look_at_notes(path: Path) -> list[Finding]:
    """Keys of a JSON file beside an image that are those of DICOM, as converters write them."""
    try:
        if path.stat().st_size > _START:
            return [Finding(Level.NOTE, "JSON: a file of more than a megabyte was not looked through")]
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(said, dict):
        return []
    found = ((key, of(key)) for key, value in said.items() if isinstance(key, str) and value not in (None, "", []))
    return [Finding(level, f"JSON: {key} is filled") for key, level in found if level is not None]


@cache
def of(key: str) -> Level | None:
    """How much a key matters."""
    return of_keyword(key)


def look_at_picture(path: Path) -> list[Finding]:
    """Notes that cameras and programs write into a picture (EXIF); no pixel is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                noted = bool(image.getexif())
    except Exception:  # Of a broken picture Pillow raises nearly every class of error.
        return [Finding(Level.WARN, "picture: a file cannot be read, so it was not looked through")]
    return [
        Finding(Level.WARN, "picture: notes of a camera or a program (EXIF), which may name times and places")
    ] * noted


#: What looks at a file, by its ending.
LOOKS: tuple[tuple[tuple[str, ...], Callable[[Path], list[Finding]]], ...] = (
    ((".nii.gz", ".nii"), look_at_nifti),
    ((".csv", ".tsv"), look_at_table),
    ((".json",), look_at_notes),
    ((".png", ".jpg", ".jpeg", ".tif", ".tiff"), look_at_picture),
    ((".h5", ".hdf5", ".mrd"), look_at_raw),
)
#: Files that may say anything and are not opened.
UNREAD = (".xlsx", ".xls", ".ods", ".doc", ".docx", ".pdf", ".txt", ".html", ".htm", ".xml", ".db", ".sqlite", ".mat")
