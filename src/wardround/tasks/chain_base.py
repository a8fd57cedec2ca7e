"""What chains share, whatever they scan and whatever the diagnosis is: two stages, images beside classical methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.imaging.readers.labelled import LabelledImage
from wardround.models.build import build_model
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.base import at
from wardround.study.baselines import Baseline
from wardround.study.registry import BASELINES, baseline
from wardround.tasks.augmentation import SPATIAL, standard
from wardround.tasks.chain_network import DIAGNOSIS, RECONSTRUCTION, ChainNetwork
from wardround.tasks.chain_settings import ChainSettings
from wardround.tasks.chained import joined, parts_of
from wardround.tasks.classical import ClassicalMethods
from wardround.tasks.contrasts import without
from wardround.tasks.images import ImageTask, resampled, scaled
from wardround.tasks.labelled import Sampling, check_image, whole_image
from wardround.tasks.losses import build_loss
from wardround.tasks.reconstruction import evaluating
from wardround.tasks.scanning import ScanBatch, ScanFrame, Scanning
from wardround.tasks.stages import weighted_sum
from wardround.tasks.task import Window

if TYPE_CHECKING:
    from wardround.study.schema import Study

SettingsT = TypeVar("SettingsT", bound=ChainSettings)
# Slices that go through both networks at once in evaluation.
TOGETHER = 8
# Metrics of images are of slices with at least this share of head or body: an empty slice is easy.
_LEAST_BODY = 0.05


@dataclass(frozen=True, eq=False)
class Looked:
    """What a chain makes of an image: reconstructed slices (B, C, H, W) and logits (B, K, ...).

    `placed` is the image as `frame` took it to be scanned.
    """

    images: Tensor
    logits: Tensor
    frame: ScanFrame
    image: LabelledImage
    placed: LabelledImage

    def restored(self, values: Tensor) -> NDArray[np.float32]:
        """Values (B, K, H, W) on the image's own grid: (K, *shape)."""
        return self.frame.restored(values, self.image, self.placed)

    def reconstructed(self) -> NDArray[np.float32]:
        """The image as it was reconstructed, on its own grid and in its own units: (C, *shape)."""
        return self.frame.in_units(self.restored(self.images), self.image)


class ChainBase(ImageTask[SettingsT], ABC):
    """A chain's scanners, networks and images; see `wardround.tasks.task.Staged` and `Imaging`. Raises `StudyError`.

    Batches have `scans`, of `channels` images a slice one after the other.
    """

    def __init__(self, study: Study, config: SettingsT) -> None:
        super().__init__(study, config)
        if not study.scanner.chain:
            raise StudyError(f"task.kind: no chain begins with scans of acquisition.kind {study.scanner.kind}")
        self.scans: Scanning = at(study.scanner.chain)(study, config)
        if config.seen not in ("reconstruction", "full", self.scans.start):
            raise StudyError(f"task.seen: {config.seen} is none of {study.modality.upper()}; take {self.scans.start}")
        self._image_loss = build_loss(config.losses.reconstruction)
        self._classical = ClassicalMethods(config.evaluation, study.modality)
        self.compare_with({name: baseline(name) for name in study.baselines if name in BASELINES})
        self._scanner: str | None = None

    def _standard(self) -> Sequence[Mapping[str, Any]]:
        square = self.config.size[0] == self.config.size[1]
        turns = () if square else ("RandRotate90d",)
        return [step for step in standard(2) if step["name"] in SPATIAL and step["name"] not in turns]

    @property
    def stages(self) -> tuple[str, ...]:
        """The networks of the chain."""
        return (RECONSTRUCTION, DIAGNOSIS) if self.config.seen == "reconstruction" else (DIAGNOSIS,)

    def build_model(self) -> ChainNetwork:
        """Both networks, initialised from torch's global generator, the first one first."""
        seen = self.config.seen
        first = build_model(self.study.model, self.study.modality) if seen == "reconstruction" else None
        second = self.second()
        _check_size(second, self.config.channels, self.config.size)
        return ChainNetwork(first, second, begin=self.scans.begin, seen=self.scans.seen, full=seen == "full")

    @abstractmethod
    def second(self) -> nn.Module:
        """The network of the diagnosis: images (B, C, H, W) -> logits (B, K, ...)."""

    @abstractmethod
    def diagnosis_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """Of the second network's logits; scalar."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Of the images against those that were scanned, and of the diagnosis."""
        # A contrast that is not there is 0 in both: it adds nothing.
        there = there_of(batch)
        images, logits = model(batch.scans, batch.channels, *(() if there is None else (there,)))
        found = {
            RECONSTRUCTION: self._image_loss(images.flatten(0, 1), batch.scans.target, batch.scans.body),
            DIAGNOSIS: self.diagnosis_loss(logits.float(), batch),
        }
        return {stage: found[stage] for stage in self.stages}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Their sum, without weights: see `schedule.phases`."""
        return weighted_sum(self.losses(model, batch))

    def both(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and logits of a batch of any length, in evaluation mode and without gradients."""
        with evaluating(model), torch.no_grad():
            pieces = parts_of(batch.scans, batch.channels, TOGETHER)
            there = there_of(batch)
            whole: Iterable[tuple[Tensor, ...]] = repeat(())
            given = whole if there is None else ((part,) for part in torch.split(there, TOGETHER))
            parts = [model(scans, batch.channels, *part) for scans, part in zip(pieces, given, strict=False)]
        images, logits = (torch.cat(each) for each in zip(*parts, strict=True))
        return images, logits.float()

    def image_scores(self, images: Tensor, batch: Any) -> dict[str, Tensor]:
        """Means of images (B * C, H, W) over the slices that show enough of a body, or over all: name -> (1,).

        Of contrasts that an image lacks there is nothing to score.
        """
        scans, there = batch.scans, there_of(batch)
        every = torch.ones_like(images[:, 0, 0]) if there is None else there.flatten().to(images.dtype)
        counted = (scans.body.mean((-2, -1)) >= _LEAST_BODY).to(images.dtype) * every
        weights = torch.where(counted.sum() > 0, counted, every)
        scores = self.scans.scores(images, scans)
        if there is not None:
            nothing = torch.zeros_like(every)
            scores = {name: torch.where(every > 0.0, values, nothing.to(values)) for name, values in scores.items()}
        return {name: ((values * weights).sum() / weights.sum())[None] for name, values in scores.items()}

    # A clinic's images and raw data ----------------------------------------------------------------------------------

    def input_shape(self) -> tuple[int, ...]:
        """See `wardround.tasks.task.Predicts`: what the second network sees."""
        return (self.config.channels, *self.config.size)

    def scanned_by(self, site: str | None) -> Self:
        """See `wardround.tasks.task.PredictsScans`."""
        made = copy(self)
        made._scanner = site
        return made

    def scanning(self) -> AcquisitionSettings:
        """See `wardround.tasks.task.PredictsScans`."""
        return self.scans.acquisition(self._scanner)

    def from_image(self, model: nn.Module, image: LabelledImage) -> Looked:
        """What both networks make of simulated scans of an image, each channel scanned as in evaluation.

        Raises DataError for an image that is not of the study's channels, or of which no scan can be simulated.
        """
        scanner = self.scans.scanner(self._scanner)
        frame = scanner.frame
        placed, sampling = frame.placed(image, ""), self._sampling(frame.size)
        check_image(placed, sampling, "")
        channels = whole_image(placed, scaled(placed.channels, frame.scales(placed.channels)), sampling)
        scans = [
            scanner.scan(channel, 0, scanner.random(0, part, number))
            for part, of_slice in enumerate(channels)
            for number, channel in enumerate(of_slice)
        ]
        there = None
        if placed.absent:
            there = without(torch.ones(len(placed.channels), len(channels)), placed.absent).T
        images, logits = self.from_scans(model, joined(scans), len(placed.channels), there)
        return Looked(images, logits, frame, image, placed)

    def from_scans(
        self, model: nn.Module, scans: ScanBatch, channels: int, there: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (slices, C, h, w) on the grid of the scans, and logits by a network that sees the study's size.

        there: (slices, C), 0 for a contrast that the image lacks (`ChainNetwork.forward`).
        """
        assert isinstance(model, ChainNetwork)
        images, logits = [], []
        for number, part in enumerate(parts_of(scans, channels, TOGETHER)):
            with evaluating(model), torch.no_grad():
                images.append(model.images(part).reshape(-1, channels, *part.target.shape[1:]))
                if there is not None:
                    images[-1] *= there[number * TOGETHER : (number + 1) * TOGETHER, :, None, None].to(images[-1])
                logits.append(model.diagnosed(resampled(images[-1], self.config.size)).float())
        return torch.cat(images), torch.cat(logits)

    def from_raw(self, model: nn.Module, scans: ScanBatch) -> tuple[Tensor, Tensor]:
        """The same of raw data. Raises DataError for a chain that does not see one scan a slice."""
        if self.config.channels != 1 or self.config.seen == "full":
            raise DataError(
                f"this model sees {self.config.channels} images of a slice"
                + (" that were not undersampled" if self.config.seen == "full" else "")
                + ", and raw data are of one; give it images"
            )
        return self.from_scans(model, scans, 1)

    def _sampling(self, size: tuple[int, int]) -> Sampling:
        return Sampling(self.config.channels, 2, size, size, None, 1, 1, 0.0)

    # Images, and what learns nothing ---------------------------------------------------------------------------------

    @property
    def windows(self) -> tuple[Window, ...]:
        """See `wardround.tasks.task.Imaging`."""
        return self.scans.windows

    def reconstruct(self, model: nn.Module, batch: Any) -> Tensor:
        """Images (B * C, H, W) of the first stage."""
        assert isinstance(model, ChainNetwork)
        with evaluating(model), torch.no_grad():
            return model.images(batch.scans)

    def reference(self, batch: Any) -> Tensor:
        """The images that were scanned: (B * C, H, W)."""
        target: Tensor = batch.scans.target
        return target

    def score_images(self, images: Tensor, batch: Any) -> dict[str, Tensor]:
        """Metrics of images alone: name -> (1,). There is no diagnosis of them, so its metrics have no value."""
        return self.without_diagnosis() | self.image_scores(images, batch)

    @abstractmethod
    def without_diagnosis(self) -> dict[str, Tensor]:
        """What a patient adds to the metrics of the diagnosis where there is none."""

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """See `wardround.tasks.task.Compared`; raises `StudyError` where a method does not fit the sites' scanners."""
        self._classical.add(baselines)
        self.scans.check_baselines(baselines)

    def baseline_parameters(self, name: str) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; (None,) where there is nothing to choose."""
        return self._classical.parameters(name)

    def baseline(self, name: str, parameter: float | None, batch: Any) -> Tensor:
        """Images (B * C, H, W) of a method that learns nothing; `parameter` is its weight, if any."""
        method = self._classical.method(name, parameter)
        return torch.cat([scans.images(method) for scans in parts_of(batch.scans, batch.channels, TOGETHER)])


def there_of(batch: Any) -> Tensor | None:
    """Which channels of a batch's slices show anything (B, C); `None` where all do, as in a task that can lack none."""
    found: Tensor | None = getattr(batch, "there", None)
    return found


def _check_size(network: nn.Module, channels: int, size: tuple[int, int]) -> None:
    """Raise `StudyError` where a network does not take images of a size."""
    try:
        with evaluating(network), torch.no_grad():
            network(torch.zeros(1, channels, *size))
    except RuntimeError as error:
        raise StudyError(
            f"task.size: the network of the diagnosis halves images several times and does not take {size[0]} x "
            f"{size[1]} pixels; multiples of 32 fit all of them",
            detail=str(error),
        ) from error
