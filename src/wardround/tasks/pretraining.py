"""Pretraining: from images without labels a network learns to say patches that it does not see (He et al., CVPR 2022).

Across sites it is SSL-FL (Yan et al., IEEE TMI 2023): the masked autoencoder is averaged as any network is, and its
encoder is what a later study starts from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.models.transformer import grid_of, image_of, patches_of
from wardround.study.images import CaseTable, ImageSettings
from wardround.study.normalise import Normalise, ZScore, check_normalise
from wardround.tasks.images import ImageTask
from wardround.tasks.masked import MaskedBatch, MaskedDataset, Masks
from wardround.tasks.overlays import coloured
from wardround.tasks.reconstruction import PooledDataset, evaluating
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study

# Of the deviation of a patch, so that one without any is no division by zero (He et al.).
_LEAST = 1e-6
ERROR = MetricSpec(
    "hidden_error",
    0.0,
    4.0,
    1e-4,
    False,
    "Error of hidden patches",
    definition="mean squared error of the patches that the network does not see, each scaled to mean 0 and deviation "
    "1, with patches that are chosen once for each image; 1 is what the mean of a patch gives",
    negligible=0.005,
)


class PretrainingTask(ImageSettings):
    """What patches of images look like that are not seen; no labels. `images` and `table` are as in a segmentation."""

    network = "build_pretrainer"

    kind: Literal["pretraining"]
    images: tuple[str, ...] = Field(("image",), min_length=1, description="as in a segmentation")
    table: CaseTable | None = Field(None, description="needed where `images` do not say whose they are")
    channels: int = Field(1, ge=1, description="channels of all files of an image together; 3 for a colour picture")
    size: tuple[int, ...] = Field((128, 128), description="voxels that images are resampled to, whole patches")
    normalise: Normalise = ZScore()
    hidden: float = Field(0.75, gt=0.0, lt=1.0, description="share of an image's patches that are not seen")

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainingTask:
        if len(self.size) != self.dimensions:
            raise ValueError(f"task.size needs {self.dimensions} numbers, as task.dimensions says")
        check_normalise(self)
        whose = any("{patient}" in one or not set(one) & set("{/") for one in self.images)
        if self.table is None and not whose:
            raise ValueError(
                "task.images: no pattern has {patient}, so images of one patient could train and test; add it, or name "
                "the CSV that says whose each image is at task.table"
            )
        return self

    def describe(self) -> str:
        """What share is hidden."""
        scaled = f", {said}" if (said := self.normalise.describe()) else ""
        return f"pretraining without labels, {self.hidden:.0%} of each image hidden{scaled}"

    def build(self, study: Study, embeddings: Any = None) -> Pretraining:
        """The task."""
        return Pretraining(study, self)


class Pretraining(ImageTask[PretrainingTask]):
    """The task of a study; see `wardround.tasks.task.Task`. Raises `StudyError` for a size of no whole patches."""

    metrics = (ERROR,)

    def __init__(self, study: Study, config: PretrainingTask) -> None:
        super().__init__(study, config)
        model: Any = study.model
        self.patch: int = model.patch_size()
        patches = math.prod(grid_of(config.size, self.patch))
        if patches < 2:
            raise StudyError(
                f"task.size: an image is one patch of {self.patch}; take larger images, or set model.patch"
            )
        self._masks = Masks(patches, min(max(1, round((1.0 - config.hidden) * patches)), patches - 1), study.seed)

    def build_model(self) -> nn.Module:
        """The network: images (B, C, *size) and places (B, V) -> patches (B, N, C patch^d)."""
        model: Any = self.study.model
        network: nn.Module = model.build_pretrainer(self.config.dimensions, self.config.channels)
        return network

    def dataset(self, site: str, source: Source) -> MaskedDataset:
        """The images of a site."""
        patients = self._patients(site, source, self.config.images, None, self.config.table)
        return MaskedDataset(patients, self.config, self.config.size, self._augmentation, self._masks, self.frame)

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, MaskedBatch.joined)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """The mean over images of `errors`. Scalar."""
        return self.errors(model(batch.images, batch.kept), batch).mean()

    def score(self, model: nn.Module, batch: MaskedBatch) -> dict[str, Tensor]:
        """The error of each image, in evaluation mode: (B,)."""
        with evaluating(model), torch.no_grad():
            return {ERROR.name: self.errors(model(batch.images, batch.kept), batch)}

    def errors(self, said: Tensor, batch: MaskedBatch) -> Tensor:
        """Mean squared error of what is said (B, N, P) of the patches that are not seen: (B,)."""
        wanted, _, _ = self._normalised(batch.images)
        hidden = wanted.new_ones(wanted.shape[:2]).scatter(1, batch.kept, 0.0)
        each = (said.float() - wanted).square().mean(dim=2)
        return (each * hidden).sum(dim=1) / (wanted.shape[1] - batch.kept.shape[1])

    def _normalised(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N, P), each with mean 0 and deviation 1, and the means and deviations, (B, N, 1)."""
        patches = patches_of(images, self.patch)
        mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True, correction=0)
        deviation = (variance + _LEAST).sqrt()
        return (patches - mean) / deviation, mean, deviation

    # What a report shows ----------------------------------------------------------------------------------------------

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """None: nothing is drawn into the images."""
        return ()

    def merit(self, rows: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """See `wardround.tasks.task.Illustrated`."""
        return -np.asarray(rows[ERROR.name])

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[MaskedBatch]:
        """See `wardround.tasks.task.Illustrated`."""
        assert isinstance(dataset, MaskedDataset)
        yield from (dataset.tested(place) for place in places)

    def illustrate(self, model: nn.Module | None, batch: MaskedBatch) -> Illustration:
        """The patient's first image with its hidden patches at their means, or as the network says them.

        Mean and deviation of a hidden patch are the true ones: the network says neither.
        """
        first = MaskedBatch(batch.images[:1], batch.kept[:1])
        wanted, mean, deviation = self._normalised(first.images)
        said = torch.zeros_like(wanted)
        caption = "what the network sees"
        if model is not None:
            with evaluating(model), torch.no_grad():
                said = model(first.images, first.kept).float()
            caption = f"error {float(on_host(self.errors(said, first))[0]):.2f}"
        seen = torch.zeros_like(mean).scatter(1, first.kept[..., None], 1.0)
        shown = (seen * wanted + (1.0 - seen) * said) * deviation + mean
        image = on_host(image_of(shown, grid_of(self.config.size, self.patch), self.patch)[0])
        return Illustration(coloured(image[..., image.shape[-1] // 2] if image.ndim == 4 else image), caption)
