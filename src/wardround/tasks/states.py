"""What a metric adds up over patients, and the value that follows: a mean, a ratio of sums, or a histogram.

A *row* is what one patient adds, a `State` is a sum of rows. States merge by addition, so that a metric over the
patients of several sites needs their sum alone. Torch-free: a coordinator reads metrics without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError
from wardround.wire.host import on_host

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.tasks.task import MetricSpec

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
# A sum over this many patients of a site stays a whole number of steps that a double holds exactly.
MAX_PATIENTS = 1 << 16
_MOST_STEPS = 1 << 36


@dataclass(frozen=True)
class MetricState:
    """A metric summed over patients; `+` is that of both groups of patients.

    `total` (..., *shape) is the sum of rows, `count` (...) the patients with a value, `broken` those of them whose row
    is not a number, because the network diverged: they are not in `total`, and the value is the worst.
    """

    total: Floats
    count: Floats
    broken: Floats

    def __add__(self, other: MetricState) -> MetricState:
        return MetricState(self.total + other.total, self.count + other.count, self.broken + other.broken)


@dataclass(frozen=True)
class Part:
    """A number of a state, or `size` of them: one patient adds a number in [low, high], in steps of `resolution`."""

    name: str
    low: float
    high: float
    resolution: float
    size: int = 1


class Kind(Protocol):
    """How a metric adds up. `shape` is that of a row, `given` that of one example's values in `Task.score`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def given(self) -> tuple[int, ...]: ...

    def ground(self, spec: MetricSpec) -> tuple[Any, ...]:
        """What decides a row: metrics of one source agree in it, and share what is summed."""
        ...

    def row(self, spec: MetricSpec, values: Floats, absent: Mask) -> Floats:
        """What a patient adds, from k examples, (k, *given) -> shape; NaN says no value where `absent` (k,)."""
        ...

    def counted(self, rows: Floats) -> Mask:
        """Which patients have a value: (n, *shape) -> (n,)."""
        ...

    def value(self, spec: MetricSpec, state: MetricState) -> Floats:
        """The metric over all patients of a state, (...); NaN where none of them has a value."""
        ...

    def parts(self, spec: MetricSpec) -> tuple[Part, ...]:
        """The numbers of `total`, flattened, in order."""
        ...

    def groups(self, rows: Floats) -> tuple[int, ...]:
        """Of how many patients the value says something by itself, beside those with and without a value."""
        ...

    def cells(self, rows: Floats) -> int | None:
        """The fewest patients behind a number of the state that is not 0; `None` where it is all who have a value."""
        ...

    def each(self, rows: Floats) -> Floats | None:
        """Every patient's own value, (n,), NaN for none; `None` where one patient alone has none."""
        ...


@dataclass(frozen=True)
class PatientMean:
    """The mean over patients of the mean over a patient's examples: `score` gives (B,) values.

    In a metric that `may_be_absent` NaN says that an example has no value, and a patient without any is left out of the
    mean. In every other metric NaN counts as the worst value.
    """

    shape: tuple[int, ...] = field(default=(), init=False)
    given: tuple[int, ...] = field(default=(), init=False)

    def ground(self, spec: MetricSpec) -> tuple[Any, ...]:
        """The range in which values are clipped."""
        return (spec.low, spec.high)

    def row(self, spec: MetricSpec, values: Floats, absent: Mask) -> Floats:
        """The mean of the examples that have a value, in the metric's range; NaN where none has."""
        kept = values[~(absent & np.isnan(values))]
        return np.asarray(spec.clip(float(np.mean(kept))) if kept.size else np.nan)

    def counted(self, rows: Floats) -> Mask:
        """Patients whose row is a number."""
        return ~np.isnan(rows)

    def value(self, spec: MetricSpec, state: MetricState) -> Floats:
        """Sum over count."""
        return _divided(state.total, state.count)

    def parts(self, spec: MetricSpec) -> tuple[Part, ...]:
        """The value, with 0 in its range for a site that has no patients."""
        return (Part("", min(0.0, spec.low), max(0.0, spec.high), spec.resolution),)

    def groups(self, rows: Floats) -> tuple[int, ...]:
        """None."""
        return ()

    def cells(self, rows: Floats) -> int | None:
        """None."""
        return None

    def each(self, rows: Floats) -> Floats | None:
        """The rows themselves."""
        return rows


MEAN = PatientMean()


@dataclass(frozen=True)
class RatioOfSums:
    """A sum over a sum, say a Dice of all patients' voxels: `score` gives (B, 2), numerator and denominator.

    Examples and patients add up. One patient's numerator lies in [-most, most] and the denominator in [0, most], in
    steps of `step`. A patient whose two numbers are 0 adds nothing and has no value. Raises ValueError where `most`
    holds more than 2^36 steps.
    """

    most: float = float(1 << 31)
    step: float = 1.0
    shape: tuple[int, ...] = field(default=(2,), init=False)
    given: tuple[int, ...] = field(default=(2,), init=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.step <= self.most <= self.step * _MOST_STEPS:
            raise ValueError(f"a ratio of sums needs 0 < step <= most <= 2^36 steps, not {self.step} and {self.most}")

    def ground(self, spec: MetricSpec) -> tuple[Any, ...]:
        """Range and step of both numbers."""
        return (self.most, self.step)

    def row(self, spec: MetricSpec, values: Floats, absent: Mask) -> Floats:
        """Both sums in whole steps; NaN where an example's number is none."""
        kept = values[~(absent & np.isnan(values).any(axis=1))]
        total = np.round(kept.sum(axis=0) / self.step) * self.step
        if not np.isfinite(total).all():
            return np.full(2, np.nan)
        return np.asarray(np.clip(total, [-self.most, 0.0], self.most))

    def counted(self, rows: Floats) -> Mask:
        """Patients who add something, or whose numbers are none."""
        return np.asarray((rows != 0.0).any(axis=1))

    def value(self, spec: MetricSpec, state: MetricState) -> Floats:
        """Numerator over denominator, in the metric's range."""
        above, below = state.total[..., 0], state.total[..., 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = above / below
        return _or_worst(spec, ratio, state.broken)

    def parts(self, spec: MetricSpec) -> tuple[Part, ...]:
        """Numerator and denominator."""
        return Part("numerator/", -self.most, self.most, self.step), Part("denominator/", 0.0, self.most, self.step)

    def groups(self, rows: Floats) -> tuple[int, ...]:
        """None."""
        return ()

    def cells(self, rows: Floats) -> int | None:
        """None: both are sums over all who have a value."""
        return None

    def each(self, rows: Floats) -> Floats | None:
        """A patient's numerator over the denominator; NaN for 0 over 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(rows[:, 0] / rows[:, 1])


@dataclass(frozen=True)
class Histogram:
    """What follows from how scores in [0, 1] are spread, with and without a class: AUROC, AUPRC, calibration.

    `score` gives (B, classes, 2): of every class the score, and 1 or 0 for whether the example has it, NaN where that
    is not known. `read` makes a value of each class from counts (..., classes, 2, bins) (`tasks.histograms`); the
    metric is the one of class `only`, or the mean over the classes that have a value. The examples of a patient are
    counted one by one (`examples="add"`), or once with their mean score, as having the class if one of them has it
    (`"mean"`). Raises ValueError for numbers that make no histogram.
    """

    read: Callable[[Floats], Floats]
    classes: int = 1
    bins: int = 200
    only: int | None = None
    examples: Literal["add", "mean"] = "add"
    most: int = 4096

    def __post_init__(self) -> None:
        if self.classes < 1 or self.bins < 2 or self.most < 1:
            raise ValueError("a histogram needs a class or more, 2 bins or more, and most of 1 or more")
        if self.only is not None and not 0 <= self.only < self.classes:
            raise ValueError(f"a histogram of {self.classes} classes has no class {self.only}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Counts of every class, without and with it, in every bin."""
        return (self.classes, 2, self.bins)

    @property
    def given(self) -> tuple[int, ...]:
        """Score and label of every class."""
        return (self.classes, 2)

    def ground(self, spec: MetricSpec) -> tuple[Any, ...]:
        """All but what is read of the counts."""
        return (self.classes, self.bins, self.examples, self.most)

    def row(self, spec: MetricSpec, values: Floats, absent: Mask) -> Floats:
        """A patient's counts; NaN where the score of a known label is not a number.

        Raises `StudyError` for labels that are neither 0, 1 nor NaN.
        """
        scores, labels = values[..., 0], values[..., 1]
        known = np.asarray(~np.isnan(labels) & ~(absent[:, None] & np.isnan(scores)))
        if not np.isin(labels[known], (0.0, 1.0)).all():
            raise StudyError(f"metric {spec.name!r}: the labels that the task's score gives are 0, 1 or NaN")
        if np.isnan(scores[known]).any():
            return np.full(self.shape, np.nan)
        if self.examples == "mean":
            scores = _divided(np.where(known, scores, 0.0).sum(axis=0), known.sum(axis=0))[None]
            labels = np.where(known, labels, 0.0).max(axis=0, initial=0.0)[None]
            known = np.asarray(known.any(axis=0))[None]
        counts = np.zeros(self.shape)
        at = np.clip(np.floor(np.clip(scores[known], 0.0, 1.0) * self.bins), 0, self.bins - 1).astype(int)
        np.add.at(counts, (np.nonzero(known)[1], labels[known].astype(int), at), 1.0)
        return np.minimum(counts, float(self.most))

    def counted(self, rows: Floats) -> Mask:
        """Patients with a known label of a class that is read, or whose scores are no numbers."""
        return np.asarray((self._read(rows) != 0.0).any(axis=(1, 2, 3)))

    def value(self, spec: MetricSpec, state: MetricState) -> Floats:
        """The value of the class that is read, or the mean of those that have one, in the metric's range."""
        values = self.read(self._read(state.total))
        has = ~np.isnan(values)
        mean = _divided(np.where(has, values, 0.0).sum(axis=-1), has.sum(axis=-1))
        return _or_worst(spec, mean, state.broken)

    def parts(self, spec: MetricSpec) -> tuple[Part, ...]:
        """All counts."""
        return (Part("counts/", 0.0, float(self.most), 1.0, int(np.prod(self.shape))),)

    def groups(self, rows: Floats) -> tuple[int, ...]:
        """The patients with and without each class that is read: an AUROC of one sick patient is that one's rank."""
        return tuple(int(n) for n in (self._read(rows) != 0.0).any(axis=-1).sum(axis=0).ravel())

    def cells(self, rows: Floats) -> int | None:
        """The fewest patients in a bin that is not empty; 0 where all are empty."""
        filled = (rows != 0.0).sum(axis=0)
        return int(filled[filled > 0].min(initial=len(rows))) if filled.any() else 0

    def each(self, rows: Floats) -> Floats | None:
        """None: an AUROC is no patient's."""
        return None

    def _read(self, counts: Floats) -> Floats:
        return counts if self.only is None else counts[..., self.only : self.only + 1, :, :]


def state_of(spec: MetricSpec, rows: Floats, weights: Floats | None = None) -> MetricState:
    """The state of patients, (n, *shape); with weights (r, n) of r weighted groups of them, as the bootstrap draws."""
    counted = spec.kind.counted(rows)
    broken = counted & np.isnan(rows).any(axis=tuple(range(1, rows.ndim)))
    kept = np.where(_wide(counted & ~broken, rows), rows, 0.0)
    if weights is None:
        return MetricState(kept.sum(axis=0), np.asarray(float(counted.sum())), np.asarray(float(broken.sum())))
    total = (weights @ kept.reshape(len(rows), -1)).reshape(len(weights), *rows.shape[1:])
    return MetricState(total, weights @ counted, weights @ broken)


def value_of(spec: MetricSpec, rows: Floats) -> float:
    """A metric over patients, (n, *shape); NaN where none of them has a value."""
    return float(spec.kind.value(spec, state_of(spec, rows)))


def check_metrics(specs: Sequence[MetricSpec]) -> None:
    """Raise `StudyError` where two metrics have one name, or one source and different states."""
    grounds: dict[str, tuple[Any, ...]] = {}
    for spec in specs:
        if sum(spec.name == other.name for other in specs) > 1:
            raise StudyError(f"two metrics of the task are called {spec.name!r}; give each a name of its own")
        if grounds.setdefault(spec.key, _ground(spec)) != _ground(spec):
            raise StudyError(
                f"metric {spec.name!r}: another metric of the source {spec.key!r} adds up in another way; give the two "
                "the same kind and numbers, or different sources"
            )


def patient_rows(
    specs: Sequence[MetricSpec],
    batches: Iterable[tuple[int, Any]],
    score: Callable[[Any], Mapping[str, Tensor]],
    diverged: Callable[[], bool] = lambda: False,
) -> dict[str, Floats]:
    """What every patient adds to each metric: name -> (n, *shape), in the order in which patients come.

    `score` gives each source's values for the examples of a batch, (B, *given). `diverged` is asked after each batch:
    where it is true, NaN never means that an example has no value. Raises `StudyError` for values of another shape.
    """
    sources = {spec.key: spec for spec in specs}
    collected: dict[str, dict[int, list[tuple[Floats, Mask]]]] = {key: {} for key in sources}
    for patient, batch in batches:
        scores, failed = score(batch), diverged()
        for key, spec in sources.items():
            values = on_host(scores[key]).astype(np.float64)
            if values.ndim == 0 or values.shape[1:] != spec.kind.given:
                needed = ", ".join(("B", *map(str, spec.kind.given)))
                raise StudyError(f"metric {spec.name!r}: the task's score must give numbers of shape ({needed})")
            absent = np.full(len(values), spec.may_be_absent and not failed)
            collected[key].setdefault(patient, []).append((values, absent))
    rows = {key: _rows(spec, collected[key].values()) for key, spec in sources.items()}
    return {spec.name: rows[spec.key] for spec in specs}


def _ground(spec: MetricSpec) -> tuple[Any, ...]:
    return (type(spec.kind), spec.may_be_absent, *spec.kind.ground(spec))


def _rows(spec: MetricSpec, patients: Iterable[list[tuple[Floats, Mask]]]) -> Floats:
    rows = []
    for parts in patients:
        values, absent = (np.concatenate(each) for each in zip(*parts, strict=True))
        rows.append(spec.kind.row(spec, values, absent))
    return np.array(rows, dtype=np.float64).reshape(len(rows), *spec.kind.shape)


def _wide(mask: Mask, rows: Floats) -> Mask:
    return mask.reshape(-1, *[1] * (rows.ndim - 1))


def _or_worst(spec: MetricSpec, values: Floats, broken: Floats) -> Floats:
    return np.where(broken > 0, spec.worst, np.clip(values, spec.low, spec.high))


def _divided(above: Floats, below: Floats) -> Floats:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0))
