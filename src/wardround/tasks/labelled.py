"""Images with masks of one site, as the examples of a segmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import DataError
from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import LabelledImage
from wardround.tasks.augmentation import Augmentation
from wardround.tasks.contrasts import dropped, first_shown
from wardround.tasks.images import CONTENT, NORMALISED, Frame, PatientImages, SitePatients, resampled
from wardround.tasks.task import Split
from wardround.wire.canonical import canonical_json

Structures = Mapping[str, tuple[int, ...] | None]


class LabelledExample(NamedTuple):
    """A training example: a slice of an image, or of a volume in 3-D and of a picture its number."""

    patient: int
    case: int
    part: int


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Images and masks.

    images: float32 (B, C, *shape), normalised. masks: float32 (B, K, *shape), a channel a structure; in evaluation on
    the image's own grid, which may be another one. known: float32 (B, K), 1 where the site draws the structure and the
    patient trains with masks.
    spacing: the size of a voxel of the masks along `shape`, slices first where B counts them.
    """

    images: Tensor
    masks: Tensor
    known: Tensor
    spacing: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def joined(cls, batches: Sequence[LabelledBatch]) -> LabelledBatch:
        """One batch of all examples, in order."""
        return cls(
            torch.cat([batch.images for batch in batches]),
            torch.cat([batch.masks for batch in batches]),
            torch.cat([batch.known for batch in batches]),
        )


@dataclass(frozen=True)
class Sampling:
    """How examples are made of images: see `wardround.tasks.segmentation.SegmentationTask`."""

    channels: int
    dimensions: int
    patch: tuple[int, ...]
    resize: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    per_image: int
    empty_every: int
    foreground: float


class LabelledDataset(PatientImages):
    """One site's images and masks; see `wardround.tasks.task.Dataset`.

    `frame` says what the images' numbers are and on which grid they lie; by default they are normalised. `drop` is the
    share of training examples without a contrast (`wardround.tasks.contrasts.dropped`). See
    `wardround.tasks.images.PatientImages` for patients who cannot be used. Raises DataError.
    """

    def __init__(
        self,
        patients: SitePatients,
        structures: Structures,
        known: Sequence[bool],
        sampling: Sampling,
        augmentation: Augmentation,
        *,
        physical: bool,
        frame: Frame = NORMALISED,
        drop: float = 0.0,
    ) -> None:
        self._structures = structures
        self._known = torch.tensor(known, dtype=torch.float32)
        self._sampling = sampling
        self._augmentation = augmentation
        self._physical = physical
        self._drop = drop
        self._training = frozenset(patients.split["train"])
        self._unlabelled = patients.unlabelled
        self._content: dict[int, Any] = {}
        self._found: dict[int, list[LabelledExample]] = {}
        super().__init__(patients, frame)
        self._digests = {patient: found.hexdigest() for patient, found in self._content.items()}
        self._train = tuple(example for patient in self._split["train"] for example in self._found[patient])
        if self._split["train"] and not self._train:
            raise DataError(f"site {self.site}: no training image has anything to see; see `task.images`")

    # What a federation sees ------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Sha256 (hex) over the content of images and masks and who trains, never over names or paths."""
        rules = {name: None if values is None else list(values) for name, values in self._structures.items()}
        return self._hashed(self._digests, structures=rules, known=[bool(k) for k in self._known])

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> LabelledBatch:
        """Training examples, cropped and changed with `random` alone."""
        return LabelledBatch.joined([self._example(self._train[index], random) for index in indices])

    def owners(self) -> tuple[int, ...]:
        """Whose each training example is."""
        return tuple(example.patient for example in self._train)

    def evaluation(self, split: Split) -> Iterator[tuple[int, LabelledBatch]]:
        """(patient number, a whole image), patient by patient: all slices of a volume, or the volume or picture."""
        for patient in self._split[split]:
            for number in range(len(self._cases[patient])):
                yield patient, self._whole(patient, number)

    @property
    def lacks(self) -> bool:
        """Whether an example may come without one of its contrasts."""
        return self._drop > 0.0 or any(case.absent for of_patient in self._cases for case in of_patient)

    def tested(self, place: int) -> LabelledBatch:
        """The first image of the test patient at a place in the order of `evaluation`."""
        return self._whole(self.tested_patient(place), 0)

    def tested_patient(self, place: int) -> int:
        """The number of the test patient at a place."""
        return self._split["test"][place]

    # Images ----------------------------------------------------------------------------------------------------------

    def _examined(self, patient: int, number: int, image: LabelledImage, case: Case) -> None:
        check_image(image, self._sampling, str(case.images[0]))
        labelled = patient not in self._unlabelled
        if labelled:
            self._check(image, case)
        self._content.setdefault(patient, hashlib.sha256()).update(_digest(image, labelled=labelled))
        if patient in self._training:
            self._found.setdefault(patient, []).extend(self._parts(image, patient, number))

    def _check(self, image: LabelledImage, case: Case) -> None:
        place = str(case.images[0])
        if self._physical and image.space.spacing is None:
            raise DataError(
                "a picture says nothing of the size of its pixels; set task.distances: pixels", detail=place
            )
        if image.labels is None:
            raise DataError("an image has no mask; see task.mask", detail=place)
        if any(values is None for values in self._structures.values()):
            return
        declared = {0} | {value for values in self._structures.values() for value in values or ()}
        if foreign := sorted(_values(image) - declared):
            raise DataError(
                f"a mask holds the value {foreign[0]}, which task.structures does not list; add it, or 0 it",
                detail=str(case.mask),
            )

    def _parts(self, image: LabelledImage, patient: int, number: int) -> Iterator[LabelledExample]:
        """The training examples of an image: slices that show a structure and every n-th of the rest, or patches.

        Without a mask a slice that shows anything is one of the rest.
        """
        shape, sampling = image.channels.shape[1:], self._sampling
        if sampling.dimensions == 3 or len(shape) == 2:
            yield from (LabelledExample(patient, number, part) for part in range(sampling.per_image))
            return
        drawn = self._drawn(image, patient).any(axis=(0, 1, 2))
        shown = image.channels[first_shown(image.absent)].astype(np.float32)
        content = self._frame.shows(shown).mean(axis=(0, 1)) > CONTENT
        rest = np.flatnonzero(content & ~drawn)[:: sampling.empty_every]
        yield from (LabelledExample(patient, number, int(part)) for part in sorted([*np.flatnonzero(drawn), *rest]))

    def _seen_as(self, image: LabelledImage, channels: Tensor) -> Tensor:
        return whole_image(image, channels, self._sampling)

    def _spacing_of(self, image: LabelledImage) -> tuple[float, ...] | None:
        return image.space.spacing if self._physical else None

    def _structures_of(self, patient: int, image: LabelledImage) -> tuple[NDArray[np.bool_] | None, ...]:
        if patient in self._unlabelled:
            return (None,) * len(self._structures)
        return tuple(mask if known else None for mask, known in zip(self._masks(image), self._known, strict=True))

    def _masks(self, image: LabelledImage, part: int | None = None) -> NDArray[np.bool_]:
        """See `masks_of`."""
        return masks_of(image, self._structures, part)

    def _drawn(self, image: LabelledImage, patient: int, part: int | None = None) -> NDArray[np.bool_]:
        """The same; nothing of a patient who trains without masks."""
        if patient not in self._unlabelled:
            return self._masks(image, part)
        shape = image.channels.shape[1:] if part is None else image.channels.shape[1:-1]
        return np.zeros((len(self._structures), *shape), np.bool_)

    def _example(self, example: LabelledExample, random: np.random.Generator) -> LabelledBatch:
        image = self._read(example.patient, example.case)
        grid, part = grid_of(image, self._sampling), None
        if self._sampling.dimensions == 2 and image.channels.ndim == 4:
            grid, part = grid[:2], example.part
        channels = self._normalised(example.patient, example.case, part)
        masks = torch.from_numpy(self._drawn(image, example.patient, part).astype(np.float32))
        channels, masks = resampled(channels, grid), resampled(masks, grid, nearest=True)
        channels, masks = self._cropped(channels, masks, random)
        channels, masks = self._augmentation(channels, masks, random)
        channels = dropped(channels, image.absent, self._drop, random)
        known = torch.zeros_like(self._known) if example.patient in self._unlabelled else self._known
        return LabelledBatch(channels[None], masks[None], known[None])

    def _cropped(self, image: Tensor, mask: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A patch: in a share `foreground` of cases with a voxel of a structure, else anywhere; padded where small."""
        patch = self._sampling.patch
        centred = bool(random.random() < self._sampling.foreground)
        places = torch.nonzero(mask.amax(dim=0)) if centred else mask.new_zeros(0, len(patch))
        middle = places[int(random.integers(len(places)))].tolist() if len(places) else None
        for axis, wanted in enumerate(patch):
            have = image.shape[axis + 1]
            if have > wanted:
                room = have - wanted
                start = int(random.integers(room + 1))
                if middle is not None:
                    # Anywhere in the patch, so that the middle is not always a structure's.
                    low, high = max(0, int(middle[axis]) - wanted + 1), min(room, int(middle[axis]))
                    start = int(random.integers(low, high + 1))
                image, mask = (part.narrow(axis + 1, start, wanted) for part in (image, mask))
            elif have < wanted:
                before = (wanted - have) // 2
                pads = [0, 0] * (len(patch) - axis - 1) + [before, wanted - have - before]
                image, mask = (nn.functional.pad(part, pads) for part in (image, mask))
        return image, mask

    def _whole(self, patient: int, number: int) -> LabelledBatch:
        """An image for evaluation: channels on the network's grid, masks on its own."""
        image, channels = self._read(patient, number), self._normalised(patient, number)
        masks = torch.from_numpy(self._masks(image).astype(np.float32))
        spacing = image.space.spacing if self._physical and image.space.spacing else (1.0,) * (masks.ndim - 1)
        channels = whole_image(image, channels, self._sampling)
        if self._sampling.dimensions == 2 and masks.ndim == 4:
            # Slices become the examples of a batch.
            masks, spacing = masks.permute(3, 0, 1, 2), (spacing[2], *spacing[:2])
        else:
            masks = masks[None]
        known = self._known.expand(len(channels), -1)
        return LabelledBatch(channels, masks.contiguous(), known, spacing)


def check_image(image: LabelledImage, sampling: Sampling, place: str) -> None:
    """Raises DataError, with `place` as its detail, for an image that the task's network cannot see."""
    shape = image.channels.shape[1:]
    if len(image.channels) != sampling.channels:
        raise DataError(
            f"an image has {len(image.channels)} channels, and the study's have {sampling.channels} (task.channels)",
            detail=place,
        )
    if sampling.dimensions == 3 and len(shape) != 3:
        raise DataError("task.dimensions is 3, and an image is a picture of 2", detail=place)
    if sampling.spacing is not None and image.space.spacing is None:
        raise DataError("task.spacing needs images that say how large their voxels are", detail=place)


def masks_of(image: LabelledImage, structures: Structures, part: int | None = None) -> NDArray[np.bool_]:
    """(K, *shape), a channel a structure; of a volume's slice `part` (K, H, W)."""
    labels = image.labels if part is None or image.labels is None else image.labels[..., part]
    assert labels is not None
    return np.stack([labels != 0 if v is None else np.isin(labels, _meaning(v, image)) for v in structures.values()])


def grid_of(image: LabelledImage, sampling: Sampling) -> tuple[int, ...]:
    """The shape of what the network sees of an image."""
    shape = image.channels.shape[1:]
    if sampling.resize is not None:
        return (*sampling.resize, *shape[2:])
    if sampling.spacing is not None:
        assert image.space.spacing is not None
        pairs = zip(shape, image.space.spacing, sampling.spacing, strict=False)
        scaled = tuple(max(1, round(n * mine / wanted)) for n, mine, wanted in pairs)
        return (*scaled, *shape[len(scaled) :])
    return shape


def whole_image(image: LabelledImage, channels: Tensor, sampling: Sampling) -> Tensor:
    """Normalised channels (C, *shape) of an image as a batch on the network's grid; in 2-D a slice an example."""
    grid = grid_of(image, sampling)
    if sampling.dimensions == 2 and channels.ndim == 4:
        return resampled(channels.permute(3, 0, 1, 2), grid[:2]).contiguous()
    return resampled(channels, grid)[None].contiguous()


def _values(image: LabelledImage) -> set[int]:
    """The numbers that a mask holds, each by itself."""
    found = {int(value) for value in np.unique(image.labels)} if image.labels is not None else set[int]()
    return {number for value in found for number in image.combined.get(value, (value,))}


def _meaning(values: tuple[int, ...], image: LabelledImage) -> list[int]:
    """The values of a mask's voxels that are any of these numbers, alone or with others."""
    own = set(values)
    combined = {value for value, numbers in image.combined.items() if own.intersection(numbers)}
    # A value of several numbers may be a number that this mask does not hold.
    return sorted(own - image.combined.keys() | combined)


def _digest(image: LabelledImage, *, labelled: bool = True) -> bytes:
    found = hashlib.sha256(image.channels.tobytes())
    if not labelled:
        return found.digest()
    assert image.labels is not None
    found.update(image.labels.tobytes())
    for value, numbers in sorted(image.combined.items()):
        found.update(canonical_json([value, *numbers]))
    return found.digest()
