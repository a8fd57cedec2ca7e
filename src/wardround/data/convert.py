"""Bringing files in: what a path holds, a study proposed for it, and a public collection converted."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wardround.data.ct_dataset import CONTRAST as CT
from wardround.data.deidentify import scrub
from wardround.data.dicom_inspect import find_dicom, summarise_dicom
from wardround.data.folder import SiteFolder
from wardround.data.hounsfield import check_hounsfield
from wardround.data.volume import Volume, read_volume, write_nifti
from wardround.errors import DataError
from wardround.study.schema import RESERVED_NAMES

# Files that hold somebody's drawing, not a scan.
_DRAWINGS = frozenset({"seg", "label", "labels", "mask", "segmentation"})


@dataclass(frozen=True)
class SiteSummary:
    """One site's folder in numbers: patients by contrast, images by size in plane, ranges, problems."""

    name: str
    patients: int
    contrasts: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    slices: tuple[int, int]
    intensity: tuple[float, float]
    problems: tuple[str, ...]

    @property
    def complete(self) -> frozenset[str]:
        """Contrasts, drawings apart, that every patient has."""
        return frozenset(c for c, n in self.contrasts.items() if n == self.patients) - _DRAWINGS

    def lines(self) -> list[str]:
        """Return the summary for people."""
        # A file's name seen at one patient only may be that patient's.
        shown = {c: n for c, n in self.contrasts.items() if scrub(c) == c and (n > 1 or self.patients == 1)}
        contrasts = ", ".join(f"{name} ({count})" for name, count in shown.items())
        if len(shown) < len(self.contrasts):
            contrasts = f"{contrasts or 'no common names'}; {len(self.contrasts) - len(shown)} names not shown"
        sizes = ", ".join(f"{h} x {w} ({count})" for (h, w), count in list(self.sizes.items())[:4])
        if len(self.sizes) > 4:
            sizes += f" and {len(self.sizes) - 4} other sizes"
        low, high = self.intensity
        return [
            f"site {self.name}: {_patients(self.patients)}; with {contrasts}",
            f"  in plane {sizes or 'unknown'}; {self.slices[0]} to {self.slices[1]} slices; "
            f"intensities {low:g} to {high:g}",
            *(f"  problem: {problem}" for problem in self.problems),
        ]


@dataclass(frozen=True)
class Inspection:
    """What a path holds. `facts` and `problems` never name a patient."""

    kind: str
    facts: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    sites: Mapping[str, SiteSummary] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        lines = [
            self.kind,
            *(f"  {fact}" for fact in self.facts),
            *(f"  problem: {p}" for p in self.problems),
        ]
        return "\n".join([*lines, *(line for site in self.sites.values() for line in site.lines())])


def inspect_path(path: Path) -> Inspection:
    """Say what `path` is: a NIfTI image, an array of k-space, CT in DICOM, a site's folder or a folder of sites.

    Reads every image, names no patient. Raises DataError where the path does not exist.
    """
    if path.is_file():
        return _inspect_file(path)
    if not path.is_dir():
        raise DataError("there is nothing at the given path", detail=str(path))
    if _is_site(path):
        return Inspection("a site's folder", sites={path.resolve().name: _summarise(path)})
    found = [child for child in sorted(path.iterdir()) if child.is_dir() and _is_site(child)]
    if found:
        others = [child for child in sorted(path.iterdir()) if child.is_dir() and child not in found]
        dicoms = sum(bool(find_dicom(child)) for child in others)
        beside = (f"{dicoms} more folders hold DICOM; inspect each by itself",) if dicoms else ()
        return Inspection(f"a folder of {len(found)} sites", beside, sites={s.name: _summarise(s) for s in found})
    if dicom := _inspect_dicom(path):
        return dicom
    return Inspection("unknown", problems=("expected SITE/PATIENT/CONTRAST.nii.gz, or DICOM, below this folder",))


def _inspect_dicom(path: Path) -> Inspection | None:
    files = find_dicom(path)
    if not files:
        return None
    summary = summarise_dicom(files)
    return Inspection(summary.kind, summary.facts, summary.problems)


def _inspect_file(path: Path) -> Inspection:
    if path.name.endswith((".nii", ".nii.gz")):
        try:
            volume = read_volume(path)
        except DataError as error:
            return Inspection("a NIfTI image", problems=(str(error),))
        spacing = " x ".join(f"{s:g}" for s in volume.spacing)
        low, high = volume.data.min(), volume.data.max()
        size = " x ".join(str(n) for n in volume.data.shape)
        return Inspection("a NIfTI image", (f"{size} voxels of {spacing} mm", f"intensities {low:g} to {high:g}"))
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return Inspection("an array", problems=("the file is damaged or holds Python objects",))
        facts: tuple[str, ...] = (f"shape {array.shape}, {array.dtype}",)
        if array.dtype.kind != "c":
            return Inspection("an array of real numbers", facts)
        measured = np.count_nonzero(array) / max(array.size, 1)
        peak = float(np.abs(array).max(initial=0.0))
        facts += (f"{measured:.1%} of samples measured, peak {peak:g}",)
        return Inspection("complex k-space", facts)
    if dicom := _inspect_dicom(path):
        return dicom
    return Inspection("unknown", problems=("neither NIfTI (.nii, .nii.gz), DICOM, nor a NumPy array (.npy)",))


def _is_site(folder: Path) -> bool:
    children = (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return any(True for child in children for _ in child.glob("[!.]*.nii*"))


def _summarise(path: Path) -> SiteSummary:
    name = path.resolve().name
    folder = SiteFolder(path, name, cache_bytes=0)
    contrasts = {c: len(folder) - folder.lacking(c) for c in folder.contrasts}
    sizes: Counter[tuple[int, int]] = Counter()
    problems: Counter[str] = Counter()
    slices: list[int] = []
    lows, highs = [], []
    for patient in range(len(folder)):
        for contrast in folder.contrasts_of(patient):
            try:
                volume = folder.volume(patient, contrast)
                if contrast == CT:
                    check_hounsfield(volume, path)
            except DataError as error:
                # A drawing of nothing is no fault: not every patient has a tumour.
                if contrast not in _DRAWINGS:
                    problems[str(error)] += 1
                continue
            sizes[volume.shape[0], volume.shape[1]] += 1
            slices.append(volume.shape[2])
            if contrast not in _DRAWINGS:
                lows.append(float(volume.min()))
                highs.append(float(volume.max()))
    return SiteSummary(
        name,
        len(folder),
        contrasts,
        dict(sizes.most_common()),
        (min(slices, default=0), max(slices, default=0)),
        (min(lows, default=0.0), max(highs, default=0.0)),
        tuple(f"{text} ({count} images)" for text, count in problems.items()),
    )


_STUDY = """\
# A study: everything that decides its result. What is left out has its default; `wardround check` lists all.
version: 1
name: {name}
seed: 0

# Sites by name. Where their data lie stands in the sites file, never here.
# `role: unseen` is evaluated only: it shows how the model does at a hospital that never took part.
sites:
{sites}

# The scanner simulated at every site; a site may have its own `acquisition` above.
acquisition:
  kind: mri
  coils: 8
  mask: {{family: random, acceleration: 4, calibration: 0.08}}
  noise: 0.005          # of the image's peak, per coil

task:
  kind: reconstruction
  contrasts: {contrasts}   # every patient has these
  size: [{height}, {width}]       # images are cropped or padded to it, never interpolated
  slices: {{every: 1, minimum_foreground: 0.05}}
  split: {{validation: 0.15, test: 0.2}}   # shares of each site's patients

model:
  kind: modl
  preset: small         # tiny | small | paper

method:
  kind: fedavg          # fedprox | fedbn | fedavgm | fedadam

local:
  steps: 20             # optimiser steps of a site in a round
  batch: 1
  lr: 0.001

schedule:
  rounds: 20
"""


_SITES = """\
# Where each site's data lie on this machine: no part of the study. ${VARIABLE} and ~ are replaced.
# `per_site_results: false` keeps a site's own results at the site.
"""


def propose_study(folder: Path) -> tuple[str, str]:
    """Return a commented study file and a sites file (YAML) for a folder of sites, or for one site's folder.

    Takes the contrasts that every patient has and the commonest size in plane; a site with one patient
    becomes `unseen`. Raises DataError where no site can train, no contrast is common, and for CT, whose scanners
    somebody has to choose.
    """
    found = inspect_path(folder)
    if "CT" in found.kind:
        raise _is_ct(folder)
    if not found.sites:
        raise DataError(
            "no study can be proposed: the folder must hold SITE/PATIENT/CONTRAST.nii.gz", detail=str(folder)
        )
    summaries = list(found.sites.values())
    shared = frozenset.intersection(*(summary.complete for summary in summaries))
    if shared == {CT}:
        raise _is_ct(folder)
    common = sorted(shared - {CT})
    if not common:
        have = "; ".join(f"{s.name}: {', '.join(sorted(s.complete)) or 'none'}" for s in summaries)
        raise DataError(
            "no contrast is common to every patient of every site; `wardround inspect` lists what there is",
            detail=f"complete are {have}",
        )
    if all(summary.patients < 2 for summary in summaries):
        raise DataError("no site can train: each has 1 patient, and one must be held out to test")
    sizes: Counter[tuple[int, int]] = Counter()
    for summary in summaries:
        sizes.update(summary.sizes)
    if not sizes:
        raise DataError("no image can be read; `wardround inspect` lists what is wrong")
    height, width = sizes.most_common(1)[0][0]
    names = _names(summary.name for summary in summaries)
    root = folder.resolve()
    paths = [root if _is_site(root) else root / summary.name for summary in summaries]
    lines = (
        f"  {name}: {{role: {'train' if s.patients > 1 else 'unseen'}}}   # {_patients(s.patients)}"
        for name, s in zip(names, summaries, strict=True)
    )
    study = _STUDY.format(
        name=re.sub(r"[^A-Za-z0-9._-]", "-", root.name).strip("._-")[:64] or "study",
        sites="\n".join(lines),
        contrasts=json.dumps(common),
        height=height,
        width=width,
    )
    entries = "".join(
        f"  {name}:\n    data: {_quoted(path)}\n    egress: {{per_site_results: true}}\n"
        for name, path in zip(names, paths, strict=True)
    )
    return study, f"{_SITES}sites:\n{entries}"


def _is_ct(folder: Path) -> DataError:
    text = "this is CT, for which no study is proposed: start from examples/luad-ct.yaml, and see docs/ct.md"
    return DataError(text, detail=str(folder))


def _quoted(path: Path) -> str:
    """Return a path as YAML text; JSON's quotes are YAML's."""
    return json.dumps(str(path), ensure_ascii=False)


def _patients(count: int) -> str:
    return "1 patient" if count == 1 else f"{count} patients"


def _names(folders: Iterable[str]) -> list[str]:
    """Return a valid and unique site name for each folder."""
    names: list[str] = []
    for folder in folders:
        name = re.sub(r"[^A-Za-z0-9_-]", "-", folder)[:28]
        if not name[:1].isalpha() or name in RESERVED_NAMES:
            name = f"S-{name}"
        while name in names:
            name = f"{name}b"
        names.append(name)
    return names


@dataclass(frozen=True)
class LGGReport:
    """What a conversion wrote: patients by site, and how many have FLAIR in place of a missing t1ce."""

    patients: Mapping[str, int]
    without_t1ce: int


_LGG_CASE = re.compile(r"^(TCGA_([A-Z0-9]{2})_[A-Z0-9]{4})_\d{8}$")


def convert_lgg(download: Path, out: Path) -> LGGReport:
    """Convert the Kaggle download "LGG MRI Segmentation" to `out/SITE/PATIENT/{flair,t1ce,seg}.nii.gz`.

    The download holds `kaggle_3m/TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1.tif` and `..._1_mask.tif`,
    256 x 256 pixels with the channels pre-contrast, FLAIR and post-contrast; the site is the TCGA code
    (CS). Images are averaged over 2 x 2 pixels to 128 x 128 uint8; a mask pixel is set where at least half
    of it was drawn. The collection puts FLAIR where t1ce is missing; so does this, and counts it. Clinical
    data become `clinical.csv`. Raises DataError where slices or masks are missing or have another shape.
    """
    places = (download, *sorted(download.glob("kaggle_3m")), *sorted(download.glob("*/kaggle_3m")))
    roots = [place for place in places if place.is_dir()]
    cases = {case: m for root in roots for case in sorted(root.iterdir()) if (m := _LGG_CASE.match(case.name))}
    if not cases:
        raise DataError("no case found; the download must hold kaggle_3m/TCGA_XX_NNNN_DATE", detail=str(download))
    patients: Counter[str] = Counter()
    without = 0
    for case, match in cases.items():
        images = _lgg_case(case)
        for name, data in images.items():
            volume = Volume(data.astype(np.float32), (1.0, 1.0, 1.0), np.eye(4))
            write_nifti(volume, out / match.group(2) / match.group(1) / f"{name}.nii.gz", np.uint8)
        patients[match.group(2)] += 1
        without += np.array_equal(images["flair"], images["t1ce"])
    for table in (root / "data.csv" for root in roots if (root / "data.csv").is_file()):
        shutil.copyfile(table, out / "clinical.csv")
    return LGGReport(dict(sorted(patients.items())), without)


def _lgg_case(case: Path) -> dict[str, NDArray[np.uint8]]:
    count = sum(not file.stem.endswith("_mask") for file in case.glob("*.tif"))
    slices, masks = [], []
    for number in range(1, count + 1):
        slices.append(_lgg_image(case / f"{case.name}_{number}.tif", (256, 256, 3)))
        masks.append(_lgg_image(case / f"{case.name}_{number}_mask.tif", (256, 256)))
    if not slices:
        raise DataError("a case of the download has no slices; download it again", detail=str(case))
    halved = np.stack([_halve(image) for image in slices], axis=2)
    drawn = np.stack([_halve((mask > 127).astype(np.float64)) for mask in masks], axis=2)
    return {
        "flair": np.round(halved[..., 1]).astype(np.uint8),
        "t1ce": np.round(halved[..., 2]).astype(np.uint8),
        "seg": (drawn >= 0.5).astype(np.uint8),
    }


def _lgg_image(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            array = np.asarray(image)
    except OSError as error:
        raise DataError("a slice of the download is missing or damaged; get it again", detail=str(path)) from error
    if array.shape != shape or array.dtype != np.uint8:
        raise DataError(f"a slice of the download is {array.shape}, not {shape} uint8", detail=str(path))
    return array


def _halve(image: NDArray[np.generic]) -> NDArray[np.float64]:
    """Average `(2h, 2w, ...)` over 2 x 2 pixels to `(h, w, ...)`."""
    height, width = image.shape[:2]
    blocks = image.reshape(height // 2, 2, width // 2, 2, *image.shape[2:])
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float64))
