"""Small hospitals of made-up thoraxes with their lungs drawn: CT volumes in HU and masks, for chains of CT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from tests.ct_hospitals import GEOMETRY, OTHER, SIZE, thorax
from tests.outlines import image_study
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile

SPACING = 4.5
# Indices to mm to the right, front and head: rows to the back and columns to the left, as DICOM has them.
AS_DICOM = np.array([[0, -SPACING, 0, 0], [-SPACING, 0, 0, 0], [0, 0, 5.0, 0], [0, 0, 0, 1.0]])


def lungs(seed: int, slices: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A thorax in HU and its lungs, (80, 80, slices) each, rows to the back; the spine tells back from front."""
    image = np.stack([thorax(10 * seed + z) for z in range(slices)], -1)
    size = image.shape[0]
    y, x = np.meshgrid(*((np.arange(size) - (size - 1) / 2) * SPACING for _ in range(2)), indexing="ij")
    inside = ((x / 150) ** 2 + (y / 105) ** 2 < 1)[..., None]
    return image, ((image < -500) & inside).astype(np.uint8)


def save(folder: Path, image: np.ndarray, mask: np.ndarray | None, affine: np.ndarray = AS_DICOM) -> None:
    """`ct.nii.gz`, and `lung.nii.gz` where there is a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("ct", image), ("lung", mask)):
        if array is not None:
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")  # type: ignore[no-untyped-call]


def make_lungs(root: Path, sites: Mapping[str, int], slices: int = 2) -> SitesFile:
    """A folder a site with so many patients."""
    for number, (site, patients) in enumerate(sites.items()):
        for patient in range(patients):
            save(root / site / f"DOE-{patient:02d}", *lungs(100 * number + patient, slices))
    return SitesFile(sites={site: SiteData(data=root / site) for site in sites})


def ct_chain(**changes: Any) -> Study:
    """A study of the lungs; `changes` replace parts of the task (`task`), or of the study."""
    return image_study(
        {
            "kind": "chain",
            "images": ["ct"],
            "mask": "lung",
            "size": [SIZE, SIZE],
            "segmenter": {"preset": "tiny"},
            "split": {"validation": 0.2, "test": 0.3},
        },
        changes,
        name="ct-chain",
        sites={"A": {}, "B": {"acquisition": {"kind": "ct", "photons": 3e4, "geometry": OTHER}}},
        acquisition={"kind": "ct", "photons": 1e5, "geometry": GEOMETRY},
        model={"kind": "learn", "preset": "tiny"},
        local={"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.005, "optimizer_state": "keep"},
        schedule={"rounds": 2},
    )
