"""Small hospitals made of arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wardround.imaging.readers.volume import Volume, write_nifti

MakeSite = Callable[..., Path]


def head(size: tuple[int, int], slices: int, seed: int) -> np.ndarray:
    """A bright disc with texture and a dark hole in air; the first slice is empty."""
    random = np.random.default_rng(seed)
    y, x = np.indices(size) - np.array(size).reshape(2, 1, 1) / 2
    radius = np.hypot(y, x) / min(size)
    disc = np.where(radius < 0.35, random.integers(100, 200, size), 0)
    disc[radius < 0.05] = 0
    volume = np.repeat(disc[..., None], slices, axis=2)
    volume[..., 0] = 0
    return volume.astype(np.float32)


@pytest.fixture
def make_site(tmp_path: Path) -> MakeSite:
    def make(
        site: str = "CS",
        patients: int = 6,
        *,
        contrasts: tuple[str, ...] = ("flair", "t1ce"),
        size: tuple[int, int] = (32, 32),
        slices: int = 5,
        seed: int = 0,
    ) -> Path:
        for number in range(patients):
            for place, contrast in enumerate(contrasts):
                data = head(size, slices, 1000 * seed + 10 * number + place)
                volume = Volume(data, (1.0, 1.0, 4.0), np.eye(4))
                folder = tmp_path / site / f"MUELLER_{number:04d}"
                write_nifti(volume, folder / f"{contrast}.nii.gz", np.uint8)
        return tmp_path / site

    return make
