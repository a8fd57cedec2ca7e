"""A chain that begins with k-space: magnitude images, scanned with coils, phase, a sampling mask and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.mri.scanner import MRIScanner, Scan
from wardround.imaging.acquisition.solvers import zero_filled
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import head_of_slice
from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.acquisition import MRIAcquisition
from wardround.study.baselines import Baseline
from wardround.tasks.classical import Method
from wardround.tasks.images import CONTENT, Scale, peaks_of, resampled
from wardround.tasks.metrics import RECONSTRUCTION_METRICS, reconstruction_scores
from wardround.tasks.mri import MRIBatch, require_estimated_maps, require_phase_for
from wardround.tasks.task import Window
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study
    from wardround.tasks.chain_settings import ChainSettings

# Interpolation leaves small undershoots; anything lower is no magnitude image.
_UNDERSHOOT = 0.05
# A deviation below it is that of a slice of noise, which must not be blown up to look like anatomy.
_LEAST_DEVIATION = 0.02


@dataclass(frozen=True)
class Magnitudes:
    """Images of magnitudes, resampled to `size`, each channel on the scale of its maximum; see `ScanFrame`."""

    size: tuple[int, int]

    def placed(self, image: LabelledImage, place: str) -> LabelledImage:
        """As it is. Raises DataError for an image of which no scan can be simulated."""
        check_magnitudes(image, place)
        return image

    def scales(self, channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
        """0 and the maximum of each channel."""
        return peaks_of(channels)

    def shows(self, image: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Above a share of its maximum."""
        return np.asarray(image > CONTENT * image.max())

    def restored(self, values: Tensor, image: LabelledImage, placed: LabelledImage) -> NDArray[np.float32]:
        """Resampled, over the slices of a volume or for a picture."""
        shape = image.channels.shape[1:]
        found = on_host(resampled(values.float(), shape[:2]))
        return np.ascontiguousarray(np.moveaxis(found, 0, -1) if len(shape) == 3 else found[0])

    def in_units(self, images: NDArray[np.float32], image: LabelledImage) -> NDArray[np.float32]:
        """Each channel times its maximum."""
        peaks = image.channels.reshape(len(image.channels), -1).max(axis=1).astype(np.float32)
        return np.asarray(images * peaks.reshape(-1, *[1] * (images.ndim - 1)))


def check_magnitudes(image: LabelledImage, place: str) -> None:
    """Raises DataError, with `place` in its detail, for an image of which no scan can be simulated."""
    for number, channel in enumerate(image.channels):
        if number in image.absent:
            continue
        low, high = float(channel.min()), float(channel.max())
        if high <= 0.0 or low < -_UNDERSHOOT * high:
            raise DataError(
                "a channel has negative values, or none above 0, so it is no magnitude image, of which a "
                "scan could be simulated; store magnitudes, or leave the patient out",
                detail=f"{place}: {low:g} to {high:g}",
            )


@dataclass(frozen=True, eq=False)
class KSpaceScanner:
    """A site's simulated MRI scanner; see `SiteScanner`. A patient's sampling mask serves all slices and channels."""

    scanner: MRIScanner
    frame: Magnitudes
    cache: ScanCache[Scan] = field(default_factory=lambda: ScanCache[Scan](CACHE_BYTES))

    def scan(self, image: Tensor, patient: int, random: np.random.Generator) -> MRIBatch:
        """Coils, phase and noise come from `random`."""
        seen = magnitude(image)
        return MRIBatch.of(self.scanner.scan(seen, patient, random), seen, head_of_slice(seen))

    def kept(self, image: Tensor, patient: int, *which: int) -> MRIBatch:
        """Kept without the zeros of its k-space."""
        seen, scanner = magnitude(image), self.scanner
        scan = self.cache.get((patient, *which), lambda: scanner.scan(seen, patient, scanner.random(patient, *which)))
        return MRIBatch.of(scan, seen, head_of_slice(seen))

    def random(self, patient: int, *which: int) -> np.random.Generator:
        """By the study's seed and the site."""
        return self.scanner.random(patient, *which)


def magnitude(image: Tensor) -> NDArray[np.float32]:
    """An image (H, W) between 0 and 1: interpolation may leave undershoots."""
    return np.asarray(image.clamp(0.0, 1.0).numpy(), dtype=np.float32)


class KSpaceScanning:
    """See `Scanning`. Raises StudyError for a real model where coil maps do not carry the phase."""

    start = "zero_filled"
    upright = False
    metrics = RECONSTRUCTION_METRICS
    #: None: a magnitude image has its own range.
    windows: tuple[Window, ...] = ()

    def __init__(self, study: Study, config: ChainSettings) -> None:
        self._study, self._size = study, config.size
        if config.window is not None:
            raise StudyError("task.window is of images in HU, and the study's acquisition is MRI; take it out")
        for site in study.sites:
            self.acquisition(site).check_maps(config.size, site)
        if study.model.real_images and config.seen == "reconstruction":
            require_estimated_maps(study, "model.image: real")

    def acquisition(self, site: str | None) -> MRIAcquisition:
        """Of a site, or of the study."""
        found = self._study.acquisition if site is None else self._study.acquisition_of(site)
        assert isinstance(found, MRIAcquisition)
        return found

    def scanner(self, site: str | None) -> KSpaceScanner:
        """Of a site, or of the study."""
        return KSpaceScanner(
            MRIScanner("" if site is None else site, self.acquisition(site), self._study.seed), Magnitudes(self._size)
        )

    @property
    def begin(self) -> Method:
        """K-space filled with zeros."""
        return zero_filled

    @property
    def seen(self) -> Callable[[Tensor], Tensor]:
        """See `standardised`."""
        return standardised

    def scores(self, images: Tensor, scans: MRIBatch) -> dict[str, Tensor]:
        """Of magnitudes (B, H, W): name -> (B,)."""
        return reconstruction_scores(images, scans.target, scans.head)

    def check_baselines(self, baselines: Mapping[str, Baseline]) -> None:
        """Raises StudyError where coil maps do not carry a phase that a method needs."""
        require_phase_for(self._study, baselines)


def standardised(images: Tensor) -> Tensor:
    """Images (..., H, W) minus their mean, over their deviation, each of what it shows.

    So the diagnosis does not depend on the scale of the k-space. The two numbers are taken as they are: no gradient
    flows through them.
    """
    shown = images.detach()
    inside = (shown > CONTENT * shown.amax((-2, -1), keepdim=True)).to(images.dtype)
    count = inside.sum((-2, -1), keepdim=True).clamp_min(1.0)
    mean = (shown * inside).sum((-2, -1), keepdim=True) / count
    variance = ((shown - mean).square() * inside).sum((-2, -1), keepdim=True) / count
    return (images - mean) / variance.sqrt().clamp_min(_LEAST_DEVIATION)
