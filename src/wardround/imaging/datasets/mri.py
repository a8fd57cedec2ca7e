"""The examples of one site: which slices of which patients, as images of one size. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wardround.errors import DataError
from wardround.imaging.datasets.split import Deal, Role, SplitName, by_seed
from wardround.imaging.orientation import Turn
from wardround.imaging.readers.folder import SiteFolder
from wardround.imaging.readers.volume import FloatArray
from wardround.study.tasks import Slices, Split
from wardround.wire.canonical import canonical_json

BoolArray = NDArray[np.bool_]

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
# Air in a magnitude image lies far below tissue: a tenth of the bright end separates them at any contrast.
_AIR = 0.1
# Interpolation leaves small undershoots; anything lower is no magnitude image.
_UNDERSHOOT = 0.05


@dataclass(frozen=True, order=True)
class SliceExample:
    """One slice: patient number (in the order of the site's folder), contrast, slice number."""

    patient: int
    contrast: str
    slice: int


@dataclass(frozen=True, eq=False)
class _Survey:
    """What is remembered of a volume: its peak, the level of air, the share of the head in each slice."""

    peak: float
    air: float
    shares: FloatArray


class SliceIndex:
    """The slices of a site as examples of `size` (H, W) pixels, split by patient.

    Every volume is divided by its own maximum, so images lie in [0, 1] and 1 is the range of PSNR and SSIM.
    Images are cropped or zero-padded around their centre, never interpolated. Raises DataError, at the
    latest when examples are first asked for, where a patient lacks a contrast, where an image's size in
    plane differs from `size` by more than a factor of two, or where a training site is left without
    training examples.
    """

    def __init__(
        self,
        folder: SiteFolder,
        *,
        contrasts: Sequence[str],
        size: tuple[int, int],
        slices: Slices,
        split: Split,
        seed: int,
        role: Role = "train",
        deal: Deal = by_seed,
    ) -> None:
        folder.require(contrasts)
        self._folder = folder
        self._contrasts = tuple(contrasts)
        self._size = size
        self._slices = slices
        self._split = deal(folder.site, [folder.name(i) for i in range(len(folder))], split, seed, role)
        self._surveys: dict[tuple[int, str], _Survey] = {}

    @property
    def site(self) -> str:
        """The site's name."""
        return self._folder.site

    def name(self, patient: int) -> str:
        """Return the name of a patient's folder: it stays at the site."""
        return self._folder.name(patient)

    def patients(self, split: SplitName) -> tuple[int, ...]:
        """Return the numbers of the patients of a split, ascending."""
        return self._split[split]

    def examples(self, split: SplitName, slices: Slices | None = None) -> tuple[SliceExample, ...]:
        """Return the examples of a split by patient, contrast and slice; `slices` replaces the own rule.

        Of each volume: every n-th slice, then those with enough foreground, then at most `per_patient` of
        them.
        """
        rule = slices or self._slices
        found = tuple(
            SliceExample(patient, contrast, int(number))
            for patient in self._split[split]
            for contrast in self._contrasts
            for number in chosen(self._survey(patient, contrast).shares, rule)
        )
        if self._split[split] and not found:
            raise DataError(
                f"site {self.site}: no {split} slice has {rule.minimum_foreground:.0%} foreground; "
                "lower `slices.minimum_foreground`"
            )
        return found

    def image(self, example: SliceExample) -> FloatArray:
        """Return a slice as float32 `(H, W)` in [0, 1], 1 being the maximum of its volume."""
        survey = self._survey(example.patient, example.contrast)
        scaled = self._slice(example) / np.float32(survey.peak)
        return np.asarray(np.clip(scaled, 0, 1), dtype=np.float32)

    def mask(self, example: SliceExample) -> BoolArray:
        """Return where the head is, bool `(H, W)`: see `head_mask`."""
        return head_mask(self._slice(example), self._survey(example.patient, example.contrast).air)

    def turn(self, example: SliceExample) -> Turn | None:
        """How a slice is shown to people; None for as it is stored."""
        return self._folder.turn(example.patient, example.contrast)

    def prompt(self, example: SliceExample) -> None:
        """No network for these images takes a prompt."""

    def fingerprint(self) -> str:
        """Return a sha256 (hex) over what training can see: image content, split, size of the examples.

        Neither names nor paths have a part; folders renamed so that patients change their split change it.
        """
        digest = self._folder.patient_digest
        seen = {name: sorted(digest(patient, self._contrasts) for patient in self._split[name]) for name in SPLITS}
        content = {"patients": seen, "contrasts": sorted(self._contrasts), "size": list(self._size)}
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def _slice(self, example: SliceExample) -> FloatArray:
        volume = self._folder.volume(example.patient, example.contrast)
        return fit_to_size(volume[:, :, example.slice], self._size)

    def _survey(self, patient: int, contrast: str) -> _Survey:
        key = (patient, contrast)
        if key not in self._surveys:
            volume = self._folder.volume(patient, contrast)
            self._check(volume, contrast, self._folder.place(patient, contrast))
            peak = float(volume.max())
            air = _AIR * float(np.percentile(volume, 99))
            slices = (fit_to_size(volume[:, :, z], self._size) for z in range(volume.shape[2]))
            masks = [head_mask(image, air) for image in slices]
            self._surveys[key] = _Survey(peak, air, np.array([m.mean() for m in masks], dtype=np.float32))
        return self._surveys[key]

    def _check(self, volume: NDArray[np.uint8] | FloatArray, contrast: str, place: str) -> None:
        where = f"site {self.site}, contrast {contrast}"
        height, width = volume.shape[:2]
        ratios = (height / self._size[0], width / self._size[1])
        if max(ratios) > 2 or min(ratios) < 0.5:
            raise DataError(
                f"{where}: images of {height} x {width} pixels are too far from the study's size "
                f"{self._size[0]} x {self._size[1]} to be cropped or padded; "
                "resample them, or set `task.size` nearer to them",
                detail=place,
            )
        low, high = float(volume.min()), float(volume.max())
        if high <= 0 or low < -_UNDERSHOOT * high:
            raise DataError(
                f"{where}: an image has negative values, so it is no magnitude image; store magnitudes, or leave the "
                "patient out",
                detail=f"{place}: {low:g} to {high:g}",
            )


def head_mask(image: FloatArray, air: float) -> BoolArray:
    """Return the large connected pieces of `image` `(H, W)` above the level `air`, with their holes filled.

    A piece counts as large from a tenth of the largest on: where the field of view cuts the scalp, skull
    separates it from the brain.
    """
    labels, pieces = ndimage.label(image > air)
    if pieces == 0:
        return np.zeros(image.shape, dtype=np.bool_)
    sizes = np.bincount(labels.ravel())
    large = sizes >= 0.1 * sizes[1:].max()
    large[0] = False
    return fill_holes(np.asarray(large[labels], dtype=np.bool_))


def head_of_slice(image: FloatArray) -> BoolArray:
    """Return where the head is in a slice `(H, W)` whose volume is not at hand: air is as dark as in the slice."""
    return head_mask(image, _AIR * float(np.percentile(image, 99)))


def fill_holes(mask: BoolArray) -> BoolArray:
    """Fill every hole: background that does not reach the border (`binary_fill_holes`, but faster)."""
    labels, pieces = ndimage.label(~mask)
    outside = np.zeros(pieces + 1, dtype=np.bool_)
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[border] = True
    outside[0] = False
    return np.asarray(~outside[labels], dtype=np.bool_)


def fit_to_size(image: NDArray[np.uint8] | FloatArray, size: tuple[int, int]) -> FloatArray:
    """Crop or zero-pad `image` `(h, w)` around its centre to `size`, float32; pixel n // 2 stays central."""
    fitted: FloatArray = image.astype(np.float32)
    for axis, wanted in enumerate(size):
        have = fitted.shape[axis]
        start = have // 2 - wanted // 2
        if have >= wanted:
            fitted = np.take(fitted, range(start, start + wanted), axis=axis)
        else:
            padding = [(0, 0), (0, 0)]
            padding[axis] = (-start, wanted - have + start)
            fitted = np.pad(fitted, padding)
    return fitted


def chosen(shares: FloatArray, rule: Slices) -> NDArray[np.intp]:
    numbers = np.arange(0, len(shares), rule.every)
    numbers = numbers[shares[numbers] >= rule.minimum_foreground]
    if rule.per_patient is not None and len(numbers) > rule.per_patient:
        # The middles of equal parts: evenly spread, and the middle slice for one.
        middles = (np.arange(rule.per_patient) + 0.5) * len(numbers) / rule.per_patient
        numbers = numbers[middles.astype(np.intp)]
    return numbers
