"""Images with classes of one site, as the examples of a classification."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wardround.errors import DataError, StudyError
from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.images import ClassSettings
from wardround.tasks.augmentation import Augmentation
from wardround.tasks.contrasts import dropped, first_shown
from wardround.tasks.images import CONTENT, Frame, PatientImages, SitePatients, resampled
from wardround.tasks.task import Split


@dataclass(frozen=True, eq=False)
class DiagnosedBatch:
    """Images and what they show.

    images: float32 (B, C, *size), normalised. labels: float32 (B, K), 1 for a class that an image shows, NaN for a
    training image without a label. prior: float32 (B, K), the share of each class among the training examples of the
    site that have labels.
    """

    images: Tensor
    labels: Tensor
    prior: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def joined(cls, batches: Sequence[DiagnosedBatch]) -> DiagnosedBatch:
        """One batch of all images, in order."""
        return cls(*(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "prior")))


class DiagnosedDataset(PatientImages):
    """One site's images with their classes; see `wardround.tasks.task.Dataset`. Raises DataError.

    `frame` says what the images' numbers are, `size` on which grid they are seen. With `slices` an image may be a
    volume, of which each slice that shows something is an example. `drop` is the share of training examples without a
    contrast (`wardround.tasks.contrasts.dropped`).
    """

    def __init__(
        self,
        patients: SitePatients,
        config: ClassSettings,
        augmentation: Augmentation,
        frame: Frame | None = None,
        *,
        size: tuple[int, ...] | None = None,
        slices: bool = False,
        drop: float = 0.0,
    ) -> None:
        self._drop = drop
        self._config, self._augmentation, self._slices = config, augmentation, slices
        self._size = config.size if size is None else size
        self._unlabelled = patients.unlabelled
        self._labels: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}
        self._seen: dict[tuple[int, int], tuple[int | None, ...]] = {}
        super().__init__(patients, frame)
        self._train = [example for patient in self._split["train"] for example in self._examples(patient)]
        used = [patient for part in self._split.values() for patient in part]
        self._digests = {patient: self._digest(patient) for patient in used}
        labelled = [example for example in self._train if example[0] not in self._unlabelled]
        shown = np.array([self._labels[patient, number] for patient, number, _ in labelled]).reshape(
            -1, len(config.classes)
        )
        self._prior = torch.from_numpy((shown.mean(axis=0) if len(shown) else np.zeros(shown.shape[1])).astype("f4"))
        self._of_class = [np.flatnonzero(shown[:, k]) for k in range(shown.shape[1])]

    def _examined(self, patient: int, number: int, image: LabelledImage, case: Case) -> None:
        check_shape(image, self._config, str(case.images[0]), slices=self._slices)
        if patient not in self._unlabelled:
            self._labels[patient, number] = _labels(case, self._config)
        self._seen[patient, number] = shown_parts(image, self._frame) if self._slices else (None,)

    def _examples(self, patient: int) -> list[tuple[int, int, int | None]]:
        """Every image of a patient, or every slice of each: the patient, the image, the slice."""
        return [(patient, n, part) for n in range(len(self._cases[patient])) for part in self._seen[patient, n]]

    def fingerprint(self) -> str:
        """Sha256 (hex) over images, classes and who trains, never over names or paths."""
        return self._hashed(self._digests, classes=list(self._config.classes))

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> DiagnosedBatch:
        """Training images, changed with `random` alone; balanced, others than asked for, of all classes alike."""
        if self._config.imbalance == "balanced":
            present = [rows for rows in self._of_class if len(rows)]
            drawn = [present[int(random.integers(len(present)))] for _ in indices]
            indices = [int(rows[int(random.integers(len(rows)))]) for rows in drawn]
        return DiagnosedBatch.joined([self._example(*self._train[index], random) for index in indices])

    def owners(self) -> tuple[int, ...]:
        """Whose each training image is. Raises StudyError for balanced draws, which take others than asked for."""
        if self._config.imbalance == "balanced":
            raise StudyError("task.imbalance: balanced draws examples by their class, which privacy does not cover")
        return tuple(patient for patient, _, _ in self._train)

    def evaluation(self, split: Split) -> Iterator[tuple[int, DiagnosedBatch]]:
        """(patient number, all images of the patient)."""
        yield from ((patient, self._whole(patient)) for patient in self._split[split])

    def tested(self, place: int) -> DiagnosedBatch:
        """All images of the test patient at a place in the order of `evaluation`."""
        return self._whole(self.tested_patient(place))

    def tested_patient(self, place: int) -> int:
        """The number of the test patient at a place."""
        return self._split["test"][place]

    def _whole(self, patient: int) -> DiagnosedBatch:
        return DiagnosedBatch.joined([self._example(*example, None) for example in self._examples(patient)])

    def _example(
        self, patient: int, number: int, part: int | None, random: np.random.Generator | None
    ) -> DiagnosedBatch:
        pixels = resampled(self._normalised(patient, number, part), self._size)
        if random is not None:
            pixels = self._augmentation.of_image(pixels, random)
            pixels = dropped(pixels, self._cases[patient][number].absent, self._drop, random)
        known = self._labels.get((patient, number))
        labels = torch.full_like(self._prior, torch.nan) if known is None else torch.from_numpy(known.astype("f4"))
        return DiagnosedBatch(pixels[None], labels[None], self._prior[None])

    def _seen_as(self, image: LabelledImage, channels: Tensor) -> Tensor:
        slices = self._slices and channels.ndim == 4
        return resampled(channels.permute(3, 0, 1, 2) if slices else channels[None], self._size)

    def _classes_of(self, patient: int, number: int) -> npt.NDArray[np.bool_] | None:
        return self._labels.get((patient, number))

    def _digest(self, patient: int) -> str:
        found = hashlib.sha256()
        for number, case in enumerate(self._cases[patient]):
            for path in case.images:
                found.update(content_sha256(path))
            if patient not in self._unlabelled:
                found.update(self._labels[patient, number].tobytes())
        return found.hexdigest()


def content_sha256(path: Path) -> bytes:
    """Sha256 of a file, or of all files of a folder (a DICOM series) whatever they are called."""
    if path.is_dir():
        files = (each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        return hashlib.sha256(b"".join(sorted(map(content_sha256, files)))).digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class Shape(Protocol):
    """What a study says of its images."""

    @property
    def dimensions(self) -> int: ...

    @property
    def channels(self) -> int: ...


def check_shape(image: LabelledImage, config: Shape, place: str, *, slices: bool = False) -> None:
    """Raises DataError, with `place` as its detail, for an image that the task's network cannot see."""
    channels, *shape = image.channels.shape
    if channels != config.channels:
        raise DataError(
            f"an image has {channels} channels, and the study's have {config.channels} (task.channels)", detail=place
        )
    if len(shape) != config.dimensions and not slices:
        raise DataError(f"task.dimensions is {config.dimensions}, and an image has {len(shape)}", detail=place)


def shown_parts(image: LabelledImage, frame: Frame) -> tuple[int | None, ...]:
    """The slices of a volume that show something, or all where none does; `None` for the whole of a picture."""
    if image.channels.ndim == 3:
        return (None,)
    shares = frame.shows(image.channels[first_shown(image.absent)].astype(np.float32)).mean(axis=(0, 1))
    found = np.flatnonzero(shares > CONTENT)
    return tuple(int(part) for part in (found if len(found) else range(len(shares))))


def _labels(case: Case, config: ClassSettings) -> npt.NDArray[np.bool_]:
    names = [name.strip() for name in case.label.split(";") if name.strip()] if config.multi_label else [case.label]
    unknown = [name for name in names if name not in config.classes]
    if unknown:
        raise DataError(
            f"{config.table.file} names a class that task.classes does not list; the study has "
            f"{', '.join(config.classes)}",
            detail=f"{case.images[0]}: {unknown[0]!r}",
        )
    return np.array([name in names for name in config.classes])
