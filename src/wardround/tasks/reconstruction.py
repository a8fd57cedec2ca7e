"""What reconstructions of all modalities share: from simulated raw data of a site's own images back to the images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.datasets.mri import SliceExample
from wardround.imaging.datasets.split import Deal, by_seed
from wardround.imaging.datasets.visits import Index
from wardround.imaging.orientation import Turn
from wardround.models.build import build_model
from wardround.models.images_alone import LearnsImages
from wardround.study import schema
from wardround.study import tasks as tasks_config
from wardround.study.baselines import Baseline
from wardround.study.registry import BASELINES, baseline
from wardround.tasks.classical import ClassicalMethods, Method
from wardround.tasks.losses import build_loss
from wardround.tasks.metrics import SSIM_WINDOW
from wardround.tasks.task import Dataset, MetricSpec, Source, Split, Window

NO_EMBEDDINGS: Mapping[str, Path] = MappingProxyType({})
_EVALUATION_BATCH = 8
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class ScanBatch(Protocol):
    """Slices with what a scanner measured of them; `target` (B, H, W) is what was scanned."""

    @property
    def target(self) -> Tensor:
        """The true images."""
        ...

    def __len__(self) -> int: ...


BatchT = TypeVar("BatchT", bound=ScanBatch)
OneT = TypeVar("OneT")


class Division(Protocol[OneT]):
    """What a task makes of a batch of one slice, where its network is to see a part of what was measured."""

    def training(self, batch: OneT, random: np.random.Generator) -> OneT:
        """A batch to learn from, divided anew in each step."""
        ...

    def evaluated(self, batch: OneT, example: SliceExample) -> OneT:
        """A batch to be measured, divided in one way in every round."""
        ...


Joined = Callable[[Sequence[BatchT]], BatchT]
# Images (B, H, W) of an operator's data (B, *data_shape).


class ReconstructionDataset(ABC, Generic[BatchT]):
    """One site's slices and their simulated acquisitions; see `wardround.tasks.task.Dataset`.

    What a slice's scan looks like is public randomness, so every arm of a study sees the same raw data. Raises
    DataError where any image of the site, of whichever split, cannot be used.
    """

    def __init__(self, index: Index, task: tasks_config.ReconstructionTask, joined: Joined[BatchT]) -> None:
        self.site = index.site
        self.task = task
        self.joined = joined
        #: How the task divides what was measured; by itself a data set gives scans as they are.
        self.division: Division[BatchT] | None = None
        self._index = index
        self._train = index.examples("train")
        # All images are looked at now: one that cannot be used must not stop a run at its end.
        self._evaluated: dict[Split, dict[int, list[SliceExample]]] = {s: self._by_patient(s) for s in _SPLITS}

    @abstractmethod
    def scan(self, example: SliceExample, flip: bool) -> BatchT:
        """A batch of one slice, flipped left-right before its scan where `flip` says so."""

    def augmented(self, example: SliceExample, flip: bool, random: np.random.Generator) -> BatchT:
        """A batch of one slice for training, changed further with `random` where the study wants it."""
        return self.scan(example, flip)

    def fingerprint(self) -> str:
        """Sha256 (hex) over the content of the images and who trains, never over names or paths."""
        return self._index.fingerprint()

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> BatchT:
        """Training slices, each flipped left-right before its scan where `random` says so."""
        flips = random.random(len(indices)) < 0.5 if self.task.flips else np.zeros(len(indices), dtype=bool)
        pairs = zip(indices, flips, strict=True)
        return self.joined([self._for_training(self._train[i], bool(flip), random) for i, flip in pairs])

    def owners(self) -> tuple[int, ...]:
        """Whose each training slice is."""
        return tuple(example.patient for example in self._train)

    def patients(self, split: Split) -> int:
        """Number of patients in a split."""
        return len(self._index.patients(split))

    def names(self, split: Split) -> tuple[str, ...]:
        """The folder names of the patients of a split, in the order of `evaluation`: they stay at the site."""
        return tuple(self._index.name(patient) for patient in self._evaluated[split])

    def evaluation(self, split: Split) -> Iterator[tuple[int, BatchT]]:
        """(patient number, batch of at most 8 slices), patient by patient, never flipped.

        Slices follow `task.evaluation.slices`; validation, which runs after every round and tunes
        baselines, takes `tuning_slices` of each volume.
        """
        for patient, examples in self._evaluated[split].items():
            for start in range(0, len(examples), _EVALUATION_BATCH):
                scans = [self._for_evaluation(example) for example in examples[start : start + _EVALUATION_BATCH]]
                yield patient, self.joined(scans)

    def middle(self, split: Split) -> Iterator[tuple[int, str, BatchT]]:
        """(patient number, contrast, batch of 1): the middle evaluated slice of each patient and contrast."""
        for patient, examples in self._evaluated[split].items():
            for contrast in dict.fromkeys(example.contrast for example in examples):
                of_contrast = [example for example in examples if example.contrast == contrast]
                yield patient, contrast, self.scan(of_contrast[len(of_contrast) // 2], False)

    def turns(self, split: Split) -> Iterator[Turn | None]:
        """How each slice of `middle` is shown to people; None for as it is."""
        for examples in self._evaluated[split].values():
            for contrast in dict.fromkeys(example.contrast for example in examples):
                of_contrast = [example for example in examples if example.contrast == contrast]
                yield self._index.turn(of_contrast[len(of_contrast) // 2])

    def _for_training(self, example: SliceExample, flip: bool, random: np.random.Generator) -> BatchT:
        batch = self.augmented(example, flip, random)
        return batch if self.division is None else self.division.training(batch, random)

    def _for_evaluation(self, example: SliceExample) -> BatchT:
        batch = self.scan(example, False)
        return batch if self.division is None else self.division.evaluated(batch, example)

    def _by_patient(self, split: Split) -> dict[int, list[SliceExample]]:
        rule = self.task.evaluation.slices
        if split == "validation":
            rule = rule.model_copy(update={"per_patient": self.task.evaluation.tuning_slices})
        patients: dict[int, list[SliceExample]] = {}
        for example in self._index.examples(split, rule):
            patients.setdefault(example.patient, []).append(example)
        return patients


class PooledDataset(Generic[BatchT]):
    """Several sites' data as one: training indices and patients run over all sites, in site order."""

    def __init__(self, datasets: Sequence[Dataset], joined: Joined[BatchT]) -> None:
        self._datasets = tuple(datasets)
        self._joined = joined
        self._starts = np.cumsum([0, *(len(dataset) for dataset in self._datasets)])

    def fingerprint(self) -> str:
        """The sites' fingerprints, joined by `+`."""
        return "+".join(dataset.fingerprint() for dataset in self._datasets)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> BatchT:
        """Training slices of any sites, in the order of `indices`."""
        return self._joined([self._one(index, random) for index in indices])

    def owners(self) -> tuple[int, ...]:
        """Whose each training example is, patients numbered anew over all sites."""
        owners = [(site, owner) for site, dataset in enumerate(self._datasets) for owner in dataset.owners()]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(owners))}
        return tuple(numbers[key] for key in owners)

    def patients(self, split: Split) -> int:
        """Number of patients of all sites in a split."""
        return sum(dataset.patients(split) for dataset in self._datasets)

    def evaluation(self, split: Split) -> Iterator[tuple[int, BatchT]]:
        """Like a site's, with patients numbered anew over all sites."""
        numbers: dict[tuple[int, int], int] = {}
        for site, dataset in enumerate(self._datasets):
            for patient, batch in dataset.evaluation(split):
                yield numbers.setdefault((site, patient), len(numbers)), batch

    def _one(self, index: int, random: np.random.Generator) -> BatchT:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} training examples")
        site = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch: BatchT = self._datasets[site].batch([index - int(self._starts[site])], random)
        return batch


class ReconstructionBase(ABC, Generic[BatchT]):
    """The reconstruction task of a study; see `wardround.tasks.task.Imaging`. Raises StudyError for tiny images."""

    def __init__(self, study: schema.Study, embeddings: Mapping[str, Path] = NO_EMBEDDINGS) -> None:
        if not isinstance(study.task, tasks_config.ReconstructionTask):
            raise StudyError(f"task.kind is {study.task.kind!r}; a reconstruction needs `kind: reconstruction`")
        if min(study.task.size) < SSIM_WINDOW:
            raise StudyError(
                f"task.size: images must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, a window of SSIM, "
                f"not {study.task.size[0]} x {study.task.size[1]}"
            )
        self.config = study.task
        self.study = study
        self._embeddings = dict(embeddings)
        self._classical = ClassicalMethods(study.task.evaluation, study.modality)
        self.compare_with({name: baseline(name) for name in study.baselines if name in BASELINES})
        self._loss = build_loss(study.task.loss)
        self._deal: Deal = by_seed
        self._datasets: dict[tuple[str, Source], ReconstructionDataset[BatchT]] = {}

    def deal_by(self, deal: Deal) -> None:
        """See `wardround.tasks.task.Dealing`."""
        self._deal = deal

    @property
    @abstractmethod
    def metrics(self) -> tuple[MetricSpec, ...]:
        """PSNR first: it selects the released round."""

    @property
    @abstractmethod
    def windows(self) -> tuple[Window, ...]:
        """The windows that a report shows images in."""

    @abstractmethod
    def index(self, site: str, source: Source, scanner: str) -> Index:
        """The slices of a site's folders, as the scanner of the site `scanner` takes them."""

    @abstractmethod
    def scans(self, index: Index) -> ReconstructionDataset[BatchT]:
        """The acquisitions of an index's slices by its site's scanner."""

    @abstractmethod
    def joined(self, batches: Sequence[BatchT]) -> BatchT:
        """One batch of all slices, in order."""

    @abstractmethod
    def images(self, model: nn.Module, batch: BatchT) -> Tensor:
        """What the loss sees of the model's reconstruction: real (B, H, W)."""

    @abstractmethod
    def inside(self, batch: BatchT) -> Tensor:
        """Where the head or the body is: (B, H, W)."""

    @abstractmethod
    def score_images(self, images: Tensor, batch: BatchT) -> dict[str, Tensor]:
        """All metrics of images (B, H, W), from whatever method: name -> (B,)."""

    @abstractmethod
    def classical(self, method: Method, batch: BatchT) -> Tensor:
        """Images (B, H, W) by `method`, as they are shown and scored: as those of `reconstruct`."""

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """Take the study's baselines from these, by name; asked again with those of packages outside."""
        self._classical.add(baselines)

    def baseline(self, name: str, parameter: float | None, batch: BatchT) -> Tensor:
        """Images (B, H, W) of a method that learns nothing; `parameter` is its weight, if any.

        Raises StudyError for a name that is none, ValueError where a weight is missing.
        """
        return self.classical(self._classical.method(name, parameter), batch)

    def baseline_parameters(self, name: str) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; (None,) where there is nothing to choose."""
        return self._classical.parameters(name)

    def build_model(self) -> nn.Module:
        """The study's network, initialised from torch's global generator."""
        return build_model(self.study.model, self.study.modality)

    def dataset(self, site: str, source: Source) -> ReconstructionDataset[BatchT]:
        """The slices of a site's folders; asked twice, the same object, so that arms share simulated scans.

        Raises StudyError for a site the study does not name and DataError where a folder cannot be used.
        """
        self._require(site)
        key = (site, source)
        if key not in self._datasets:
            self._datasets[key] = self._divided(self.scans(self.index(site, source, site)))
        return self._datasets[key]

    def visits(self, site: str, sources: Mapping[str, Source]) -> ReconstructionDataset[BatchT]:
        """The test patients of other sites, each by its own site's split, in the scanner of an unseen site.

        `sources` are the folders of those sites. Raises StudyError and DataError as `dataset` does.
        """
        for name in (site, *sources):
            self._require(name)
        return self._divided(self.scans(self.visitors(site, sources)))

    def division(self, site: str) -> Division[BatchT] | None:
        """How what was measured at a site is divided; by itself not at all."""
        return None

    def _divided(self, dataset: ReconstructionDataset[BatchT]) -> ReconstructionDataset[BatchT]:
        dataset.division = self.division(dataset.site)
        return dataset

    @abstractmethod
    def visitors(self, site: str, sources: Mapping[str, Source]) -> Index:
        """The test patients of other sites, as an index of `site`."""

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[BatchT]:
        """The union of several sites' data sets, for the arm that pools what a federation keeps apart."""
        return PooledDataset(parts, self.joined)

    def loss(self, model: nn.Module, batch: BatchT) -> Tensor:
        """The study's loss between the reconstruction and the target; scalar.

        Of a network that learns images alone it is its own.
        """
        if isinstance(model, LearnsImages):
            return model.learned(batch.target)
        return self._loss(self.images(model, batch), batch.target, self.inside(batch))

    def score(self, model: nn.Module, batch: BatchT) -> dict[str, Tensor]:
        """All metrics of the model's reconstruction: name -> (B,)."""
        return self.score_images(self.reconstruct(model, batch), batch)

    def reconstruct(self, model: nn.Module, batch: BatchT) -> Tensor:
        """Real images (B, H, W), in evaluation mode and without gradients."""
        with evaluating(model), torch.no_grad():
            return self.images(model, batch)

    def reference(self, batch: BatchT) -> Tensor:
        """The images the acquisitions were simulated from: (B, H, W)."""
        return batch.target

    def examples(self, dataset: Dataset) -> Iterator[BatchT]:
        """The middle slice of each contrast of the first test patient, for a site's own picture report."""
        if isinstance(dataset, ReconstructionDataset):
            yield from islice((batch for _, _, batch in dataset.middle("test")), self._shown)

    def turns(self, dataset: Dataset) -> Iterator[Turn | None]:
        """How each of these examples is shown; None for as it is."""
        if isinstance(dataset, ReconstructionDataset):
            yield from islice(dataset.turns("test"), self._shown)

    @property
    def _shown(self) -> int:
        """How many examples a picture report shows."""
        return len(self.config.contrasts)

    def _require(self, site: str) -> None:
        if site not in self.study.sites:
            raise StudyError(f"the study has no site {site!r}; it has {', '.join(self.study.sites)}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that batch normalisation uses what it learned and learns nothing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
