"""Two small hospitals of made-up heads and a study that trains on them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

SIZE = 64


def head(seed: int, slices: int = 3) -> np.ndarray:
    """A made-up head with a few round structures: uint8 (64, 64, slices)."""
    random = np.random.default_rng(seed)
    y, x, z = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j, -0.3 : 0.3 : slices * 1j]
    image = 90.0 * (x**2 + (y / 1.2) ** 2 + z**2 < 0.5)
    for centre in random.uniform(-0.4, 0.4, (5, 3)):
        image += 25.0 * (((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) < 0.02)
    return image.astype(np.uint8)


def save(image: np.ndarray, path: Path) -> None:
    """Write a NIfTI file of 2 x 2 x 5 mm voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image, np.diag([2.0, 2.0, 5.0, 1.0])), path)  # type: ignore[no-untyped-call]


def make_hospitals(root: Path) -> Path:
    """Alpha with four patients and Beta with three, `root/SITE/PATIENT/flair.nii.gz`."""
    for site, count in (("Alpha", 4), ("Beta", 3)):
        for number in range(count):
            save(head(10 * ord(site[0]) + number), root / site / f"Doe-John-{number}" / "flair.nii.gz")
    return root


def write_study(folder: Path, data: Path, **changes: Any) -> tuple[Path, Path]:
    """study.yaml and sites.yaml in `folder`: two sites, the tiny network, two rounds of two steps."""
    study = {
        "name": "tiny",
        "sites": {"Alpha": {}, "Beta": {"acquisition": {"coils": 6, "mask": {"calibration": 0.1}}}},
        "acquisition": {"coils": 4, "mask": {"calibration": 0.1}},
        "task": {
            "contrasts": ["flair"],
            "size": [SIZE, SIZE],
            "evaluation": {
                "tuning_slices": 1,
                "slices": {"per_patient": 1},
                "baselines": ["zero_filled", "cg_sense"],
                "cg_weights": [0.01],
            },
        },
        "model": {"preset": "tiny"},
        "local": {"steps": 2},
        "schedule": {"rounds": 2},
    }
    sites = {"sites": {site: {"data": str(data / site)} for site in ("Alpha", "Beta")}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study | changes), encoding="utf-8")
    (folder / "sites.yaml").write_text(yaml.safe_dump(sites), encoding="utf-8")
    return folder / "study.yaml", folder / "sites.yaml"
