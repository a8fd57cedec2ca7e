"""The chain from raw data to the diagnosis: simulated scan -> image -> outlines, by two networks.

Raw data are simulated from images (a simulated acquisition of real anatomy). Every channel of a slice is scanned and
reconstructed by the same network; the second network sees the images. `wardround.tasks.scanning` says what is scanned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo
from torch import Tensor, nn

from wardround.imaging.orientation import Turn
from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.models.outliner import build_outliner
from wardround.study.images import DrawnSettings, DropShare, OverlapLoss, each_a_channel
from wardround.study.models import ModelSettings
from wardround.tasks.chain_base import ChainBase
from wardround.tasks.chain_settings import ChainSettings, ImageLosses, default_second, second_network
from wardround.tasks.chained import ChainBatch, ChainDataset
from wardround.tasks.contrasts import first_with_anything
from wardround.tasks.images import resampled
from wardround.tasks.labelled import LabelledDataset, Sampling
from wardround.tasks.overlap import overlap_metrics, overlap_scores
from wardround.tasks.overlays import OUTLINES, slice_overlay
from wardround.tasks.predictions import Masks
from wardround.tasks.reconstruction import PooledDataset
from wardround.tasks.scanning import ScanBatch
from wardround.tasks.segmentation import as_one, overlap_loss
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study


class ChainLosses(ImageLosses):
    """The losses of both stages; `schedule.phases` says with which weights they count in which rounds."""

    diagnosis: OverlapLoss = OverlapLoss()


def _segmenter(value: Any, info: ValidationInfo) -> Any:
    return second_network(value, info, "segmentation", "build_network", "outlines nothing")


class ChainTask(ChainSettings, DrawnSettings):
    """From simulated raw data over an image to outlines of structures; stages `reconstruction` and `diagnosis`.

    `model` is the network of the reconstruction.
    """

    kind: Literal["chain"]
    segmenter: Annotated[SerializeAsAny[ModelSettings], BeforeValidator(_segmenter)] = Field(
        default_factory=lambda: default_second("segmentation"),
        description="the network that outlines structures in reconstructed images, one of those for segmentation",
    )
    losses: ChainLosses = ChainLosses()
    drop_contrasts: DropShare = 0.0

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The files of an image, where each is a channel and is scanned by itself."""
        return each_a_channel(self.images, self.channels)

    def describe(self) -> str:
        """From what to what."""
        return (
            f"chain: simulated scans of {', '.join(self.images)} -> {self.second_sees} of {self.size[0]} x "
            f"{self.size[1]} pixels -> outlines of {', '.join(self.structures)} by {self.segmenter.describe()}; losses "
            f"{self.losses.reconstruction.kind} and Dice with cross-entropy"
        )

    def build(self, study: Study, embeddings: Any = None) -> Chain:
        """The task."""
        return Chain(study, self)


class Chain(ChainBase[ChainTask]):
    """The task of a study; see `wardround.tasks.task.Staged` and `Imaging`. Raises `StudyError`."""

    @property
    def structures(self) -> tuple[str, ...]:
        """What is outlined, in the order of channels."""
        return tuple(self.config.structures)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Dice first: it selects the released round. The images' come last."""
        unit = "mm" if self.config.distances == "mm" else "px"
        return (*overlap_metrics(self.structures, unit), *self.scans.metrics)

    def second(self) -> nn.Module:
        """The network that outlines: images (B, C, H, W) -> logits (B, K, H, W)."""
        return build_outliner(self.config.segmenter, 2, self.config.channels, len(self.structures))

    def dataset(self, site: str, source: Source) -> ChainDataset:
        """The images and masks of a site, with its simulated scanner."""
        config, scanner = self.config, self.scans.scanner(site)
        drawn = LabelledDataset(
            self._patients(site, source, config.images, config.mask, config.table),
            config.values,
            config.drawn_at(site),
            self._sampling(scanner.frame.size),
            self._augmentation,
            physical=config.distances == "mm",
            frame=scanner.frame,
            drop=config.drop_contrasts,
        )
        return ChainDataset(drawn, scanner)

    def _sampling(self, size: tuple[int, int]) -> Sampling:
        config = self.config
        return Sampling(config.channels, 2, size, size, None, 1, config.empty_every, 0.0)

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, ChainBatch.joined)

    def diagnosis_loss(self, logits: Tensor, batch: ChainBatch) -> Tensor:
        """Of the outlines against the drawn ones."""
        overlap = self.config.losses.diagnosis
        return overlap_loss(logits, batch.masks, batch.known, overlap.dice, overlap.cross_entropy)

    # What is measured ------------------------------------------------------------------------------------------------

    def score(self, model: nn.Module, batch: ChainBatch) -> dict[str, Tensor]:
        """All metrics of one whole image: name -> (1,)."""
        images, logits = self.both(model, batch)
        marked = as_one(resampled(logits, batch.masks.shape[2:]) > 0)
        return self._overlap(marked, batch) | self.image_scores(images.flatten(0, 1), batch)

    def _overlap(self, marked: Tensor, batch: ChainBatch) -> dict[str, Tensor]:
        known = [bool(each) for each in on_host(batch.known[0]) > 0.5]
        # A volume of one slice is a picture.
        spacing = batch.spacing[1 - marked.ndim :]
        return overlap_scores(marked, as_one(batch.masks > 0.5), known, self.structures, spacing)

    def without_diagnosis(self) -> dict[str, Tensor]:
        """No outline, so no value."""
        absent = torch.full((1,), torch.nan, dtype=torch.float64)
        return {spec.name: absent for spec in self.metrics}

    # A clinic's images and raw data ----------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`."""
        return self._patterns(self.config.images, self.config.table)

    def predict(self, model: nn.Module, image: LabelledImage) -> Masks:
        """What the chain outlines in simulated scans of an image, and the image that it saw; see `from_image`."""
        found = self.from_image(model, image)
        return Masks(self.structures, found.restored(found.logits) > 0, found.reconstructed())

    def predict_scans(self, model: nn.Module, scans: ScanBatch) -> Masks:
        """See `wardround.tasks.task.PredictsScans` and `from_raw`."""
        images, logits = self.from_raw(model, scans)
        whole, marked = (
            np.moveaxis(on_host(each), 0, -1) for each in (images, resampled(logits, images.shape[2:]) > 0)
        )
        return Masks(self.structures, np.ascontiguousarray(marked), np.ascontiguousarray(whole, np.float32))

    # Pictures --------------------------------------------------------------------------------------------------------

    def examples(self, dataset: Dataset) -> Iterator[ChainBatch]:
        """The slice of the first test patient with most of the structures, once for each channel."""
        if isinstance(dataset, ChainDataset):
            yield from (batch for batch, _ in dataset.shown())

    def turns(self, dataset: Dataset) -> Iterator[Turn | None]:
        """How each of these examples is shown; None for as it is."""
        if isinstance(dataset, ChainDataset):
            yield from (turn for _, turn in dataset.shown())

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """The colours of outlines."""
        return OUTLINES

    def merit(self, rows: Mapping[str, Any]) -> Any:
        """The Dice of each patient."""
        return rows[self.metrics[0].name]

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[ChainBatch]:
        """See `wardround.tasks.task.Illustrated`: a slice of each patient."""
        assert isinstance(dataset, ChainDataset)
        yield from (dataset.tested(place) for place in places)

    def illustrate(self, model: nn.Module | None, batch: ChainBatch) -> Illustration:
        """Outlines in the first channel that is there, as reconstructed; without a network as it was scanned."""
        shape, images, marked = batch.masks.shape[2:], batch.scans.target[None], None
        first = 0 if batch.there is None else first_with_anything(batch.there)
        if model is not None:
            images, logits = self.both(model, batch)
            marked = on_host(resampled(logits, shape) > 0)[0]
        shown = resampled(images[:, first : first + 1], shape)
        image, drawn = on_host(shown)[0, 0], on_host(batch.masks > 0.5)[0]
        spacing = batch.spacing[-2:] if self.scans.upright else batch.spacing
        return Illustration(slice_overlay(image, drawn, marked, spacing))
