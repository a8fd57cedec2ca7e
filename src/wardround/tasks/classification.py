"""Classification: which of several classes (a diagnosis) a patient's images show.

A patient is measured once, by the mean of the probabilities of all their images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.images import ClassSettings, DropShare, each_a_channel
from wardround.study.normalise import Normalise, ZScore, check_normalise
from wardround.study.teacher import TaughtBy
from wardround.tasks import confidence
from wardround.tasks.charts import Charts
from wardround.tasks.classes import Classes, Floats
from wardround.tasks.diagnosed import DiagnosedBatch, DiagnosedDataset, check_shape
from wardround.tasks.distillation import (
    Distillation,
    Lesson,
    Said,
    Teacher,
    channels_of,
    check_scale,
    order_of,
    unfit_kind,
)
from wardround.tasks.images import ImageTask, resampled, scaled
from wardround.tasks.overlays import coloured
from wardround.tasks.predictions import Probabilities
from wardround.tasks.reconstruction import PooledDataset, evaluating
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source
from wardround.tasks.temperature import Calibration
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study


class ClassificationTask(ClassSettings):
    """Which of several classes a patient's images show."""

    network = "build_classifier"
    spectral = True

    kind: Literal["classification"]
    size: tuple[int, ...] = Field((128, 128), description="voxels that images are resampled to")
    imbalance: Literal["none", "weighted", "balanced", "logit_adjusted"] = Field(
        "none",
        description="against classes that are rare at a site: `weighted` weighs the loss by 1 / frequency, `balanced` "
        "draws examples of all its classes alike, `logit_adjusted` adds log frequencies to the logits in training",
    )
    normalise: Normalise = ZScore()
    drop_contrasts: DropShare = 0.0
    teacher: TaughtBy | None = Field(
        None,
        description="a released model of a classification that teaches the network; where `labels.share` is below 1, "
        "it teaches all other training patients alone",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ClassificationTask:
        if len(self.size) != self.dimensions:
            raise ValueError(f"task.size needs {self.dimensions} numbers, as task.dimensions says")
        if self.taught_by is not None and self.labels.share < 1.0 and self.imbalance == "balanced":
            raise ValueError(
                "task.imbalance: balanced draws examples by their labels, and with task.teacher those without one "
                "train too; take logit_adjusted or weighted"
            )
        check_normalise(self)
        return self

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The files of an image, where each is a channel."""
        return each_a_channel(self.images, self.channels)

    def describe(self) -> str:
        """How many classes."""
        several = ", several a patient" if self.multi_label else ""
        taught = "" if self.teacher is None else f", taught by {self.teacher.describe()}"
        scaled = f", {said}" if (said := self.normalise.describe()) else ""
        return f"classification in {len(self.classes)} classes{several}{self.labels.describe()}{scaled}{taught}"

    def build(self, study: Study, embeddings: Any = None) -> Classification:
        """The task."""
        return Classification(study, self)


class Classification(ImageTask[ClassificationTask]):
    """The task of a study; see `wardround.tasks.task.Task`."""

    def __init__(self, study: Study, config: ClassificationTask) -> None:
        super().__init__(study, config)
        self.classes = Classes(config.classes, config.multi_label, config.imbalance)
        self._distillation = Distillation(config)

    def learn_from(self, teacher: Callable[[], Teacher]) -> None:
        """See `wardround.tasks.distillation.Student`."""
        self._distillation = Distillation(self.config, teacher, repeats=self.repeats)

    def check_teacher(self) -> None:
        """See `wardround.tasks.distillation.Student`."""
        _ = self._distillation.lesson

    def lesson_for(self, student: Any) -> Lesson:
        """See `wardround.tasks.distillation.Teaches`. Another classification, of classes among its own."""
        own = self.config
        if not isinstance(student, ClassificationTask) or student.multi_label != own.multi_label:
            raise unfit_kind(student, own)
        check_scale(student, own)
        order = order_of(student.classes, own.classes, "task.classes")
        return ClassLesson(channels_of(student, own), own.size, order)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Macro AUROC first: it selects the released round."""
        return self.classes.metrics

    @property
    def repeats(self) -> bool:
        """See `wardround.tasks.task.Repeating`."""
        return self.config.augment in ("none", ())

    def build_model(self) -> nn.Module:
        """The network: images (B, C, *size) -> logits (B, K)."""
        self.study.model.check_size(self.config.size)
        network = self._network(self.config.channels, len(self.config.classes))
        return self._with_spectrum(network, self.config.channels, self.config.size)

    def dataset(self, site: str, source: Source) -> DiagnosedDataset:
        """The images and classes of a site."""
        patients = self._patients(site, source, self.config.images, None, self.config.table, self.config.labels)
        drop = self.config.drop_contrasts
        return DiagnosedDataset(patients, self.config, self._augmentation, self.frame, drop=drop)

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, DiagnosedBatch.joined)

    def loss(self, model: nn.Module, batch: DiagnosedBatch) -> Tensor:
        """Cross-entropy, for several classes a patient binary; against imbalance as the study says. Scalar.

        With a teacher see `wardround.tasks.distillation.Distillation.loss`.
        """
        logits = model(batch.images).float()
        own = self.classes.loss(logits, batch.labels, batch.prior)
        return self._distillation.loss(own, logits, batch.images, exclusive=not self.config.multi_label)

    def logits(self, model: nn.Module, batch: DiagnosedBatch) -> Tensor:
        """(B, K), in evaluation mode."""
        with evaluating(model), torch.no_grad():
            found: Tensor = model(batch.images).float()
        return found

    def said(self, model: nn.Module, batch: DiagnosedBatch) -> confidence.Said:
        """See `wardround.tasks.confidence.Confident`: each class of each patient."""
        probabilities = self.classes.probabilities(self.logits(model, batch))
        return confidence.Said(probabilities, batch.labels, not self.config.multi_label)

    def score(self, model: nn.Module, batch: DiagnosedBatch) -> dict[str, Tensor]:
        """What one patient adds to the histograms; see `Classes.measured`."""
        return self.classes.measured(self.logits(model, batch), batch.labels)

    def calibration(self, model: nn.Module, batches: Iterable[tuple[int, DiagnosedBatch]]) -> Calibration | None:
        """See `wardround.tasks.task.Calibrated`."""
        return self.classes.calibration((self.logits(model, b), b.labels, b.prior) for _, b in batches)

    def calibrated(self, calibration: Calibration) -> Classification:
        """See `wardround.tasks.task.Calibrated`."""
        task = copy(self)
        task.classes = self.classes.calibrated(calibration)
        return task

    # What a report shows ----------------------------------------------------------------------------------------------

    def charts(self, rows: Mapping[str, Floats]) -> Charts:
        """See `wardround.tasks.task.Charted`."""
        return self.classes.charts(rows)

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """None: nothing is drawn into the images."""
        return ()

    def merit(self, rows: Mapping[str, Floats]) -> Floats:
        """See `Classes.merit`."""
        return self.classes.merit(rows)

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[DiagnosedBatch]:
        """See `wardround.tasks.task.Illustrated`."""
        assert isinstance(dataset, DiagnosedDataset)
        yield from (dataset.tested(place) for place in places)

    def illustrate(self, model: nn.Module | None, batch: DiagnosedBatch) -> Illustration:
        """The patient's first image; below it the classes, those that a network finds with their probabilities."""
        caption = self.classes.caption(batch.labels, None if model is None else self.logits(model, batch))
        image = on_host(batch.images[0])
        return Illustration(coloured(image[..., image.shape[-1] // 2] if image.ndim == 4 else image), caption)

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
        pixels = resampled(scaled(image.channels, self.frame.scales(image.channels)), self.config.size)[None]
        nothing = pixels.new_zeros(1, len(self.config.classes))
        return self.classes.said(self.logits(model, DiagnosedBatch(pixels, nothing, nothing)))


@dataclass(frozen=True)
class ClassLesson:
    """How a classification teaches another: its channels, on its own grid, and where it has each class."""

    channels: Sequence[int]
    size: tuple[int, ...]
    order: Sequence[int]

    def says(self, network: nn.Module, images: Tensor, masks: Tensor | None) -> Said:
        """See `wardround.tasks.distillation.Lesson`."""
        logits = network(resampled(images[:, self.channels], self.size)).float()[:, self.order]
        return Said(logits, torch.ones_like(logits))
