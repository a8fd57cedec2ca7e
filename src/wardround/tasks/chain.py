"""The chain from raw data to the diagnosis: undersampled k-space -> image -> outlines, by two networks.

The k-space is simulated from magnitude images (a simulated acquisition of real anatomy). Every channel of a slice is
scanned with its patient's sampling mask and reconstructed by the same network; the second network sees the magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.mri.scanner import MRIScanner
from wardround.imaging.acquisition.solvers import zero_filled
from wardround.imaging.orientation import Turn
from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.models.build import build_model
from wardround.models.outliner import build_outliner
from wardround.study.acquisition import MRIAcquisition
from wardround.study.base import Config
from wardround.study.baselines import Baseline
from wardround.study.images import DrawnSettings, OverlapLoss
from wardround.study.models import ModelSettings
from wardround.study.registry import BASELINES, MODELS, Reading, baseline, builtin, builtins, read
from wardround.study.tasks import ClassicalSettings, Loss
from wardround.tasks.augmentation import SPATIAL, standard
from wardround.tasks.chained import ChainBatch, ChainDataset, magnitude, parts_of, scanned
from wardround.tasks.classical import ClassicalMethods
from wardround.tasks.images import CONTENT, ImageTask, peaks_of, resampled, scaled
from wardround.tasks.labelled import LabelledDataset, Sampling, check_image, check_magnitudes, whole_image
from wardround.tasks.losses import build_loss
from wardround.tasks.metrics import RECONSTRUCTION_METRICS, SSIM_WINDOW, reconstruction_scores
from wardround.tasks.mri import MRIBatch, require_estimated_maps, require_phase_for
from wardround.tasks.overlap import overlap_metrics, overlap_scores
from wardround.tasks.overlays import OUTLINES, slice_overlay
from wardround.tasks.predictions import Masks
from wardround.tasks.reconstruction import PooledDataset, evaluating
from wardround.tasks.segmentation import as_one, overlap_loss
from wardround.tasks.stages import weighted_sum
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source, Window
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study

RECONSTRUCTION, DIAGNOSIS = "reconstruction", "diagnosis"
# Slices that go through both networks at once in evaluation.
_TOGETHER = 8
# PSNR and SSIM are of slices with at least this share of head: an empty slice is easy.
_LEAST_HEAD = 0.05
# A deviation below it is that of a slice of noise, which must not be blown up to look like anatomy.
_LEAST_DEVIATION = 0.02


class ChainLosses(Config):
    """The losses of both stages; `schedule.phases` says with which weights they count in which rounds."""

    reconstruction: Loss = Loss()
    diagnosis: OverlapLoss = OverlapLoss()


def _segmenter(value: Any, info: ValidationInfo) -> Any:
    """The section of the second network; one of the package's own, as `model` is not its place."""
    if isinstance(value, Mapping) and "kind" not in value:
        value = {"kind": MODELS["segmentation"], **value}
    found: Any = read("model", value, info)
    unread = isinstance(info.context, Reading) and "model" in info.context.unread
    if not unread and (found.closed or not hasattr(found, "build_network")):
        kinds = [
            kind for settings in builtins("model") if hasattr(settings, "build_network") for kind in settings.kinds()
        ]
        raise ValueError(f"{found.kind} outlines nothing; take {', '.join(kinds)}")
    return found


def _default_segmenter() -> ModelSettings:
    kind = MODELS["segmentation"]
    found: Any = builtin("model", kind).model_validate({"kind": kind})
    settings: ModelSettings = found
    return settings


class ChainTask(DrawnSettings):
    """From undersampled k-space over an image to outlines of structures; two stages, `reconstruction` and `diagnosis`.

    `model` is the network of the reconstruction.
    """

    scanner = "needed"
    network = "build"

    kind: Literal["chain"]
    dimensions: Literal[2] = 2
    augment: Literal["standard", "none"] | tuple[dict[str, Any], ...] = Field(
        "standard",
        description="changes of an image and its mask before its scan: flips and, of square images, quarter turns; or "
        "a list of MONAI's random dictionary transforms that move voxels",
    )
    size: tuple[int, int] = Field(
        (128, 128), description="rows and columns of a slice; images of another size are resampled before their scan"
    )
    segmenter: Annotated[SerializeAsAny[ModelSettings], BeforeValidator(_segmenter)] = Field(
        default_factory=_default_segmenter,
        description="the network that outlines structures in reconstructed images, one of those for segmentation",
    )
    seen: Literal["reconstruction", "zero_filled", "full"] = Field(
        "reconstruction",
        description="what the segmenter sees; for comparison, zero-filled images or the images that were scanned, and "
        "then `diagnosis` is the only stage",
    )
    losses: ChainLosses = ChainLosses()
    evaluation: ClassicalSettings = Field(
        ClassicalSettings(),
        description="the classical methods that the images are compared with, by default `zero_filled` alone; of their "
        "images there are no outlines",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ChainTask:
        if min(self.size) < SSIM_WINDOW:
            raise ValueError(f"task.size: slices must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, one of SSIM")
        for step in self.augment if isinstance(self.augment, tuple) else ():
            if step.get("name") not in SPATIAL:
                raise ValueError(
                    f"task.augment: {step.get('name')!r} does not only move voxels, and what is scanned must stay an "
                    f"image of a patient; take {', '.join(SPATIAL)}"
                )
        return self

    @property
    def compares_with(self) -> tuple[str, ...]:
        """Nothing without a first stage."""
        if self.seen != "reconstruction":
            return ()
        return ("zero_filled",) if self.evaluation.baselines is None else self.evaluation.baselines

    @property
    def classical(self) -> ClassicalSettings:
        """Its evaluation."""
        return self.evaluation

    def describe(self) -> str:
        """From what to what."""
        seen = {"reconstruction": "image", "zero_filled": "zero-filled image", "full": "image without undersampling"}
        return (
            f"chain: simulated k-space of {', '.join(self.images)} -> {seen[self.seen]} of {self.size[0]} x "
            f"{self.size[1]} pixels -> outlines of {', '.join(self.structures)} by {self.segmenter.describe()}; losses "
            f"{self.losses.reconstruction.kind} and Dice with cross-entropy"
        )

    def build(self, study: Study, embeddings: Any = None) -> Chain:
        """The task."""
        return Chain(study, self)


class ChainNetwork(nn.Module):
    """Scans of C channels of B slices -> magnitudes (B, C, H, W) and logits (B, K, H, W).

    Without a reconstruction, the second network sees zero-filled images, or with `full` those that were scanned.
    """

    def __init__(self, reconstruction: nn.Module | None, diagnosis: nn.Module, *, full: bool = False) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.diagnosis = diagnosis
        self._full = full

    def forward(self, scans: MRIBatch, channels: int) -> tuple[Tensor, Tensor]:
        """`scans` are of B * C images, the channels of a slice one after the other."""
        images = self.images(scans).reshape(-1, channels, *scans.target.shape[1:])
        return images, self.outlines(images)

    def images(self, scans: MRIBatch) -> Tensor:
        """The first stage alone: magnitudes (B * C, H, W)."""
        if self._full:
            return scans.target
        if self.reconstruction is None:
            return _zero_filled(scans)
        image: Tensor = self.reconstruction(scans.operator, scans.kspace)
        return image.abs()

    def outlines(self, images: Tensor) -> Tensor:
        """The second stage alone: logits (B, K, H, W) of magnitudes (B, C, H, W)."""
        logits: Tensor = self.diagnosis(standardised(images))
        return logits


class Chain(ImageTask[ChainTask]):
    """The task of a study; see `wardround.tasks.task.Staged` and `Imaging`. Raises `StudyError` for scans of CT."""

    def __init__(self, study: Study, config: ChainTask) -> None:
        super().__init__(study, config)
        if study.modality != "mri":
            raise StudyError(
                "task.kind: chain scans MRI, and the study's acquisition is CT; set `acquisition: {kind: mri}`"
            )
        if study.model.real_images and config.seen == "reconstruction":
            require_estimated_maps(study, "model.image: real")
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

    @property
    def structures(self) -> tuple[str, ...]:
        """What is outlined, in the order of channels."""
        return tuple(self.config.structures)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Dice first: it selects the released round. The images' come last."""
        unit = "mm" if self.config.distances == "mm" else "px"
        return (*overlap_metrics(self.structures, unit), *RECONSTRUCTION_METRICS)

    def build_model(self) -> nn.Module:
        """Both networks, initialised from torch's global generator."""
        config = self.config
        first = build_model(self.study.model, "mri") if config.seen == "reconstruction" else None
        second = build_outliner(config.segmenter, 2, config.channels, len(self.structures))
        _check_size(second, config.channels, config.size)
        return ChainNetwork(first, second, full=config.seen == "full")

    def dataset(self, site: str, source: Source) -> ChainDataset:
        """The images and masks of a site, with its simulated scanner."""
        config, acquisition = self.config, self.study.acquisition_of(site)
        assert isinstance(acquisition, MRIAcquisition)
        drawn = LabelledDataset(
            self._patients(site, source, config.images, config.mask, config.table),
            config.values,
            config.drawn_at(site),
            self._sampling,
            self._augmentation,
            physical=config.distances == "mm",
            magnitudes=True,
        )
        return ChainDataset(drawn, MRIScanner(site, acquisition, self.study.seed))

    @property
    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(config.channels, 2, config.size, config.size, None, 1, config.empty_every, 0.0)

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, ChainBatch.joined)

    # Losses ----------------------------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: ChainBatch) -> dict[str, Tensor]:
        """Of the images against those that were scanned, and of the outlines against the drawn ones."""
        images, logits = model(batch.scans, batch.channels)
        overlap, scans = self.config.losses.diagnosis, batch.scans
        found = {
            RECONSTRUCTION: self._image_loss(images.flatten(0, 1), scans.target, scans.head),
            DIAGNOSIS: overlap_loss(logits.float(), batch.masks, batch.known, overlap.dice, overlap.cross_entropy),
        }
        return {stage: found[stage] for stage in self.stages}

    def loss(self, model: nn.Module, batch: ChainBatch) -> Tensor:
        """Their sum, without weights: see `schedule.phases`."""
        return weighted_sum(self.losses(model, batch))

    # What is measured ------------------------------------------------------------------------------------------------

    def score(self, model: nn.Module, batch: ChainBatch) -> dict[str, Tensor]:
        """All metrics of one whole image: name -> (1,)."""
        with evaluating(model), torch.no_grad():
            parts = [model(scans, batch.channels) for scans in parts_of(batch.scans, batch.channels, _TOGETHER)]
        images, logits = (torch.cat(each) for each in zip(*parts, strict=True))
        marked = as_one(resampled(logits.float(), batch.masks.shape[2:]) > 0)
        return self._overlap(marked, batch) | _image_scores(images.flatten(0, 1), batch.scans)

    def _overlap(self, marked: Tensor, batch: ChainBatch) -> dict[str, Tensor]:
        known = [bool(each) for each in on_host(batch.known[0]) > 0.5]
        return overlap_scores(marked, as_one(batch.masks > 0.5), known, self.structures, batch.spacing)

    # A clinic's images and raw data ----------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`."""
        return self._patterns(self.config.images, self.config.table)

    def input_shape(self) -> tuple[int, ...]:
        """See `wardround.tasks.task.Predicts`: what the second network sees."""
        return (self.config.channels, *self.config.size)

    def scanned_by(self, site: str | None) -> Chain:
        """See `wardround.tasks.task.PredictsScans`."""
        made = copy(self)
        made._scanner = site
        return made

    def scanning(self) -> MRIAcquisition:
        """See `wardround.tasks.task.PredictsScans`."""
        found = self.study.acquisition if self._scanner is None else self.study.acquisition_of(self._scanner)
        assert isinstance(found, MRIAcquisition)
        return found

    def predict(self, model: nn.Module, image: LabelledImage) -> Masks:
        """What the chain outlines in simulated scans of an image, each channel scanned as in evaluation.

        Raises DataError for an image that is not of the study's channels, or of which no scan can be simulated.
        """
        check_image(image, self._sampling, "")
        check_magnitudes(image, "")
        peaks = image.channels.reshape(len(image.channels), -1).max(axis=1).astype(np.float32)
        channels = whole_image(image, scaled(image.channels, peaks_of(image.channels)), self._sampling)
        scanner = MRIScanner("", self.scanning(), self.study.seed)
        scans = [
            scanned(scanner, magnitude(channel), 0, scanner.random(0, part, number))
            for part, of_slice in enumerate(channels)
            for number, channel in enumerate(of_slice)
        ]
        shape = image.channels.shape[1:]
        found = self._outlined(model, MRIBatch.joined(scans), len(peaks), shape[:2], volume=len(shape) == 3)
        assert found.images is not None
        return replace(found, images=found.images * peaks.reshape(-1, *[1] * len(shape)))

    def predict_scans(self, model: nn.Module, scans: MRIBatch) -> Masks:
        """See `wardround.tasks.task.PredictsScans`. Raises DataError for a chain that does not see one scan a slice."""
        if self.config.channels != 1 or self.config.seen == "full":
            raise DataError(
                f"this model outlines {self.config.channels} images of a slice"
                + (" that were not undersampled" if self.config.seen == "full" else "")
                + ", and raw data are of one; give it images"
            )
        return self._outlined(model, scans, 1, scans.kspace.shape[-2:], volume=True)

    def _outlined(
        self, model: nn.Module, scans: MRIBatch, channels: int, grid: Sequence[int], *, volume: bool
    ) -> Masks:
        """Outlines and images of all slices on a grid, by a second network that sees images of the study's size."""
        assert isinstance(model, ChainNetwork)
        images, marked = [], []
        for part in parts_of(scans, channels, _TOGETHER):
            with evaluating(model), torch.no_grad():
                found = model.images(part).reshape(-1, channels, *part.kspace.shape[-2:])
                logits = model.outlines(resampled(found, self.config.size))
            images.append(on_host(resampled(found, grid)))
            marked.append(on_host(resampled(logits.float(), grid) > 0))
        whole, drawn = (np.concatenate(each) for each in (images, marked))
        whole, drawn = (np.moveaxis(each, 0, -1) if volume else each[0] for each in (whole, drawn))
        return Masks(self.structures, np.ascontiguousarray(drawn).astype(bool), np.ascontiguousarray(whole, np.float32))

    # Pictures and what learns nothing --------------------------------------------------------------------------------

    @property
    def windows(self) -> tuple[Window, ...]:
        """None: a magnitude image has its own range."""
        return ()

    def reconstruct(self, model: nn.Module, batch: ChainBatch) -> Tensor:
        """Magnitudes (B * C, H, W) of the first stage."""
        assert isinstance(model, ChainNetwork)
        with evaluating(model), torch.no_grad():
            return model.images(batch.scans)

    def reference(self, batch: ChainBatch) -> Tensor:
        """The images that were scanned: (B * C, H, W)."""
        return batch.scans.target

    def score_images(self, images: Tensor, batch: ChainBatch) -> dict[str, Tensor]:
        """Metrics of images alone: name -> (1,). There are no outlines of them, so these have no value."""
        absent = torch.full((1,), torch.nan, dtype=torch.float64)
        return {spec.name: absent for spec in self.metrics} | _image_scores(images, batch.scans)

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """See `wardround.tasks.task.Compared`; raises `StudyError` where coil maps do not carry a phase it needs."""
        self._classical.add(baselines)
        require_phase_for(self.study, baselines)

    def baseline_parameters(self, name: str) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; (None,) where there is nothing to choose."""
        return self._classical.parameters(name)

    def baseline(self, name: str, parameter: float | None, batch: ChainBatch) -> Tensor:
        """Magnitudes (B * C, H, W) of a method that learns nothing; `parameter` is its weight, if any."""
        method = self._classical.method(name, parameter)
        return torch.cat([method(s.operator, s.kspace).abs() for s in parts_of(batch.scans, batch.channels, _TOGETHER)])

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
        """Outlines in the first channel as the first stage reconstructed it; without a network as it was scanned."""
        shape, images, marked = batch.masks.shape[2:], batch.scans.target[None], None
        if model is not None:
            with evaluating(model), torch.no_grad():
                images, logits = model(batch.scans, batch.channels)
            marked = on_host(resampled(logits.float(), shape) > 0)[0]
        image, drawn = on_host(resampled(images[:, :1], shape))[0, 0], on_host(batch.masks > 0.5)[0]
        return Illustration(slice_overlay(image, drawn, marked, batch.spacing))


def _check_size(network: nn.Module, channels: int, size: tuple[int, int]) -> None:
    """Raise `StudyError` where a network does not take images of a size."""
    try:
        with evaluating(network), torch.no_grad():
            network(torch.zeros(1, channels, *size))
    except RuntimeError as error:
        raise StudyError(
            f"task.size: the network of task.segmenter halves images several times and does not take {size[0]} x "
            f"{size[1]} pixels; multiples of 32 fit all of them",
            detail=str(error),
        ) from error


def _zero_filled(scans: MRIBatch) -> Tensor:
    return zero_filled(scans.operator, scans.kspace).abs()


def standardised(images: Tensor) -> Tensor:
    """Images (..., H, W) minus their mean, over their deviation, each of what it shows.

    So outlines do not depend on the scale of the k-space. The two numbers are taken as they are: no gradient flows
    through them.
    """
    shown = images.detach()
    inside = (shown > CONTENT * shown.amax((-2, -1), keepdim=True)).to(images.dtype)
    count = inside.sum((-2, -1), keepdim=True).clamp_min(1.0)
    mean = (shown * inside).sum((-2, -1), keepdim=True) / count
    variance = ((shown - mean).square() * inside).sum((-2, -1), keepdim=True) / count
    return (images - mean) / variance.sqrt().clamp_min(_LEAST_DEVIATION)


def _image_scores(images: Tensor, scans: MRIBatch) -> dict[str, Tensor]:
    """Means over the slices that show enough of a head, or over all: name -> (1,)."""
    counted = (scans.head.mean((-2, -1)) >= _LEAST_HEAD).to(images.dtype)
    weights = torch.where(counted.sum() > 0, counted, torch.ones_like(counted))
    scores = reconstruction_scores(images, scans.target, scans.head)
    return {name: ((values * weights).sum() / weights.sum())[None] for name, values in scores.items()}
