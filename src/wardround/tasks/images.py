"""What tasks of images share: a site's patients with their images, and how a study's settings become a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.imaging.datasets.memory import ScanCache
from wardround.imaging.datasets.split import Deal, by_seed
from wardround.imaging.orientation import Turn, turn_for
from wardround.imaging.readers.cases import Case, Patterns, Reader, find_cases
from wardround.imaging.readers.labelled import LabelledImage, read_case
from wardround.study.images import CaseTable, ImageSettings
from wardround.study.plugins import NO_PLUGINS
from wardround.tasks.augmentation import Augmentation, standard
from wardround.tasks.task import Source, Split
from wardround.wire.canonical import canonical_json

if TYPE_CHECKING:
    from wardround.study.schema import Study

SettingsT = TypeVar("SettingsT", bound=ImageSettings)
Cases = Mapping[str, Sequence[Case]]
_CACHE_BYTES = 2**30
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# What an image shows is above this share of its maximum.
CONTENT = 0.05


class PatientImages:
    """The images of a site's patients, read when asked for and kept as far as memory goes."""

    def __init__(
        self, site: str, cases: Cases, split: Mapping[Split, Sequence[int]], scales: Scales | None = None
    ) -> None:
        self.site = site
        self._names = tuple(cases)
        self._cases = tuple(tuple(of_patient) for of_patient in cases.values())
        self._split = split
        self._cache = ScanCache[LabelledImage](_CACHE_BYTES)
        self._scales_of = scales_of if scales is None else scales
        self._scales: dict[tuple[int, int], tuple[Scale | None, ...]] = {}

    def patients(self, split: Split) -> int:
        """Number of patients in a split."""
        return len(self._split[split])

    def names(self, split: Split) -> tuple[str, ...]:
        """The names of the patients of a split, in the order of `evaluation`: they stay at the site."""
        return tuple(self._names[patient] for patient in self._split[split])

    def _read(self, patient: int, number: int) -> LabelledImage:
        return self._cache.get((patient, number), lambda: read_case(self._cases[patient][number], self.site))

    def _normalised(self, patient: int, number: int, part: int | None = None) -> Tensor:
        """The channels of an image, or of its slice `part`, each on the scale of the whole image."""
        key, channels = (patient, number), self._read(patient, number).channels
        if key not in self._scales:
            self._scales[key] = self._scales_of(channels)
        return scaled(channels if part is None else channels[..., part], self._scales[key])

    def turn(self, patient: int, number: int) -> Turn | None:
        """How slices of an image are shown to people; `None` where its file does not say how the patient lies."""
        affine = self._read(patient, number).space.affine
        return None if affine is None or np.array_equal(affine, np.eye(4)) else turn_for(np.eye(4))

    def _hashed(self, digests: Sequence[str], **rules: Any) -> str:
        """Sha256 (hex) over every patient's digest by split, and over the rules that make examples of them."""
        seen = {name: sorted(digests[patient] for patient in self._split[name]) for name in _SPLITS}
        return hashlib.sha256(canonical_json({"patients": seen, **rules})).hexdigest()


class ImageTask(Generic[SettingsT]):
    """A study's task of images; see `wardround.tasks.task.Task`."""

    def __init__(self, study: Study, config: SettingsT) -> None:
        self.study, self.config = study, config
        self._deal: Deal = by_seed
        self._readers: Callable[[str], Mapping[str, Reader]] = NO_PLUGINS.readers
        chain = self._standard() if config.augment == "standard" else config.augment
        self._augmentation = Augmentation(() if isinstance(chain, str) else chain)

    def _standard(self) -> Sequence[Mapping[str, Any]]:
        """The changes of training images where the study says `standard`."""
        return standard(self.config.dimensions)

    def deal_by(self, deal: Deal) -> None:
        """See `wardround.tasks.task.Dealing`."""
        self._deal = deal

    def read_by(self, readers: Callable[[str], Mapping[str, Reader]]) -> None:
        """See `wardround.tasks.task.ReadsFiles`."""
        self._readers = readers

    def _cases(
        self, site: str, source: Source, images: tuple[str, ...], mask: str | None, table: CaseTable | None
    ) -> tuple[Cases, Mapping[Split, Sequence[int]]]:
        """A site's images by patient, and who is in which part."""
        cases = find_cases(source, site, Patterns(images, mask, table, self._readers(site)))
        role = self.study.sites[site].role
        return cases, self._deal(site, list(cases), self.config.split, self.study.seed, role)

    def _network(self, channels: int, outputs: int) -> nn.Module:
        """The study's model; one that does not serve the task was refused with the study."""
        build: Any = getattr(self.study.model, self.config.network)
        network: nn.Module = build(self.config.dimensions, channels, outputs)
        return network


Scale = tuple[Tensor, Tensor]
Scales = Callable[[NDArray[np.generic]], tuple[Scale | None, ...]]


def scales_of(channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
    """Mean and deviation of each channel (*shape) over what it shows; `None` for one that shows nothing."""
    return tuple(map(_scale, torch.from_numpy(channels.astype(np.float32))))


def peaks_of(channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
    """0 and the maximum of each channel (*shape): a magnitude image on the scale of a reconstruction, 0 to 1."""
    whole = torch.from_numpy(channels.astype(np.float32)).flatten(1)
    return tuple((torch.zeros(()), peak) if peak > 0 else None for peak in whole.amax(1))


def _scale(channel: Tensor) -> Scale | None:
    inside = channel[channel > CONTENT * channel.max()]
    return (inside.mean(), inside.std().clamp_min(1e-6)) if len(inside) > 1 else None


def scaled(channels: NDArray[np.generic], scales: Sequence[Scale | None]) -> Tensor:
    """Each channel (*shape) minus its mean, over its deviation: float32."""
    values = torch.from_numpy(channels.astype(np.float32))
    for channel, scale in zip(values, scales, strict=True):
        if scale is not None:
            channel.sub_(scale[0]).div_(scale[1])
    return values


def resampled(x: Tensor, grid: Sequence[int], *, nearest: bool = False) -> Tensor:
    """(N, *shape) or (N, C, *shape), over the last axes, on another grid: averaged where smaller, else linear."""
    shape = tuple(x.shape[-len(grid) :])
    if shape == tuple(grid):
        return x
    batch = x if x.ndim == len(grid) + 2 else x[None]
    if nearest:
        made = nn.functional.interpolate(batch, size=tuple(grid), mode="nearest-exact")
    elif all(wanted <= have for wanted, have in zip(grid, shape, strict=True)):
        made = nn.functional.interpolate(batch, size=tuple(grid), mode="area")
    else:
        mode = "trilinear" if len(grid) == 3 else "bilinear"
        made = nn.functional.interpolate(batch, size=tuple(grid), mode=mode, align_corners=False)
    return made if x.ndim == len(grid) + 2 else made[0]
