"""A folder of CT in DICOM, told in counts: no patient, no date, no identifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wardround.data.ct_projections import read_projections
from wardround.data.ct_protocol import CTProtocol
from wardround.data.dicom import CTSlice, read_slice
from wardround.data.dicom_file import is_projection, open_dicom, text
from wardround.errors import DataError

_SUFFIXES = frozenset({".dcm", ".ima", ".dicom"})
_SHOWN = 6  # of each fact's values


@dataclass(frozen=True)
class DicomSummary:
    """What files of DICOM hold, for people."""

    kind: str
    facts: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """What is kept of a slice: not its pixels, for a collection is larger than memory."""

    size: tuple[int, int]
    spacing: tuple[float, float]
    low: float
    high: float
    protocol: CTProtocol

    @classmethod
    def of(cls, one: CTSlice) -> _Seen:
        rows, columns = one.hu.shape
        return cls((rows, columns), one.spacing, float(one.hu.min()), float(one.hu.max()), one.protocol)


def find_dicom(path: Path) -> list[Path]:
    """DICOM files at or below a path, by their suffix or their first bytes, sorted; hidden files are left out."""
    if path.is_file():
        return [path] if _is_dicom(path) else []
    below = (file for file in sorted(path.rglob("*")) if not file.name.startswith("."))
    return [file for file in below if file.is_file() and _is_dicom(file)]


def summarise_dicom(files: list[Path]) -> DicomSummary:
    """Read every file and count what they show. A file that cannot be read is counted under its problem."""
    try:
        if is_projection(open_dicom(files[0], pixels=False)):
            return _projections({file.parent for file in files})
    except DataError:
        pass  # counted below
    slices: list[_Seen] = []
    patients: set[str | None] = set()
    series: set[str | None] = set()
    problems: Counter[str] = Counter()
    for file in files:
        try:
            slices.append(_Seen.of(read_slice(file)))
            header = open_dicom(file, pixels=False)
        except DataError as error:
            problems[str(error)] += 1
            continue
        patients.add(text(header, "PatientID"))
        series.add(text(header, "SeriesInstanceUID"))
    counted = (
        f"{len(files)} files, {len(slices)} of them CT slices, of {len(patients)} patients in {len(series)} series"
    )
    facts = (counted, *_facts(slices)) if slices else (counted,)
    return DicomSummary("CT images in DICOM", facts, tuple(f"{what} ({n} files)" for what, n in problems.most_common()))


def _facts(slices: list[_Seen]) -> tuple[str, ...]:
    protocols = [one.protocol for one in slices]
    low, high = min(one.low for one in slices), max(one.high for one in slices)
    spacings = [spacing for one in slices for spacing in one.spacing]
    sizes = _counts(f"{rows} x {columns}" for rows, columns in (one.size for one in slices))
    scanners = _counts(p.scanner or "unknown" for p in protocols)
    return (
        f"in plane {sizes}; pixels of {min(spacings):.3g} to {max(spacings):.3g} mm; {low:g} to {high:g} HU",
        f"scanners {scanners}",
        *(f"{name} {_counts(_say(p, key, unit) for p in protocols)}" for name, key, unit in _PROTOCOL),
    )


_PROTOCOL = (
    ("tube voltage", "kvp", " kV"),
    ("slice thickness", "slice_thickness", " mm"),
    ("kernel", "kernel", ""),
    ("source to isocentre", "source_distance", " mm"),
    ("isocentre to detector", "detector_distance", " mm"),
)


def _say(protocol: CTProtocol, key: str, unit: str) -> str:
    value = getattr(protocol, key)
    if value is None:
        return "unknown"
    return f"{value:g}{unit}" if isinstance(value, float) else str(value)


def _counts(values: Iterable[str]) -> str:
    found = Counter(values).most_common()
    shown = ", ".join(f"{value} ({count})" for value, count in found[:_SHOWN])
    return f"{shown} and {len(found) - _SHOWN} others" if len(found) > _SHOWN else shown


def _projections(folders: set[Path]) -> DicomSummary:
    facts: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    for folder in sorted(folders):
        try:
            scan = read_projections(folder)
        except DataError as error:
            problems[str(error)] += 1
            continue
        views, rows, bins = scan.sinogram.shape
        geometry = scan.geometry
        facts[
            f"{views} views of {rows} rows of {bins} bins of {geometry.bin:.4g} mm, {geometry.kind}, source "
            f"{geometry.source_distance:.4g} mm and detector {geometry.detector_distance:.4g} mm from the isocentre, "
            f"{_say(scan.protocol, 'kvp', ' kV')}"
        ] += 1
    return DicomSummary(
        "CT projections (DICOM-CT-PD)",
        (f"{len(folders)} scans", *(f"{what} ({n} scans)" for what, n in facts.most_common())),
        tuple(f"{what} ({n} scans)" for what, n in problems.most_common()),
    )


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in _SUFFIXES:
        return True
    # Scanners write IM0001 and no suffix, or a UID, whose last number looks like one.
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
