"""What is summed beside a model: the entries of a training round and of an evaluation, written and read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wardround.tasks.metrics import PatientMeans
from wardround.wire.update import Aggregate, Metric

if TYPE_CHECKING:
    from wardround.tasks.task import MetricSpec

Array = npt.NDArray[Any]
LOSS = "loss"
SECONDS = "seconds"
# Of a validation, which may travel in a training round; and of an evaluation, which travels alone.
_VALIDATED, _VALIDATION = "validation_patients", "validation/"
_PATIENTS, _TOTAL, _REPLICATES = "patients", "total/", "replicates/"
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


def evaluation_metrics(specs: Sequence[MetricSpec], replicates: int) -> tuple[Metric, ...]:
    """Sums over test patients and over the patients of every bootstrap replicate."""
    metrics = [Metric(_PATIENTS, 0, MAX_PATIENTS, 1)]
    for s in specs:
        low, high = min(0.0, s.low) * MAX_PATIENTS, max(0.0, s.high) * MAX_PATIENTS
        metrics.append(Metric(_TOTAL + s.name, low, high, s.resolution))
        if replicates:
            metrics.append(Metric(_REPLICATES + s.name, low, high, s.resolution, replicates))
    return tuple(metrics)


def evaluation_sums(values: Mapping[str, Array], weights: npt.NDArray[np.int64]) -> dict[str, Any]:
    """A site's entries: from each metric's value for every patient (n,), and its replicates' draws (R, n)."""
    sums: dict[str, Any] = {}
    for name, per_patient in values.items():
        means = PatientMeans.of(per_patient, weights)
        sums |= {_PATIENTS: means.count, _TOTAL + name: means.total}
        if len(weights):
            sums[_REPLICATES + name] = means.replicates
    return sums


def patient_means(aggregate: Aggregate, specs: Sequence[MetricSpec]) -> dict[str, PatientMeans]:
    """The mergeable state of every metric from an evaluation's sums."""
    count = int(aggregate.metrics[_PATIENTS][0])
    return {
        s.name: PatientMeans(
            float(aggregate.metrics[_TOTAL + s.name][0]),
            count,
            aggregate.metrics.get(_REPLICATES + s.name, np.zeros(0)),
        )
        for s in specs
    }
