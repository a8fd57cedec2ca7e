"""Folders of MR in DICOM, and outlines in DICOM SEG, in counts: no patient, no date, no identifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from wardround.deidentify import scrub
from wardround.errors import DataError
from wardround.imaging.readers.dicom_file import open_dicom, text
from wardround.imaging.readers.dicom_image import read_image_series
from wardround.imaging.readers.dicom_inspect import DicomSummary, summarise_dicom
from wardround.imaging.readers.dicom_seg import segment_names

_SHOWN = 12  # kinds of segments


def summarise(files: Sequence[Path]) -> DicomSummary:
    """What files of DICOM hold: CT as `summarise_dicom` says, MR by series, SEG by segment."""
    of = _by_modality(files)
    segs = of.pop("SEG", [])
    images = [file for each in of.values() for file in each]
    mr = bool(of.get("MR")) and "CT" not in of
    found = (_series(images) if mr else summarise_dicom(sorted(images))) if images else DicomSummary("", (), ())
    kind = " and ".join(part for part in (found.kind, "outlines in DICOM SEG" if segs else "") if part)
    facts, problems = _segments(segs)
    return DicomSummary(kind, (*found.facts, *facts), (*found.problems, *problems))


def _by_modality(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        try:
            modality = text(open_dicom(file, pixels=False), "Modality") or ""
        except DataError:
            modality = ""
        found.setdefault(modality, []).append(file)
    return found


def _series(files: Sequence[Path]) -> DicomSummary:
    problems: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    scanners: Counter[str] = Counter()
    patients: set[str] = set()
    gaps: Counter[str] = Counter()
    folders = sorted({file.parent for file in files}) if len(files) > 1 else list(files)
    for folder in folders:
        try:
            series = read_image_series(folder)
        except DataError as error:
            problems[str(error)] += 1
            continue
        shape, spacing = " x ".join(map(str, series.data.shape)), " x ".join(f"{s:.3g}" for s in series.spacing)
        sizes[f"{shape} voxels of {spacing} mm"] += 1
        first = series.headers[0]
        scanners[" ".join(filter(None, (text(first, "Manufacturer"), text(first, "ManufacturerModelName"))))] += 1
        patients.add(text(first, "PatientID") or "")
        if series.gaps:
            gaps[series.gaps] += 1
    whole = sum(sizes.values())
    facts = (
        f"{len(files)} files in {len(folders)} folders; {whole} series of {len(patients)} patients can be read",
        *(f"{size} ({count} series)" for size, count in sizes.most_common(_SHOWN)),
        *((f"scanners {_counted(scanners)}",) if whole else ()),
        *(f"mind: slices may be missing: {gap} ({count} series)" for gap, count in gaps.most_common()),
    )
    return DicomSummary("MR images in DICOM", facts, _said(problems))


def _segments(files: Sequence[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names: Counter[tuple[int, str]] = Counter()
    problems: Counter[str] = Counter()
    for file in files:
        try:
            # A label is free text.
            names.update((n, name if scrub(name) == name else "") for n, name in segment_names(file).items())
        except DataError as error:
            problems[str(error)] += 1
    facts = tuple(
        f"segment {number}: {name or 'a label not shown'} ({count} SEG)"
        for (number, name), count in sorted(names.items())[:_SHOWN]
    )
    return facts, _said(problems)


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'unknown'} ({count})" for name, count in found.items())


def _said(problems: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{problem} ({count} folders or files)" for problem, count in problems.most_common())
