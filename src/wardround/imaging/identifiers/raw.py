"""Headers of MRI raw data (ISMRMRD, and fastMRI, which holds one): whom they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wardround.errors import DataError, MissingExtra
from wardround.imaging.identifiers.findings import Finding, Level
from wardround.imaging.readers.raw.hdf5 import opened, text_of
from wardround.imaging.readers.raw.ismrmrd_file import groups_of

#: Elements of an ISMRMRD header that say who a patient is, or when the patient was where.
ELEMENTS = {
    "patientName": Level.REFUSE,
    "patientBirthdate": Level.REFUSE,
    "patientID": Level.WARN,
    "accessionNumber": Level.REFUSE,
    "referringPhysicianName": Level.REFUSE,
    "institutionName": Level.WARN,
    "stationName": Level.WARN,
    "studyDate": Level.WARN,
    "seriesDate": Level.WARN,
}


def look_at_raw(path: Path) -> list[Finding]:
    """Elements of a header of raw data that are filled, and fastMRI's patient_id; no sample is read."""
    try:
        with opened(path) as file:
            header = _headers(file)
            named = bool(text_of(file.attrs.get("patient_id", "")))
    except MissingExtra:
        return [Finding(Level.WARN, "raw data: a header was not looked through, for h5py is not installed")]
    except DataError:
        return [Finding(Level.WARN, "raw data: a file cannot be read, so it was not looked through")]
    found = [
        Finding(level, f"raw data: {name} is filled")
        for name, level in ELEMENTS.items()
        if re.search(rf"<(?:\w+:)?{name}>\s*[^\s<]", header)
    ]
    return [*found, *[Finding(Level.NOTE, "raw data: patient_id is filled")] * named]


def _headers(file: Any) -> str:
    found = [text_of(file[group]["xml"][0]) for group in groups_of(file)]
    if "ismrmrd_header" in file:
        found.append(text_of(file["ismrmrd_header"][()]))
    return "\n".join(text for text in found if text)
