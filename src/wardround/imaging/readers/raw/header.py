"""The XML header of ISMRMRD, which fastMRI's files hold as well: what of it is used here.

Inati et al., "ISMRM Raw data format", Magn. Reson. Med. 77 (2017), 411. The package ismrmrd, which parses it, is a part
of the extra `raw`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.errors import MissingExtra
from wardround.imaging.readers.raw.slices import ScanFacts, raw_error

_MOST_BYTES = 1 << 22
_MOST_SIZE = 1 << 14


@dataclass(frozen=True)
class Encoding:
    """One encoded space: sizes in samples, fields of view in mm, (readout, phase, partition); where its centre lies.

    `recon` is the image that the scan is for. `centre` is the encoding step of the middle line and partition, `None`
    where the header does not say it.
    """

    trajectory: str
    matrix: tuple[int, int, int]
    field: tuple[float, float, float]
    recon: tuple[int, int, int]
    recon_field: tuple[float, float, float]
    centre: tuple[int | None, int | None]

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Size of a voxel in mm along readout, phase encode and partition, `None` where a size is no size."""
        sides = tuple(f / m for f, m in zip(self.field, self.matrix, strict=True))
        good = all(math.isfinite(side) and side > 0 for side in sides)
        return (sides[0], sides[1], sides[2]) if good else None

    @property
    def rows(self) -> int:
        """Positions along the readout without its oversampling: those within the field of view of the image."""
        share = self.recon_field[0] / self.field[0] if self.field[0] > 0 else 1.0
        return max(1, round(self.matrix[0] * min(1.0, share))) if share > 0 else self.matrix[0]

    def matrix_along(self, pixel: float | None) -> tuple[int, int]:
        """Rows and columns of the image of a scan along a trajectory, whose points are in pixels of `pixel` mm.

        Of the image's field of view: `recon` itself may be interpolated, or the encoded lines number the readouts.
        """
        if pixel is None or min(self.recon_field[:2]) <= 0:
            return self.recon[0], self.recon[1]
        rows, columns = (max(1, round(side / pixel)) for side in self.recon_field[:2])
        return rows, columns


@dataclass(frozen=True)
class Header:
    """What an ISMRMRD header says."""

    facts: ScanFacts
    encodings: tuple[Encoding, ...]


def parse_header(xml: str | bytes, path: Path) -> Header:
    """Read a header. Raises DataError for what is none, and `MissingExtra` without the package ismrmrd."""
    text = xml.decode("utf-8", "replace") if isinstance(xml, bytes) else xml
    wrong = "the header of a raw data file is no ISMRMRD header"
    # A document type may define entities that grow without end; no header needs one.
    if len(text) > _MOST_BYTES or "<!DOCTYPE" in text:
        raise raw_error(wrong, path)
    try:
        from ismrmrd.xsd import CreateFromDocument
    except ImportError as error:
        raise MissingExtra("reading the header of raw data (fastMRI, ISMRMRD)", "raw") from error
    try:
        found = CreateFromDocument(text.encode("utf-8"))
        encodings = tuple(_encoding(one) for one in found.encoding)
    except Exception as error:  # the parser's own errors are of many kinds
        raise raw_error(wrong, path, str(error)) from error
    if not encodings or any(not 1 <= n <= _MOST_SIZE for one in encodings for n in (*one.matrix, *one.recon)):
        raise raw_error(f"{wrong}: it has no encoding, or an encoding of impossible size", path)
    return Header(_facts(found, encodings[0]), encodings)


def _encoding(one: Any) -> Encoding:
    limits = one.encodingLimits
    first = None if limits is None else limits.kspace_encoding_step_1
    second = None if limits is None else limits.kspace_encoding_step_2
    return Encoding(
        str(getattr(one.trajectory, "value", one.trajectory)).lower(),
        _three(one.encodedSpace.matrixSize, int),
        _three(one.encodedSpace.fieldOfView_mm, float),
        _three(one.reconSpace.matrixSize, int),
        _three(one.reconSpace.fieldOfView_mm, float),
        (None if first is None else int(first.center), None if second is None else int(second.center)),
    )


def _three(one: Any, kind: type[Any]) -> Any:
    return kind(one.x), kind(one.y), kind(one.z)


def _facts(found: Any, encoding: Encoding) -> ScanFacts:
    system, subject, measurement = (
        found.acquisitionSystemInformation,
        found.subjectInformation,
        found.measurementInformation,
    )
    strength = None if system is None else system.systemFieldStrength_T
    vendor = None if system is None else system.systemVendor
    return ScanFacts(
        spacing=encoding.spacing,
        field_strength=None if strength is None else float(strength),
        vendor=vendor or None,
        protocol=(None if measurement is None else measurement.protocolName) or None,
        matrix=(encoding.recon[0], encoding.recon[1]),
        patient=(None if subject is None else subject.patientID) or None,
    )


def common(values: Sequence[int], what: str, path: Path) -> int:
    """The one value that all readouts share. Raises DataError where they differ."""
    found = sorted({int(value) for value in values})
    if len(found) != 1:
        raise raw_error(
            f"the readouts of a raw data file differ in {what}; several scans lie in one file: split it",
            path,
            str(found),
        )
    return found[0]
