"""MRI reconstruction: undersampled multi-coil k-space, simulated from a site's own magnitude images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.scanner import MRIScanner, Scan
from wardround.imaging.acquisition.mri.split import (
    centre,
    held_out_samples,
    kspace_loss,
    relative_error,
    unseen_share,
)
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SliceExample, head_of_slice
from wardround.imaging.datasets.visits import Index
from wardround.study import MRIAcquisition, schema
from wardround.study import tasks as tasks_config
from wardround.study.acquisition import CoilAcquisition
from wardround.study.baselines import Baseline
from wardround.study.raw_acquisition import RawAcquisition
from wardround.study.supervision import Supervision
from wardround.tasks.classical import Method
from wardround.tasks.magnitudes import MagnitudeReconstruction
from wardround.tasks.metrics import KSPACE_RESIDUAL, SPLIT_METRICS
from wardround.tasks.reconstruction import NO_EMBEDDINGS, ReconstructionDataset, evaluating
from wardround.tasks.task import MetricSpec
from wardround.wire.host import on_host
from wardround.wire.random import public_generator


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

    def part(self, start: int, stop: int) -> Self:
        """The slices from `start` to before `stop`."""
        return type(self)(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    @classmethod
    def of(cls, scan: Scan, image: NDArray[np.float32], head: NDArray[np.bool_]) -> MRIBatch:
        """A batch of one scan of an image (H, W) with its head; a scan that has a reference has it for a target."""
        kspace, mask, maps = scan.unpacked()
        target = torch.from_numpy(image) if scan.reference is None else scan.reference
        inside = torch.from_numpy(head.astype(np.float32))
        return cls(kspace[None], maps[None], mask[None], target[None], inside[None])

    @classmethod
    def measured(cls, operator: CartesianMRI, kspace: Tensor) -> MRIBatch:
        """A batch of k-space (B, C, H, W) whose true images are not known."""
        mask = operator.mask.expand(kspace.shape[0], *kspace.shape[2:])
        unknown = torch.zeros_like(mask)
        return cls(kspace, operator.maps, mask, unknown, unknown)

    @classmethod
    def joined(cls, batches: Sequence[MRIBatch]) -> MRIBatch:
        """One batch of all slices, in order; scans with fewer coils get more, which see nothing and change nothing."""
        if cls is MRIBatch and any(isinstance(batch, SplitBatch) for batch in batches):
            return SplitBatch.joined([SplitBatch.of_batch(batch) for batch in batches])
        coils = max(batch.maps.shape[1] for batch in batches)
        padded = [
            replace(batch, kspace=_with_coils(batch.kspace, coils), maps=_with_coils(batch.maps, coils))
            for batch in batches
        ]
        return cls(*(torch.cat([getattr(batch, field.name) for batch in padded]) for field in fields(cls)))


@dataclass(frozen=True, eq=False)
class SplitBatch(MRIBatch):
    """Slices of which some measured samples are held out: Lambda of `wardround.imaging.acquisition.mri.split`.

    held: float32 (B, H, W), 1 where a measured sample is held out; 0 everywhere in a slice whose samples are whole.
    alone: bool (B,): whether a slice is learned from by its measured samples alone, without `target`.
    centre: float32 (B, H, W), 1 in the calibration centre of a slice with samples held out, else 0.
    """

    held: Tensor
    alone: Tensor
    centre: Tensor

    @classmethod
    def of_batch(cls, batch: MRIBatch) -> SplitBatch:
        """The same scans with no sample held out; a batch that is split stays as it is."""
        if isinstance(batch, SplitBatch):
            return batch
        none = torch.zeros_like(batch.mask)
        return cls._of(batch, none, none, alone=False)

    @classmethod
    def _of(cls, batch: MRIBatch, held: Tensor, middle: Tensor, *, alone: bool) -> SplitBatch:
        whole: dict[str, Tensor] = {field.name: getattr(batch, field.name) for field in fields(MRIBatch)}
        return cls(**whole, held=held, alone=torch.full((len(batch),), alone), centre=middle)

    @classmethod
    def drawn(
        cls,
        batch: MRIBatch,
        how: Supervision,
        random: np.random.Generator,
        *,
        alone: bool = False,
    ) -> SplitBatch:
        """A batch with samples, or lines, of each slice held out by `held_out_samples`; see there for the errors."""
        masks = [on_host(mask) for mask in batch.mask]
        held = np.stack([held_out_samples(mask, how, random) for mask in masks])
        middle = np.stack([centre(mask) for mask in masks])
        return cls._of(batch, torch.from_numpy(held), torch.from_numpy(middle), alone=alone)

    @property
    def seen(self) -> MRIBatch:
        """The scans as if the samples that are held out had never been measured."""
        left = 1 - self.held
        return MRIBatch(self.kspace * left[:, None], self.maps, self.mask * left, self.target, self.head)

    def chosen(self, numbers: NDArray[np.intp]) -> SplitBatch:
        """The slices of these numbers, in this order."""
        return SplitBatch(*(getattr(self, field.name)[numbers.tolist()] for field in fields(self)))

    def image_of_seen(self, method: Method) -> Tensor:
        """What a method makes of the samples that are not held out: complex images (B, H, W).

        It is given neither the data of the others nor that they were measured.
        """
        seen = self.seen
        image = method(seen.operator, seen.kspace)
        return image if image.is_complex() else image.to(self.kspace.dtype)

    def held_out_loss(self, image: Tensor) -> Tensor:
        """How badly complex images (B, H, W) predict the samples that are held out, `kspace_loss`: (B,)."""
        asked = CartesianMRI(self.maps, self.mask * self.held)
        return kspace_loss(asked.A(image), self.kspace * self.held[:, None])

    def learned_loss(self, method: Method) -> Tensor:
        """What learning from these samples alone lowers: (B,).

        `held_out_loss`, what no coil sees kept dark, and what the image leaves of the calibration centre: that is never
        held out, so that without it nothing would tell a network how bright an image is.
        """
        image = self.image_of_seen(method)
        return self.held_out_loss(image) + unseen_share(image, self.maps) + self._left_of_centre(image)

    def _left_of_centre(self, image: Tensor) -> Tensor:
        """|y - A x| / |y| over the calibration centre: (B,)."""
        asked = CartesianMRI(self.maps, self.centre)
        return relative_error(asked.A(image), self.kspace * self.centre[:, None])


@dataclass(frozen=True)
class SampleDivision:
    """How a site's measured samples are divided; see `wardround.tasks.reconstruction.Division`.

    With `alone` also those of training: the site then learns from nothing else.
    """

    site: str
    how: Supervision
    seed: int
    alone: bool

    def training(self, batch: MRIBatch, random: np.random.Generator) -> MRIBatch:
        """Divided anew where the site learns from samples alone, else as it is."""
        return self._divided(batch, random) if self.alone else batch

    def evaluated(self, batch: MRIBatch, example: SliceExample) -> MRIBatch:
        """Divided alike in every round, by public randomness."""
        which = (example.patient, example.contrast, example.slice)
        return self._divided(batch, public_generator(self.seed, self.site, "held out", *which))

    def _divided(self, batch: MRIBatch, random: np.random.Generator) -> MRIBatch:
        try:
            return SplitBatch.drawn(batch, self.how, random, alone=self.alone)
        except GeometryError as error:
            raise StudyError(f"site {self.site}: {error}") from error


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
    Where a site has no true images (`study.supervision`), it learns from its measured samples, and the first metric is
    how well held-out samples are predicted, at every site; those of images have no value where `target` is 0.
    """

    def __init__(self, study: schema.Study, embeddings: Mapping[str, Path] = NO_EMBEDDINGS) -> None:
        super().__init__(study, embeddings)
        if study.model.real_images:
            require_estimated_maps(study, "model.image: real")

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """Raises StudyError for one of real images where the coil maps do not carry the phase."""
        super().compare_with(baselines)
        require_phase_for(self.study, baselines)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """PSNR first, or held-out samples where a site has no true images: it selects the released round."""
        return SPLIT_METRICS if self._divides else super().metrics

    @cached_property
    def _divides(self) -> bool:
        """Whether any site learns without true images, or has none to be measured against."""
        study = self.study
        return any(study.supervision_of(s).splits or not study.acquisition_of(s).has_reference for s in study.sites)

    def division(self, site: str) -> SampleDivision | None:
        """How what was measured at a site is divided; none in a study whose sites all have true images."""
        how = self.study.supervision_of(site)
        return SampleDivision(site, how, self.study.seed, how.splits) if self._divides else None

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

    def loss(self, model: nn.Module, batch: MRIBatch) -> Tensor:
        """The study's loss; of slices that are learned from by their samples, how badly it predicts held-out ones."""
        which = on_host(batch.alone) if isinstance(batch, SplitBatch) else np.zeros(0, np.bool_)
        if not isinstance(batch, SplitBatch) or not which.any():
            return super().loss(model, batch)
        alone = batch.chosen(np.flatnonzero(which))
        loss = alone.learned_loss(model).sum()
        if not which.all():
            taught = np.flatnonzero(~which)
            loss = loss + len(taught) * super().loss(model, batch.chosen(taught))
        return loss / len(batch)

    def score(self, model: nn.Module, batch: MRIBatch) -> dict[str, Tensor]:
        """All metrics of the model's reconstruction: name -> (B,)."""
        with evaluating(model), torch.no_grad():
            return self._scores(model, batch)

    def score_baseline(self, name: str, parameter: float | None, batch: MRIBatch) -> dict[str, Tensor]:
        """All metrics of a method that learns nothing: name -> (B,)."""
        return self._scores(self._classical.method(name, parameter), batch)

    def _scores(self, method: Method, batch: MRIBatch) -> dict[str, Tensor]:
        if not isinstance(batch, SplitBatch):
            return self.score_images(batch.images(method), batch)
        known = batch.target.flatten(1).any(1)
        # Without a true image nothing is measured of the image of all samples, so that none is made.
        images = batch.images(method) if bool(on_host(known.any())) else batch.target
        scores = self.score_images(images, batch)
        scores = {name: values.where(known, torch.nan) for name, values in scores.items()}
        return {KSPACE_RESIDUAL.name: batch.held_out_loss(batch.image_of_seen(method)) / 2, **scores}

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
        if not isinstance(acquisition, CoilAcquisition | RawAcquisition):
            continue
        if acquisition.maps == "espirit":
            raise StudyError(
                f"{what} needs coil maps that carry the phase, and site {site} has acquisition.maps: espirit, which "
                f"leave it in the image; {remedy}, or set maps: estimated"
            )
        if isinstance(acquisition, CoilAcquisition) and acquisition.maps == "true" and acquisition.phase > 0.0:
            raise StudyError(
                f"{what} needs coil maps that carry the phase, and site {site} has acquisition.maps: true "
                f"with acquisition.phase above 0; {remedy}, or set maps: estimated"
            )
