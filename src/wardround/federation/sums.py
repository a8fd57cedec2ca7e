"""What is summed beside a model: the entries of a training round and of an evaluation, written and read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wardround.tasks.estimates import Mean
from wardround.wire.update import Aggregate, Metric

if TYPE_CHECKING:
    from wardround.tasks.task import MetricSpec

Array = npt.NDArray[Any]
LOSS = "loss"
SECONDS = "seconds"
# Of a validation, which may travel in a training round; and of an evaluation, which travels alone.
_VALIDATED, _VALIDATION = "validation_patients", "validation/"
_PATIENTS, _VALUE, _ERROR, _PAIRED = "patients", "value/", "error/", "paired/"
# A site's sum over patients fits its declared range up to this many patients.
MAX_PATIENTS = 1 << 16
MAX_LOSS = 1e6


def validation_metrics(specs: Sequence[MetricSpec]) -> tuple[Metric, ...]:
    """Sums over validation patients, and their number."""
    return (
        Metric(_VALIDATED, 0, MAX_PATIENTS, 1),
        *(
            Metric(
                _VALIDATION + s.name,
                min(0.0, s.low) * MAX_PATIENTS,
                max(0.0, s.high) * MAX_PATIENTS,
                s.resolution,
            )
            for s in specs
        ),
    )


def validation_sums(values: Mapping[str, Array]) -> dict[str, Any]:
    """A site's entries: from each metric's value for every patient, (n,)."""
    counts = [len(per_patient) for per_patient in values.values()]
    return {
        _VALIDATED: counts[0] if counts else 0,
        **{_VALIDATION + name: float(np.sum(per_patient)) for name, per_patient in values.items()},
    }


def validation_means(sums: Aggregate) -> dict[str, float] | None:
    """The mean of every metric over the validation patients of all sites.

    `None` where sites have no validation patient, or keep what they measured to themselves.
    """
    patients = float(sums.metrics[_VALIDATED][0])
    if not patients:
        return None
    return {
        name.removeprefix(_VALIDATION): float(np.round(total[0] / patients, 9))
        for name, total in sums.metrics.items()
        if name.startswith(_VALIDATION)
    }


def round_metrics(specs: Sequence[MetricSpec], *, private: bool = False) -> tuple[Metric, ...]:
    """What a training round sums beside the model: loss, seconds, and the validation of the incoming model.

    With privacy no loss: it is one of training patients, and carries no noise.
    """
    return (
        *(() if private else (Metric(LOSS, -MAX_LOSS, MAX_LOSS, 1e-7),)),
        Metric(SECONDS, 0, 1e7, 1e-3),
        *validation_metrics(specs),
    )


def evaluation_metrics(specs: Sequence[MetricSpec]) -> tuple[Metric, ...]:
    """A site's own results: the number of test patients, and of every metric value and standard errors, rounded.

    A standard error of one step below 0 is one that the site does not give.
    """
    metrics = [Metric(_PATIENTS, 0, MAX_PATIENTS, 1)]
    for s in specs:
        step, widest = s.resolution, s.high - s.low
        metrics.append(Metric(_VALUE + s.name, min(0.0, s.low), max(0.0, s.high), step))
        metrics.append(Metric(_ERROR + s.name, -step, widest, step))
        metrics.append(Metric(_PAIRED + s.name, -step, 2.0 * widest, step))
    return tuple(metrics)


@dataclass(frozen=True)
class Result:
    """A metric's mean at a site, and the standard error of its difference to the reference row, paired by patient."""

    mean: Mean
    paired: float | None = None


def evaluation_entries(specs: Sequence[MetricSpec], results: Mapping[str, Result]) -> dict[str, Any]:
    """A site's entries, from every metric's result."""
    entries: dict[str, Any] = {}
    for s in specs:
        found = results[s.name]
        hidden = -s.resolution
        entries |= {
            _PATIENTS: found.mean.count,
            _VALUE + s.name: found.mean.value,
            _ERROR + s.name: hidden if found.mean.error is None else found.mean.error,
            _PAIRED + s.name: hidden if found.paired is None else found.paired,
        }
    return entries


def results_in(aggregate: Aggregate, specs: Sequence[MetricSpec]) -> dict[str, Result]:
    """Every metric's result, from a site's entries."""
    count = int(aggregate.metrics[_PATIENTS][0])

    def error(name: str, step: float) -> float | None:
        value = float(aggregate.metrics[name][0])
        return None if value < -0.5 * step else max(0.0, value)

    return {
        s.name: Result(
            Mean(float(aggregate.metrics[_VALUE + s.name][0]), error(_ERROR + s.name, s.resolution), count),
            error(_PAIRED + s.name, s.resolution),
        )
        for s in specs
    }
