"""Hospitals with outlined blobs in small volumes: tumours that a network of a few thousand weights can learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile

SIZE = 32


def make_outlines(root: Path, sites: Mapping[str, int], slices: int = 4, without: int = 0) -> SitesFile:
    """A folder a site with so many patients, `image.nii.gz` and `mask.nii.gz` each; the last `without` have no blob."""
    for number, (site, patients) in enumerate(sites.items()):
        for patient in range(patients):
            image, mask = blob(1000 * number + patient, slices, drawn=patient < patients - without)
            folder = root / site / f"DOE-{patient:02d}"
            folder.mkdir(parents=True)
            affine = np.diag([1.0, 1.0, 3.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(image, affine), folder / "image.nii.gz")
            nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "mask.nii.gz")
    return SitesFile(sites={site: SiteData(data=root / site) for site in sites})


def blob(seed: int, slices: int, drawn: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """An image of noise in a disc with a bright ball, and the ball: (SIZE, SIZE, slices), uint8."""
    random = np.random.default_rng(seed)
    y, x, z = np.meshgrid(np.arange(SIZE), np.arange(SIZE), np.arange(slices), indexing="ij")
    centre = random.uniform(10, SIZE - 10, 2)
    radius = random.uniform(3, 6)
    far = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 + (3 * (z - slices / 2)) ** 2
    ball = (far < radius**2) & drawn
    body = (y - SIZE / 2) ** 2 + (x - SIZE / 2) ** 2 < (SIZE / 2 - 1) ** 2
    image = body * (90 + 15 * random.standard_normal(y.shape)) + 90 * ball
    return np.clip(image, 0, 255).astype(np.uint8), ball.astype(np.uint8)


def outline_study(sites: Mapping[str, Any], **changes: Any) -> Study:
    """A study of the blobs in 2-D; `changes` replace parts of the task (`task`), or of the study."""
    return image_study(
        {"kind": "segmentation", "patch": [SIZE, SIZE], "split": {"validation": 0.2, "test": 0.3}},
        changes,
        name="outlines",
        sites=dict(sites),
        model={"kind": "monai_unet", "preset": "tiny"},
        local={"steps": 6, "batch": 4, "optimizer": "adam", "lr": 0.02, "optimizer_state": "keep"},
        schedule={"rounds": 6},
    )


def image_study(task: Mapping[str, Any], changes: Mapping[str, Any], **values: Any) -> Study:
    """A study of a task of images; `changes` replace parts of the task (`task`), or of the study."""
    return Study.model_validate({"seed": 5, **values, **changes, "task": {**task, **changes.get("task", {})}})
