"""Images with masks of one site, and prompts drawn from the masks, as the examples of a prompted segmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import DataError
from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import LabelledImage
from wardround.models.prompts import FIRST_CORNER, INSIDE, LAST_CORNER
from wardround.study.prompts import AutomaticPrompt, PointPrompt, Prompt
from wardround.tasks.augmentation import Augmentation
from wardround.tasks.images import CONTENT, SitePatients, resampled
from wardround.tasks.labelled import LabelledDataset, LabelledExample, Sampling
from wardround.tasks.task import Split
from wardround.wire.random import public_generator

Masks = NDArray[np.bool_]
CORNERS = (FIRST_CORNER, LAST_CORNER)


@dataclass(frozen=True, eq=False)
class PromptedBatch:
    """Slices or pictures with their prompts.

    images: float32 (B, C, S, S), the longer side filling the square, with values from 0 to 1. masks: float32
    (B, K, *shape), a channel a structure, in training on the network's grid and in evaluation on the image's own; what
    has no prompt is not in them. known: float32 (B, K), 1 where the site draws the structure; prompted: (B, K), 1 where
    it has a prompt. points: float32 (B, K, P, 2), the points of each prompt, column and row in pixels of `images`.
    exact: (B, K, 2, 2), the corners of the box of the mask itself; in evaluation. spacing: the size of a pixel of the
    masks.
    """

    images: Tensor
    masks: Tensor
    known: Tensor
    prompted: Tensor
    points: Tensor
    exact: Tensor
    spacing: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def joined(cls, batches: Sequence[PromptedBatch]) -> PromptedBatch:
        """One batch of all examples, in order."""
        names = ("images", "masks", "known", "prompted", "points", "exact")
        parts = {name: torch.cat([getattr(b, name) for b in batches]) for name in names}
        return cls(**parts, spacing=batches[0].spacing)


@dataclass(frozen=True)
class Prompting:
    """How examples are made of images: see `wardround.tasks.prompted.PromptedTask`. `size`: pixels of a side."""

    prompt: Prompt
    size: int
    channels: int
    slices: int | None
    least: int
    enlarge: bool
    seed: int

    @property
    def means(self) -> tuple[int, ...]:
        """What each point of a prompt is."""
        return (INSIDE,) * self.prompt.count if isinstance(self.prompt, PointPrompt) else CORNERS

    @property
    def automatic(self) -> bool:
        """Whether prompts are found, so that slices without a structure are seen too."""
        return isinstance(self.prompt, AutomaticPrompt)


class PromptedDataset(LabelledDataset):
    """One site's slices and pictures that show a structure, with prompts; see `wardround.tasks.task.Dataset`.

    Prompts of training examples come from the step's random numbers. Those of an evaluation come from the study's seed,
    what the patient's images hold and the slice, so every arm, every run and every other site see the same ones.
    """

    def __init__(
        self,
        patients: SitePatients,
        structures: Mapping[str, tuple[int, ...] | None],
        known: Sequence[bool],
        prompting: Prompting,
        augmentation: Augmentation,
        *,
        physical: bool,
    ) -> None:
        self._prompting = prompting
        grid = (prompting.size, prompting.size)
        sampling = Sampling(prompting.channels, 2, grid, None, None, 1, 1, 0.0)
        self._shown: dict[tuple[int, int], tuple[int | None, ...]] = {}
        super().__init__(patients, structures, known, sampling, augmentation, physical=physical)

    def _examined(self, patient: int, number: int, image: LabelledImage, case: Case) -> None:
        check_size(image, self._prompting, str(case.images[0]))
        self._shown[patient, number] = self._prompted_parts(image)
        super()._examined(patient, number, image, case)

    def fingerprint(self) -> str:
        """Sha256 (hex) over images, masks, who trains and which slices are prompted, never over names or paths."""
        rules = self._prompting
        chosen = {"slices": rules.slices, "least": rules.least} | ({"others": True} if rules.automatic else {})
        return self._hashed({p: f"{d} {chosen}" for p, d in self._digests.items()}, known=self._known.tolist())

    def pictures(self) -> int:
        """How many different images the network sees: see `wardround.tasks.task.Counted`."""
        used = {patient for part in self._split.values() for patient in part}
        return sum(max(1, len(parts)) for (patient, _), parts in self._shown.items() if patient in used)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Any:
        """Training examples, changed and prompted with `random` alone."""
        return PromptedBatch.joined([self._trained(self._train[index], random) for index in indices])

    def evaluation(self, split: Split) -> Iterator[tuple[int, Any]]:
        """(patient number, the prompted slices of an image), patient by patient."""
        for patient in self._split[split]:
            for number in range(len(self._cases[patient])):
                yield patient, self._tested(patient, number)

    def tested(self, place: int) -> Any:
        """The prompted slices of the first image of the test patient at a place in the order of `evaluation`."""
        return self._tested(self.tested_patient(place), 0)

    # Images ----------------------------------------------------------------------------------------------------------

    def _seen_as(self, image: LabelledImage, channels: Tensor) -> Tensor:
        slices = channels.permute(3, 0, 1, 2) if channels.ndim == 4 else channels[None]
        return torch.stack([squared(part, self._prompting.size) for part in slices])

    def _parts(self, image: LabelledImage, patient: int, number: int) -> Iterator[LabelledExample]:
        for part in self._shown[patient, number]:
            yield LabelledExample(patient, number, 0 if part is None else part)

    def _prompted_parts(self, image: LabelledImage) -> tuple[int | None, ...]:
        """The slices of an image that show a structure, evenly spread; `None` for a picture's one.

        Where prompts are found, as many that show none are seen too.
        """
        masks, automatic = self._masks(image), self._prompting.automatic
        large = (masks.sum(axis=(1, 2)) >= self._prompting.least).any(axis=0)
        if masks.ndim == 3:
            return (None,) if large or automatic else ()
        found = spread(np.flatnonzero(large), self._prompting.slices)
        if automatic:
            content = self._frame.shows(image.channels[0].astype(np.float32)).mean(axis=(0, 1)) > CONTENT
            found = np.sort([*found, *spread(np.flatnonzero(content & ~large), max(1, len(found)))])
        return tuple(int(part) for part in found)

    def _seen(self, patient: int, number: int, part: int | None) -> tuple[Tensor, Masks]:
        """A slice (C, S, S) as the network sees it, and its masks (K, h, w) on its own grid; none that is too small."""
        image = self._read(patient, number)
        masks = self._masks(image, part)
        masks = masks & (masks.sum(axis=(1, 2), keepdims=True) >= self._prompting.least)
        return seen(image.channels if part is None else image.channels[..., part], self._prompting.size), masks

    def _trained(self, example: LabelledExample, random: np.random.Generator) -> PromptedBatch:
        volume = self._read(example.patient, example.case).channels.ndim == 4
        picture, drawn = self._seen(example.patient, example.case, example.part if volume else None)
        size = self._prompting.size
        masks = squared(torch.from_numpy(drawn.astype(np.float32)), size, nearest=True)
        picture, masks = self._augmentation(picture, masks, random)
        return self._batch(picture, masks, masks.numpy() > 0.5, 1.0, random)

    def _tested(self, patient: int, number: int) -> PromptedBatch:
        image = self._read(patient, number)
        # A patient without a structure has no prompt, and is counted all the same.
        middle = None if image.channels.ndim == 3 else image.channels.shape[-1] // 2
        batches = []
        for part in self._shown[patient, number] or (middle,):
            picture, drawn = self._seen(patient, number, part)
            names = ("prompt", self._digests[patient], number, -1 if part is None else part)
            random = public_generator(self._prompting.seed, *names)
            masks = torch.from_numpy(drawn.astype(np.float32))
            batches.append(self._batch(picture, masks, drawn, scale_of(drawn, self._prompting.size), random))
        spacing = image.space.spacing if self._physical and image.space.spacing else (1.0, 1.0)
        joined = PromptedBatch.joined(batches)
        return PromptedBatch(**{**vars(joined), "spacing": tuple(spacing[:2])})

    def _batch(
        self, picture: Tensor, masks: Tensor, drawn: Masks, scale: float, random: np.random.Generator
    ) -> PromptedBatch:
        """A batch of one; `drawn` (K, h, w) has `scale` pixels of the network's image for each of its own."""
        points = np.stack([prompt_of(mask, scale, self._prompting, random) for mask in drawn])
        exact = np.stack([box_of(mask, scale, self._prompting.size) for mask in drawn])
        has = drawn.any(axis=(1, 2)).astype(np.float32)
        prompted, given, box = (torch.from_numpy(part)[None] for part in (has, points, exact))
        return PromptedBatch(picture[None], masks[None], self._known[None], prompted, given, box)


def spread(places: NDArray[np.intp], most: int | None) -> NDArray[np.intp]:
    """At most so many of the places, evenly spread."""
    if most is None or len(places) <= most:
        return places
    return np.asarray(places[((np.arange(most) + 0.5) * len(places) / most).astype(int)])


def check_size(image: LabelledImage, prompting: Prompting, place: str) -> None:
    """Raises DataError, with `place` as its detail, for an image with fewer pixels than the network sees."""
    longer = max(image.channels.shape[1:3])
    if longer < prompting.size and not prompting.enlarge:
        raise DataError(
            f"an image has {longer} pixels along its longer side, and the network sees {prompting.size} (model.size); "
            "set `task.enlarge: true` to have images enlarged",
            detail=place,
        )


def seen(channels: NDArray[Any], size: int) -> Tensor:
    """A picture (C, h, w) of any numbers as a prompted network sees it: (C, size, size), from 0 to 1."""
    return squared(unit(torch.from_numpy(channels.astype(np.float32))), size)


def unit(values: Tensor) -> Tensor:
    """Values of a picture, from 0 to 1."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)


def squared(values: Tensor, size: int, *, nearest: bool = False) -> Tensor:
    """Values (C, h, w) on a square grid that the longer side fills; zeros below or to the right of the rest."""
    rows, columns = shape_in(tuple(values.shape[1:]), size)
    return nn.functional.pad(resampled(values, (rows, columns), nearest=nearest), (0, size - columns, 0, size - rows))


def restored(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values (N, K, size, size) of such squares on the grid (h, w) of the pictures."""
    rows, columns = shape_in(shape, values.shape[-1])
    return resampled(values[..., :rows, :columns], shape)


def shape_in(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Rows and columns of a picture (h, w) in a square of `size`."""
    height, width = shape
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def scale_of(masks: Masks, size: int) -> float:
    """How many pixels of a network's image one of masks (K, h, w) has on a side."""
    return float(size / max(masks.shape[1:]))


# Prompts --------------------------------------------------------------------------------------------------------------


def prompt_of(mask: Masks, scale: float, prompting: Prompting, random: np.random.Generator) -> NDArray[np.float32]:
    """The points (P, 2) of a mask's prompt, in pixels of the network's image; zeros for an empty mask.

    A mask without a voxel takes as many random numbers as any other, so that no prompt depends on another structure.
    """
    prompt, size = prompting.prompt, prompting.size
    if not isinstance(prompt, PointPrompt):
        return box_of(mask, scale, size, random.uniform(-prompt.jitter, prompt.jitter, (2, 2)))
    shares = random.random(prompt.count)
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros((prompt.count, 2), np.float32)
    chosen = (shares * len(rows)).astype(int)
    # The middle of a pixel: 0 is the middle of the first one, in either image.
    places = (np.stack((columns[chosen], rows[chosen]), axis=1) + 0.5) * scale - 0.5
    return np.clip(places, 0.0, size - 1.0).astype(np.float32)


def box_of(mask: Masks, scale: float, size: int, moved: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """First and last corner (2, 2) of the box around a mask, each `moved`; column and row; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((2, 2), np.float32)
    corners = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], np.float64) * scale
    # Sides of a small box that moved past each other change places.
    corners = np.sort(corners if moved is None else corners + moved, axis=0)
    return np.clip(corners, 0.0, size - 1.0).astype(np.float32)
