"""Segmentation: outlines of structures (a tumour, vessels) in images of a site, 2-D or 3-D.

A structure is a channel of its own, so that structures may overlap, and a site that does not draw one takes no part in
its loss (partial labels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.models.outliner import build_outliner
from wardround.study.images import DrawnSettings, DropShare, OverlapLoss, UsedLabels, each_a_channel
from wardround.study.normalise import Normalise, ZScore, check_normalise
from wardround.study.teacher import TaughtBy
from wardround.tasks import confidence
from wardround.tasks.contrasts import first_with_anything
from wardround.tasks.distillation import (
    Distillation,
    Lesson,
    Said,
    Teacher,
    channels_of,
    check_scale,
    grid_scale,
    order_of,
    unfit_kind,
)
from wardround.tasks.images import ImageTask, resampled, scaled
from wardround.tasks.labelled import LabelledBatch, LabelledDataset, Sampling, check_image, whole_image
from wardround.tasks.overlap import overlap_metrics, overlap_scores
from wardround.tasks.overlays import OUTLINES, fullest, slice_overlay
from wardround.tasks.predictions import Masks
from wardround.tasks.reconstruction import PooledDataset, evaluating
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study

_WINDOWS = 16
_OVERLAP = 0.25


class SegmentationTask(DrawnSettings):
    """Outlines of structures in images, 2-D or 3-D."""

    network = "build_network"
    spectral = True

    kind: Literal["segmentation"]
    patch: tuple[int, ...] = Field((128, 128), description="voxels of an example, and of a window in evaluation")
    resize: tuple[int, int] | None = Field(None, description="2-D: rows and columns that images are resampled to")
    spacing: tuple[float, ...] | None = Field(None, description="mm that images are resampled to, along each axis")
    patches_per_image: int = Field(1, ge=1, description="examples of a volume (3-D) or picture")
    foreground: float = Field(0.5, ge=0.0, le=1.0, description="share of patches around a voxel of a structure")
    loss: OverlapLoss = OverlapLoss()
    normalise: Normalise = ZScore()
    labels: UsedLabels = UsedLabels()
    drop_contrasts: DropShare = 0.0
    teacher: TaughtBy | None = Field(
        None,
        description="a released model of a segmentation or prompted segmentation that teaches the network; where "
        "`labels.share` is below 1, it teaches all other training patients alone",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SegmentationTask:
        if len(self.patch) != self.dimensions:
            raise ValueError(f"task.patch needs {self.dimensions} numbers, as task.dimensions says")
        if self.resize is not None and (self.dimensions == 3 or self.spacing is not None):
            raise ValueError("task.resize is for 2-D, and not with task.spacing")
        if self.spacing is not None and (len(self.spacing) != self.dimensions or min(self.spacing) <= 0):
            raise ValueError(f"task.spacing needs {self.dimensions} positive numbers, as task.dimensions says")
        check_normalise(self)
        return self

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The files of an image, where each is a channel."""
        return each_a_channel(self.images, self.channels)

    def describe(self) -> str:
        """What is outlined, in how many dimensions."""
        taught = "" if self.teacher is None else f", taught by {self.teacher.describe()}"
        scaled = f", {said}" if (said := self.normalise.describe()) else ""
        what = f"segmentation of {', '.join(self.structures)} in {self.dimensions}-D"
        return f"{what}{self.labels.describe()}{scaled}{taught}"

    def build(self, study: Study, embeddings: Any = None) -> Segmentation:
        """The task."""
        return Segmentation(study, self)


class Segmentation(ImageTask[SegmentationTask]):
    """The task of a study; see `wardround.tasks.task.Task`."""

    def __init__(self, study: Study, config: SegmentationTask) -> None:
        super().__init__(study, config)
        self._distillation = Distillation(config)

    def learn_from(self, teacher: Callable[[], Teacher]) -> None:
        """See `wardround.tasks.distillation.Student`."""
        self._distillation = Distillation(self.config, teacher, repeats=self.config.augment in ("none", ()))

    def check_teacher(self) -> None:
        """See `wardround.tasks.distillation.Student`."""
        _ = self._distillation.lesson

    def lesson_for(self, student: Any) -> Lesson:
        """See `wardround.tasks.distillation.Teaches`. Another segmentation, of structures among its own."""
        own = self.config
        if not isinstance(student, SegmentationTask):
            raise unfit_kind(student, own)
        check_scale(student, own)
        order = order_of(tuple(student.structures), self.structures, "task.structures")
        return OutlineLesson(self, channels_of(student, own), grid_scale(student, own), order)

    @property
    def structures(self) -> tuple[str, ...]:
        """What is outlined, in the order of channels."""
        return tuple(self.config.structures)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Dice first: it selects the released round."""
        return overlap_metrics(self.structures, "mm" if self.config.distances == "mm" else "px")

    def build_model(self) -> nn.Module:
        """The network: images (B, C, *shape) -> logits (B, K, *shape)."""
        self.study.model.check_size(self.config.patch)
        config = self.config
        network = build_outliner(self.study.model, config.dimensions, config.channels, len(self.structures))
        return self._with_spectrum(network, config.channels, config.patch)

    def dataset(self, site: str, source: Source) -> LabelledDataset:
        """The images and masks of a site."""
        config = self.config
        return LabelledDataset(
            self._patients(site, source, config.images, config.mask, config.table, config.labels),
            config.values,
            config.drawn_at(site),
            self._sampling,
            self._augmentation,
            physical=config.distances == "mm",
            frame=self.frame,
            drop=config.drop_contrasts,
        )

    @property
    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(
            config.channels,
            config.dimensions,
            config.patch,
            config.resize,
            config.spacing,
            config.patches_per_image,
            config.empty_every,
            config.foreground,
        )

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, LabelledBatch.joined)

    def loss(self, model: nn.Module, batch: LabelledBatch) -> Tensor:
        """Weighted sum of soft Dice and cross-entropy of what the site draws; scalar.

        With a teacher see `wardround.tasks.distillation.Distillation.loss`.
        """
        logits, weights = model(batch.images).float(), self.config.loss
        own = overlap_loss(logits, batch.masks, batch.known, weights.dice, weights.cross_entropy)
        return self._distillation.loss(own, logits, batch.images, batch.masks, exclusive=False)

    def logits(self, model: nn.Module, batch: LabelledBatch) -> Tensor:
        """Logits (B, K, *shape of the masks) by windows of the size of a patch, in evaluation mode."""
        return self.outlined(model, batch.images, batch.masks.shape[2:])

    def said(self, model: nn.Module, batch: LabelledBatch) -> confidence.Said:
        """See `wardround.tasks.confidence.Confident`: each voxel of each structure."""
        known = batch.known.reshape(*batch.known.shape, *[1] * (batch.masks.ndim - 2)) > 0.5
        truth = torch.where(known, batch.masks, torch.nan)
        return confidence.Said(torch.sigmoid(self.logits(model, batch)), truth, exclusive=False)

    def outlined(self, model: nn.Module, images: Tensor, shape: Sequence[int]) -> Tensor:
        """The same of images (B, C, *grid), on the grid `shape`."""
        # Late: MONAI takes seconds to import, and a process that only reads the study needs none of it.
        from monai.inferers import sliding_window_inference

        weights = self._weights.to(images.device)
        with evaluating(model), torch.no_grad():
            found: Any = sliding_window_inference(
                images, self.config.patch, _WINDOWS, model, overlap=_OVERLAP, roi_weight_map=weights
            )
        return resampled(found.float(), shape)

    @cached_property
    def _weights(self) -> Tensor:
        """Of the voxels of a window. Made on the CPU: torch's device for tests has no numbers."""
        from monai.data.utils import compute_importance_map

        weights: Tensor = compute_importance_map(self.config.patch, mode="gaussian")
        return weights

    def score(self, model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
        """All metrics of one whole image: name -> (1,)."""
        marked, drawn = as_one(self.logits(model, batch) > 0), as_one(batch.masks > 0.5)
        known = [bool(each) for each in on_host(batch.known[0]) > 0.5]
        # A volume of one slice is a picture.
        return overlap_scores(marked, drawn, known, self.structures, batch.spacing[1 - marked.ndim :])

    # What a report shows ----------------------------------------------------------------------------------------------

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """The colours of outlines."""
        return OUTLINES

    def merit(self, rows: Mapping[str, Any]) -> Any:
        """The Dice of each patient."""
        return rows[self.metrics[0].name]

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[LabelledBatch]:
        """See `wardround.tasks.task.Illustrated`; of a patient with several images the first."""
        assert isinstance(dataset, LabelledDataset)
        yield from (dataset.tested(place) for place in places)

    def illustrate(self, model: nn.Module | None, batch: LabelledBatch) -> Illustration:
        """Outlines in the first channel that is there; of a volume, in the slice that shows most of what is drawn."""
        volume, at, first = len(batch.spacing) == 3, None, first_with_anything(batch.images)
        if volume:
            drawn = on_host(batch.masks) > 0.5
            at = fullest(np.moveaxis(drawn, 0, -1) if self.config.dimensions == 2 else drawn[0])
        if at is not None and self.config.dimensions == 2:
            # The network sees the one slice that is shown.
            batch = replace(batch, **{n: getattr(batch, n)[at : at + 1] for n in ("images", "masks", "known")})
            at = None

        def shown(part: Tensor) -> Any:
            whole = on_host(part[0])
            return whole if at is None else whole[..., at]

        return Illustration(
            slice_overlay(
                shown(resampled(batch.images[:, first : first + 1], batch.masks.shape[2:]))[0],
                shown(batch.masks > 0.5),
                None if model is None else shown(self.logits(model, batch) > 0),
                batch.spacing if self.config.dimensions == 2 else (batch.spacing[2], *batch.spacing[:2]),
            )
        )

    # A clinic's images -----------------------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`."""
        return self._patterns(self.config.images, self.config.table)

    def input_shape(self) -> tuple[int, ...]:
        """See `wardround.tasks.task.Predicts`: a window's."""
        return (self.config.channels, *self.config.patch)

    def predict(self, model: nn.Module, image: LabelledImage) -> Masks:
        """What the network outlines in an image, on the image's grid, where it is likelier than not.

        Raises DataError for an image that the network cannot see.
        """
        check_image(image, self._sampling, "")
        shape = image.channels.shape[1:]
        channels = whole_image(image, scaled(image.channels, self.frame.scales(image.channels)), self._sampling)
        logits = self.outlined(model, channels, shape[: self.config.dimensions])
        slices = self.config.dimensions == 2 and len(shape) == 3
        marked = (logits > 0).permute(1, 2, 3, 0) if slices else (logits > 0)[0]
        return Masks(self.structures, on_host(marked.contiguous()).astype(bool))


@dataclass(frozen=True, eq=False)
class OutlineLesson:
    """How a segmentation teaches another: its channels, on a grid `scale` times as fine, and where it has a structure.

    It looks at an example as it looks at any image: by windows of the size of its own patch.
    """

    task: Segmentation
    channels: Sequence[int]
    scale: Sequence[float]
    order: Sequence[int]

    def says(self, network: nn.Module, images: Tensor, masks: Tensor | None) -> Said:
        """See `wardround.tasks.distillation.Lesson`."""
        shape = images.shape[2:]
        grid = [max(1, round(size * scale)) for size, scale in zip(shape, self.scale, strict=True)]
        logits = self.task.outlined(network, resampled(images[:, self.channels], grid), shape)[:, self.order]
        return Said(logits, logits.new_ones(logits.shape[:2]))


def as_one(masks: Tensor) -> Tensor:
    """A batch's masks (B, K, *shape) as one image's (K, *whole): slices of a volume become its first axis."""
    return masks[0] if len(masks) == 1 else masks.transpose(0, 1)


def overlap_loss(
    logits: Tensor, masks: Tensor, known: Tensor, dice: float, cross_entropy: float, smooth: float = 1.0
) -> Tensor:
    """dice * (1 - soft Dice) + cross_entropy * binary cross-entropy, mean over the structures that are drawn; scalar.

    logits, masks: (B, K, *shape); known: (B, K). The Dice of a structure is over the whole batch, as V-Net's
    (Milletari et al., 3DV 2016) without squares: (2 sum pg + s) / (sum p + sum g + s).
    """
    space = tuple(range(2, logits.ndim))
    weight = known.reshape(*known.shape, *[1] * len(space))
    p, g = torch.sigmoid(logits) * weight, masks * weight
    sums = (0, *space)
    soft = (2.0 * (p * g).sum(sums) + smooth) / (p.sum(sums) + g.sum(sums) + smooth)
    drawn = (known.amax(dim=0) > 0).to(logits.dtype)
    count = drawn.sum().clamp_min(1.0)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(space)
    each = (entropy * known).sum(0) / known.sum(0).clamp_min(1.0)
    return dice * ((1.0 - soft) * drawn).sum() / count + cross_entropy * (each * drawn).sum() / count
