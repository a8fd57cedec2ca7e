"""Prompted segmentation: a network such as Segment Anything outlines what a box or a point marks in a picture or slice.

Boxes and points are drawn from the true masks, a box with stated jitter: a clinic's reader marks a lesion roughly, and
the network outlines it. A patient is measured by the slices that are prompted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.images import DrawnSettings, OverlapLoss
from wardround.study.prompts import AutomaticPrompt, BoxPrompt, PointPrompt, Prompt
from wardround.tasks.distillation import Lesson, Said, channels_of, check_scale, order_of, unfit_kind
from wardround.tasks.images import ImageTask
from wardround.tasks.labelled import Sampling, check_image, masks_of
from wardround.tasks.overlap import hd95, overlap_metrics, overlap_scores
from wardround.tasks.overlays import OUTLINES, fullest, slice_overlay
from wardround.tasks.predictions import Masks as Found
from wardround.tasks.prompts import (
    CORNERS,
    PromptedBatch,
    PromptedDataset,
    Prompting,
    box_of,
    check_size,
    prompt_of,
    restored,
    scale_of,
    seen,
    squared,
    unit,
)
from wardround.tasks.reconstruction import PooledDataset, evaluating
from wardround.tasks.segmentation import overlap_loss
from wardround.tasks.task import Dataset, Illustration, MetricSpec, Source
from wardround.wire.host import on_host
from wardround.wire.random import public_generator

if TYPE_CHECKING:
    from wardround.study.schema import Study

# What is compared and learned nothing; in the order of reports.
ZERO_SHOT, FILLED = "zero_shot", "filled_prompt"
# As many prompts pass the decoder at once.
_TOGETHER = 8


class PromptedTask(DrawnSettings):
    """Outlines of what prompts mark in pictures and slices."""

    network = "build_prompted"

    kind: Literal["prompted_segmentation"]
    dimensions: Literal[2] = 2
    augment: Literal["standard", "none"] | tuple[dict[str, Any], ...] = Field(
        "none",
        description="as in a segmentation; `none` lets what a frozen encoder gives of an image be computed once",
    )
    prompt: Prompt = BoxPrompt()
    slices: int | None = Field(
        None, ge=1, description="of a volume: at most this number of those that show a structure, evenly spread"
    )
    least: int = Field(20, ge=1, description="pixels of a structure from which on a slice of it is prompted")
    enlarge: bool = Field(False, description="whether images smaller than the network's are enlarged; else an error")
    loss: OverlapLoss = OverlapLoss()

    @property
    def compares_with(self) -> tuple[str, ...]:
        """The model as the study starts it, and for boxes the box itself as the outline.

        Nothing where a localiser finds the boxes: before it learned there are none.
        """
        if isinstance(self.prompt, AutomaticPrompt):
            return ()
        return (ZERO_SHOT, FILLED) if isinstance(self.prompt, BoxPrompt) else (ZERO_SHOT,)

    def describe(self) -> str:
        """What is outlined, and by which prompt."""
        return f"segmentation of {', '.join(self.structures)}, prompted by {self.prompt.describe()}"

    def build(self, study: Study, embeddings: Any = None) -> PromptedSegmentation:
        """The task."""
        if isinstance(self.prompt, AutomaticPrompt):
            # Late: its localiser is MONAI's, which takes seconds to import.
            from wardround.tasks.located import LocatedSegmentation

            return LocatedSegmentation(study, self)
        return PromptedSegmentation(study, self)


class PromptedSegmentation(ImageTask[PromptedTask]):
    """The task of a study; see `wardround.tasks.task.Task`."""

    def __init__(self, study: Study, config: PromptedTask) -> None:
        super().__init__(study, config)
        model: Any = study.model
        self._prompting = Prompting(
            config.prompt, model.size, config.channels, config.slices, config.least, config.enlarge, study.seed
        )

    @property
    def structures(self) -> tuple[str, ...]:
        """What is outlined, in the order of channels."""
        return tuple(self.config.structures)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Dice with the study's prompts first: it selects the released round. Last that with the exact box."""
        plain = overlap_metrics(self.structures, "mm" if self.config.distances == "mm" else "px")
        # A mask's prompt is never where there is no structure.
        kept = [_of_slices(spec) for spec in plain if not spec.name.startswith("false_alarm")]
        oracle = MetricSpec(
            "oracle_dice", 0.0, 1.0, 1e-4, True, "Dice with an oracle box", "", 0.005,
            "the same with the box of the true mask itself as the prompt: a bound, for no reader draws that box",
            may_be_absent=True,
        )  # fmt: skip
        return (*kept, oracle)

    @property
    def repeats(self) -> bool:
        """See `wardround.tasks.task.Repeating`."""
        return self.config.augment in ("none", ())

    def build_model(self) -> nn.Module:
        """The network: images (B, C, S, S), points (B, K, P, 2) and what they mean -> logits (B, K, S, S)."""
        settings: Any = self.study.model
        network: nn.Module = settings.build_prompted(self.config.dimensions, self.config.channels)
        return network

    def dataset(self, site: str, source: Source) -> PromptedDataset:
        """The images and masks of a site."""
        config = self.config
        return PromptedDataset(
            self._patients(site, source, config.images, config.mask, config.table),
            config.values,
            config.drawn_at(site),
            self._prompting,
            self._augmentation,
            physical=config.distances == "mm",
        )

    def pooled(self, parts: Sequence[Dataset]) -> PooledDataset[Any]:
        """The union of several sites' data sets."""
        return PooledDataset(parts, PromptedBatch.joined)

    def lesson_for(self, student: Any) -> Lesson:
        """See `wardround.tasks.distillation.Teaches`. A segmentation without prompts, of structures among its own."""
        own = self.config
        if getattr(student, "kind", "") != "segmentation":
            raise unfit_kind(student, own)
        check_scale(student, own)
        if student.labels.share < 1.0:
            raise StudyError(
                "task.labels.share: the study's teacher outlines what a box marks, and a patient without a mask has "
                "none; set it to 1, or choose a teacher of task.kind segmentation"
            )
        order_of(tuple(student.structures), self.structures, "task.structures")
        return PromptedLesson(self._prompting, channels_of(student, own))

    def loss(self, model: nn.Module, batch: PromptedBatch) -> Tensor:
        """Weighted sum of soft Dice and cross-entropy of what is prompted, on the network's grid; scalar."""
        logits = model(batch.images, batch.points, self._prompting.means).float()
        weights = self.config.loss
        return overlap_loss(logits, batch.masks, batch.known * batch.prompted, weights.dice, weights.cross_entropy)

    def marked(self, model: nn.Module, batch: PromptedBatch) -> Tensor:
        """What the network outlines, bool (B, K, *shape of the masks), by the study's prompts."""
        return self._prompted(model, batch, batch.points, self._prompting.means)

    def _prompted(self, model: nn.Module, batch: PromptedBatch, points: Tensor, means: Sequence[int]) -> Tensor:
        found = self.logits(model, batch.images, points, means, shape_of(batch)) > 0
        return found & (batch.prompted[..., None, None] > 0.5)

    @staticmethod
    def logits(
        model: nn.Module, images: Tensor, points: Tensor, means: Sequence[int], shape: tuple[int, int]
    ) -> Tensor:
        """Logits (B, K, *shape) by prompts (B, K, P, 2), in evaluation mode and without gradients."""
        with evaluating(model), torch.no_grad():
            starts = range(0, len(images), _TOGETHER)
            parts = ((images[at : at + _TOGETHER], points[at : at + _TOGETHER]) for at in starts)
            found = torch.cat([model(image, point, means).float() for image, point in parts])
        return restored(found, shape)

    def score(self, model: nn.Module, batch: PromptedBatch) -> dict[str, Tensor]:
        """All metrics of the prompted slices of one image: name -> (1,)."""
        oracle = self._scores(self._prompted(model, batch, batch.exact, CORNERS), batch)
        return self._scores(self.marked(model, batch), batch) | {"oracle_dice": oracle["dice"]}

    def _scores(self, marked: Tensor, batch: PromptedBatch) -> dict[str, Tensor]:
        """Of outlines (B, K, h, w)."""
        drawn = batch.masks > 0.5
        known = [bool(each) for each in on_host(batch.known[0]) > 0.5]
        # All slices as one image: what is counted in pixels does not know where they lie.
        found, true = (part.transpose(0, 1).flatten(1, 2) for part in (marked, drawn))
        scores = overlap_scores(found, true, known, self.structures, batch.spacing)
        distances = self._distances(on_host(marked).astype(bool), on_host(drawn).astype(bool), known, batch.spacing)
        return scores | distances

    def _distances(self, marked: Any, drawn: Any, known: Sequence[bool], spacing: Sequence[float]) -> dict[str, Tensor]:
        """The HD95 of each structure in the plane of its slices, their mean: slices between may be left out."""
        found = {}
        for number, structure in enumerate(self.structures):
            pairs = zip(marked[:, number], drawn[:, number], strict=True)
            each = [hd95(one, other, spacing) for one, other in pairs if other.any()] if known[number] else []
            name = "hd95" if len(self.structures) == 1 else f"hd95_{structure}"
            found[name] = torch.tensor([np.mean(each) if each else np.nan], dtype=torch.float64)
        return found

    # What learned nothing --------------------------------------------------------------------------------------------

    @property
    def untrained(self) -> Mapping[str, tuple[str, str]]:
        """See `wardround.tasks.task.ComparesUntrained`."""
        every = {
            ZERO_SHOT: ("zero-shot", "the model that the study starts from, before any training"),
            FILLED: ("filled prompt", "everything inside the box that prompts the network"),
        }
        return {name: every[name] for name in self.config.compares_with}

    def score_untrained(self, name: str, model: nn.Module, batch: PromptedBatch) -> dict[str, Tensor]:
        """See `wardround.tasks.task.ComparesUntrained`."""
        if name == ZERO_SHOT:
            return self.score(model, batch)
        known = batch.prompted[..., None, None] > 0.5
        boxes = (batch.points, batch.exact)
        inside = [_filled(corners, self._prompting.size, shape_of(batch)) & known for corners in boxes]
        scores, oracle = (self._scores(marked, batch) for marked in inside)
        return scores | {"oracle_dice": oracle["dice"]}

    # What a report shows ----------------------------------------------------------------------------------------------

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """The colours of outlines."""
        return OUTLINES

    def merit(self, rows: Mapping[str, Any]) -> Any:
        """The Dice of each patient."""
        return rows["dice"]

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[PromptedBatch]:
        """See `wardround.tasks.task.Illustrated`; of a patient the slice that shows most of what is drawn."""
        assert isinstance(dataset, PromptedDataset)
        for place in places:
            batch = dataset.tested(place)
            at = fullest(np.moveaxis(on_host(batch.masks) > 0.5, 0, -1))
            names = ("images", "masks", "known", "prompted", "points", "exact")
            yield replace(batch, **{name: getattr(batch, name)[at : at + 1] for name in names})

    def illustrate(self, model: nn.Module | None, batch: PromptedBatch) -> Illustration:
        """Outlines in the first channel of one slice, by the study's prompt."""
        marked = None if model is None else on_host(self.marked(model, batch)[0])
        shown = on_host(restored(batch.images[:, :1], shape_of(batch))[0, 0])
        return Illustration(slice_overlay(shown, on_host(batch.masks[0] > 0.5), marked, batch.spacing))

    # A clinic's images -----------------------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`; with a reader's rough mask, which prompts, beside the image."""
        return replace(self._patterns(self.config.images, self.config.table), mask=self.config.mask)

    def input_shape(self) -> tuple[int, ...]:
        """Always a StudyError: what is exported has images alone as its input."""
        raise StudyError("a network that takes a prompt beside an image is not exported; use `wardround predict`")

    def predict(self, model: nn.Module, image: LabelledImage) -> Found:
        """What the network outlines where a rough mask marks a structure: by the box around it, or points inside.

        Raises DataError for an image that the network cannot see, and for one without such a mask.
        """
        if image.labels is None:
            raise DataError(
                f"this model outlines what a prompt marks (task.prompt.kind: {self.config.prompt.kind}), and an image "
                f"alone has none; give a patient's folder with a rough mask named {self.config.mask!r} (task.mask)"
            )

        def prompt(picture: Tensor, part: int | None) -> tuple[Any, Any]:
            prompting, rough = self._prompting, masks_of(image, self.config.values, part)
            scale = scale_of(rough, prompting.size)
            random = public_generator(prompting.seed, "prompt", -1 if part is None else part)
            by_points = isinstance(prompting.prompt, PointPrompt)
            points = [
                prompt_of(mask, scale, prompting, random) if by_points else box_of(mask, scale, prompting.size)
                for mask in rough
            ]
            return np.stack(points), rough.any(axis=(1, 2))

        return self._predicted(model, image, prompt)

    def _predicted(
        self, model: nn.Module, image: LabelledImage, prompt: Callable[[Tensor, int | None], tuple[Any, Any]]
    ) -> Found:
        """What is outlined; `prompt` gives points (K, P, 2) for a slice (C, S, S), and which of the K are there."""
        prompting = self._prompting
        check_image(image, Sampling(self.config.channels, 2, (1, 1), None, None, 1, 1, 0.0), "")
        check_size(image, prompting, "")
        volume = image.channels.ndim == 4
        marked = np.zeros((len(self.structures), *image.channels.shape[1:]), np.bool_)
        shape = (image.channels.shape[1], image.channels.shape[2])
        for part in range(image.channels.shape[-1]) if volume else (None,):
            picture = seen(image.channels if part is None else image.channels[..., part], prompting.size)
            points, there = prompt(picture, part)
            if there.any():
                given = torch.from_numpy(points)[None]
                found = on_host(self.logits(model, picture[None], given, prompting.means, shape)[0] > 0)
                marked[..., slice(None) if part is None else part] = found & there[:, None, None]
        return Found(self.structures, marked)


@dataclass(frozen=True, eq=False)
class PromptedLesson:
    """How a prompted segmentation teaches one without prompts: by the box around what is drawn, or points inside it.

    It sees the student's example with its values from 0 to 1, and says nothing of what is not drawn there, which has no
    box. The box is that of the mask itself: a teacher shall give its best answer, and no result is measured with it.
    """

    prompting: Prompting
    channels: Sequence[int]

    def says(self, network: nn.Module, images: Tensor, masks: Tensor | None) -> Said:
        """See `wardround.tasks.distillation.Lesson`. The network sees no example without a prompt."""
        assert masks is not None
        shape, size = (masks.shape[2], masks.shape[3]), self.prompting.size
        drawn = on_host(masks > 0.5).astype(bool)
        there: NDArray[np.bool_] = np.asarray(drawn.any(axis=(2, 3)))
        rows = np.flatnonzero(there.any(axis=1)).tolist()
        logits = images.new_zeros(masks.shape)
        if rows:
            points = np.stack([np.stack([self._prompt(mask, shape) for mask in drawn[row]]) for row in rows])
            pictures = torch.stack([squared(unit(image), size) for image in images[rows][:, self.channels]])
            given = torch.from_numpy(points).to(images.device)
            logits[rows] = PromptedSegmentation.logits(network, pictures, given, self.prompting.means, shape)
        return Said(logits, torch.from_numpy(there.astype(np.float32)).to(images.device))

    def _prompt(self, mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.float32]:
        scale = self.prompting.size / max(shape)
        if not isinstance(self.prompting.prompt, PointPrompt):
            return box_of(mask, scale, self.prompting.size)
        return prompt_of(mask, scale, self.prompting, public_generator(self.prompting.seed, "teacher"))


def shape_of(batch: PromptedBatch) -> tuple[int, int]:
    """The pictures' own grid."""
    return batch.masks.shape[2], batch.masks.shape[3]


def _of_slices(spec: MetricSpec) -> MetricSpec:
    """A metric of a segmentation as it is measured here."""
    if spec.name.startswith("hd95"):
        told = (
            "in the plane of a slice the larger of both 95th percentiles of the distances from one contour to the "
            "other, the image's diagonal where nothing was marked; mean over the patient's prompted slices"
        )
        return replace(spec, definition=told)
    return replace(spec, definition=f"{spec.definition}, in the slices that are prompted")


def _filled(corners: Tensor, size: int, shape: tuple[int, int]) -> Tensor:
    """What lies inside boxes (B, K, 2, 2) of the network's image, on the pictures' grid: bool (B, K, h, w)."""
    scale = max(shape) / size
    rows, columns = (torch.arange(n, device=corners.device) + 0.5 for n in shape)
    low, high = (corners * scale)[..., 0, :], (corners * scale)[..., 1, :]
    across = (columns >= low[..., :1]) & (columns < high[..., :1])
    down = (rows >= low[..., 1:]) & (rows < high[..., 1:])
    return down[..., :, None] & across[..., None, :]
