"""Reconstruction with an acquisition's own operator: raw data are simulated from a site's own magnitude images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SliceExample
from wardround.imaging.datasets.visits import Index
from wardround.study import tasks as tasks_config
from wardround.study.acquisitions import AcquisitionSettings
from wardround.tasks.classical import Method
from wardround.tasks.magnitudes import MagnitudeReconstruction
from wardround.tasks.reconstruction import ReconstructionDataset
from wardround.tasks.scans import Scans, ScansBatch
from wardround.wire.random import public_generator


class GeneralDataset(ReconstructionDataset[ScansBatch]):
    """One site's slices, measured by its scanner's operator.

    The operator is drawn for the site (for a patient where the acquisition `varies`), noise for a slice. Scans are kept
    in memory up to `cache_bytes`. Raises DataError where an image cannot be used.
    """

    def __init__(
        self,
        index: Index,
        acquisition: AcquisitionSettings,
        task: tasks_config.ReconstructionTask,
        *,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(index, task, ScansBatch.joined)
        self.acquisition = acquisition
        self._seed = seed
        self._operators: dict[tuple[int, ...], LinearOperator] = {}
        self._cache = ScanCache[Tensor](cache_bytes)

    def scan(self, example: SliceExample, flip: bool) -> ScansBatch:
        """A batch of one slice, flipped left-right before its scan where `flip` says so."""
        image, inside = self._index.image(example), self._index.mask(example)
        if flip:
            image, inside = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(inside[:, ::-1])
        operator, target = self._operator(example, image), torch.from_numpy(image)[None]
        data = self._cache.get((example, flip), lambda: self._measured(operator, target, example))
        return ScansBatch((Scans(operator, data, target, torch.from_numpy(inside.astype(np.float32))[None]),))

    def _operator(self, example: SliceExample, image: NDArray[np.float32]) -> LinearOperator:
        """Kept, so that scans of one operator can be computed together."""
        whose = (example.patient,) if self.acquisition.varies else ()
        if whose not in self._operators:
            random = public_generator(self._seed, self.site, "operator", *whose)
            made = self.acquisition.operator((image.shape[0], image.shape[1]), random)
            if not isinstance(made, LinearOperator) or made.image_shape != image.shape:
                raise StudyError(
                    f"acquisition.kind: {self.acquisition.kind} makes no LinearOperator of images of "
                    f"{image.shape[0]} x {image.shape[1]} pixels, the study's task.size"
                )
            self._operators[whose] = made
        return self._operators[whose]

    def _measured(self, operator: LinearOperator, target: Tensor, example: SliceExample) -> Tensor:
        random = public_generator(self._seed, self.site, "scan", example.patient, example.contrast, example.slice)
        data = self.acquisition.measure(operator, target, random)
        if not isinstance(data, Tensor) or tuple(data.shape) != (1, *operator.data_shape):
            raise StudyError(
                f"acquisition.kind: {self.acquisition.kind} measures data that are not of its operator's shape, "
                f"(1, {', '.join(map(str, operator.data_shape))})"
            )
        return data


class GeneralReconstruction(MagnitudeReconstruction[ScansBatch]):
    """Magnitude images from what an acquisition's operator measures. Raises StudyError for tiny images."""

    def scans(self, index: Index) -> GeneralDataset:
        """The acquisitions of an index's slices by its site's scanner."""
        return GeneralDataset(index, self.study.acquisition_of(index.site), self.config, seed=self.study.seed)

    def joined(self, batches: Sequence[ScansBatch]) -> ScansBatch:
        """One batch of all slices, in order."""
        return ScansBatch.joined(batches)

    def images(self, model: nn.Module, batch: ScansBatch) -> Tensor:
        """The model's reconstruction (B, H, W); of complex images the magnitude."""
        return _magnitude(batch.images(model))

    def inside(self, batch: ScansBatch) -> Tensor:
        """Where something is imaged: (B, H, W)."""
        return batch.body

    def classical(self, method: Method, batch: ScansBatch) -> Tensor:
        """Images (B, H, W); of complex ones the magnitude."""
        return _magnitude(batch.images(method))


def _magnitude(images: Tensor) -> Tensor:
    return images.abs() if images.is_complex() else images
