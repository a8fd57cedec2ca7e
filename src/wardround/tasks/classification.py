"""Classification: which of several classes (a diagnosis) a patient's images show.

A patient is measured once, by the mean of the probabilities of all their images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.imaging.readers.cases import Case, Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.images import ImageSettings, LabelTable
from wardround.tasks.augmentation import Augmentation
from wardround.tasks.charts import Charts, confusion, reliability
from wardround.tasks.histograms import auroc, average_precision, calibration_error
from wardround.tasks.images import ImageTask, PatientImages, SitePatients, resampled, scaled, scales_of
from wardround.tasks.overlays import coloured
from wardround.tasks.predictions import Probabilities
from wardround.tasks.reconstruction import PooledDataset, evaluating
from wardround.tasks.states import Histogram
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source, Split
from wardround.tasks.temperature import Calibration, fitted
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study

_BINS = 200
_LEAST_SHARE = 0.5 / 1000
Floats = npt.NDArray[np.float64]


class ClassificationTask(ImageSettings):
    """Which of several classes a patient's images show."""

    network = "build_classifier"

    kind: Literal["classification"]
    images: tuple[str, ...] = Field(("images/{id}",), min_length=1, description="as in a segmentation")
    table: LabelTable = LabelTable()
    classes: tuple[str, ...] = Field(min_length=2, description="as the table names them")
    multi_label: bool = Field(False, description="whether a patient can have several classes, or none")
    channels: int = Field(3, ge=1)
    size: tuple[int, ...] = Field((128, 128), description="voxels that images are resampled to")
    imbalance: Literal["none", "weighted", "balanced", "logit_adjusted"] = Field(
        "none",
        description="against classes that are rare at a site: `weighted` weighs the loss by 1 / frequency, `balanced` "
        "draws examples of all its classes alike, `logit_adjusted` adds log frequencies to the logits in training",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ClassificationTask:
        if len(self.size) != self.dimensions:
            raise ValueError(f"task.size needs {self.dimensions} numbers, as task.dimensions says")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("task.classes names a class twice")
        if self.multi_label and self.imbalance in ("balanced", "logit_adjusted"):
            raise ValueError(f"task.imbalance: {self.imbalance} is for one class a patient; take weighted")
        return self

    def describe(self) -> str:
        """How many classes."""
        several = ", several a patient" if self.multi_label else ""
        return f"classification in {len(self.classes)} classes{several}"

    def build(self, study: Study, embeddings: Any = None) -> Classification:
        """The task."""
        return Classification(study, self)


@dataclass(frozen=True, eq=False)
class DiagnosedBatch:
    """Images and what they show.

    images: float32 (B, C, *size), normalised. labels: float32 (B, K), 1 for a class that an image shows. prior: float32
    (B, K), the share of each class among the training examples of the site.
    """

    images: Tensor
    labels: Tensor
    prior: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def joined(cls, batches: Sequence[DiagnosedBatch]) -> DiagnosedBatch:
        """One batch of all images, in order."""
        return cls(*(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "prior")))


class DiagnosedDataset(PatientImages):
    """One site's images with their classes; see `wardround.tasks.task.Dataset`. Raises DataError."""

    def __init__(self, patients: SitePatients, config: ClassificationTask, augmentation: Augmentation) -> None:
        self._config, self._augmentation = config, augmentation
        self._labels: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}
        super().__init__(patients)
        self._train = [(p, n) for p in self._split["train"] for n in range(len(self._cases[p]))]
        used = [patient for part in self._split.values() for patient in part]
        self._digests = {patient: self._digest(patient) for patient in used}
        shown = np.array([self._labels[example] for example in self._train]).reshape(-1, len(config.classes))
        self._prior = torch.from_numpy((shown.mean(axis=0) if len(shown) else np.zeros(shown.shape[1])).astype("f4"))
        self._of_class = [np.flatnonzero(shown[:, k]) for k in range(shown.shape[1])]

    def _examined(self, patient: int, number: int, image: LabelledImage, case: Case) -> None:
        check_shape(image, self._config, str(case.images[0]))
        self._labels[patient, number] = _labels(case, self._config)

    def fingerprint(self) -> str:
        """Sha256 (hex) over images, classes and who trains, never over names or paths."""
        return self._hashed(self._digests, classes=list(self._config.classes))

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> DiagnosedBatch:
        """Training images, changed with `random` alone; balanced, others than asked for, of all classes alike."""
        if self._config.imbalance == "balanced":
            present = [rows for rows in self._of_class if len(rows)]
            drawn = [present[int(random.integers(len(present)))] for _ in indices]
            indices = [int(rows[int(random.integers(len(rows)))]) for rows in drawn]
        return DiagnosedBatch.joined([self._example(*self._train[index], random) for index in indices])

    def owners(self) -> tuple[int, ...]:
        """Whose each training image is. Raises StudyError for balanced draws, which take others than asked for."""
        if self._config.imbalance == "balanced":
            raise StudyError("task.imbalance: balanced draws examples by their class, which privacy does not cover")
        return tuple(patient for patient, _ in self._train)

    def evaluation(self, split: Split) -> Iterator[tuple[int, DiagnosedBatch]]:
        """(patient number, all images of the patient)."""
        yield from ((patient, self._whole(patient)) for patient in self._split[split])

    def tested(self, place: int) -> DiagnosedBatch:
        """All images of the test patient at a place in the order of `evaluation`."""
        return self._whole(self._split["test"][place])

    def _whole(self, patient: int) -> DiagnosedBatch:
        numbers = range(len(self._cases[patient]))
        return DiagnosedBatch.joined([self._example(patient, n, None) for n in numbers])

    def _example(self, patient: int, number: int, random: np.random.Generator | None) -> DiagnosedBatch:
        pixels = resampled(self._normalised(patient, number), self._config.size)
        if random is not None:
            pixels = self._augmentation.of_image(pixels, random)
        labels = torch.from_numpy(self._labels[patient, number].astype(np.float32))
        return DiagnosedBatch(pixels[None], labels[None], self._prior[None])

    def _digest(self, patient: int) -> str:
        found = hashlib.sha256()
        for number, case in enumerate(self._cases[patient]):
            for path in case.images:
                with path.open("rb") as file:
                    found.update(hashlib.file_digest(file, "sha256").digest())
            found.update(self._labels[patient, number].tobytes())
        return found.hexdigest()


def check_shape(image: LabelledImage, config: ClassificationTask, place: str) -> None:
    """Raises DataError, with `place` as its detail, for an image that the task's network cannot see."""
    channels, *shape = image.channels.shape
    if channels != config.channels:
        raise DataError(
            f"an image has {channels} channels, and the study's have {config.channels} (task.channels)", detail=place
        )
    if len(shape) != config.dimensions:
        raise DataError(f"task.dimensions is {config.dimensions}, and an image has {len(shape)}", detail=place)


def _labels(case: Case, config: ClassificationTask) -> npt.NDArray[np.bool_]:
    names = [name.strip() for name in case.label.split(";") if name.strip()] if config.multi_label else [case.label]
    unknown = [name for name in names if name not in config.classes]
    if unknown:
        raise DataError(
            f"{config.table.file} names a class that task.classes does not list; the study has "
            f"{', '.join(config.classes)}",
            detail=f"{case.images[0]}: {unknown[0]!r}",
        )
    return np.array([name in names for name in config.classes])


class Classification(ImageTask[ClassificationTask]):
    """The task of a study; see `wardround.tasks.task.Task`. `own` is what a site makes probabilities come true with."""

    own: Calibration | None = None

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Macro AUROC first: it selects the released round."""
        return classification_metrics(self.config.classes, self.config.multi_label)

    @property
    def repeats(self) -> bool:
        """See `wardround.tasks.task.Repeating`."""
        return self.config.augment in ("none", ())

    def build_model(self) -> nn.Module:
        """The network: images (B, C, *size) -> logits (B, K)."""
        return self._network(self.config.channels, len(self.config.classes))

    def dataset(self, site: str, source: Source) -> DiagnosedDataset:
        """The images and classes of a site."""
        patients = self._patients(site, source, self.config.images, None, self.config.table)
        return DiagnosedDataset(patients, self.config, self._augmentation)

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, DiagnosedBatch.joined)

    def loss(self, model: nn.Module, batch: DiagnosedBatch) -> Tensor:
        """Cross-entropy, for several classes a patient binary; against imbalance as the study says. Scalar."""
        logits = model(batch.images).float()
        return diagnosis_loss(logits, batch.labels, batch.prior, self.config.imbalance, self.config.multi_label)

    def logits(self, model: nn.Module, batch: DiagnosedBatch) -> Tensor:
        """(B, K), in evaluation mode."""
        with evaluating(model), torch.no_grad():
            found: Tensor = model(batch.images).float()
        return found

    def probabilities(self, logits: Tensor, own: Calibration | None = None) -> Tensor:
        """(B, K), of logits as a site calibrates them where it does; see `wardround.tasks.temperature`."""
        scaled = logits if own is None else logits / own.temperature
        if own is not None and own.offsets:
            scaled = scaled + scaled.new_tensor(own.offsets)
        return torch.sigmoid(scaled) if self.config.multi_label else torch.softmax(scaled, dim=1)

    def score(self, model: nn.Module, batch: DiagnosedBatch) -> dict[str, Tensor]:
        """What one patient adds to the histograms, from all of the patient's images: (1, classes, 2) each.

        Where the site has no calibration, no label of a scaled probability is known.
        """
        logits, labels = self.logits(model, batch), batch.labels.amax(dim=0, keepdim=True)
        scores = self.probabilities(logits).mean(dim=0, keepdim=True)
        if self.config.multi_label:
            hits = (scores > 0.5).float()
        else:
            hits = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
        scaled, right = self._confidence(self.probabilities(logits, self.own).mean(dim=0, keepdim=True), labels)
        pairs = {
            "probability": (scores, labels),
            "hit": (hits, labels),
            "confidence": self._confidence(scores, labels),
            "scaled": (scaled, torch.full_like(right, math.nan) if self.own is None else right),
        }
        return {name: torch.stack(pair, dim=-1) for name, pair in pairs.items()}

    def _confidence(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (1, K) that are to come true, and whether they do: of the likeliest class, or of every one."""
        if self.config.multi_label:
            return scores, labels
        best = scores.argmax(dim=1, keepdim=True)
        return scores.gather(1, best), labels.gather(1, best)

    # A calibration at each site ---------------------------------------------------------------------------------------

    def calibration(self, model: nn.Module, batches: Iterable[tuple[int, DiagnosedBatch]]) -> Calibration | None:
        """See `wardround.tasks.task.Calibrated`."""
        logits, labels = [], []
        offsets: tuple[float, ...] = ()
        for _, batch in batches:
            offsets = self._offsets(batch)
            logits.append(on_host(self.logits(model, batch)).astype(np.float64))
            labels.append(on_host(batch.labels.amax(dim=0)).astype(np.float64))
        return fitted(logits, np.array(labels), offsets, multi_label=self.config.multi_label)

    def _offsets(self, batch: DiagnosedBatch) -> tuple[float, ...]:
        """What training took out of the logits: the log of each class's share at the site, or of its odds."""
        if self.config.imbalance == "none":
            return ()
        share = on_host(floored(batch.prior[0])).astype(np.float64)
        return tuple(map(float, np.log(share / (1.0 - share) if self.config.multi_label else share)))

    def calibrated(self, calibration: Calibration) -> Classification:
        """See `wardround.tasks.task.Calibrated`."""
        if len(calibration.offsets) not in (0, len(self.config.classes)):
            raise DataError("the calibration beside the model is of another model; evaluate the run again")
        task = copy(self)
        task.own = calibration
        return task

    # What a report shows ----------------------------------------------------------------------------------------------

    def charts(self, rows: Mapping[str, Floats]) -> Charts:
        """See `wardround.tasks.task.Charted`; without a matrix of classes where a patient can have several."""
        called = rows["balanced_accuracy"]
        known = ~np.isnan(called).any(axis=(1, 2, 3))
        return Charts(
            confusion=None if self.config.multi_label else confusion(called[known], self.config.classes),
            before=reliability(np.nansum(rows["ece"], axis=0)),
            after=reliability(np.nansum(rows["ece_scaled"], axis=0)),
        )

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """None: nothing is drawn into the images."""
        return ()

    def merit(self, rows: Mapping[str, Floats]) -> Floats:
        """The mean over classes of the probability of what is true, the class or its absence."""
        counts = rows["auroc"]
        centres = (np.arange(counts.shape[-1]) + 0.5) / counts.shape[-1]
        right = (counts[:, :, 1] @ centres + counts[:, :, 0] @ (1.0 - centres)).mean(axis=1)
        return np.asarray(right)

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[DiagnosedBatch]:
        """See `wardround.tasks.task.Illustrated`."""
        assert isinstance(dataset, DiagnosedDataset)
        yield from (dataset.tested(place) for place in places)

    def illustrate(self, model: nn.Module | None, batch: DiagnosedBatch) -> Illustration:
        """The patient's first image; below it the classes, those that a network finds with their probabilities."""
        labels = on_host(batch.labels.amax(dim=0))
        if model is None:
            found = [name for name, has in zip(self.config.classes, labels, strict=True) if has]
        else:
            scores = on_host(self.probabilities(self.logits(model, batch)).mean(dim=0))
            named = [k for k in range(len(scores)) if scores[k] > 0.5] if self.config.multi_label else [scores.argmax()]
            found = [f"{self.config.classes[k]} {scores[k]:.2f}" for k in named]
        image = on_host(batch.images[0])
        return Illustration(coloured(image[..., image.shape[-1] // 2] if image.ndim == 4 else image), ", ".join(found))

    # A clinic's images -----------------------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`."""
        return self._patterns(self.config.images, self.config.table)

    def input_shape(self) -> tuple[int, ...]:
        """See `wardround.tasks.task.Predicts`."""
        return (self.config.channels, *self.config.size)

    def predict(self, model: nn.Module, image: LabelledImage) -> Probabilities:
        """How likely each class is of an image. Raises DataError for one that the network cannot see."""
        check_shape(image, self.config, "")
        pixels = resampled(scaled(image.channels, scales_of(image.channels)), self.config.size)[None]
        nothing = pixels.new_zeros(1, len(self.config.classes))
        found = self.probabilities(self.logits(model, DiagnosedBatch(pixels, nothing, nothing)), self.own)
        values = on_host(found)[0].astype(np.float64)
        return Probabilities(self.config.classes, values, not self.config.multi_label)


def sensitivity(counts: Floats) -> Floats:
    """The share of a class's patients that were called it: counts (..., classes, 2, 2) -> (..., classes)."""
    positive = counts[..., 1, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(positive[..., -1] / positive.sum(axis=-1))


def classification_metrics(classes: Sequence[str], multi_label: bool = False) -> tuple[MetricSpec, ...]:
    """AUROC, balanced accuracy, average precision and calibration error, macro; then AUROC and sensitivity by class."""
    number = len(classes)
    scores, hits = partial(Histogram, classes=number, bins=_BINS), partial(Histogram, classes=number, bins=2)
    sure = partial(Histogram, classes=number if multi_label else 1, bins=_BINS)

    def spec(name: str, label: str, definition: str, kind: Histogram, source: str, larger: bool = True) -> MetricSpec:
        return MetricSpec(name, 0.0, 1.0, 1e-4, larger, label, "", 0.005, definition, True, kind, source)

    area = "share of pairs of a patient with and one without the class in which the former has the higher probability"
    apart = "expected difference of the likeliest class's probability and the share in whom it is right, in 10 bins"
    called = "share of the class's patients in whom it is the likeliest class"
    macro = (
        spec("auroc", "AUROC", f"{area}; mean of the classes", scores(auroc), "probability"),
        spec("balanced_accuracy", "Balanced accuracy", f"{called}; mean of the classes", hits(sensitivity), "hit"),
        spec("auprc", "AUPRC", "average precision, mean of the classes", scores(average_precision), "probability"),
        spec("ece", "Calibration error", apart, sure(calibration_error), "confidence", larger=False),
        spec("ece_scaled", "Calibration error after scaling", f"{apart}; of probabilities as each site calibrates them "
             "on its own patients", sure(calibration_error), "scaled", larger=False),
    )  # fmt: skip
    by_class = [
        part
        for k, name in enumerate(classes)
        for part in (
            spec(f"auroc_{name}", f"AUROC of {name}", area, scores(auroc, only=k), "probability"),
            spec(f"sensitivity_{name}", f"Sensitivity for {name}", called, hits(sensitivity, only=k), "hit"),
        )
    ]
    return (*macro, *by_class)


def floored(prior: Tensor) -> Tensor:
    """Shares of classes; one without an example counts as half an example in 1,000."""
    return prior.clamp(_LEAST_SHARE, 1.0 - _LEAST_SHARE)


def diagnosis_loss(logits: Tensor, labels: Tensor, prior: Tensor, imbalance: str, multi_label: bool) -> Tensor:
    """logits, labels and prior (B, K) -> scalar.

    `weighted` weighs a class by 1 / (K prior) (binary: its positives by (1 - prior) / prior); `logit_adjusted` adds
    log prior to the logits (Menon et al., ICLR 2021). A class without a training example at the site has no weight, and
    the least prior of half an example.
    """
    share = floored(prior)
    if multi_label:
        weight = (1.0 - share) / share if imbalance == "weighted" else torch.ones_like(share)
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (each * (labels * weight + 1.0 - labels)).mean()
    if imbalance == "logit_adjusted":
        logits = logits + share.log()
    each = -(torch.log_softmax(logits, dim=1) * labels).sum(dim=1)
    if imbalance != "weighted":
        return each.mean()
    weight = (labels / (share * labels.shape[1])).sum(dim=1)
    return (each * weight).sum() / weight.sum().clamp_min(1e-12)
