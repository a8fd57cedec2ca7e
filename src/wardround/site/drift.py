"""Whether a site's recent patients look to a released model as those did on whom it was validated and tested.

All of it stays at the site: what is measured of each patient, what is kept of it, and what is said of the difference.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.errors import DataError, WardroundError
from wardround.learning.divergence import watched
from wardround.storage.cipher import StoreCipher
from wardround.tasks.confidence import Confident, Said
from wardround.tasks.states import patient_rows, state_of
from wardround.tasks.task import Dataset, Imaging, MetricSpec, Split, Task
from wardround.wire.files import write_text
from wardround.wire.host import on_host
from wardround.wire.random import public_generator

Floats = npt.NDArray[np.float64]
#: What is measured of each patient, by measure: (n, ...), NaN where a patient has nothing of it.
Rows = Mapping[str, Floats]
INTENSITY, SPECTRUM, NOISE, CONFIDENCE, ENTROPY, CALIBRATION = (
    "intensity", "spectrum", "noise", "confidence", "entropy", "calibration",
)  # fmt: skip
_BINS, _BANDS, _GROUPS = 32, 16, 10
# Voxels of a patient from which the bins of intensities are made.
_SAMPLED = 4096
# Below this a voxel is background that any network knows: it would drown what is said of structures.
_SURELY_NOT = 0.05
_DRAWS, _LEVEL, LEAST = 4999, 0.05, 5
_BATCH = 500


# What is measured of a patient ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looked:
    """Rows of a group of patients, and the edges of the bins that their intensities are counted in."""

    rows: Rows
    edges: Floats

    @property
    def patients(self) -> int:
        """How many."""
        return max((len(found) for found in self.rows.values()), default=0)


@torch.no_grad()
def look(task: Task, model: nn.Module, dataset: Dataset, split: Split, edges: Floats | None = None) -> Looked:
    """Measure every patient of a split with a loaded network on the CPU. Without `edges` they are those of the split.

    Of each patient: the shares of its intensities in bins; the logarithm of the power of its slices in rings of
    frequency, as a share of all; the noise of its slices (Immerkaer, CVIU 1996, eq. 5), in the numbers that the network
    sees; for a task that is `Confident` the mean of the largest probability, the mean entropy in nats and, where it is
    labelled, what a reliability diagram adds up; and the task's own metrics.
    """
    model.eval()
    if edges is None:
        edges = _edges(task, dataset, split)
    found: dict[int, dict[str, list[Floats]]] = {}
    for patient, batch in dataset.evaluation(split):
        own = found.setdefault(patient, {})
        images = images_of(task, batch)
        if images is not None:
            for name, value in _of_images(images, edges).items():
                own.setdefault(name, []).append(value)
        if isinstance(task, Confident):
            for name, value in _of_said(task.said(model, batch)).items():
                own.setdefault(name, []).append(value)
    names = {name: value[0].shape for own in found.values() for name, value in own.items()}
    nothing = {name: np.full(shape, np.nan) for name, shape in names.items()}
    rows: dict[str, Floats] = {
        name: np.array([_mean(own[name]) if name in own else nothing[name] for own in found.values()]) for name in names
    }
    with watched(model) as diverged:
        rows |= patient_rows(task.metrics, dataset.evaluation(split), partial(task.score, model), diverged)
    return Looked(rows, edges)


def images_of(task: Task, batch: Any) -> Tensor | None:
    """The images of a batch as slices (S, H, W); `None` for a task that shows none."""
    images = task.reference(batch) if isinstance(task, Imaging) else getattr(batch, "images", None)
    if not isinstance(images, Tensor) or images.ndim < 3:
        return None
    if images.ndim == 5:
        # Slices along the last axis of volumes.
        images = images.movedim(-1, 1)
    images = images.reshape(-1, *images.shape[-2:]).float()
    return images if min(images.shape[-2:]) >= 3 else None


def _edges(task: Task, dataset: Dataset, split: Split) -> Floats:
    """Edges between bins that hold alike shares of the intensities of a split."""
    sampled: list[Floats] = []
    for _, batch in dataset.evaluation(split):
        images = images_of(task, batch)
        if images is not None:
            flat = on_host(images).astype(np.float64).ravel()
            sampled.append(flat[:: max(1, len(flat) // _SAMPLED)])
    if not sampled:
        return np.zeros(0)
    return np.unique(np.quantile(np.concatenate(sampled), np.arange(1, _BINS) / _BINS))


def _of_images(images: Tensor, edges: Floats) -> dict[str, Floats]:
    flat = on_host(images).astype(np.float64)
    counts = np.bincount(np.searchsorted(edges, flat.ravel()), minlength=len(edges) + 1)
    found: dict[str, Floats] = {INTENSITY: counts / counts.sum()}
    # A slice that shows nothing has neither noise nor frequencies.
    shows = flat[flat.std(axis=(1, 2)) > 1e-6]
    if len(shows):
        found[NOISE] = np.array([np.mean([_noise(one) for one in shows])])
        found[SPECTRUM] = np.mean([_spectrum(one) for one in shows], axis=0)
    return found


def _noise(image: Floats) -> float:
    """The deviation of noise in an image (H, W): sqrt(pi / 2) times a sixth of the mean magnitude of the difference of
    two Laplacians, which structure hardly moves."""
    rows = image[:-2] - 2.0 * image[1:-1] + image[2:]
    both = rows[:, :-2] - 2.0 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.sqrt(np.pi / 2.0) / 6.0 * np.abs(both).mean())


def _spectrum(image: Floats) -> Floats:
    """log10 of the share of an image's power in rings of frequency, without its mean: (bands,)."""
    power = np.abs(np.fft.fft2(image - image.mean())) ** 2
    rows, columns = (np.fft.fftfreq(n) for n in image.shape)
    radius = np.hypot(rows[:, None], columns[None]) / 0.5
    bands = np.minimum((radius * _BANDS).astype(int), _BANDS - 1)
    summed = np.bincount(bands.ravel(), weights=power.ravel(), minlength=_BANDS)
    return np.asarray(np.log10(summed / summed.sum() + 1e-9))


def _of_said(said: Said) -> dict[str, Floats]:
    """Confidence and entropy of what a network says, and what it adds to a reliability diagram."""
    p = on_host(said.probabilities).astype(np.float64)
    truth = on_host(said.truth).astype(np.float64)
    if said.exclusive:
        sure = p.max(axis=1)
        entropy = -(p * np.log(np.clip(p, 1e-12, 1.0))).sum(axis=1)
        top = p.argmax(axis=1)[:, None]
        right = np.take_along_axis(truth, top, axis=1)[:, 0]
    else:
        looked = p >= _SURELY_NOT if p.ndim > 2 else np.ones_like(p, bool)
        p, right = p[looked], truth[looked]
        sure = np.maximum(p, 1.0 - p)
        entropy = -(p * np.log(np.clip(p, 1e-12, 1.0)) + (1.0 - p) * np.log(np.clip(1.0 - p, 1e-12, 1.0)))
        right = np.where(np.isnan(right), np.nan, (p > 0.5) == (right > 0.5))
    if not sure.size:
        return {}
    found = {CONFIDENCE: np.array([sure.mean()]), ENTROPY: np.array([entropy.mean()])}
    known = ~np.isnan(right)
    if known.any():
        group = np.minimum((sure[known] * _GROUPS).astype(int), _GROUPS - 1)
        sums = [np.bincount(group, weights, _GROUPS) for weights in (None, sure[known], right[known])]
        # Each patient counts the same, however large.
        found[CALIBRATION] = np.array(sums, dtype=np.float64) / known.sum()
    return found


def _mean(parts: Sequence[Floats]) -> Floats:
    return np.asarray(np.mean(parts, axis=0))


# What is kept of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a site keeps of a release's own patients, in its history folder: rows without names, sealed with its key."""

    folder: Path
    cipher: StoreCipher | None = None

    def path(self, release: str) -> Path:
        """The file of a release."""
        return self.folder / "drift" / f"{release}.json"

    def clear(self) -> None:
        """Delete what is kept of all releases: no row says whose it is. The data give it again. Raises `DataError`."""
        try:
            for path in (self.folder / "drift").glob("*.json"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError("the site's history folder cannot be written", detail=str(error)) from error

    def keep(self, release: str, looked: Looked) -> None:
        """Write it, over what was kept before. Raises `DataError` where the folder cannot be written."""
        packed = io.BytesIO()
        arrays: dict[str, Any] = {f"rows/{name}": rows for name, rows in looked.rows.items()}
        np.savez_compressed(packed, edges=looked.edges, **arrays)
        plain = json.dumps({"release": release, "looked": base64.b64encode(packed.getvalue()).decode()})
        try:
            self.path(release).parent.mkdir(parents=True, exist_ok=True)
            text = plain if self.cipher is None else self.cipher.seal(plain, f"drift/{release}")
            write_text(self.path(release), text, durable=True)
        except OSError as error:
            raise DataError("the site's history folder cannot be written", detail=str(error)) from error

    def of(self, release: str) -> Looked | None:
        """What was kept, if anything. Raises `DataError` where it cannot be read."""
        try:
            text = self.path(release).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError("the site's history folder cannot be read", detail=str(error)) from error
        try:
            plain = text if self.cipher is None else self.cipher.open(text, f"drift/{release}")
            value = json.loads(plain)
            if value["release"] != release:
                raise ValueError("of another release")
            with np.load(io.BytesIO(base64.b64decode(value["looked"]))) as file:
                rows = {name.removeprefix("rows/"): file[name] for name in file.files if name.startswith("rows/")}
                return Looked(rows, file["edges"])
        except (ValueError, KeyError, TypeError, OSError, WardroundError) as error:
            raise DataError(
                "what the site kept of the release's own patients cannot be read; delete it and it is made anew from "
                "the data",
                detail=f"{self.path(release)}: {error}",
            ) from error


# What is said of the difference ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """How far a measure moved: its mean before and now (none of a histogram), and how likely chance moves it as far.

    `p` is adjusted for all measures that were tested; `drifted` is `None` where too few patients have it.
    """

    measure: str
    before: float | None
    now: float | None
    distance: float | None
    p: float | None
    patients: tuple[int, int]
    drifted: bool | None

    def to_json(self) -> dict[str, Any]:
        """For a file at the site."""
        return {**vars(self), "patients": list(self.patients)}


#: Of rows (n, ...) and weights (r, n), r ways to choose the recent ones: the values (r,) of the group of weight 1.
Value = Callable[[Floats, Floats], Floats]


def compare(reference: Looked, recent: Looked, specs: Sequence[MetricSpec]) -> tuple[Moved, ...]:
    """Every measure that both groups have, in order, each tested by permutation.

    A measure's statistic is the distance of the two groups: half the sum of the differences of the mean shares of
    intensities, the Euclidean distance of the mean spectra, the absolute difference of everything else. Its p is the
    share of 4,999 ways to deal all patients out to two groups of these sizes that come as far or further (Phipson &
    Smyth, 2010: the one that was observed counts among them), adjusted for the number of measures by Holm's method
    (1979), so that the chance of any false alarm is at most 5 %.
    """
    kinds = {spec.name: spec for spec in specs}
    found: list[tuple[str, Floats, Floats]] = []
    for name in (*_PLAIN, CALIBRATION, *kinds):
        if name in reference.rows and name in recent.rows:
            # A patient without a value, or of whom the network made no number, has no part in it.
            found.append((name, _having(reference.rows[name]), _having(recent.rows[name])))
    tested = [_tested(name, old, new, kinds.get(name)) for name, old, new in found]
    return tuple(_adjusted(tested))


_PLAIN = (INTENSITY, SPECTRUM, NOISE, CONFIDENCE, ENTROPY)


def _having(rows: Floats) -> Floats:
    return rows[~np.isnan(rows).reshape(len(rows), -1).any(axis=1)]


def _tested(name: str, old: Floats, new: Floats, spec: MetricSpec | None) -> Moved:
    sizes = len(old), len(new)
    if min(sizes) < LEAST:
        return Moved(name, None, None, None, None, sizes, None)
    rows = np.concatenate([old, new])
    distance = _distance(name, spec)
    observed = np.arange(len(rows)) >= len(old)
    random = public_generator(0, "drift", name, *sizes)
    at = float(distance(rows, observed[None].astype(np.float64))[0])
    if not np.isfinite(at):
        return Moved(name, None, None, None, None, sizes, None)
    further = 0
    for start in range(0, _DRAWS, _BATCH):
        count = min(_BATCH, _DRAWS - start)
        order = random.permuted(np.broadcast_to(observed, (count, len(rows))), axis=1).astype(np.float64)
        drawn = distance(rows, order)
        # Equal up to rounding is as far; where no value follows from a deal, that is as far, too.
        further += int((~(drawn < at - 1e-9 * max(1.0, abs(at)))).sum())
    before, now = _shown(name, spec, old), _shown(name, spec, new)
    return Moved(name, before, now, at, (1 + further) / (1 + _DRAWS), sizes, False)


def _distance(name: str, spec: MetricSpec | None) -> Value:
    """The statistic of a measure: rows (n, ...), weights (r, n) -> (r,)."""

    def distance(rows: Floats, weights: Floats) -> Floats:
        if spec is not None or name == CALIBRATION:
            value = partial(_metric, spec) if spec is not None else _calibration_error
            return np.abs(value(rows, weights) - value(rows, 1.0 - weights))
        flat = rows.reshape(len(rows), -1)
        means = [w @ flat / w.sum(axis=1, keepdims=True) for w in (weights, 1.0 - weights)]
        apart = means[0] - means[1]
        if name == INTENSITY:
            return np.asarray(0.5 * np.abs(apart).sum(axis=1))
        return np.asarray(np.sqrt(np.square(apart).sum(axis=1)))

    return distance


def _metric(spec: MetricSpec, rows: Floats, weights: Floats) -> Floats:
    """The task's metric of each group."""
    return np.asarray(spec.kind.value(spec, state_of(spec, rows, weights)), dtype=np.float64)


def _calibration_error(rows: Floats, weights: Floats) -> Floats:
    """The expected calibration error (Naeini et al., AAAI 2015) of each group, every patient of the same weight."""
    sums = (weights @ rows.reshape(len(rows), -1)).reshape(len(weights), *rows.shape[1:])
    count, sure, right = sums[:, 0], sums[:, 1], sums[:, 2]
    return np.asarray(np.abs(right - sure).sum(axis=1) / count.sum(axis=1))


def _shown(name: str, spec: MetricSpec | None, rows: Floats) -> float | None:
    """A group's own value, where that is a number."""
    everybody = np.ones((1, len(rows)))
    if spec is not None:
        return float(_metric(spec, rows, everybody)[0])
    if name == CALIBRATION:
        return float(_calibration_error(rows, everybody)[0])
    return float(rows.mean()) if rows[0].size == 1 else None


def _adjusted(tested: Sequence[Moved]) -> Iterator[Moved]:
    """The same with p adjusted by Holm's method, in their order."""
    having = sorted((moved.p, place) for place, moved in enumerate(tested) if moved.p is not None)
    adjusted: dict[int, float] = {}
    least = 0.0
    for rank, (p, place) in enumerate(having):
        least = max(least, min(1.0, (len(having) - rank) * p))
        adjusted[place] = least
    for place, moved in enumerate(tested):
        known = adjusted.get(place)
        yield moved if known is None else replace(moved, p=known, drifted=known <= _LEVEL)
