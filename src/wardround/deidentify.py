"""What may be said outside a site about an error inside it."""

from __future__ import annotations

import re

from wardround.errors import WardroundError

_EXTENSIONS = "nii|gz|dcm|ima|h5|hdf5|mat|npy|npz|cfl|hdr|img|mha|nrrd|tiff?|png|jpe?g|csv|json|ya?ml|db|zip|txt"
# In this order: a path may hold a date and an identifier.
_REMOVED = tuple(
    (re.compile(pattern, re.IGNORECASE), mark)
    for pattern, mark in (
        (r"""(['"])(?=[^'"\n]*[/\\])[^'"\n]*\1""", "[path]"),  # a quoted path may hold spaces
        (r"(?:[a-z]:)?[^\s'\"`(),;=]*[a-z_~.][^\s'\"`(),;=]*[/\\][^\s'\"`(),;]*", "[path]"),
        (r"(?:[a-z]:)?(?<![\w.])[/\\][^\s'\"`(),;]+", "[path]"),
        (rf"[\w^+-][\w.^+-]*\.(?:{_EXTENSIONS})\b", "[file]"),
        (r"\b\d+(?:\.\d+){4,}\b", "[identifier]"),  # a DICOM UID
        (r"\b(?:19|20)\d\d[-./]?(?:0[1-9]|1[0-2])[-./]?(?:0[1-9]|[12]\d|3[01])\b", "[date]"),
        (r"\b(?:0?[1-9]|[12]\d|3[01])[-./](?:0?[1-9]|1[0-2])[-./](?:19|20)\d\d\b", "[date]"),
        (r"[\w-]+(?:\^[\w-]*)+", "[name]"),  # DICOM's FAMILY^GIVEN
        (r"\b(?=[\w-]*[a-z])(?=[\w-]*\d{3})[\w-]+\b", "[identifier]"),  # letters with three digits in a row
        (r"(?<![\w.])\d{7,}(?![\w.])", "[identifier]"),  # a record number
    )
)


# Enough for all that was found; more would be text made to go on for ever.
_PASSES = 8
# A reason is read by people and kept in every record of the round.
_LONGEST = 500


def scrub(text: str) -> str:
    """Return `text` without paths, file names, dates, DICOM names and identifiers, each replaced by its kind.

    The second of two nets: it knows shapes, not people. Text of other libraries does not leave a site at all
    (`describe_error`).
    """
    # What takes the place of a name may complete a path: again, until nothing is found.
    for _ in range(_PASSES):
        before = text
        for pattern, mark in _REMOVED:
            text = pattern.sub(mark, text)
        if text == before:
            break
    return text


def describe_error(error: BaseException) -> str:
    """Return what a site may tell others of an error.

    An error of Wardround's own, whose message holds fixed text and numbers only, becomes `Class: message`,
    scrubbed; any other becomes its bare class name, for it may quote a path or a header.
    """
    name = type(error).__name__
    if not isinstance(error, WardroundError):
        return name
    return f"{name}: {scrub(str(error))[:_LONGEST]}"
