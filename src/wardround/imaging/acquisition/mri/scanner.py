"""A site's simulated MRI scanner: what it measures of an image, and what of that is worth keeping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wardround.imaging.acquisition.mri.coils import low_resolution_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.simulate import SimulatedScan, simulate
from wardround.imaging.acquisition.mri.variety import changed, drawn
from wardround.study import MRIAcquisition
from wardround.study.acquisition import MRIVariety
from wardround.wire.random import public_generator


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan without its zeros, and without maps that can be estimated again: a fifth of the memory."""

    samples: Tensor
    measured: Tensor
    maps: Tensor | None
    reference: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        parts = (self.samples, self.measured, self.maps, self.reference)
        return sum(part.nbytes for part in parts if part is not None)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """K-space (C, H, W), mask (H, W) and maps (C, H, W)."""
        kspace = self.samples.new_zeros(self.samples.shape[0], *self.measured.shape)
        kspace[:, self.measured] = self.samples
        mask = self.measured.float()
        maps = low_resolution_maps(kspace[None], mask[None])[0] if self.maps is None else self.maps
        return kspace, mask, maps


@dataclass(frozen=True)
class MRIScanner:
    """The scanner of a site: its mask is drawn for a patient (for the site where `mask.fixed`), the rest for a scan."""

    site: str
    acquisition: MRIAcquisition
    seed: int

    def scan(self, image: NDArray[np.float32], patient: int, random: np.random.Generator) -> Scan:
        """A scan of a slice (H, W) of a patient, peak 1; coils, phase and noise come from `random`."""
        whose = () if self.acquisition.mask.fixed else (patient,)
        shape = (image.shape[0], image.shape[1])
        mask = sampling_mask(self.acquisition.mask, shape, public_generator(self.seed, self.site, "mask", *whose))
        return _packed(simulate(image, self.acquisition, random, mask), self.acquisition)

    def varied(
        self, image: NDArray[np.float32], variety: MRIVariety, random: np.random.Generator
    ) -> tuple[Scan, NDArray[np.float32]]:
        """A training scan of a changed slice (H, W) by another scanner, and that slice: all from `random`."""
        scanned, scanner = changed(image, variety, random), drawn(self.acquisition, random)
        return _packed(simulate(scanned, scanner, random), scanner), scanned

    def random(self, patient: int, *which: str | int) -> np.random.Generator:
        """Public randomness of one scan of a patient: every arm of a study sees the same."""
        return public_generator(self.seed, self.site, "scan", patient, *which)


def _packed(measured: SimulatedScan, acquisition: MRIAcquisition) -> Scan:
    where = measured.mask != 0
    # ESPIRiT's are kept: to estimate them again at every visit would cost more than a step of training.
    maps = None if acquisition.maps == "estimated" else measured.maps
    return Scan(measured.kspace[:, where], where, maps, measured.reference)
