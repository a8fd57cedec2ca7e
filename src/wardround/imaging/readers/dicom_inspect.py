"""A folder of CT in DICOM, in counts: no patient, no date, no identifier."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.readers.ct_projections import read_projections
from wardround.imaging.readers.ct_protocol import CTProtocol
from wardround.imaging.readers.dicom import CTSlice, read_slice
from wardround.imaging.readers.dicom_file import is_projection, open_dicom
from wardround.imaging.readers.dicom_signs import is_dicom
from wardround.imaging.readers.hounsfield import without_air, wrong_rescale
from wardround.imaging.readers.places import Place, regular_gaps, unevenness

# Problems that differ by a number are one.
_NUMBER = re.compile(r"-?\d[\d.,]*")
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
    folder: Path
    patient: str | None
    series: str
    place: Place
    lowest: float

    @classmethod
    def of(cls, one: CTSlice, folder: Path) -> _Seen:
        size, low, high = one.hu.shape, float(one.hu.min()), float(one.hu.max())
        place = (folder, one.patient or None, one.series, one.place)
        return cls((size[0], size[1]), one.spacing, low, high, one.protocol, *place, one.lowest)


def find_dicom(path: Path) -> list[Path]:
    """DICOM files at or below a path, by their suffix or their first bytes, sorted; hidden files are left out."""
    if path.is_file():
        return [path] if is_dicom(path) else []
    below = (file for file in sorted(path.rglob("*")) if not file.name.startswith("."))
    return [file for file in below if file.is_file() and is_dicom(file)]


def summarise_dicom(files: list[Path]) -> DicomSummary:
    """Read every file and count what they show. A file that cannot be read is counted under its problem."""
    try:
        if is_projection(open_dicom(files[0], pixels=False)):
            return _projections({file.parent for file in files})
    except DataError:
        pass  # counted below
    slices: list[_Seen] = []
    problems: Counter[str] = Counter()
    shown: dict[str, str] = {}

    def problem(said: str, count: int = 1) -> None:
        problems[_NUMBER.sub("#", said)] += count
        shown.setdefault(_NUMBER.sub("#", said), said)

    for file in files:
        try:
            slices.append(_Seen.of(read_slice(file, alone=False), file.parent))
        except DataError as error:
            problem(str(error))
    for what, found in list(_airless(slices)):
        problem(wrong_rescale(what), len(found))
        slices = [one for one in slices if one.series != found[0].series or one not in found]
    patients = {one.patient for one in slices}
    series = len({seen.series for seen in slices})
    counted = f"{len(files)} files, {len(slices)} of them CT slices, of {len(patients)} patients in {series} series"
    facts = (counted, *_facts(slices), *_not_whole(slices)) if slices else (counted,)
    told = (f"{shown[what]} ({n} files)" for what, n in problems.most_common())
    return DicomSummary("CT images in DICOM", facts, tuple(told))


def _airless(slices: list[_Seen]) -> Iterator[tuple[str, list[_Seen]]]:
    """Series whose rescale is wrong, patient by patient."""
    patients: dict[str | Path, dict[str, list[_Seen]]] = {}
    for one in slices:
        patients.setdefault(one.patient or one.folder, {}).setdefault(one.series, []).append(one)
    for series in patients.values():
        wrong = without_air({name: [one.lowest for one in found] for name, found in series.items()})
        yield from ((what, series[name]) for name, what in wrong.items())


def _not_whole(slices: list[_Seen]) -> Iterator[str]:
    """What keeps folders from being series that can be reconstructed; training takes every image by itself."""
    folders: dict[Path, dict[str, list[Place]]] = {}
    for one in slices:
        folders.setdefault(one.folder, {}).setdefault(one.series, []).append(one.place)
    mixed = [len(series) for series in folders.values() if len(series) > 1]
    if mixed:
        yield (
            f"mind: {len(mixed)} of {len(folders)} folders mix several series, up to {max(mixed)}: `wardround "
            "reconstruct` takes one series a folder; training takes every image by itself"
        )
    every = [places for series in folders.values() for places in series.values()]
    faults = Counter(fault for places in every if (fault := unevenness(places)))
    for fault, count in faults.most_common():
        yield f"mind: {fault} ({count} series): `wardround reconstruct` takes whole series"
    gaps = Counter(gap for places in every if not unevenness(places) and (gap := regular_gaps(places)))
    for gap, count in gaps.most_common():
        yield f"mind: slices may be missing: {gap} ({count} series)"


def _facts(slices: list[_Seen]) -> tuple[str, ...]:
    protocols = [one.protocol for one in slices]
    low, high = min(one.low for one in slices), max(one.high for one in slices)
    spacings = [spacing for one in slices for spacing in one.spacing]
    least, most = f"{min(spacings):.3g}", f"{max(spacings):.3g}"
    span = least if least == most else f"{least} to {most}"
    sizes = _counts(f"{rows} x {columns}" for rows, columns in (one.size for one in slices))
    scanners = _counts(p.scanner or "unknown" for p in protocols)
    return (
        f"in plane {sizes}; pixels of {span} mm; {low:g} to {high:g} HU",
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
