"""Non-Cartesian MRI reconstruction: radial or spiral k-space, simulated from a site's own magnitude images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI
from wardround.imaging.acquisition.mri.noncartesian_scanner import NonCartesianScanner, PathScan, require_dense_centre
from wardround.imaging.acquisition.mri.nufft import EVALUATION, TRAINING
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SliceExample
from wardround.imaging.datasets.visits import Index
from wardround.study import schema
from wardround.study import tasks as tasks_config
from wardround.study.baselines import Baseline
from wardround.study.noncartesian import NonCartesianAcquisition
from wardround.tasks.classical import Method
from wardround.tasks.magnitudes import MagnitudeReconstruction
from wardround.tasks.mri import require_estimated_maps, require_phase_for
from wardround.tasks.reconstruction import NO_EMBEDDINGS, ReconstructionDataset, evaluating


@dataclass(frozen=True, eq=False)
class NonCartesianBatch:
    """Slices with what a scanner would have measured of them along its trajectory.

    kspace: complex64 (B, C, S), times the root of the samples' weights. maps: complex64 (B, C, H, W). trajectory:
    float32 (B, S, 2). weights, areas: float32 (B, S), see `NonCartesianMRI`; 0 where a scan of fewer samples is padded.
    target, head: float32 (B, H, W), as in `wardround.tasks.mri.MRIBatch`.
    """

    kspace: Tensor
    maps: Tensor
    trajectory: Tensor
    weights: Tensor
    areas: Tensor
    target: Tensor
    head: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    @cached_property
    def operator(self) -> NonCartesianMRI:
        """The acquisition as networks learn with it."""
        return self._operator(TRAINING)

    @cached_property
    def precise(self) -> NonCartesianMRI:
        """The acquisition as results are computed with it."""
        return self._operator(EVALUATION)

    @property
    def body(self) -> Tensor:
        """The head, by the name that all scans have for what is imaged."""
        return self.head

    def images(self, method: Method) -> Tensor:
        """Magnitudes (B, H, W) of what a method makes of operator and k-space."""
        return method(self.precise, self.kspace).abs()

    def part(self, start: int, stop: int) -> NonCartesianBatch:
        """The slices from `start` to before `stop`."""
        return NonCartesianBatch(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    @classmethod
    def of(cls, scan: PathScan, image: NDArray[np.float32], head: NDArray[np.bool_]) -> NonCartesianBatch:
        """A batch of one scan of an image (H, W) with its head."""
        path, maps = scan.path, scan.known_maps()
        weighed = scan.samples * path.weights.sqrt()
        target, inside = torch.from_numpy(image), torch.from_numpy(head.astype(np.float32))
        parts = (weighed, maps, path.trajectory, path.weights, path.areas, target, inside)
        return cls(*(part[None] for part in parts))

    @classmethod
    def joined(cls, batches: Sequence[NonCartesianBatch]) -> NonCartesianBatch:
        """One batch of all slices, in order.

        Scans with fewer coils get more, which see nothing, and those with fewer samples more, which count nothing.
        """
        coils = max(batch.maps.shape[1] for batch in batches)
        samples = max(batch.weights.shape[1] for batch in batches)
        padded = [batch._padded(coils, samples) for batch in batches]
        return cls(*(torch.cat([getattr(batch, field.name) for batch in padded]) for field in fields(cls)))

    def _padded(self, coils: int, samples: int) -> NonCartesianBatch:
        more, further = coils - self.maps.shape[1], samples - self.weights.shape[1]
        if not (more or further):
            return self
        return replace(
            self,
            kspace=pad(self.kspace, (0, further, 0, more)),
            maps=pad(self.maps, (0, 0, 0, 0, 0, more)),
            trajectory=pad(self.trajectory, (0, 0, 0, further)),
            weights=pad(self.weights, (0, further)),
            areas=pad(self.areas, (0, further)),
        )

    def _operator(self, tolerance: float) -> NonCartesianMRI:
        return NonCartesianMRI(self.maps, self.trajectory, self.weights, areas=self.areas, tolerance=tolerance)


class NonCartesianDataset(ReconstructionDataset[NonCartesianBatch]):
    """One site's slices and their simulated scans along its trajectory, which is turned anew for each patient.

    Coils, phase and noise are drawn for a slice. Scans are kept in memory up to `cache_bytes`. Raises DataError where
    an image cannot be used.
    """

    def __init__(
        self,
        index: Index,
        acquisition: NonCartesianAcquisition,
        task: tasks_config.ReconstructionTask,
        *,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(index, task, NonCartesianBatch.joined)
        self.scanner = NonCartesianScanner(index.site, acquisition, seed)
        self._cache = ScanCache[PathScan](cache_bytes)

    def scan(self, example: SliceExample, flip: bool) -> NonCartesianBatch:
        """A batch of one slice, flipped left-right before its scan where `flip` says so."""
        image, head = self._index.image(example), self._index.mask(example)
        if flip:
            image, head = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(head[:, ::-1])
        patient, which, scanner = example.patient, (example.contrast, example.slice), self.scanner
        scan = self._cache.get((example, flip), lambda: scanner.scan(image, patient, scanner.random(patient, *which)))
        return NonCartesianBatch.of(scan, image, head)


class NonCartesianReconstruction(MagnitudeReconstruction[NonCartesianBatch]):
    """Magnitude images from radial or spiral k-space.

    Raises StudyError for tiny images, for a network that takes Cartesian k-space alone, for a trajectory whose centre
    is too thin for coil maps, and for a real model or baseline where the coil maps do not carry the phase.
    """

    def __init__(self, study: schema.Study, embeddings: Mapping[str, Path] = NO_EMBEDDINGS) -> None:
        super().__init__(study, embeddings)
        if study.model.real_images:
            require_estimated_maps(study, "model.image: real")
        if study.model.cartesian:
            raise StudyError(
                f"model.kind: {study.model.kind} takes Cartesian k-space alone, and the study's scanners measure along "
                "a trajectory; take varnet, cascade, swin_denoiser or modl"
            )
        for site in study.sites:
            try:
                require_dense_centre(self._acquisition(site), self.config.size)
            except GeometryError as error:
                raise StudyError(f"sites.{site}: acquisition.trajectory: {error}") from error

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """Raises StudyError for one of real images where the coil maps do not carry the phase."""
        super().compare_with(baselines)
        require_phase_for(self.study, baselines)

    def scans(self, index: Index) -> NonCartesianDataset:
        """The acquisitions of an index's slices by its site's scanner."""
        return NonCartesianDataset(index, self._acquisition(index.site), self.config, seed=self.study.seed)

    def joined(self, batches: Sequence[NonCartesianBatch]) -> NonCartesianBatch:
        """One batch of all slices, in order."""
        return NonCartesianBatch.joined(batches)

    def images(self, model: nn.Module, batch: NonCartesianBatch) -> Tensor:
        """The magnitude of the model's reconstruction (B, H, W), as it learns."""
        image: Tensor = model(batch.operator, batch.kspace)
        return image.abs()

    def reconstruct(self, model: nn.Module, batch: NonCartesianBatch) -> Tensor:
        """Magnitudes (B, H, W), in evaluation mode, without gradients and by the precise transform."""
        with evaluating(model), torch.no_grad():
            return batch.images(model)

    def inside(self, batch: NonCartesianBatch) -> Tensor:
        """Where the head is: (B, H, W)."""
        return batch.head

    def classical(self, method: Method, batch: NonCartesianBatch) -> Tensor:
        """Magnitude images (B, H, W)."""
        return batch.images(method)

    def _acquisition(self, site: str) -> NonCartesianAcquisition:
        found = self.study.acquisition_of(site)
        assert isinstance(found, NonCartesianAcquisition)
        return found
