"""Images with masks of one site, and a simulated scan of every channel: the examples of a chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from wardround.imaging.orientation import Turn
from wardround.tasks.images import resampled
from wardround.tasks.labelled import LabelledBatch, LabelledDataset
from wardround.tasks.looks import Look
from wardround.tasks.overlays import fullest
from wardround.tasks.scanning import ScanBatch, SiteScanner
from wardround.tasks.task import Prepared, Split


@dataclass(frozen=True, eq=False)
class ChainBatch:
    """Slices with a scan of each of their channels, and what was drawn on them.

    scans: of B slices with C channels each, B * C images: the channels of a slice follow each other. masks: float32
    (B, K, *shape), in evaluation on the grid of what was scanned. known: float32 (B, K), 1 where the site draws it.
    spacing: the size of a voxel of the masks along their axes, slices first where B counts them. there: float32 (B, C),
    0 for a contrast that an image lacks or that was dropped, whose scan shows nothing; `None` where all are there.
    """

    scans: ScanBatch
    masks: Tensor
    known: Tensor
    spacing: tuple[float, ...] = ()
    there: Tensor | None = None

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def channels(self) -> int:
        """Scans of a slice."""
        return len(self.scans) // len(self.masks)

    @classmethod
    def joined(cls, batches: Sequence[ChainBatch]) -> ChainBatch:
        """One batch of all slices, in order."""
        there = [batch.there for batch in batches]
        given = [part if part is not None else batch.masks.new_ones(len(batch), batch.channels)
                 for part, batch in zip(there, batches, strict=True)]  # fmt: skip
        return cls(
            joined([batch.scans for batch in batches]),
            torch.cat([batch.masks for batch in batches]),
            torch.cat([batch.known for batch in batches]),
            there=None if all(part is None for part in there) else torch.cat(given),
        )


def joined(scans: Sequence[ScanBatch]) -> ScanBatch:
    """One batch of all scans, in order, of one modality."""
    return type(scans[0]).joined(scans)


def parts_of(scans: ScanBatch, channels: int, slices: int) -> Iterator[ScanBatch]:
    """Scans of up to `slices` slices of `channels` channels at a time, in order: a whole volume would fill a memory."""
    step = slices * channels
    for start in range(0, len(scans), step):
        yield scans.part(start, start + step)


class Drawn(Protocol):
    """A site's images with what is known of them, on the scale of a scanner's frame."""

    site: str

    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def owners(self) -> tuple[int, ...]: ...

    def patients(self, split: Split) -> int: ...

    def names(self, split: Split) -> tuple[str, ...]: ...

    def looks(self, split: Split) -> Iterator[tuple[int, Look]]: ...

    def set_aside(self) -> dict[Split, int]: ...

    def set_aside_unknown(self) -> int: ...


DrawnT = TypeVar("DrawnT", bound=Drawn)


class ScannedDataset(Generic[DrawnT]):
    """One site's images with simulated scans: what is the same whatever is known of the images.

    A training example is changed and then scanned anew each time: noise, and what else is of one scan, comes from the
    random numbers of the step. How a scan in evaluation looks is public randomness, so every arm of a study sees the
    same raw data. Where a scanner has something slow to make, this is `wardround.tasks.task.Prepared`.
    """

    def __init__(self, drawn: DrawnT, scanner: SiteScanner) -> None:
        self.site = drawn.site
        self._drawn = drawn
        self._scanner = scanner
        self._owners = drawn.owners()
        if isinstance(scanner, Prepared):
            self.prepare = scanner.prepare

    def fingerprint(self) -> str:
        """Sha256 (hex) over the content of images, what is known of them and who trains, never over names or paths."""
        return self._drawn.fingerprint()

    def __len__(self) -> int:
        return len(self._owners)

    def owners(self) -> tuple[int, ...]:
        """Whose each training slice is."""
        return self._owners

    def patients(self, split: Split) -> int:
        """Number of patients in a split."""
        return self._drawn.patients(split)

    def names(self, split: Split) -> tuple[str, ...]:
        """The names of the patients of a split, in the order of `evaluation`: they stay at the site."""
        return self._drawn.names(split)

    def looks(self, split: Split) -> Iterator[tuple[int, Look]]:
        """What is scanned, before it is; see `wardround.tasks.looks.Looked`."""
        return self._drawn.looks(split)

    def set_aside(self) -> dict[Split, int]:
        """How many patients of each part are set aside; see `wardround.tasks.task.SetsAside`."""
        return self._drawn.set_aside()

    def set_aside_unknown(self) -> int:
        """How many images are set aside of which it is not known whose they are."""
        return self._drawn.set_aside_unknown()


class ChainDataset(ScannedDataset[LabelledDataset]):
    """One site's images and masks with simulated scans; see `wardround.tasks.task.Dataset`."""

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> ChainBatch:
        """Training slices, changed and then scanned with `random` alone."""
        return ChainBatch.joined([self._training(index, random) for index in indices])

    def evaluation(self, split: Split) -> Iterator[tuple[int, ChainBatch]]:
        """(patient number, a whole image), patient by patient: all slices of a volume, or a picture."""
        for patient, number, image in self._whole(split):
            yield patient, self._scanned(image, patient, number, range(len(image)))

    def shown(self) -> Iterator[tuple[ChainBatch, Turn | None]]:
        """The slice of the first test patient with most of the structures, a batch of one for each of its channels."""
        for patient, number, image in self._whole("test"):
            chosen = int(image.masks.flatten(1).sum(1).argmax())
            batch, turn = self._scanned(image, patient, number, (chosen,)), self._drawn.turn(patient, number)
            for channel in range(batch.channels):
                if batch.there is not None and not batch.there[0, channel]:
                    continue
                yield ChainBatch(batch.scans.part(channel, channel + 1), batch.masks, batch.known), turn
            return

    def tested(self, place: int) -> ChainBatch:
        """The slice with most of the structures, of the test patient at a place in the order of `evaluation`."""
        image = self._drawn.tested(place)
        chosen = fullest(np.moveaxis(image.masks.numpy() > 0.5, 0, -1))
        return self._scanned(image, self._drawn.tested_patient(place), 0, (chosen,))

    def _whole(self, split: Split) -> Iterator[tuple[int, int, LabelledBatch]]:
        """Patient, number of the image among the patient's, and the image."""
        numbers: Counter[int] = Counter()
        for patient, image in self._drawn.evaluation(split):
            yield patient, numbers[patient], image
            numbers[patient] += 1

    def _training(self, index: int, random: np.random.Generator) -> ChainBatch:
        drawn, patient = self._drawn.batch([index], random), self._owners[index]
        scans = joined([self._scanner.scan(image, patient, random) for image in drawn.images[0]])
        return ChainBatch(scans, _on_grid(drawn.masks, scans), drawn.known, there=self._there(drawn.images))

    def _there(self, images: Tensor) -> Tensor | None:
        """Which channels of images (B, C, H, W) show anything, at a site where some may not; else `None`."""
        return images.flatten(2).ne(0.0).any(2).float() if self._drawn.lacks else None

    def _scanned(self, image: LabelledBatch, patient: int, number: int, slices: Sequence[int]) -> ChainBatch:
        chosen = list(slices)
        scans = [
            self._scanner.kept(values, patient, number, part, channel)
            for part in chosen
            for channel, values in enumerate(image.images[part])
        ]
        there = self._there(image.images[chosen])
        return ChainBatch(joined(scans), image.masks[chosen], image.known[chosen], image.spacing, there)


def _on_grid(masks: Tensor, scans: ScanBatch) -> Tensor:
    """Masks of what was scanned on the grid of its image, which may be coarser: what fills half a pixel."""
    grid = tuple(scans.target.shape[1:])
    return masks if masks.shape[2:] == grid else (resampled(masks, grid) >= 0.5).to(masks.dtype)
