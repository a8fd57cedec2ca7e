"""Bringing files in: what a path holds, and a public collection converted."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wardround.deidentify import scrub
from wardround.errors import DataError
from wardround.imaging.datasets.ct import CONTRAST as CT
from wardround.imaging.raw_inspect import RawSummary, describe_file, raw_sites, summarise_raw
from wardround.imaging.readers.dicom_inspect import find_dicom
from wardround.imaging.readers.folder import SiteFolder
from wardround.imaging.readers.hounsfield import check_hounsfield
from wardround.imaging.readers.raw import is_raw, raw_files
from wardround.imaging.readers.raw.arrays import read_array
from wardround.imaging.readers.raw.trajectory import points_file
from wardround.imaging.readers.series_inspect import summarise
from wardround.imaging.readers.volume import Volume, read_volume, write_nifti

# Files that hold somebody's drawing, not a scan.
DRAWINGS = frozenset({"seg", "label", "labels", "mask", "segmentation"})


@dataclass(frozen=True)
class SiteSummary:
    """One site's folder in numbers: patients by contrast, images by size in plane, ranges; unusable files."""

    name: str
    patients: int
    contrasts: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    slices: tuple[int, int]
    intensity: tuple[float, float]
    unusable: Mapping[str, tuple[str, ...]]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with how many images."""
        return tuple(f"{text} ({len(files)} images)" for text, files in self.unusable.items())

    @property
    def complete(self) -> frozenset[str]:
        """Contrasts, drawings apart, that every patient has."""
        return frozenset(c for c, n in self.contrasts.items() if n == self.patients) - DRAWINGS

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
            f"site {self.name}: {counted_patients(self.patients)}; with {contrasts}",
            f"  in plane {sizes or 'unknown'}; {self.slices[0]} to {self.slices[1]} slices; "
            f"intensities {low:g} to {high:g}",
            *(f"  problem: {problem}" for problem in self.problems),
        ]


@dataclass(frozen=True)
class Inspection:
    """What a path holds. Facts, problems and the text of it never name a patient; `unusable` names files."""

    kind: str
    facts: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    sites: Mapping[str, SiteSummary] = field(default_factory=lambda: MappingProxyType({}))
    raw: tuple[RawSummary, ...] = ()

    @property
    def unusable(self) -> list[str]:
        """A line for each file below a folder that cannot be used, and why: for eyes at the site alone."""
        images = [item for site in self.sites.values() for item in site.unusable.items()]
        scans = [(text, map(str, files)) for site in self.raw for text, files in site.problems.items()]
        return [f"{file}: {text}" for text, files in (*images, *scans) for file in files]

    def __str__(self) -> str:
        lines = [
            self.kind,
            *(f"  {fact}" for fact in self.facts),
            *(f"  problem: {p}" for p in self.problems),
        ]
        return "\n".join([*lines, *(line for site in self.sites.values() for line in site.lines())])


def inspect_path(path: Path) -> Inspection:
    """Say what `path` is: a NIfTI image, an array of k-space, DICOM, a site's folder or a folder of sites.

    Reads every image, names no patient. Raises DataError where the path does not exist.
    """
    if path.is_file():
        return _inspect_file(path)
    if not path.is_dir():
        raise DataError("there is nothing at the given path", detail=str(path))
    if is_site(path):
        return Inspection("a site's folder", beside_images(path), sites={path.resolve().name: _summarise(path)})
    found = [child for child in sorted(path.iterdir()) if child.is_dir() and is_site(child)]
    if found:
        others = [child for child in sorted(path.iterdir()) if child.is_dir() and child not in found]
        dicoms = sum(bool(find_dicom(child)) for child in others)
        dicom_said = (f"{dicoms} more folders hold DICOM; inspect each by itself",) if dicoms else ()
        beside = (*dicom_said, *beside_images(path))
        return Inspection(f"a folder of {len(found)} sites", beside, sites={s.name: _summarise(s) for s in found})
    if raw := raw_sites(path):
        return _inspect_raw(path, raw)
    if dicom := _inspect_dicom(path):
        return dicom
    return Inspection(
        "unknown", problems=("expected SITE/PATIENT/CONTRAST.nii.gz, raw data or DICOM below this folder",)
    )


def _inspect_raw(path: Path, sites: Sequence[Path]) -> Inspection:
    """What sites with raw data hold."""
    what = "a site's folder of raw data" if sites[0] == path else f"a folder of {len(sites)} sites with raw data"
    found = tuple(summarise_raw(site) for site in sites)
    return Inspection(what, tuple(line for site in found for line in site.lines()), raw=found)


def _inspect_dicom(path: Path) -> Inspection | None:
    files = find_dicom(path)
    if not files:
        return None
    summary = summarise(files)
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
    if path.suffix == ".npy" and not points_file(path).exists():
        try:
            array = read_array(path, "array")
        except DataError as error:
            return Inspection("an array", problems=(str(error),))
        if array.dtype.kind != "c":
            return Inspection("an array of real numbers", (f"shape {array.shape}, {array.dtype}",))
    if is_raw(path):
        return Inspection(*describe_file(path))
    if dicom := _inspect_dicom(path):
        return dicom
    return Inspection("unknown", problems=("neither NIfTI (.nii, .nii.gz), raw data, DICOM, nor an array (.npy)",))


def beside_images(folder: Path) -> tuple[str, ...]:
    """Says that raw data lie in a folder with images, for a study takes one kind; empty where none do."""
    count = len(raw_files(folder))
    what = "1 file of raw data lies beside NIfTI images and is left out"
    if count > 1:
        what = f"{count} files of raw data lie beside NIfTI images and are left out"
    return (f"{what}: keep one kind in a folder",) if count else ()


def is_site(folder: Path) -> bool:
    """Whether a folder holds PATIENT/CONTRAST.nii.gz."""
    children = (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return any(True for child in children for _ in child.glob("[!.]*.nii*"))


def _summarise(path: Path) -> SiteSummary:
    name = path.resolve().name
    folder = SiteFolder(path, name, cache_bytes=0)
    contrasts = {c: len(folder) - folder.lacking(c) for c in folder.contrasts}
    sizes: Counter[tuple[int, int]] = Counter()
    problems: defaultdict[str, list[str]] = defaultdict(list)
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
                if contrast not in DRAWINGS:
                    problems[str(error)].append(error.detail)
                continue
            sizes[volume.shape[0], volume.shape[1]] += 1
            slices.append(volume.shape[2])
            if contrast not in DRAWINGS:
                lows.append(float(volume.min()))
                highs.append(float(volume.max()))
    return SiteSummary(
        name,
        len(folder),
        contrasts,
        dict(sizes.most_common()),
        (min(slices, default=0), max(slices, default=0)),
        (min(lows, default=0.0), max(highs, default=0.0)),
        {text: tuple(files) for text, files in problems.items()},
    )


def counted_patients(count: int) -> str:
    """`1 patient`, `2 patients`."""
    return "1 patient" if count == 1 else f"{count} patients"


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
