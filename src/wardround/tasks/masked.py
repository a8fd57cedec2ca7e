"""Images of one site of which a network sees a few patches, as the examples of a pretraining. No labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import LabelledImage
from wardround.tasks.augmentation import Augmentation
from wardround.tasks.diagnosed import Shape, check_shape, content_sha256
from wardround.tasks.images import Frame, PatientImages, SitePatients, resampled
from wardround.tasks.task import Split
from wardround.wire.random import public_generator


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """Images and which of their patches are seen.

    images: float32 (B, C, *size), normalised. kept: int64 (B, V), places of patches, each once, in order.
    """

    images: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def joined(cls, batches: Sequence[MaskedBatch]) -> MaskedBatch:
        """One batch of all images, in order."""
        return cls(torch.cat([b.images for b in batches]), torch.cat([b.kept for b in batches]))


@dataclass(frozen=True)
class Masks:
    """Which `kept` of an image's `patches` are seen. `seed` is the study's."""

    patches: int
    kept: int
    seed: int

    def drawn(self, random: np.random.Generator) -> Tensor:
        """Some that `random` chooses: (1, V)."""
        return torch.from_numpy(np.sort(random.permutation(self.patches)[: self.kept]))[None]

    def fixed(self, content: str, number: int) -> Tensor:
        """Always the same of an image, by a hash of what its patient's files hold and its number: (1, V)."""
        return self.drawn(public_generator(self.seed, "mask", content, number))


class MaskedDataset(PatientImages):
    """One site's images without labels; see `wardround.tasks.task.Dataset`. Raises DataError."""

    def __init__(
        self,
        patients: SitePatients,
        shape: Shape,
        size: tuple[int, ...],
        augmentation: Augmentation,
        masks: Masks,
        frame: Frame | None = None,
    ) -> None:
        self._shape, self._size, self._augmentation, self._masks = shape, size, augmentation, masks
        super().__init__(patients, frame)
        self._train = [(patient, n) for patient in self._split["train"] for n in range(len(self._cases[patient]))]
        used = [patient for part in self._split.values() for patient in part]
        self._digests = {patient: self._digest(patient) for patient in used}

    def _examined(self, patient: int, number: int, image: LabelledImage, case: Case) -> None:
        check_shape(image, self._shape, str(case.images[0]))

    def fingerprint(self) -> str:
        """Sha256 (hex) over images and who trains, never over names or paths."""
        return self._hashed(self._digests)

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> MaskedBatch:
        """Training images, changed and masked with `random` alone."""
        return MaskedBatch.joined([self._example(*self._train[index], random) for index in indices])

    def owners(self) -> tuple[int, ...]:
        """Whose each training image is."""
        return tuple(patient for patient, _ in self._train)

    def evaluation(self, split: Split) -> Iterator[tuple[int, MaskedBatch]]:
        """(patient number, all images of the patient), always with the same patches seen."""
        yield from ((patient, self._whole(patient)) for patient in self._split[split])

    def tested(self, place: int) -> MaskedBatch:
        """All images of the test patient at a place in the order of `evaluation`."""
        return self._whole(self._split["test"][place])

    def _whole(self, patient: int) -> MaskedBatch:
        return MaskedBatch.joined([self._example(patient, number, None) for number in range(len(self._cases[patient]))])

    def _example(self, patient: int, number: int, random: np.random.Generator | None) -> MaskedBatch:
        pixels = resampled(self._normalised(patient, number), self._size)
        if random is None:
            return MaskedBatch(pixels[None], self._masks.fixed(self._digests[patient], number))
        return MaskedBatch(self._augmentation.of_image(pixels, random)[None], self._masks.drawn(random))

    def _seen_as(self, image: LabelledImage, channels: Tensor) -> Tensor:
        return resampled(channels, self._size)[None]

    def _digest(self, patient: int) -> str:
        contents = (content_sha256(path) for case in self._cases[patient] for path in case.images)
        return hashlib.sha256(b"".join(contents)).hexdigest()
