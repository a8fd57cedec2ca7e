"""Names of files and folders, and short texts, that look as if they told who a patient is. Shapes, no dictionary."""

from __future__ import annotations

import re
from itertools import pairwise

from wardround.imaging.identifiers.findings import words

NAME, DATE, NUMBER = "a person's name", "a date, as of a birth", "a number as long as a medical record's"

_DICOM_NAME = re.compile(r"[^\W\d_]{2,}\^[^\W\d_]*")
_YEAR, _MONTH, _DAY = r"(?:18|19|20)\d\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_DATE = re.compile(
    rf"(?<!\d)(?:{_YEAR}([-._/]?){_MONTH}\1{_DAY}|{_DAY}([-._/]){_MONTH}\2{_YEAR}|{_DAY}{_MONTH}{_YEAR})(?!\d)"
)
_NUMBER = re.compile(r"(?<![\d.])\d{6,12}(?![\d.])")
_UID = re.compile(r"\d+(?:\.\d+){4,}")
# Capital and small letters, or capitals alone: DOE, Doe, O'Brien, Müller.
_WORD = re.compile(r"[^\W\d_]['’]?[^\W\d_]+")
_PARTED = re.compile(r"[\s_,.;+-]+")
# Words of data sets, in small letters, that stand where a name would.
_COMMON = words(
    """
    adc all anon anonymous axial axi baseline batch body bone brain brats breast case center centre
    chest cohort cor coronal ct data dataset dce derivatives dicom dwi edema exam examination export
    exports fast field flair follow followup gre group head hospital image images imagestr imagests img
    input kidney knee label labels labelstr left liver localizer lung mask masks mprage mri mr nifti
    oedema output part patient patients pelvis pet phantom post prostate raw reader reading recon right
    sag sagittal scan scans scanner seg segmentation segmentations sequence series session set ses site
    slice slices spine spin echo spleen stack stage structure study studies sub subject subjects swi
    table test tests thorax time tof train training tra tse tumor tumour unknown val validation visit
    volume volumes weighted with without pre con contrast native fat sat cine short long axis
    """
)


def identifying(text: str) -> str:
    """What a text looks like: `NAME`, `DATE`, `NUMBER`, or nothing.

    >>> identifying("MUELLER^ANNA"), identifying("Doe_John"), identifying("scan_19510423"), identifying("t1_flair")
    ("a person's name", "a person's name", 'a date, as of a birth', '')
    """
    plain = _UID.sub("", text)
    if _DICOM_NAME.search(plain):
        return NAME
    if _DATE.search(plain):
        return DATE
    if _NUMBER.search(plain):
        return NUMBER
    return NAME if _two_names(plain) else ""


def _two_names(text: str) -> bool:
    """Whether two words that stand side by side are written as names are, and are none of a data set's own."""
    parts = [part for part in _PARTED.split(text) if part]
    named = [
        bool(_WORD.fullmatch(part))
        and len(part) >= 3
        and (part.istitle() or part.isupper() or "'" in part)
        and part.lower() not in _COMMON
        for part in parts
    ]
    return any(first and second for first, second in pairwise(named))
