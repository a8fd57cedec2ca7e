"""What a site measures of its images before training, patient by patient: none of it leaves but in sums.

Intensity, spectrum and noise are of images as a network would see them, so that what a study's normalisation and
resampling take away is gone; landmarks and resolution are of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from wardround.study.normalise import PERCENTILES, STANDARD
from wardround.tasks.task import Dataset, Imaging, Split
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
#: Bins of a histogram: of one width from LOW to HIGH, the outer ones with what lies beyond.
BINS, LOW, HIGH = 100, -5.0, 5.0
#: Rings of the spectrum: from 0 to half a cycle a pixel.
RADII = 32
# Of a plane, the share that must show something: others are air.
_LEAST = 0.05
# Below every amplitude that means something, since an image has a deviation of 1.
_FLOOR = 1e-4
# The median of the absolute value of a standard normal number.
_MAD = 0.6744897501960817


@dataclass(frozen=True, eq=False)
class Look:
    """An image.

    `values`: of each channel what it shows, normalised (M,). `planes`: (P, C, H, W) as the network sees them, `shown`
    where they show something. `shape` and `spacing` (mm; `None` where files do not say) are the file's. `structures`:
    of each the mask (*shape), `None` where it is not drawn. `classes`: which of them the image shows (K,).
    """

    values: Sequence[Array]
    planes: Tensor
    shown: Tensor
    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    structures: tuple[Mask | None, ...] = ()
    classes: Mask | None = None


@runtime_checkable
class Looked(Protocol):
    """A data set that shows its images whole."""

    def looks(self, split: Split) -> Iterator[tuple[int, Look]]:
        """(patient number, an image), patient by patient."""
        ...


def describes(task: Any, dataset: Dataset) -> bool:
    """Whether a task's data set has images that can be described."""
    return isinstance(dataset, Looked) or isinstance(task, Imaging)


def looks_of(task: Any, dataset: Dataset, split: Split) -> Iterator[tuple[int, Look]]:
    """The images of a split that `describes` finds; of a task that reconstructs, the true images that are evaluated,
    each on the scale of what it shows."""
    if isinstance(dataset, Looked):
        yield from dataset.looks(split)
        return
    for patient, batch in dataset.evaluation(split):
        images = task.reference(batch)
        for image in images.float().split(1):
            shown = image > _LEAST * image.max()
            if bool(shown.any()):
                inside = image[shown]
                image = (image - inside.mean()) / inside.std(correction=0).clamp_min(1e-6)
            values = [on_host(image[shown])]
            yield patient, Look(values, image[:, None], shown[:, None], tuple(image.shape[1:]))


def planes_of(images: Tensor) -> Tensor:
    """(B, C, H, W), or the slices of volumes (B, C, H, W, D), as planes (P, C, H, W)."""
    return images if images.ndim == 4 else images.permute(0, 4, 1, 2, 3).flatten(0, 1)


# Of one image ---------------------------------------------------------------------------------------------------------


def histogram(values: Array) -> Floats:
    """The share of values (M,) in each bin: (BINS,), with sum 1; NaN of none."""
    places = np.floor((np.asarray(values, np.float64) - LOW) * (BINS / (HIGH - LOW)))
    counts = np.bincount(np.clip(places, 0, BINS - 1).astype(np.int64), minlength=BINS)
    return counts / len(values) if len(values) else np.full(BINS, np.nan)


def landmarks(values: Array) -> Floats:
    """Where the percentiles of values (M,) lie once the outer two are at -2 and 2: (L,); NaN of one value alone.

    Any line through the values gives the same: a channel less its mean, over its deviation, as the file has it.
    """
    if len(values) < 2:
        return np.full(len(PERCENTILES), np.nan)
    # Late: a coordinator reads what may be said without torch.
    from wardround.tasks.curves import standardised

    found = standardised(np.percentile(np.asarray(values, np.float64), PERCENTILES), STANDARD)
    return np.full(len(PERCENTILES), np.nan) if found is None else found


def spectrum(plane: Tensor) -> Floats:
    """The mean log amplitude of a plane (H, W) in each ring of frequencies: (RADII,).

    Rings are of one width up to half a cycle a pixel, without the mean. The plane is faded out to its edges (Hann), and
    amplitudes are such that white noise of deviation s has mean square s^2. A ring that a small plane has no frequency
    in lies on the line between its neighbours.
    """
    values = on_host(plane).astype(np.float64)
    window = np.outer(*(np.hanning(size + 2)[1:-1] for size in values.shape))
    faded = (values - values.mean()) * window
    amplitude = np.abs(np.fft.fft2(faded)) / np.sqrt(np.square(window).sum())
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(size) for size in values.shape), indexing="ij"))
    ring = np.ceil(radius * (2 * RADII)).astype(np.int64) - 1
    kept = (ring >= 0) & (ring < RADII)
    counts = np.bincount(ring[kept], minlength=RADII)
    sums = np.bincount(ring[kept], np.log(amplitude[kept] + _FLOOR), minlength=RADII)
    there = np.flatnonzero(counts)
    return np.interp(np.arange(RADII), there, sums[there] / counts[there])


def noise(planes: Array, shown: Mask) -> float:
    """A robust estimate of the deviation of the noise in planes (P, H, W), where they show something; NaN of nothing.

    The median absolute value of the diagonal details of Haar's wavelet at the finest scale, over 0.6745 (Donoho and
    Johnstone, *Ideal spatial adaptation by wavelet shrinkage*, Biometrika 81, 1994): most of them are noise, and fine
    structure is in the estimate as far as it is in half of them.
    """
    rows, columns = planes.shape[1] // 2 * 2, planes.shape[2] // 2 * 2
    four = [planes[:, i:rows:2, j:columns:2].astype(np.float64) for i in (0, 1) for j in (0, 1)]
    inside = np.logical_and.reduce([shown[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)])
    details = ((four[0] - four[1] - four[2] + four[3]) / 2.0)[inside]
    return float(np.median(np.abs(details)) / _MAD) if len(details) else float("nan")


# Of all patients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """What is summed over patients: `size` numbers of each, in whole steps of `step`; with `squares` their squares."""

    size: int
    step: float
    squares: bool = False


@dataclass(frozen=True)
class Subject:
    """What images of a study are: how many channels, which structures are drawn, which classes there are."""

    channels: int
    structures: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    several: bool = False

    @property
    def quantities(self) -> dict[str, Quantity]:
        """By name. Of a structure: its share of the voxels, the share of slices with it, and mL where that is known."""
        found = {
            "intensity": Quantity(self.channels * BINS, 2.0**-20),
            "landmarks": Quantity(self.channels * len(PERCENTILES), 1e-4),
            "spectrum": Quantity(self.channels * RADII, 1e-4),
            "noise": Quantity(self.channels, 1e-5, squares=True),
            "matrix": Quantity(3, 1e-2, squares=True),
            "spacing": Quantity(3, 1e-3, squares=True),
        }
        for structure in self.structures:
            found[f"share of {structure}"] = Quantity(1, 1e-6, squares=True)
            found[f"slices with {structure}"] = Quantity(1, 1e-4, squares=True)
            found[f"volume of {structure}"] = Quantity(1, 1e-2, squares=True)
        return found


def subject_of(task: Any) -> Subject:
    """The subject of a study's task."""
    settings = getattr(task, "config", None)
    classes: tuple[str, ...] = tuple(getattr(settings, "classes", ()))
    return Subject(
        int(getattr(settings, "channels", 1)),
        tuple(getattr(settings, "structures", ())),
        classes,
        bool(getattr(settings, "multi_label", False)),
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """What patients add to each quantity: name -> (n, size), NaN of a patient without a value. They stay at the site.

    `classes`: (n, K), which classes a patient has, NaN where that is not known; `None` of a task without.
    """

    values: Mapping[str, Floats]
    classes: Floats | None


def rows_of(subject: Subject, looks: Iterable[tuple[int, Look]]) -> Rows:
    """A row for each patient, in order: the mean over the patient's images, and any class that one of them shows."""
    quantities, patients = subject.quantities, list[int]()
    found: dict[str, list[list[Floats]]] = {name: [] for name in quantities}
    shown: list[list[Floats]] = []
    for patient, look in looks:
        if not patients or patients[-1] != patient:
            patients.append(patient)
            shown.append([])
            for rows in found.values():
                rows.append([])
        for name, values in _measured(subject, look).items():
            found[name][-1].append(values)
        unknown = np.full(len(subject.classes), np.nan)
        shown[-1].append(unknown if look.classes is None else look.classes.astype(np.float64))
    means = {
        name: np.array([_mean(rows, quantities[name].size) for rows in of_patients]).reshape(-1, quantities[name].size)
        for name, of_patients in found.items()
    }
    classes = np.array([np.max(rows, axis=0) for rows in shown]).reshape(len(patients), len(subject.classes))
    return Rows(means, classes if subject.classes else None)


def _mean(rows: Sequence[Floats], size: int) -> Floats:
    whole = [row for row in rows if not np.isnan(row).any()]
    return np.mean(whole, axis=0) if whole else np.full(size, np.nan)


def _measured(subject: Subject, look: Look) -> dict[str, Floats]:
    found = {
        "intensity": np.concatenate([histogram(values) for values in look.values]),
        "landmarks": np.concatenate([landmarks(values) for values in look.values]),
        "spectrum": _spectra(look).ravel(),
        "noise": np.array(
            [noise(on_host(look.planes[:, c]), on_host(look.shown[:, c])) for c in range(subject.channels)]
        ),
        # A picture is one slice, of no thickness.
        "matrix": np.array([*look.shape, 1][:3], np.float64),
        "spacing": np.array([np.nan] * 3 if look.spacing is None else [*look.spacing, 0.0][:3]),
    }
    voxel = None if look.spacing is None or len(look.spacing) != 3 else float(np.prod(look.spacing)) / 1000.0
    for structure, mask in zip(subject.structures, look.structures or (None,) * len(subject.structures), strict=True):
        share = slices = volume = np.nan
        if mask is not None:
            share = float(mask.mean())
            slices = float(mask.any(axis=(0, 1)).mean()) if mask.ndim == 3 else float(mask.any())
            volume = np.nan if voxel is None else float(mask.sum()) * voxel
        found[f"share of {structure}"] = np.array([share])
        found[f"slices with {structure}"] = np.array([slices])
        found[f"volume of {structure}"] = np.array([volume])
    return found


def _spectra(look: Look) -> Floats:
    """The mean over the planes that show enough: (C, RADII); NaN where none does."""
    enough = look.shown.float().mean(dim=(2, 3)) > _LEAST
    found = np.full((look.planes.shape[1], RADII), np.nan)
    for channel in range(len(found)):
        planes = look.planes[enough[:, channel], channel]
        if len(planes):
            found[channel] = np.mean([spectrum(plane) for plane in planes], axis=0)
    return found


def whole(values: Floats, quantity: Quantity) -> npt.NDArray[np.int64]:
    """Values in whole steps of a quantity."""
    return np.rint(values / quantity.step).astype(np.int64)
