"""A CT study proposed for folders of images: fields of view that hold the bodies, and scanners to begin with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wardround.errors import DataError
from wardround.imaging.convert import counted_patients
from wardround.imaging.datasets.ct import BodyOutline, CTFolder
from wardround.imaging.proposal import HEAD, check_training, role_of
from wardround.imaging.readers.ct_files import NIFTI, patient_files
from wardround.imaging.readers.dicom_file import open_dicom, text
from wardround.imaging.readers.dicom_inspect import find_dicom
from wardround.study.scanners import PRESETS

_SIZES = (256, 128)
_SPARE = 1.01  # of the field of view beyond the largest body
_BIN = 0.75  # of a pixel, at the isocentre
_OFFSET = 0.25
# Distances in mm that a scanner may have; what headers say beyond them is a mistake.
_SOURCE, _DETECTOR = (300.0, 900.0), (200.0, 800.0)


@dataclass(frozen=True)
class _Template:
    """A scanner to begin with, as in examples/luad-ct.yaml: `views` for images of 128 x 128 pixels; distances in mm."""

    kind: str
    views: int
    source: float
    detector: float
    photons: str
    noise: float


_TEMPLATES = (
    _Template("fan_arc", 72, 595.0, 490.6, "1.5e+4", 5.0),
    _Template("fan_flat", 60, 541.0, 408.1, "1.2e+4", 8.0),
    _Template("fan_arc", 80, 570.0, 470.0, "1.0e+4", 4.0),
    _Template("fan_flat", 64, 500.0, 450.0, "1.0e+4", 5.0),
)

_OURS = "The numbers are ours, to begin with."
_HEADERS = "The numbers are ours, to begin with; distances are those of a site's DICOM headers, where they name any."
_SMALLER = " With [128, 128] there and here, and `pixel` doubled, a run is several times faster."

_STUDY = (
    HEAD
    + """\
#
# ACQUISITIONS ARE SIMULATED from your images: few views and a low dose, so that there is something to restore.
# {stated}
# Change them to the scanners that you want to study: `views`, `photons` (through air, in a bin and view),
# `electronic_noise` (in photons), the distances in mm.
# A known scanner is one line; what stands beside its name changes it, and its field of view must hold the bodies:
#   acquisition: {{preset: hyperfed_1, geometry: {{size: [{size}, {size}], views: {views}}}}}
# Presets: {presets}.
# The largest body reaches {reach:.0f} mm from its middle: {size} pixels of {pixel:g} mm hold all of them.
sites:
{sites}

task:
  kind: reconstruction
  # As `geometry.size` of every site.{other}
  size: [{size}, {size}]
  slices: {{every: 1, minimum_foreground: 0.05}}   # of volumes take less: `every: 4`, or `per_patient: 20`
  split: {{validation: 0.15, test: 0.2}}   # shares of each site's patients
  augment: true
  loss: {{kind: mse}}

model: {{kind: learn, preset: small, conditioned: true}}   # tiny | small | paper; conditioned on the scanner

method: {{kind: fedavg}}        # fedprox | fedbn | fedadam | hyperfed, see docs/methods.md

local:
  steps: 24             # optimiser steps of a site in a round
  batch: 1
  lr: 0.003
  schedule: cosine
  warmup: 30
  clip_norm: 0.02
  optimizer_state: keep

schedule: {{rounds: 20, validate_every: 4}}
"""
)


@dataclass(frozen=True)
class _Survey:
    """What a site's images ask of a scanner: reach of the largest body, in mm, and edges of pixels in mm.

    `distances` are source to isocentre and isocentre to detector, where headers say.
    """

    patients: int
    slices: int
    reach: float
    pixels: tuple[float, ...]
    distances: tuple[float, float] | None


def ct_sites(root: Path) -> list[Path]:
    """The folders of CT sites in `root`, SITE/PATIENT/..., or `root` itself where it is one, PATIENT/....

    A patient's files may lie in folders of studies and series. `root` is a site where files lie right below its
    folders, and where each of these is one patient by the headers, another one each time: as sites none could train.
    """
    if not root.is_dir():
        return []
    found = [child for child in _folders(root) if _scan_of(child)]
    if any(_scan_of(child, deep=False) for child in found):
        return [root]
    people = [{_identity(inner)[0] for inner in _folders(child) if _scan_of(inner)} for child in found]
    alone = {person for ids in people if len(ids) == 1 for person in ids if person is not None}
    return [root] if 1 < len(found) == len(alone) else found


def propose_ct(name: str, sites: Mapping[str, Path]) -> str:
    """Return a commented study (YAML) for sites with CT images; reads every image.

    128 x 128 pixels, or 256 x 256 where the images resolve as much, of one size at all sites, that hold the largest
    body. Raises DataError where an image cannot be used, no body is found, no site can train, and where folders of a
    site are series of one patient.
    """
    for path in sites.values():
        _check_patients(path)
    surveys = {site: _survey(CTFolder(path, site)) for site, path in sites.items()}
    check_training(survey.patients for survey in surveys.values())
    reach = max(survey.reach for survey in surveys.values())
    if reach == 0:
        raise DataError("no body was found in any image; `wardround inspect` lists what there is")
    field, own = 2 * reach * _SPARE, float(np.median([p for survey in surveys.values() for p in survey.pixels]))
    size = next((size for size in _SIZES if field / size >= own), _SIZES[-1])
    pixel = math.ceil(10 * field / size) / 10
    other = _SMALLER if size == _SIZES[0] else ""
    return _STUDY.format(
        name=name,
        size=size,
        pixel=pixel,
        reach=reach,
        views=_views(_TEMPLATES[0], size),
        presets=", ".join(PRESETS),
        other=other,
        stated=_HEADERS if any(survey.distances for survey in surveys.values()) else _OURS,
        sites="\n".join(
            _site(site, survey, _TEMPLATES[number % len(_TEMPLATES)], size, pixel)
            for number, (site, survey) in enumerate(surveys.items())
        ),
    )


def _site(name: str, survey: _Survey, template: _Template, size: int, pixel: float) -> str:
    source, detector = survey.distances or (template.source, template.detector)
    radius = size * pixel / 2
    # An image's corners must not reach the source.
    source = max(source, math.ceil(1.1 * math.sqrt(2) * radius))
    whole = source + detector
    spacing = math.ceil(10 * _BIN * pixel * whole / source) / 10
    fan = math.asin(radius / source)
    reach = whole * (fan if template.kind == "fan_arc" else math.tan(fan))
    bins = 2 * math.ceil(reach / spacing + _OFFSET + 2)
    slices = "1 slice" if survey.slices == 1 else f"{survey.slices} slices"
    return "\n".join(
        (
            f"  {name}:   # {counted_patients(survey.patients)}, {slices}",
            f"    role: {role_of(survey.patients)}",
            "    acquisition:",
            "      kind: ct",
            f"      photons: {template.photons}",
            f"      electronic_noise: {template.noise}",
            f"      geometry: {{kind: {template.kind}, size: [{size}, {size}], pixel: {pixel:g}, "
            f"views: {_views(template, size)}, bins: {bins},",
            f"                 bin: {spacing:g}, offset: {_OFFSET}, source_distance: {source:g}, "
            f"detector_distance: {detector:g}}}",
        )
    )


def _views(template: _Template, size: int) -> int:
    """A third more views for twice the pixels; whole quarter turns, whose matrices are a quarter as large."""
    return template.views if size == 128 else 4 * round(template.views / 3)


def _survey(folder: CTFolder) -> _Survey:
    reaches, pixels = [0.0], []
    distances: Counter[tuple[float, float]] = Counter()
    for patient in range(len(folder)):
        for image in folder.slices(patient):
            reaches.append(BodyOutline.of(image).reach)
            pixels.append(max(image.spacing))
            if image.protocol is not None:
                distances[image.protocol.source_distance or 0.0, image.protocol.detector_distance or 0.0] += 1
    known = (place for place, _ in distances.most_common() if _possible(*place))
    return _Survey(len(folder), len(pixels), max(reaches), tuple(pixels), next(known, None))


def _possible(source: float, detector: float) -> bool:
    return _SOURCE[0] <= source <= _SOURCE[1] and _DETECTOR[0] <= detector <= _DETECTOR[1]


def _folders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _scan_of(patient: Path, *, deep: bool = True) -> Path | None:
    """The first file of a patient that may be CT; without `deep`, not in the folders within the patient's."""
    files = (file for file in patient_files(patient) if deep or file.parent == patient)
    first = next((file for file in files if file.name in NIFTI or find_dicom(file)), None)
    return None if first is None or _is_mr(first) else first


def _is_mr(file: Path) -> bool:
    try:
        return file.name not in NIFTI and text(open_dicom(file, pixels=False), "Modality") == "MR"
    except DataError:
        return False  # The survey says what is wrong with it.


def _check_patients(site: Path) -> None:
    """Raise DataError where folders of a site are one patient's: it would be tested on whom it trained on."""
    known = [identity for folder in _folders(site) if (identity := _identity(folder))[1] is not None]
    doubled = len(known) - len(set(known))
    if doubled:
        raise DataError(
            f"{doubled} folders of a site hold the same examination of the same patient as another: they look like "
            "series; give each patient one folder, SITE/PATIENT/, with the series in folders within it",
            detail=str(site),
        )


def _identity(folder: Path) -> tuple[str | None, str | None]:
    """Patient and examination of the first DICOM image in a folder, as its header says."""
    scan = _scan_of(folder)
    if scan is None or scan.name in NIFTI:
        return None, None
    header = open_dicom(scan, pixels=False)
    return text(header, "PatientID"), text(header, "StudyInstanceUID")
