"""What goes into the sums: the metrics of a training round and of an evaluation. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wardround.federation.coordinator import LOSS, PATIENTS, SECONDS, VALIDATION
from wardround.tasks.metrics import PatientMeans
from wardround.wire.update import Aggregate, Metric

if TYPE_CHECKING:
    from wardround.tasks.task import MetricSpec

# A site's sum over patients fits its declared range up to this many patients.
MAX_PATIENTS = 1 << 16
MAX_LOSS = 1e6


def validation_metrics(specs: Sequence[MetricSpec]) -> tuple[Metric, ...]:
    """Sums over validation patients, and their number."""
    return (
        Metric(PATIENTS, 0, MAX_PATIENTS, 1),
        *(
            Metric(
                VALIDATION + s.name,
                min(0.0, s.low) * MAX_PATIENTS,
                max(0.0, s.high) * MAX_PATIENTS,
                s.resolution,
            )
            for s in specs
        ),
    )


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
    metrics = [Metric("patients", 0, MAX_PATIENTS, 1)]
    for s in specs:
        low, high = min(0.0, s.low) * MAX_PATIENTS, max(0.0, s.high) * MAX_PATIENTS
        metrics.append(Metric(f"total/{s.name}", low, high, s.resolution))
        if replicates:
            metrics.append(Metric(f"replicates/{s.name}", low, high, s.resolution, replicates))
    return tuple(metrics)


def patient_means(aggregate: Aggregate, specs: Sequence[MetricSpec]) -> dict[str, PatientMeans]:
    """The mergeable state of every metric from an evaluation's sums."""
    count = int(aggregate.metrics["patients"][0])
    return {
        s.name: PatientMeans(
            float(aggregate.metrics[f"total/{s.name}"][0]),
            count,
            aggregate.metrics.get(f"replicates/{s.name}", np.zeros(0)),
        )
        for s in specs
    }
