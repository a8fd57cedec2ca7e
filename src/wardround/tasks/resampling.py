"""The standard error of a metric that is no mean, by drawing a site's patients anew. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wardround.tasks.states import state_of

if TYPE_CHECKING:
    from wardround.tasks.task import MetricSpec

Floats = npt.NDArray[np.float64]
RESAMPLES = 400


def resampled_error(
    spec: MetricSpec, rows: Floats, random: np.random.Generator, reference: Floats | None = None
) -> float | None:
    """The bootstrap's standard error over patients (n, *shape), or that of the paired difference to a `reference`.

    Patients with a value are drawn with replacement, the same ones for both (Efron and Tibshirani, 1993, section 6.2),
    and the spread is scaled by sqrt(n / (n - 1)), so that it is s / sqrt(n) where the metric is a mean. `None` where
    that says nothing: fewer than 2 patients, no value in half of the draws or more, or the same value in all of them.
    """
    counted = spec.kind.counted(rows)
    if reference is not None:
        counted |= spec.kind.counted(reference)
    count = int(counted.sum())
    if count < 2:
        return None
    weights = random.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES).astype(np.float64)
    values = spec.kind.value(spec, state_of(spec, rows[counted], weights))
    if reference is not None:
        values = spec.kind.value(spec, state_of(spec, reference[counted], weights)) - values
    values = values[~np.isnan(values)]
    if 2 * len(values) <= RESAMPLES:
        return None
    error = float(values.std(ddof=1)) * (count / (count - 1)) ** 0.5
    return error if error > 1e-12 * (spec.high - spec.low) else None
