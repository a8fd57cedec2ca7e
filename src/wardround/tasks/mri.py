"""MRI reconstruction: undersampled multi-coil k-space, simulated from a site's own magnitude images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.scanner import MRIScanner, Scan
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SliceExample, head_of_slice
from wardround.imaging.datasets.visits import Index
from wardround.study import MRIAcquisition, schema
from wardround.study import tasks as tasks_config
from wardround.study.acquisition import CoilAcquisition
from wardround.study.baselines import Baseline
from wardround.tasks.classical import Method
from wardround.tasks.magnitudes import MagnitudeReconstruction
from wardround.tasks.reconstruction import NO_EMBEDDINGS, ReconstructionDataset


@dataclass(frozen=True, eq=False)
class MRIBatch:
    """Slices with what a scanner would have measured of them.

    kspace, maps: complex64 (B, C, H, W). mask, target, head: float32 (B, H, W); `target` is the magnitude
    image the acquisition was simulated from, 1 being its volume's maximum, `head` is 1 inside the head.
    """

    kspace: Tensor
    maps: Tensor
    mask: Tensor
    target: Tensor
    head: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    @cached_property
    def operator(self) -> CartesianMRI:
        """The acquisition as the reconstruction knows it."""
        return CartesianMRI(self.maps, self.mask)

    @property
    def body(self) -> Tensor:
        """The head, by the name that all scans have for what is imaged."""
        return self.head

    def images(self, method: Method) -> Tensor:
        """Magnitudes (B, H, W) of what a method makes of operator and k-space."""
        return method(self.operator, self.kspace).abs()

    def part(self, start: int, stop: int) -> MRIBatch:
        """The slices from `start` to before `stop`."""
        return MRIBatch(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    @classmethod
    def of(cls, scan: Scan, image: NDArray[np.float32], head: NDArray[np.bool_]) -> MRIBatch:
        """A batch of one scan of an image (H, W) with its head; a scan that has a reference has it for a target."""
        kspace, mask, maps = scan.unpacked()
        target = torch.from_numpy(image) if scan.reference is None else scan.reference
        inside = torch.from_numpy(head.astype(np.float32))
        return cls(kspace[None], maps[None], mask[None], target[None], inside[None])

    @classmethod
    def joined(cls, batches: Sequence[MRIBatch]) -> MRIBatch:
        """One batch of all slices, in order; scans with fewer coils get more, which see nothing and change nothing."""
        coils = max(batch.maps.shape[1] for batch in batches)
        padded = [
            replace(batch, kspace=_with_coils(batch.kspace, coils), maps=_with_coils(batch.maps, coils))
            for batch in batches
        ]
        return cls(*(torch.cat([getattr(batch, field.name) for batch in padded]) for field in fields(cls)))


def _with_coils(x: Tensor, coils: int) -> Tensor:
    """(B, C, H, W) -> (B, coils, H, W), zeros behind."""
    missing = coils - x.shape[1]
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x


class MRIDataset(ReconstructionDataset[MRIBatch]):
    """One site's slices and their simulated MRI scans.

    The mask is drawn for a patient (for the site where `mask.fixed`), coils, phase and noise for a slice. Scans are
    kept in memory up to `cache_bytes`, measured samples only; those that `acquisition.vary` draws never come again and
    are not kept. Raises DataError where an image cannot be used.
    """

    def __init__(
        self,
        index: Index,
        acquisition: MRIAcquisition,
        task: tasks_config.ReconstructionTask,
        *,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(index, task, MRIBatch.joined)
        self.acquisition = acquisition
        self.scanner = MRIScanner(index.site, acquisition, seed)
        self._cache = ScanCache[Scan](cache_bytes)

    def scan(self, example: SliceExample, flip: bool) -> MRIBatch:
        """A batch of one slice, flipped left-right before its scan where `flip` says so."""
        image, head = self._index.image(example), self._index.mask(example)
        if flip:
            image, head = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(head[:, ::-1])
        patient, which, scanner = example.patient, (example.contrast, example.slice), self.scanner
        key = (example, flip)
        scan = self._cache.get(key, lambda: scanner.scan(image, patient, scanner.random(patient, *which)))
        return MRIBatch.of(scan, image, head)

    def augmented(self, example: SliceExample, flip: bool, random: np.random.Generator) -> MRIBatch:
        """With `acquisition.vary`, a changed slice as one of many scanners sees it."""
        variety = self.acquisition.vary
        if variety is None:
            return self.scan(example, flip)
        image = self._index.image(example)
        scan, image = self.scanner.varied(image[:, ::-1] if flip else image, variety, random)
        return MRIBatch.of(scan, image, head_of_slice(image))


class MRIReconstruction(MagnitudeReconstruction[MRIBatch]):
    """Magnitude images from undersampled k-space.

    Raises StudyError for tiny images, and for a real model or baseline where the coil maps do not carry the phase.
    """

    def __init__(self, study: schema.Study, embeddings: Mapping[str, Path] = NO_EMBEDDINGS) -> None:
        super().__init__(study, embeddings)
        if study.model.real_images:
            require_estimated_maps(study, "model.image: real")

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """Raises StudyError for one of real images where the coil maps do not carry the phase."""
        super().compare_with(baselines)
        require_phase_for(self.study, baselines)

    def scans(self, index: Index) -> MRIDataset:
        """The acquisitions of an index's slices by its site's scanner."""
        acquisition = self.study.acquisition_of(index.site)
        assert isinstance(acquisition, MRIAcquisition)
        return MRIDataset(index, acquisition, self.config, seed=self.study.seed)

    def joined(self, batches: Sequence[MRIBatch]) -> MRIBatch:
        """One batch of all slices, in order."""
        return MRIBatch.joined(batches)

    def images(self, model: nn.Module, batch: MRIBatch) -> Tensor:
        """The magnitude of the model's reconstruction (B, H, W)."""
        image: Tensor = model(batch.operator, batch.kspace)
        return image.abs()

    def inside(self, batch: MRIBatch) -> Tensor:
        """Where the head is: (B, H, W)."""
        return batch.head

    def classical(self, method: Method, batch: MRIBatch) -> Tensor:
        """Magnitude images (B, H, W)."""
        return method(batch.operator, batch.kspace).abs()


def require_phase_for(study: schema.Study, baselines: Mapping[str, Baseline]) -> None:
    """Raise `StudyError` where a method takes images for real and a site's coil maps do not carry the phase."""
    for name, found in baselines.items():
        if found.real_images:
            require_estimated_maps(study, f"the baseline {name}")


def require_estimated_maps(study: schema.Study, what: str) -> None:
    """Raise `StudyError` where a site has coil maps that do not carry the phase, which `what` needs."""
    remedy = "set model.image: complex" if what.startswith("model") else "take it out of task.evaluation.baselines"
    for site in study.sites:
        acquisition = study.acquisition_of(site)
        if not isinstance(acquisition, CoilAcquisition):
            continue
        if acquisition.maps == "espirit":
            raise StudyError(
                f"{what} needs coil maps that carry the phase, and site {site} has acquisition.maps: espirit, which "
                f"leave it in the image; {remedy}, or set maps: estimated"
            )
        if acquisition.maps == "true" and acquisition.phase > 0.0:
            raise StudyError(
                f"{what} needs coil maps that carry the phase, and site {site} has acquisition.maps: true "
                f"with acquisition.phase above 0; {remedy}, or set maps: estimated"
            )
