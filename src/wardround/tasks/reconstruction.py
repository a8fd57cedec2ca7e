"""Reconstruction: from simulated raw data of a site's own images back to the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.data.dataset import Example, SliceIndex
from wardround.data.folder import SiteFolder
from wardround.errors import StudyError
from wardround.models.build import build_model
from wardround.models.unrolled import modl_shape
from wardround.physics.coils import low_resolution_maps
from wardround.physics.masks import sampling_mask
from wardround.physics.mri import CartesianMRI
from wardround.physics.simulate import simulate
from wardround.physics.solvers import cg_sense, tv, zero_filled
from wardround.study import MRIAcquisition, schema
from wardround.study import models as models_config
from wardround.study import tasks as tasks_config
from wardround.tasks.losses import build_loss
from wardround.tasks.metrics import RECONSTRUCTION_METRICS, SSIM_WINDOW, reconstruction_scores
from wardround.tasks.task import Dataset, MetricSpec, Source, Split, Window
from wardround.wire.random import public_generator

_CACHE_BYTES = 2**28
_EVALUATION_BATCH = 8
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


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


class ReconstructionDataset:
    """One site's slices and their simulated acquisitions; see `wardround.tasks.task.Dataset`.

    What a slice's scan looks like is public randomness: the mask is drawn for a patient (for the site where
    `mask.fixed`), coils, phase and noise for a slice. So every arm of a study sees the same raw data, and
    scans may be kept: in memory up to `cache_bytes`, measured samples only. Raises DataError where any image of the
    site, of whichever split, cannot be used.
    """

    def __init__(
        self,
        index: SliceIndex,
        acquisition: MRIAcquisition,
        task: tasks_config.ReconstructionTask,
        *,
        seed: int,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self.acquisition = acquisition
        self._index = index
        self._task = task
        self._seed = seed
        self._train = index.examples("train")
        # All images are looked at now: one that cannot be used must not stop a run at its end.
        self._evaluated: dict[Split, dict[int, list[Example]]] = {s: self._by_patient(s) for s in _SPLITS}
        self._cache = _ScanCache(cache_bytes)

    def fingerprint(self) -> str:
        """Sha256 (hex) over the content of the images and who trains, never over names or paths."""
        return self._index.fingerprint()

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> MRIBatch:
        """Training slices, each flipped left-right before its scan where `random` says so."""
        flips = random.random(len(indices)) < 0.5 if self._task.flips else np.zeros(len(indices), dtype=bool)
        return MRIBatch.joined([self._scan(self._train[i], bool(flip)) for i, flip in zip(indices, flips, strict=True)])

    def patients(self, split: Split) -> int:
        """Number of patients in a split."""
        return len(self._index.patients(split))

    def evaluation(self, split: Split) -> Iterator[tuple[int, MRIBatch]]:
        """(patient number, batch of at most 8 slices), patient by patient, never flipped.

        Slices follow `task.evaluation.slices`; validation, which runs after every round and tunes
        baselines, takes `tuning_slices` of each volume.
        """
        for patient, examples in self._evaluated[split].items():
            for start in range(0, len(examples), _EVALUATION_BATCH):
                scans = [self._scan(example, False) for example in examples[start : start + _EVALUATION_BATCH]]
                yield patient, MRIBatch.joined(scans)

    def middle(self, split: Split) -> Iterator[tuple[int, str, MRIBatch]]:
        """(patient number, contrast, batch of 1): the middle evaluated slice of each patient and contrast."""
        for patient, examples in self._evaluated[split].items():
            for contrast in self._task.contrasts:
                of_contrast = [example for example in examples if example.contrast == contrast]
                if of_contrast:
                    yield patient, contrast, self._scan(of_contrast[len(of_contrast) // 2], False)

    def _by_patient(self, split: Split) -> dict[int, list[Example]]:
        rule = self._task.evaluation.slices
        if split == "validation":
            rule = rule.model_copy(update={"per_patient": self._task.evaluation.tuning_slices})
        patients: dict[int, list[Example]] = {}
        for example in self._index.examples(split, rule):
            patients.setdefault(example.patient, []).append(example)
        return patients

    def _scan(self, example: Example, flip: bool) -> MRIBatch:
        key = (example, flip)
        image, head = self._index.image(example), self._index.head_mask(example)
        if flip:
            image, head = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(head[:, ::-1])
        scan = self._cache.get(key)
        if scan is None:
            scan = self._simulate(example, image)
            self._cache.put(key, scan)
        kspace, mask, maps = scan.unpacked()
        target, inside = torch.from_numpy(image), torch.from_numpy(head.astype(np.float32))
        return MRIBatch(kspace[None], maps[None], mask[None], target[None], inside[None])

    def _simulate(self, example: Example, image: NDArray[np.float32]) -> _Scan:
        site = self._index.site
        whose = () if self.acquisition.mask.fixed else (example.patient,)
        shape = (image.shape[0], image.shape[1])
        mask = sampling_mask(self.acquisition.mask, shape, public_generator(self._seed, site, "mask", *whose))
        scanner = public_generator(self._seed, site, "scan", example.patient, example.contrast, example.slice)
        measured = simulate(image, self.acquisition, scanner, mask)
        where = measured.mask != 0
        maps = measured.maps if self.acquisition.maps == "true" else None
        return _Scan(measured.kspace[:, where], where, maps)


@dataclass(frozen=True, eq=False)
class _Scan:
    """A scan without its zeros, and without maps that can be estimated again: a fifth of the memory."""

    samples: Tensor
    measured: Tensor
    maps: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes + self.measured.nbytes + (0 if self.maps is None else self.maps.nbytes)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """K-space (C, H, W), mask (H, W) and maps (C, H, W)."""
        kspace = self.samples.new_zeros(self.samples.shape[0], *self.measured.shape)
        kspace[:, self.measured] = self.samples
        mask = self.measured.float()
        maps = low_resolution_maps(kspace[None], mask[None])[0] if self.maps is None else self.maps
        return kspace, mask, maps


class _ScanCache:
    """Keeps what fits: examples come in random order, so nothing is worth throwing out for another."""

    def __init__(self, capacity: int) -> None:
        self._room = capacity
        self._scans: dict[tuple[Example, bool], _Scan] = {}

    def get(self, key: tuple[Example, bool]) -> _Scan | None:
        return self._scans.get(key)

    def put(self, key: tuple[Example, bool], scan: _Scan) -> None:
        if scan.nbytes <= self._room:
            self._room -= scan.nbytes
            self._scans[key] = scan


class PooledDataset:
    """Several sites' data as one: training indices and patients run over all sites, in site order."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = tuple(datasets)
        self._starts = np.cumsum([0, *(len(dataset) for dataset in self._datasets)])

    def fingerprint(self) -> str:
        """The sites' fingerprints, joined by `+`."""
        return "+".join(dataset.fingerprint() for dataset in self._datasets)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> MRIBatch:
        """Training slices of any sites, in the order of `indices`."""
        return MRIBatch.joined([self._one(index, random) for index in indices])

    def patients(self, split: Split) -> int:
        """Number of patients of all sites in a split."""
        return sum(dataset.patients(split) for dataset in self._datasets)

    def evaluation(self, split: Split) -> Iterator[tuple[int, MRIBatch]]:
        """Like a site's, with patients numbered anew over all sites."""
        numbers: dict[tuple[int, int], int] = {}
        for site, dataset in enumerate(self._datasets):
            for patient, batch in dataset.evaluation(split):
                yield numbers.setdefault((site, patient), len(numbers)), batch

    def _one(self, index: int, random: np.random.Generator) -> MRIBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} training examples")
        site = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch: MRIBatch = self._datasets[site].batch([index - int(self._starts[site])], random)
        return batch


class ReconstructionTask:
    """The reconstruction task of a study; see `wardround.tasks.task.Imaging`. Raises StudyError for tiny images."""

    def __init__(self, study: schema.Study) -> None:
        if not isinstance(study.task, tasks_config.ReconstructionTask):
            raise StudyError(f"task.kind is {study.task.kind!r}; a reconstruction needs `kind: reconstruction`")
        if min(study.task.size) < SSIM_WINDOW:
            raise StudyError(
                f"task.size: images must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, a window of SSIM, "
                f"not {study.task.size[0]} x {study.task.size[1]}"
            )
        if isinstance(study.model, models_config.MoDL) and modl_shape(study.model).image == "real":
            _require_estimated_maps(study)
        self.config = study.task
        self._study = study
        self._loss = build_loss(study.task.loss)
        self._datasets: dict[tuple[str, Source], ReconstructionDataset] = {}

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """PSNR first: it selects the released round."""
        return RECONSTRUCTION_METRICS

    def build_model(self) -> nn.Module:
        """The study's network, initialised from torch's global generator."""
        return build_model(self._study.model)

    def dataset(self, site: str, source: Source) -> ReconstructionDataset:
        """The slices of a site's folder; asked twice, the same object, so that arms share simulated scans.

        Raises StudyError for a site the study does not name and DataError where the folder cannot be used.
        """
        if site not in self._study.sites:
            raise StudyError(f"the study has no site {site!r}; it has {', '.join(self._study.sites)}")
        key = (site, source)
        if key not in self._datasets:
            self._datasets[key] = self._open(site, source)
        return self._datasets[key]

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset:
        """The union of several sites' data sets, for the arm that pools what a federation keeps apart."""
        return PooledDataset(parts)

    def loss(self, model: nn.Module, batch: MRIBatch) -> Tensor:
        """The study's loss between the reconstructed magnitude and the target; scalar."""
        image: Tensor = model(batch.operator, batch.kspace)
        return self._loss(image.abs(), batch.target, batch.head)

    def score(self, model: nn.Module, batch: MRIBatch) -> dict[str, Tensor]:
        """All metrics of the model's reconstruction: name -> (B,)."""
        return self.score_images(self.reconstruct(model, batch), batch)

    def score_images(self, images: Tensor, batch: MRIBatch) -> dict[str, Tensor]:
        """All metrics of magnitude images (B, H, W), from whatever method: name -> (B,)."""
        return reconstruction_scores(images, batch.target, batch.head)

    def reconstruct(self, model: nn.Module, batch: MRIBatch) -> Tensor:
        """Magnitude images (B, H, W), in evaluation mode and without gradients."""
        with _evaluating(model), torch.no_grad():
            image: Tensor = model(batch.operator, batch.kspace)
            return image.abs()

    def baseline(self, name: str, parameter: float | None, batch: MRIBatch) -> Tensor:
        """Magnitude images (B, H, W) of a method that learns nothing; `parameter` is its weight, if any."""
        with torch.no_grad():
            match name:
                case "zero_filled":
                    return zero_filled(batch.operator, batch.kspace).abs()
                case "cg_sense":
                    return cg_sense(batch.operator, batch.kspace, _required(name, parameter)).abs()
                case "tv":
                    return tv(batch.operator, batch.kspace, _required(name, parameter)).abs()
        raise _unknown_baseline(name)

    def baseline_parameters(self, name: str) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; (None,) where there is nothing to choose."""
        match name:
            case "zero_filled":
                return (None,)
            case "cg_sense":
                return self.config.evaluation.cg_weights
            case "tv":
                return self.config.evaluation.tv_weights
        raise _unknown_baseline(name)

    def reference(self, batch: MRIBatch) -> Tensor:
        """The magnitude images the acquisitions were simulated from: (B, H, W)."""
        return batch.target

    @property
    def windows(self) -> tuple[Window, ...]:
        """None: a magnitude image has its own range."""
        return ()

    def examples(self, dataset: Dataset) -> Iterator[MRIBatch]:
        """The middle slice of each contrast of the first test patient, for a site's own picture report."""
        if isinstance(dataset, ReconstructionDataset):
            count = len(self.config.contrasts)
            yield from islice((batch for _, _, batch in dataset.middle("test")), count)

    def _open(self, site: str, source: Source) -> ReconstructionDataset:
        index = SliceIndex(
            SiteFolder(source[0], site),
            contrasts=self.config.contrasts,
            size=self.config.size,
            slices=self.config.slices,
            split=self.config.split,
            seed=self._study.seed,
            role=self._study.sites[site].role,
        )
        acquisition = self._study.acquisition_of(site)
        assert isinstance(acquisition, MRIAcquisition)
        return ReconstructionDataset(index, acquisition, self.config, seed=self._study.seed)


def _require_estimated_maps(study: schema.Study) -> None:
    for site in study.sites:
        acquisition = study.acquisition_of(site)
        if isinstance(acquisition, MRIAcquisition) and acquisition.maps == "true" and acquisition.phase > 0.0:
            raise StudyError(
                f"model.image: real needs coil maps that carry the phase, and site {site} has acquisition.maps: true "
                "with acquisition.phase above 0; set model.image: complex, or maps: estimated"
            )


def _unknown_baseline(name: str) -> StudyError:
    return StudyError(f"there is no baseline {name!r}; choose zero_filled, cg_sense or tv")


def _required(name: str, parameter: float | None) -> float:
    if parameter is None:
        raise ValueError(f"the baseline {name} needs a weight")
    return parameter


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that batch normalisation uses what it learned and learns nothing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
