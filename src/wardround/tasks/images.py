"""What tasks of images share: a site's patients with their images, and how a study's settings become a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import DataError
from wardround.imaging.datasets.memory import ScanCache
from wardround.imaging.datasets.split import Deal, by_seed
from wardround.imaging.orientation import Turn, turn_for
from wardround.imaging.readers.aside import Aside, refuse
from wardround.imaging.readers.cases import Case, Patterns, Reader, sort_cases
from wardround.imaging.readers.labelled import LabelledImage, read_image
from wardround.models.spectrum import with_spectrum
from wardround.study.images import CaseTable, ImageSettings, UsedLabels
from wardround.study.normalise import STANDARD, Normalise, PercentileScale, ZScore
from wardround.study.plugins import NO_PLUGINS
from wardround.study.rules import optional_contrasts
from wardround.tasks.augmentation import Augmentation, standard
from wardround.tasks.curves import Curve, curve_through
from wardround.tasks.looks import Look, planes_of
from wardround.tasks.task import Source, Split
from wardround.wire.canonical import canonical_json, digest
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from wardround.study.schema import Study

SettingsT = TypeVar("SettingsT", bound=ImageSettings)
Cases = Mapping[str, Sequence[Case]]
_CACHE_BYTES = 2**30
_ALL = UsedLabels()
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# What an image shows is above this share of its maximum.
CONTENT = 0.05


# Stops a site that must set too many patients aside: called once with the site, how many it has, and who is.
Quarantine = Callable[[str, int, Sequence[Aside]], None]


@dataclass(frozen=True)
class SitePatients:
    """A site's patients: all names in order, the images of those that can be used, who is in which part, who is aside.

    Who cannot be used is dealt out as the others are, so that no other changes places when their files are mended.
    """

    site: str
    names: tuple[str, ...]
    cases: Cases
    split: Mapping[Split, Sequence[int]]
    aside: tuple[Aside, ...]
    quarantine: Quarantine
    #: Who trains without a label: their labels are not used.
    unlabelled: frozenset[int] = frozenset()


class PatientImages:
    """The images of a site's patients, all read when the set is made, and kept as far as memory goes.

    A patient whose images cannot be read or used, as `_examined` finds, is set aside. Raises DataError where those are
    too many for the site, and where none is left to train of those that should.
    """

    def __init__(self, patients: SitePatients, frame: Frame | None = None) -> None:
        self.site = patients.site
        self._frame = NORMALISED if frame is None else frame
        self._names = patients.names
        self._cases = tuple(tuple(patients.cases.get(name, ())) for name in patients.names)
        self._cache = ScanCache[LabelledImage](_CACHE_BYTES)
        self._scales: dict[tuple[int, int], tuple[Scale | None, ...]] = {}
        self._split = patients.split
        # Whom no part has is of another site that shares the folder.
        dealt = {self._names[patient] for part in patients.split.values() for patient in part}
        incomplete = (one for one in patients.aside if not one.patient or one.patient in dealt)
        aside = (*incomplete, *self._examine(dealt))
        total = len(dealt) + sum(not one.patient for one in aside)
        patients.quarantine(self.site, total, aside)
        out = {one.patient for one in aside}
        self._split = {
            part: tuple(patient for patient in patients.split[part] if self._names[patient] not in out)
            for part in _SPLITS
        }
        self._aside = {part: len(patients.split[part]) - len(self._split[part]) for part in _SPLITS}
        self._unknown = sum(not one.patient for one in aside)
        if patients.split["train"] and not self._split["train"]:
            raise DataError(f"site {self.site}: no patient is left to train, after those that cannot be used")

    def _examine(self, dealt: Set[str]) -> list[Aside]:
        found = []
        for patient, of_patient in enumerate(self._cases):
            for number, case in enumerate(of_patient if self._names[patient] in dealt else ()):
                try:
                    self._examined(patient, number, self._read(patient, number), case)
                except DataError as error:
                    found.append(Aside(self._names[patient], str(error), error.detail))
                    break
        return found

    def _examined(self, patient: int, number: int, image: LabelledImage, case: Case) -> None:
        """Look at an image once; raises DataError, whose message names no patient, for one that cannot be used."""

    def set_aside(self) -> dict[Split, int]:
        """How many patients of each part are set aside; see `wardround.tasks.task.SetsAside`."""
        return dict(self._aside)

    def set_aside_unknown(self) -> int:
        """How many images or rows are set aside of which it is not known whose they are."""
        return self._unknown

    def patients(self, split: Split) -> int:
        """Number of patients in a split."""
        return len(self._split[split])

    def names(self, split: Split) -> tuple[str, ...]:
        """The names of the patients of a split, in the order of `evaluation`: they stay at the site."""
        return tuple(self._names[patient] for patient in self._split[split])

    def _read(self, patient: int, number: int) -> LabelledImage:
        def read() -> LabelledImage:
            case = self._cases[patient][number]
            return self._frame.placed(read_image(case), str(case.images[0]))

        return self._cache.get((patient, number), read)

    def _normalised(self, patient: int, number: int, part: int | None = None) -> Tensor:
        """The channels of an image, or of its slice `part`, each on the scale of the whole image."""
        key, channels = (patient, number), self._read(patient, number).channels
        if key not in self._scales:
            self._scales[key] = self._frame.scales(channels)
        return scaled(channels if part is None else channels[..., part], self._scales[key])

    def looks(self, split: Split) -> Iterator[tuple[int, Look]]:
        """(patient number, an image as the network would see it), patient by patient; see `wardround.tasks.looks`."""
        for patient in self._split[split]:
            for number in range(len(self._cases[patient])):
                yield patient, self._look(patient, number)

    def _look(self, patient: int, number: int) -> Look:
        image, channels = self._read(patient, number), self._normalised(patient, number)
        shown = np.stack([self._frame.shows(channel.astype(np.float32)) for channel in image.channels])
        return Look(
            [on_host(channel)[inside] for channel, inside in zip(channels, shown, strict=True)],
            planes_of(self._seen_as(image, channels)),
            planes_of(self._seen_as(image, torch.from_numpy(shown.astype(np.float32)))) > 0.5,
            image.channels.shape[1:],
            self._spacing_of(image),
            self._structures_of(patient, image),
            self._classes_of(patient, number),
        )

    def _seen_as(self, image: LabelledImage, channels: Tensor) -> Tensor:
        """Channels (C, *shape) of an image on the grid of the network: (B, C, *grid)."""
        raise NotImplementedError

    def _spacing_of(self, image: LabelledImage) -> tuple[float, ...] | None:
        """The size of a voxel in mm, where the study believes what the files say of it."""
        return image.space.spacing

    def _structures_of(self, patient: int, image: LabelledImage) -> tuple[NDArray[np.bool_] | None, ...]:
        """What is drawn of each structure (*shape); `None` of one that is not drawn here, or not of this patient."""
        return ()

    def _classes_of(self, patient: int, number: int) -> NDArray[np.bool_] | None:
        """Which classes an image shows (K,); `None` where nothing is known of it."""
        return None

    def turn(self, patient: int, number: int) -> Turn | None:
        """How slices of an image are shown to people; `None` where its file does not say how the patient lies."""
        affine = self._read(patient, number).space.affine
        return None if affine is None or np.array_equal(affine, np.eye(4)) else turn_for(np.eye(4))

    def _hashed(self, digests: Mapping[int, str], **rules: Any) -> str:
        """Sha256 (hex) over every patient's digest by split, and over the rules that make examples of them."""
        seen = {name: sorted(digests[patient] for patient in self._split[name]) for name in _SPLITS}
        return hashlib.sha256(canonical_json({"patients": seen, **rules})).hexdigest()


class ImageTask(Generic[SettingsT]):
    """A study's task of images; see `wardround.tasks.task.Task`. By itself it refuses patients who cannot be used."""

    def __init__(self, study: Study, config: SettingsT) -> None:
        self.study, self.config = study, config
        self._deal: Deal = by_seed
        self._quarantine: Quarantine = refuse
        self._readers: Callable[[str], Mapping[str, Reader]] = NO_PLUGINS.readers
        chain = self._standard() if config.augment == "standard" else config.augment
        self._augmentation = Augmentation(() if isinstance(chain, str) else chain)

    @cached_property
    def frame(self) -> Normalised:
        """How images are normalised, at a site and at a clinic."""
        return frame_of(getattr(self.config, "normalise", ZScore()))

    def _standard(self) -> Sequence[Mapping[str, Any]]:
        """The changes of training images where the study says `standard`."""
        return standard(self.config.dimensions)

    def deal_by(self, deal: Deal) -> None:
        """See `wardround.tasks.task.Dealing`."""
        self._deal = deal

    def read_by(self, readers: Callable[[str], Mapping[str, Reader]]) -> None:
        """See `wardround.tasks.task.ReadsFiles`."""
        self._readers = readers

    def set_aside_by(self, quarantine: Quarantine) -> None:
        """See `wardround.tasks.task.SettingAside`."""
        self._quarantine = quarantine

    def _patients(
        self,
        site: str,
        source: Source,
        images: tuple[str, ...],
        mask: str | None,
        table: CaseTable | None,
        labels: UsedLabels = _ALL,
    ) -> SitePatients:
        """A site's images by patient, and who is in which part; of those who train, as many as `labels` says.

        Contrasts that the study says the site lacks are not looked for.

        With a teacher the others train, too, without labels.
        """
        missing = frozenset(map(images.index, self.study.sites[site].missing))
        found = sort_cases(source, site, Patterns(images, mask, table, self._readers(site), absent=missing))
        names = tuple(sorted({*found.cases, *(one.patient for one in found.aside if one.patient)}))
        if not found.cases:
            self._quarantine(site, len(found.aside), found.aside)
            raise DataError(f"site {site} has no patient who can be used")
        split = self._deal(site, names, self.config.split, self.study.seed, self.study.sites[site].role)
        used = _labelled(split["train"], names, labels, site, self.study.seed)
        taught = split["train"] if self.config.taught_by is not None else used
        unlabelled = frozenset(taught).difference(used)
        parts = {**split, "train": taught}
        return SitePatients(site, names, found.cases, parts, found.aside, self._quarantine, unlabelled)

    def _patterns(self, images: tuple[str, ...], table: CaseTable | None) -> Patterns:
        """How the files of images without masks or labels are named."""
        whose = None if table is None else CaseTable(file=table.file, id=table.id, patient=table.patient)
        return Patterns(
            images,
            None,
            whose,
            self._readers(""),
            optional=optional_contrasts(self.study),
            remedy="complete it; this model was not trained to do without (task.drop_contrasts, sites.NAME.missing)",
        )

    def _with_spectrum(self, network: nn.Module, channels: int, shape: Sequence[int]) -> nn.Module:
        """The network of images (B, channels, *shape) with what the study's method asks for of their amplitudes."""
        return with_spectrum(network, self.study.method.spectrum, channels, shape, self.study.training_sites)

    def _network(self, channels: int, outputs: int) -> nn.Module:
        """The study's model; one that does not serve the task was refused with the study."""
        build: Any = getattr(self.study.model, self.config.network)
        network: nn.Module = build(self.config.dimensions, channels, outputs)
        return network


def _labelled(
    train: tuple[int, ...], names: Sequence[str], labels: UsedLabels, site: str, seed: int
) -> tuple[int, ...]:
    """The patients whose labels are used: those with the least hashes, so that one more patient moves one at most."""
    if labels.share >= 1.0 or not train:
        return train
    count = max(1, round(labels.share * len(train)))
    ranked = sorted(train, key=lambda patient: digest(["labels", seed, site, labels.draw, names[patient]]))
    return tuple(sorted(ranked[:count]))


# What is subtracted and by what is divided, or a curve.
Scale = tuple[Tensor, Tensor] | Curve


class Frame(Protocol):
    """What the numbers of a site's images mean, and on which grid they are taken."""

    def placed(self, image: LabelledImage, place: str) -> LabelledImage:
        """The image as it is taken; raises DataError, with `place` as its detail, for one that cannot be."""
        ...

    def scales(self, channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
        """What becomes 0 and by what it is divided, for each channel (*shape) of an image; see `scaled`."""
        ...

    def shows(self, image: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where an image (*shape) shows something."""
        ...


class Normalised:
    """Images of any numbers as they are stored, each channel minus its mean, over its deviation."""

    def placed(self, image: LabelledImage, place: str) -> LabelledImage:
        """As it is."""
        return image

    def scales(self, channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
        """See `scales_of`."""
        return scales_of(channels)

    def shows(self, image: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Above a share of its maximum."""
        return np.asarray(image > CONTENT * image.max())


NORMALISED = Normalised()


@dataclass(frozen=True)
class Harmonised(Normalised):
    """Images of any numbers, each channel with `percentiles` of what it shows at `values` (C, L); see `curves`.

    A single row of values is of all channels.
    """

    percentiles: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def scales(self, channels: NDArray[np.generic]) -> tuple[Scale | None, ...]:
        """A curve for each channel; `None` for one that shows nothing."""
        rows = self.values if len(self.values) == len(channels) else self.values[:1] * len(channels)
        return tuple(self._curve(channel, row) for channel, row in zip(channels, rows, strict=True))

    def _curve(self, channel: NDArray[np.generic], wanted: tuple[float, ...]) -> Scale | None:
        image = channel.astype(np.float32)
        inside = image[self.shows(image)]
        if len(inside) < 2:
            return None
        return curve_through(np.percentile(inside.astype(np.float64), self.percentiles), wanted)


def frame_of(normalise: Normalise) -> Normalised:
    """How a study's section `task.normalise` changes images."""
    if isinstance(normalise, ZScore):
        return NORMALISED
    if isinstance(normalise, PercentileScale):
        return Harmonised((normalise.low, normalise.high), (STANDARD,))
    return Harmonised(normalise.percentiles, normalise.values)


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
    """Each channel (*shape) minus its mean, over its deviation, or as its curve says: float32."""
    values = torch.from_numpy(channels.astype(np.float32))
    for channel, scale in zip(values, scales, strict=True):
        if isinstance(scale, Curve):
            channel.copy_(scale(channel))
        elif scale is not None:
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
