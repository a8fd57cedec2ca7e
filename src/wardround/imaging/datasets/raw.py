"""The examples of one site that has raw data: which slices of which patients, on one grid and on one scale."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from wardround.errors import DataError, GeometryError
from wardround.imaging.acquisition.mri.coils import calibration_region
from wardround.imaging.acquisition.mri.operator import fft2c, ifft2c
from wardround.imaging.datasets.mri import SPLITS, BoolArray, SliceExample, chosen, fit_to_size, head_mask
from wardround.imaging.datasets.split import Deal, Role, SplitName, by_seed
from wardround.imaging.datasets.visits import Visits
from wardround.imaging.readers.aside import Aside, refuse
from wardround.imaging.readers.raw.folder import RawFolder
from wardround.imaging.readers.raw.slices import ComplexArray, RawSlices, fully_sampled
from wardround.imaging.readers.volume import FloatArray
from wardround.study.acquisition import ESPIRIT_LINES
from wardround.study.tasks import Slices, Split
from wardround.wire.canonical import canonical_json

#: What slices of raw data are called where others have a contrast.
CONTRAST = "raw"
_AIR = 0.1  # of the bright end of a volume, as in images
_OPEN = 8  # patients whose files stay known
Sampling = Literal["retrospective", "own"]
# Stops a site that must set too many patients aside: called once with the site, how many it has, and who is.
Quarantine = Callable[[str, int, Sequence[Aside]], None]


@dataclass(frozen=True, eq=False)
class RawExample:
    """One slice on the grid of the study, divided by the maximum of its volume.

    kspace: complex64 (coils, H, W). mask: float32 (H, W), 1 where measured; 1 everywhere for a full scan. reference:
    float32 (H, W), 0 everywhere where none is known. head: bool (H, W).
    """

    kspace: ComplexArray
    mask: FloatArray
    reference: FloatArray
    head: BoolArray


@dataclass(frozen=True, eq=False)
class _Part:
    """One file of a patient: its slices' share of foreground, its maximum and the level of air."""

    shares: FloatArray
    peak: float
    air: float


class RawIndex:
    """The slices of a site's raw data as examples of `size` (H, W), split by patient.

    A full scan's coil images are cropped or padded around their centre to `size`, never interpolated: the field of view
    changes and the voxel does not. A file that is undersampled by itself must have `size` columns, for its images are
    not known; its readout is cropped likewise. Each volume (a file) is divided by the maximum of its reference: the
    root sum of squares over coils of a full scan, or the file's own image; with `reference` False, that of the
    zero-filled images. A patient's slices are counted over all files, in the order of their names.

    All files of patients in `served` splits are read once here. One that cannot be used is set aside, with its patient.
    Raises DataError where `quarantine` does, and where no patient is left to train.
    """

    def __init__(
        self,
        folder: RawFolder,
        *,
        size: tuple[int, int],
        slices: Slices,
        split: Split,
        seed: int,
        sampling: Sampling,
        reference: bool = True,
        espirit: bool = False,
        role: Role = "train",
        deal: Deal = by_seed,
        quarantine: Quarantine = refuse,
        served: Sequence[SplitName] = SPLITS,
    ) -> None:
        self._folder, self._size, self._slices = folder, size, slices
        self._sampling, self._has_reference, self._espirit = sampling, reference, espirit
        dealt = deal(folder.site, folder.names, split, seed, role)
        self._opened: OrderedDict[int, list[RawSlices]] = OrderedDict()
        self._parts: dict[int, list[_Part]] = {}
        self._dealt = {part: dealt[part] if part in served else () for part in SPLITS}
        aside = []
        for patient in sorted(patient for part in self._dealt.values() for patient in part):
            try:
                self._parts[patient] = self._survey(patient)
            except DataError as error:
                aside.append(Aside(folder.name(patient), str(error), error.detail))
        quarantine(folder.site, len(self._parts) + len(aside), aside)
        self._whole = {part: tuple(p for p in dealt[part] if p in self._parts or part not in served) for part in SPLITS}
        self._split = {part: tuple(p for p in self._dealt[part] if p in self._parts) for part in SPLITS}
        if self._dealt["train"] and not self._split["train"]:
            raise DataError(f"site {self.site}: no patient is left to train, after those that cannot be used")

    @property
    def site(self) -> str:
        """The site's name."""
        return self._folder.site

    def name(self, patient: int) -> str:
        """Return what the site calls a patient: it stays at the site."""
        return self._folder.name(patient)

    def patients(self, split: SplitName) -> tuple[int, ...]:
        """Return the numbers of the patients of a split, ascending."""
        return self._split[split]

    def set_aside(self) -> dict[SplitName, int]:
        """How many patients of each part cannot be used."""
        return {part: len(self._dealt[part]) - len(self._split[part]) for part in SPLITS}

    def examples(self, split: SplitName, slices: Slices | None = None) -> tuple[SliceExample, ...]:
        """Return the examples of a split by patient and slice; `slices` replaces the own rule."""
        rule = slices or self._slices
        found = tuple(
            SliceExample(patient, CONTRAST, int(number))
            for patient in self._split[split]
            for number in chosen(np.concatenate([part.shares for part in self._parts[patient]]), rule)
        )
        if self._split[split] and not found:
            raise DataError(
                f"site {self.site}: no {split} slice has {rule.minimum_foreground:.0%} foreground; "
                "lower `slices.minimum_foreground`"
            )
        return found

    def raw(self, example: SliceExample) -> RawExample:
        """Return a slice's raw data. Raises DataError where its file changed since it was looked at."""
        file, number = self._place(example)
        part, scan = self._parts[example.patient][file], self._files(example.patient)[file]
        kspace, mask, image = self._fitted(scan, number)
        reference = image / np.float32(part.peak)
        head = head_mask(image, part.air)
        if not self._has_reference:
            reference = np.zeros_like(reference)
        return RawExample(kspace / np.float32(part.peak), mask, reference, head)

    def image(self, example: SliceExample) -> FloatArray:
        """Return the reference of a slice, float32 (H, W), 1 being the maximum of its volume."""
        return self.raw(example).reference

    def mask(self, example: SliceExample) -> BoolArray:
        """Return where the head is, bool (H, W)."""
        return self.raw(example).head

    def turn(self, example: SliceExample) -> None:
        """Raw data do not say how a patient lies."""

    def prompt(self, example: SliceExample) -> None:
        """No network for these images takes a prompt."""

    def fingerprint(self) -> str:
        """Return a sha256 (hex) over what training can see: content of the files, split, size of the examples.

        Neither names nor paths have a part.
        """
        digest = self._folder.digest
        seen = {name: sorted(digest(patient) for patient in self._whole[name]) for name in SPLITS}
        content = {"patients": seen, "raw": self._sampling, "size": list(self._size)}
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def _place(self, example: SliceExample) -> tuple[int, int]:
        """Of a running number: which file, and which slice of it."""
        number = example.slice
        for file, part in enumerate(self._parts[example.patient]):
            if number < len(part.shares):
                return file, number
            number -= len(part.shares)
        raise IndexError(f"slice {example.slice} of a patient")

    def _files(self, patient: int) -> list[RawSlices]:
        if patient not in self._opened:
            self._opened[patient] = self._folder.open(patient)
            if len(self._opened) > _OPEN:
                self._opened.popitem(last=False)
        self._opened.move_to_end(patient)
        return self._opened[patient]

    def _survey(self, patient: int) -> list[_Part]:
        return [self._part(scan) for scan in self._files(patient)]

    def _part(self, scan: RawSlices) -> _Part:
        scan.require_cartesian()
        self._check_size(scan)
        if self._espirit and scan.coils == 1:
            raise scan.error("ESPIRiT compares coils, and raw data are of one; set acquisition.maps: estimated")
        images = [image for _, _, image in (self._fitted(scan, number) for number in range(len(scan)))]
        peak = float(max(image.max() for image in images))
        if peak <= 0.0:
            raise scan.error("a raw data file holds nothing but zeros")
        air = _AIR * float(np.percentile(np.stack(images), 99))
        return _Part(np.array([head_mask(image, air).mean() for image in images], np.float32), peak, air)

    def _check_size(self, scan: RawSlices) -> None:
        height, width = scan.shape[2:]
        ratios = (height / self._size[0], width / self._size[1])
        if max(ratios) > 2 or min(ratios) < 0.5:
            raise scan.error(
                f"raw data of {height} x {width} samples are too far from the study's size {self._size[0]} x "
                f"{self._size[1]} to be cropped or padded; set `task.size` nearer to them"
            )
        if self._sampling == "own" and width != self._size[1]:
            raise scan.error(
                f"raw data that are undersampled as measured have {width} columns and the study {self._size[1]}; give "
                f"`task.size` {width} columns: lines that were not measured cannot be cropped or padded"
            )
        if self._sampling == "own" and self._has_reference and scan.picture is None:
            raise scan.error(
                "raw data hold no reference image (reconstruction_rss), and acquisition.reference is `file`; set it to "
                "`none`"
            )

    def _fitted(self, scan: RawSlices, number: int) -> tuple[ComplexArray, FloatArray, FloatArray]:
        """K-space, mask and image (H, W) of a slice on the study's grid, in the units of its file."""
        kspace = scan.kspace(number)
        mask = scan.mask(number, kspace)
        if self._sampling == "own":
            return self._own(scan, number, kspace, mask)
        if not fully_sampled(mask):
            raise scan.error(
                f"raw data are undersampled as measured ({mask.mean():.0%} of a slice); leave the file out, or set "
                "acquisition.sampling: own for a site of such files"
            )
        kspace, images = _on_grid(kspace, self._size)
        return kspace, np.ones(self._size, np.float32), _root_sum_of_squares(images)

    def _own(
        self, scan: RawSlices, number: int, kspace: ComplexArray, mask: FloatArray
    ) -> tuple[ComplexArray, FloatArray, FloatArray]:
        if fully_sampled(mask):
            raise scan.error(
                "raw data are fully sampled, and acquisition.sampling is `own`; leave the file out, or set it to "
                "`retrospective` for a site of such files"
            )
        if mask.shape[0] != self._size[0]:
            if (mask != mask[:1]).any():
                raise scan.error(
                    f"raw data that are undersampled along both axes have {mask.shape[0]} rows and the study "
                    f"{self._size[0]}; give `task.size` as many"
                )
            kspace, _ = _on_grid(kspace, (self._size[0], mask.shape[1]))
            mask = np.repeat(mask[:1], self._size[0], axis=0)
        try:
            region = calibration_region(mask)
        except GeometryError as error:
            raise scan.error(str(error)) from error
        if self._espirit and min(region) < ESPIRIT_LINES:
            raise scan.error(
                f"ESPIRiT needs {ESPIRIT_LINES} calibration lines, and raw data have {min(region)}; set "
                "acquisition.maps: estimated"
            )
        if self._has_reference:
            assert scan.picture is not None
            return kspace, mask, fit_to_size(_magnitude(scan, number), self._size)
        images: ComplexArray = ifft2c(torch.from_numpy(kspace)).numpy()
        return kspace, mask, _root_sum_of_squares(images)


class RawVisits(Visits[RawIndex]):
    """Test patients of several sites, their raw data undersampled as another site's study says."""

    def raw(self, example: SliceExample) -> RawExample:
        """Return the member's raw data."""
        member, own = self._at_home(example)
        return member.raw(own)

    def set_aside(self) -> dict[SplitName, int]:
        """How many of the members' test patients cannot be used."""
        return {"train": 0, "validation": 0, "test": sum(member.set_aside()["test"] for member in self._members)}


def mirrored(values: np.ndarray) -> np.ndarray:
    """Turn left and right round about index n // 2 of the last axis, of images or of centred k-space alike.

    The transform of an image that is turned round so is its k-space, turned round so.
    """
    turned = values[..., ::-1]
    return np.ascontiguousarray(np.roll(turned, 1, axis=-1) if values.shape[-1] % 2 == 0 else turned)


def _on_grid(kspace: ComplexArray, size: tuple[int, int]) -> tuple[ComplexArray, ComplexArray]:
    """K-space and coil images (coils, H, W), cropped or padded in image space."""
    images = ifft2c(torch.from_numpy(kspace))
    if tuple(kspace.shape[-2:]) == size:
        return kspace, images.numpy()
    fitted = np.stack(list(_planes(images.numpy(), size)))
    found: ComplexArray = fft2c(torch.from_numpy(fitted)).numpy()
    return found, fitted


def _planes(images: ComplexArray, size: tuple[int, int]) -> Iterator[ComplexArray]:
    for image in images:
        yield (fit_to_size(image.real, size) + 1j * fit_to_size(image.imag, size)).astype(np.complex64)


def _root_sum_of_squares(images: ComplexArray) -> FloatArray:
    return np.asarray(np.sqrt((images.real**2 + images.imag**2).sum(0)), np.float32)


def _magnitude(scan: RawSlices, number: int) -> FloatArray:
    assert scan.picture is not None
    image = scan.picture(number)
    if image.ndim != 2 or not np.isfinite(image).all() or image.min() < 0:
        raise scan.error("the reference image of a raw data file is no magnitude image")
    return image
