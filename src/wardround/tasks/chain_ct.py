"""A chain that begins with sinograms: volumes in Hounsfield units, scanned with few views and photons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.ct.simulate import REFINEMENT
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.datasets.ct import BODY, BodyOutline, Grid, Slice, check_axes
from wardround.imaging.datasets.ct_volume import Middle, body_of, brought_back, nearest_on_grid, scannable
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.readers.hounsfield import AIR, check_hounsfield
from wardround.imaging.readers.labelled import LabelledImage, VoxelSpace
from wardround.study.baselines import Baseline
from wardround.study.ct import CTAcquisition
from wardround.tasks.classical import Method
from wardround.tasks.ct import CTScan, Scanner, Scanners
from wardround.tasks.ct_metrics import CT_METRICS, ct_scores, ct_windows, hounsfield
from wardround.tasks.images import Scale
from wardround.tasks.scans import ScansBatch
from wardround.tasks.task import MetricSpec, Window
from wardround.wire.host import on_host
from wardround.wire.random import public_generator

if TYPE_CHECKING:
    from wardround.study.schema import Study
    from wardround.tasks.chain_settings import ChainSettings

# Lung to contrast-filled vessels; bone is white.
WINDOW = (-1000.0, 400.0)
_PER_UNIT = 1000.0  # HU


@dataclass(frozen=True, eq=False)
class PlacedVolume(LabelledImage):
    """A volume on a scanner's grid; `middle` is where in its own slices, in pixels, the isocentre lies."""

    middle: Middle = (0.0, 0.0)


@dataclass(frozen=True)
class Hounsfield:
    """Volumes in HU on the grid that scans are simulated on, rows to the back and columns to the left; see `ScanFrame`.

    Slices are resampled by their physical spacing, the body in the middle. 0 is -1024 HU, so that what a change of an
    image leaves empty is air; a unit is 1000 HU. Masks lie on the same grid, where outlines are measured.
    """

    grid: Grid

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return self.grid.size

    def placed(self, image: LabelledImage, place: str) -> PlacedVolume:
        """On the grid. Raises DataError for values that are no HU, and where no scan can be simulated of an image."""
        space = image.space
        if image.channels.ndim != 4 or space.spacing is None:
            raise DataError(
                "an image does not say how large its voxels are, and no scan in mm can be simulated of it; a chain of "
                "CT takes volumes in HU, as NIfTI",
                detail=place,
            )
        if space.affine is not None:
            check_axes(space.affine, place)
        check_hounsfield(image.channels, Path(place))
        slices = _slices_of(image)
        middle, reach = body_of(slices)
        if reach > self.grid.radius + self.grid.pixel:
            raise DataError(
                f"the body does not fit the field of view: it reaches {reach:.0f} mm from its middle, the scanner sees "
                f"{self.grid.radius:.0f} mm; enlarge `geometry.pixel`, or `geometry.size` with `task.size`, and the "
                "detector with it",
                detail=place,
            )
        count = image.channels.shape[-1]
        hu = np.stack([scannable(one, middle, self.grid) for one in slices])
        channels = hu.reshape(-1, count, *self.size).transpose(0, 2, 3, 1)
        labels = None
        if image.labels is not None:
            labels = nearest_on_grid(_lying(image.labels, space), slices[0].spacing, middle, self.grid)
            labels = np.where(self.grid.inside()[..., None], labels, labels.dtype.type(0))
        pixel = self.grid.pixel
        return PlacedVolume(
            np.ascontiguousarray(channels),
            labels,
            VoxelSpace((pixel, pixel, space.spacing[2])),
            image.combined,
            middle=middle,
        )

    def scales(self, channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
        """The same for every volume."""
        return ((torch.tensor(AIR), torch.tensor(_PER_UNIT)),) * len(channels)

    def shows(self, image: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where there is tissue."""
        return np.asarray(image > BODY)

    def restored(self, values: Tensor, image: LabelledImage, placed: LabelledImage) -> NDArray[np.float32]:
        """Interpolated between the pixels of a reconstruction; 0 where the scanner saw nothing."""
        assert isinstance(placed, PlacedVolume)
        like, pixel = _slices_of(image)[0], self.grid.pixel * REFINEMENT
        found = [
            [brought_back(each, pixel, like, placed.middle, 0.0) for each in of_slice]
            for of_slice in on_host(values.float())
        ]
        return np.ascontiguousarray(_lying(np.moveaxis(np.array(found, np.float32), 0, -1), image.space))

    def in_units(self, images: NDArray[np.float32], image: LabelledImage) -> NDArray[np.float32]:
        """Attenuation relative to water in HU, at least that of nothing."""
        return np.asarray(_PER_UNIT * (np.maximum(images, 0.0) - 1.0), np.float32)


def _lying(array: NDArray[Any], space: VoxelSpace) -> NDArray[Any]:
    """An array (..., right, front, head) with rows to the back and columns to the left, or the other way round."""
    return array if space.affine is None else np.swapaxes(np.flip(array, (-3, -2)), -3, -2)


def _slices_of(image: LabelledImage) -> list[Slice]:
    """The slices of all channels, one channel after the other."""
    assert image.space.spacing is not None
    first, second = image.space.spacing[:2]
    spacing = (first, second) if image.space.affine is None else (second, first)
    volumes = np.maximum(_lying(image.channels, image.space).astype(np.float32), np.float32(AIR))
    return [Slice(np.ascontiguousarray(volume[..., z]), spacing) for volume in volumes for z in range(volume.shape[-1])]


@dataclass(frozen=True, eq=False)
class SinogramScanner:
    """A site's simulated CT scanner; see `SiteScanner`."""

    site: str
    scanner: Scanner
    seed: int
    frame: Hounsfield
    cache: ScanCache[CTScan] = field(default_factory=lambda: ScanCache[CTScan](CACHE_BYTES))

    def scan(self, image: Tensor, patient: int, random: np.random.Generator) -> ScansBatch:
        """Photons and read-out noise come from `random`."""
        return self.scanner.batch(self._measured(image, random))

    def kept(self, image: Tensor, patient: int, *which: int) -> ScansBatch:
        """Kept as it was measured."""
        random = self.random(patient, *which)
        return self.scanner.batch(self.cache.get((patient, *which), lambda: self._measured(image, random)))

    def random(self, patient: int, *which: int) -> np.random.Generator:
        """By the study's seed and the site."""
        return public_generator(self.seed, self.site, "scan", patient, *which)

    def prepare(self, *, keep: bool) -> None:
        """Build the scanner's matrices."""
        self.scanner.prepare(keep=keep)

    def _measured(self, image: Tensor, random: np.random.Generator) -> CTScan:
        hu = np.maximum(_PER_UNIT * image.numpy() + AIR, AIR).astype(np.float32)
        pixel = self.frame.grid.pixel
        return self.scanner.measured(hu, BodyOutline.of(Slice(hu, (pixel, pixel))).mask, random)


class SinogramScanning:
    """See `Scanning`. Raises StudyError for a geometry that cannot be measured with or is of another size."""

    start = "fbp"
    upright = True

    def __init__(self, study: Study, config: ChainSettings) -> None:
        self._study, self._scanners = study, Scanners()
        self._window = WINDOW if config.window is None else config.window
        if config.channels != 1:
            raise StudyError(f"task.channels is {config.channels}, and a scan of CT is of one; set it to 1")
        if study.model.prompt_dimension is not None:
            raise StudyError("model.anatomy: a chain takes no embeddings of patients; remove it")
        for site in study.sites:
            acquisition = self.acquisition(site)
            acquisition.check_size(config.size, site)
            self._scanners.of(acquisition, site)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """In HU, each with its range."""
        return CT_METRICS

    @property
    def windows(self) -> tuple[Window, ...]:
        """Lung and soft tissue."""
        return ct_windows()

    def acquisition(self, site: str | None) -> CTAcquisition:
        """Of a site, or of the study. Raises StudyError where the study has none of its own."""
        found = self._study.acquisition if site is None else self._study.acquisition_of(site)
        if not isinstance(found, CTAcquisition):
            sites = " | ".join(self._study.sites)
            raise StudyError(f"the study has no scanner of its own; choose a site's with --site {sites}")
        return found

    def scanner(self, site: str | None) -> SinogramScanner:
        """Of a site, or of the study; sites of one acquisition share its matrices."""
        found = self._scanners.of(self.acquisition(site), site)
        return SinogramScanner("" if site is None else site, found, self._study.seed, Hounsfield(found.grid))

    @property
    def begin(self) -> Method:
        """Filtered back projection with a Hann window."""
        return _initial

    @property
    def seen(self) -> Callable[[Tensor], Tensor]:
        """See `windowed`."""
        return partial(windowed, window=self._window)

    def scores(self, images: Tensor, scans: ScansBatch) -> dict[str, Tensor]:
        """Of attenuation (B, H, W), below 0 taken for 0: name -> (B,)."""
        return ct_scores(images.clamp_min(0.0), scans.target, scans.body)

    def check_baselines(self, baselines: Mapping[str, Baseline]) -> None:
        """All fit."""


def _initial(operator: LinearOperator, data: Tensor) -> Tensor:
    return operator.initial(data)


def windowed(images: Tensor, window: tuple[float, float]) -> Tensor:
    """Images in attenuation relative to water: the HU of a window as -1 to 1, cut off at its ends.

    Not standardised, as magnitudes are: a number in HU means the same tissue in every slice, and to subtract the mean
    of a slice would take that away. Beyond the window there is no gradient.
    """
    low, high = window
    return (2.0 * (hounsfield(images) - low) / (high - low) - 1.0).clamp(-1.0, 1.0)
