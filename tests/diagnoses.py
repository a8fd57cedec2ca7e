"""Hospitals with small pictures of two or three kinds of texture, named by a table; several pictures a patient."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.outlines import image_study
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile

SIZE = 16
CLASSES = ("plain", "striped", "bright")


def make_diagnoses(root: Path, sites: Mapping[str, Sequence[int]]) -> SitesFile:
    """A folder a site; of each class so many patients, every other one with two pictures."""
    for number, (site, patients) in enumerate(sites.items()):
        folder = root / site
        (folder / "images").mkdir(parents=True)
        rows = []
        for kind, count in enumerate(patients):
            for patient in range(count):
                for which in range(1 + patient % 2):
                    name = f"i{kind}{patient:03d}{which}"
                    Image.fromarray(picture(kind, 10_000 * number + 1000 * kind + 10 * patient + which)).save(
                        folder / "images" / f"{name}.png"
                    )
                    rows.append((name, f"DOE{kind}{patient:03d}", CLASSES[kind]))
        with (folder / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "patient", "label"), *rows])
    return SitesFile(sites={site: SiteData(data=root / site) for site in sites})


def picture(kind: int, seed: int) -> np.ndarray:
    """(SIZE, SIZE, 3), uint8."""
    random = np.random.default_rng(seed)
    image = 100 + 20 * random.standard_normal((SIZE, SIZE, 3))
    if kind == 1:
        image[::2] += 60
    if kind == 2:
        image[4:12, 4:12] += 90
    return np.clip(image, 0, 255).astype(np.uint8)


def diagnosis_study(sites: Mapping[str, Any], **changes: Any) -> Study:
    """A study of the pictures; `changes` replace parts of the task (`task`), or of the study."""
    task = {
        "kind": "classification",
        "classes": CLASSES,
        "size": [SIZE, SIZE],
        "augment": "none",
        "split": {"validation": 0.2, "test": 0.3},
    }
    return image_study(
        task,
        changes,
        name="diagnoses",
        sites=dict(sites),
        model={"kind": "densenet", "preset": "tiny"},
        local={"steps": 6, "batch": 8, "optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"},
        schedule={"rounds": 4},
    )
