"""The chain from raw data to a class: simulated scan -> image -> which of several classes, by two networks.

A patient is measured once, by the mean of the probabilities of all slices of all their images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo
from torch import Tensor, nn

from wardround.imaging.orientation import Turn
from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.images import ClassSettings
from wardround.study.models import ModelSettings
from wardround.tasks.chain_base import ChainBase
from wardround.tasks.chain_settings import ChainSettings, default_second, second_network
from wardround.tasks.chained import ScannedDataset, joined
from wardround.tasks.charts import Charts
from wardround.tasks.classes import Classes, Floats
from wardround.tasks.diagnosed import DiagnosedBatch, DiagnosedDataset, shown_parts
from wardround.tasks.overlays import coloured
from wardround.tasks.predictions import Probabilities
from wardround.tasks.reconstruction import PooledDataset
from wardround.tasks.scanning import ScanBatch
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source, Split
from wardround.tasks.temperature import Calibration
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study


def _classifier(value: Any, info: ValidationInfo) -> Any:
    return second_network(value, info, "classification", "build_classifier", "names no class")


class ChainToClassTask(ChainSettings, ClassSettings):
    """From simulated raw data over an image to a class; stages `reconstruction` and `diagnosis`.

    `model` is the network of the reconstruction. Images, table and classes are those of a classification; an image may
    also be a volume, of which each slice that shows something is an example.
    """

    kind: Literal["chain_to_class"]
    images: tuple[str, ...] = Field(("images/{id}",), min_length=1, description="as in a segmentation")
    channels: int = Field(
        1, ge=1, description="channels of all files of an image together, each of which is scanned; CT: 1"
    )
    imbalance: Literal["none", "weighted", "logit_adjusted"] = Field(
        "none",
        description="against classes that are rare at a site: `weighted` weighs the loss by 1 / frequency, "
        "`logit_adjusted` adds log frequencies to the logits in training",
    )
    classifier: Annotated[SerializeAsAny[ModelSettings], BeforeValidator(_classifier)] = Field(
        default_factory=lambda: default_second("classification"),
        description="the network that tells classes of reconstructed images, one of those for classification",
    )

    def describe(self) -> str:
        """From what to what."""
        several = ", several a patient," if self.multi_label else ""
        return (
            f"chain: simulated scans of {', '.join(self.images)} -> {self.second_sees} of {self.size[0]} x "
            f"{self.size[1]} pixels -> {len(self.classes)} classes{several} by {self.classifier.describe()}; losses "
            f"{self.losses.reconstruction.kind} and cross-entropy{self.labels.describe()}"
        )

    def build(self, study: Study, embeddings: Any = None) -> ChainToClass:
        """The task."""
        return ChainToClass(study, self)


@dataclass(frozen=True, eq=False)
class ClassedScans:
    """Slices with a scan of each of their channels, and what they show.

    scans: of B slices with C channels each, B * C images: the channels of a slice follow each other. labels and prior
    (B, K): see `DiagnosedBatch`. turn: how slices are shown to people in evaluation; None for as they are.
    """

    scans: ScanBatch
    labels: Tensor
    prior: Tensor
    turn: Turn | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Scans of a slice."""
        return len(self.scans) // len(self.labels)

    @classmethod
    def joined(cls, batches: Sequence[ClassedScans]) -> ClassedScans:
        """One batch of all slices, in order."""
        labels, prior = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "prior"))
        return cls(joined([batch.scans for batch in batches]), labels, prior)


class ClassedDataset(ScannedDataset[DiagnosedDataset]):
    """One site's images and classes with simulated scans; see `wardround.tasks.task.Dataset`."""

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> ClassedScans:
        """Training slices, changed and then scanned with `random` alone."""
        return ClassedScans.joined([self._training(index, random) for index in indices])

    def evaluation(self, split: Split) -> Iterator[tuple[int, ClassedScans]]:
        """(patient number, all slices of all images of the patient)."""
        for patient, batch in self._drawn.evaluation(split):
            yield patient, self._scanned(batch, patient, range(len(batch)))

    def tested(self, place: int) -> ClassedScans:
        """All slices of the test patient at a place in the order of `evaluation`."""
        batch, patient = self._drawn.tested(place), self._drawn.tested_patient(place)
        return self._scanned(batch, patient, range(len(batch)))

    def shown(self) -> Iterator[tuple[ClassedScans, Turn | None]]:
        """The middle slice of the first test patient, a batch of one for each of its channels."""
        for patient, batch in self._drawn.evaluation("test"):
            one = self._scanned(batch, patient, (len(batch) // 2,))
            for channel in range(one.channels):
                yield ClassedScans(one.scans.part(channel, channel + 1), one.labels, one.prior), one.turn
            return

    def _training(self, index: int, random: np.random.Generator) -> ClassedScans:
        drawn, patient = self._drawn.batch([index], random), self._owners[index]
        scans = joined([self._scanner.scan(image, patient, random) for image in drawn.images[0]])
        return ClassedScans(scans, drawn.labels, drawn.prior)

    def _scanned(self, batch: DiagnosedBatch, patient: int, slices: Sequence[int]) -> ClassedScans:
        chosen = list(slices)
        scans = [
            self._scanner.kept(values, patient, part, channel)
            for part in chosen
            for channel, values in enumerate(batch.images[part])
        ]
        turn = self._drawn.turn(patient, 0)
        return ClassedScans(joined(scans), batch.labels[chosen], batch.prior[chosen], turn)


class ChainToClass(ChainBase[ChainToClassTask]):
    """The task of a study; see `wardround.tasks.task.Staged`, `Imaging` and `Calibrated`. Raises `StudyError`."""

    def __init__(self, study: Study, config: ChainToClassTask) -> None:
        super().__init__(study, config)
        self.classes = Classes(config.classes, config.multi_label, config.imbalance)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Macro AUROC first: it selects the released round. The images' come last."""
        return (*self.classes.metrics, *self.scans.metrics)

    def second(self) -> nn.Module:
        """The network that tells classes: images (B, C, H, W) -> logits (B, K)."""
        build: Any = getattr(self.config.classifier, "build_classifier")  # noqa: B009
        network: nn.Module = build(2, self.config.channels, len(self.config.classes))
        return network

    def dataset(self, site: str, source: Source) -> ClassedDataset:
        """The images and classes of a site, with its simulated scanner."""
        scanner = self.scans.scanner(site)
        patients = self._patients(site, source, self.config.images, None, self.config.table, self.config.labels)
        frame = scanner.frame
        drawn = DiagnosedDataset(patients, self.config, self._augmentation, frame, size=frame.size, slices=True)
        return ClassedDataset(drawn, scanner)

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, ClassedScans.joined)

    def diagnosis_loss(self, logits: Tensor, batch: ClassedScans) -> Tensor:
        """Cross-entropy, for several classes a patient binary; against imbalance as the study says."""
        return self.classes.loss(logits, batch.labels, batch.prior)

    # What is measured, and a calibration at each site -----------------------------------------------------------------

    def score(self, model: nn.Module, batch: ClassedScans) -> dict[str, Tensor]:
        """What one patient adds to all metrics; see `Classes.measured` and `image_scores`."""
        images, logits = self.both(model, batch)
        return self.classes.measured(logits, batch.labels) | self.image_scores(images.flatten(0, 1), batch)

    def without_diagnosis(self) -> dict[str, Tensor]:
        """No class is known."""
        return self.classes.unknown()

    def calibration(self, model: nn.Module, batches: Iterable[tuple[int, ClassedScans]]) -> Calibration | None:
        """See `wardround.tasks.task.Calibrated`."""
        return self.classes.calibration((self.both(model, b)[1], b.labels, b.prior) for _, b in batches)

    def calibrated(self, calibration: Calibration) -> ChainToClass:
        """See `wardround.tasks.task.Calibrated`."""
        task = copy(self)
        task.classes = self.classes.calibrated(calibration)
        return task

    # A clinic's images and raw data ----------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`."""
        return self._patterns(self.config.images, self.config.table)

    def predict(self, model: nn.Module, image: LabelledImage) -> Probabilities:
        """How likely each class is of simulated scans of an image; see `from_image`."""
        found = self.from_image(model, image)
        which = [part or 0 for part in shown_parts(found.placed, found.frame)]
        return self.classes.said(found.logits[which])

    def predict_scans(self, model: nn.Module, scans: ScanBatch) -> Probabilities:
        """See `wardround.tasks.task.PredictsScans` and `from_raw`."""
        return self.classes.said(self.from_raw(model, scans)[1])

    # What a report shows ----------------------------------------------------------------------------------------------

    def charts(self, rows: Mapping[str, Floats]) -> Charts:
        """See `wardround.tasks.task.Charted`."""
        return self.classes.charts(rows)

    def examples(self, dataset: Dataset) -> Iterator[ClassedScans]:
        """The middle slice of the first test patient, once for each channel."""
        if isinstance(dataset, ClassedDataset):
            yield from (batch for batch, _ in dataset.shown())

    def turns(self, dataset: Dataset) -> Iterator[Turn | None]:
        """How each of these examples is shown; None for as it is."""
        if isinstance(dataset, ClassedDataset):
            yield from (turn for _, turn in dataset.shown())

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """None: nothing is drawn into the images."""
        return ()

    def merit(self, rows: Mapping[str, Floats]) -> Floats:
        """See `Classes.merit`."""
        return self.classes.merit(rows)

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[ClassedScans]:
        """See `wardround.tasks.task.Illustrated`."""
        assert isinstance(dataset, ClassedDataset)
        yield from (dataset.tested(place) for place in places)

    def illustrate(self, model: nn.Module | None, batch: ClassedScans) -> Illustration:
        """The middle slice as it was reconstructed, or without a network as it was scanned; below it the classes."""
        target, logits = batch.scans.target, None
        images = target.reshape(len(batch), batch.channels, *target.shape[1:])
        if model is not None:
            images, logits = self.both(model, batch)
        middle = on_host(images[len(batch) // 2])
        shown = middle if batch.turn is None else np.stack([batch.turn(channel) for channel in middle])
        return Illustration(coloured(shown), self.classes.caption(batch.labels, logits))
