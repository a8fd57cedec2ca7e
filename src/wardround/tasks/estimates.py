"""A metric over a site's patients, and the interval that follows from n, value and standard error.

The standard error of a mean over n patients is s / sqrt(n) with the sample standard deviation s; that of a metric that
is no mean comes from drawing patients anew (`tasks.resampling`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Fewer patients give no interval, anywhere.
LEAST_PATIENTS = 5


@dataclass(frozen=True)
class Mean:
    """A metric over `count` patients and its standard error; `error` is `None` where it is not known.

    `absent` patients beside them have no value. Where the site keeps the metric to itself it is `withheld`, and nothing
    else is known.
    """

    value: float
    error: float | None
    count: int
    absent: int = 0
    withheld: bool = False


WITHHELD = Mean(math.nan, None, 0, withheld=True)


@dataclass(frozen=True)
class PatientEstimate:
    """A metric over `n` patients, with `absent` others; without standard error and interval where it has none."""

    value: float
    n: int
    se: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    absent: int = 0


def mean_of(values: Sequence[float] | npt.NDArray[np.float64]) -> Mean:
    """The mean of one value a patient, (n,), and its standard error; that of one patient is not known."""
    given = np.asarray(values, dtype=np.float64)
    if not given.size:
        return Mean(math.nan, None, 0)
    error = float(given.std(ddof=1)) / math.sqrt(given.size) if given.size > 1 else None
    return Mean(float(given.mean()), error, given.size)


def two_digits(error: float) -> float:
    """A standard error to two significant digits.

    An interval needs no more: the standard error of 5 patients is itself uncertain by a third. All digits of several
    metrics that are functions of each other (PSNR and RMSE) come close to solving 5 patients' values.
    """
    return float(f"{error:.1e}")


def estimate(mean: Mean, level: float = 0.95) -> PatientEstimate:
    """The interval of a mean by Student's t with n - 1 degrees of freedom; none below `LEAST_PATIENTS`."""
    if mean.error is None or mean.count < LEAST_PATIENTS:
        return PatientEstimate(mean.value, mean.count, absent=mean.absent)
    return _interval(mean.value, mean.error, mean.count, mean.count - 1.0, level, mean.absent)


def difference(mine: Mean, other: Mean, paired: float | None, *, larger_is_better: bool) -> Mean:
    """How much better `mine` is than `other`, positive for better, with its paired standard error.

    Without a value where one of the two has none.
    """
    if mine.withheld or other.withheld:
        return WITHHELD
    if not mine.count or not other.count:
        return Mean(math.nan, None, 0, other.absent)
    gain = mine.value - other.value
    return Mean(gain if larger_is_better else -gain, paired, min(mine.count, other.count), other.absent)


def mean_of_sites(sites: Sequence[Mean], level: float = 0.95) -> PatientEstimate:
    """The unweighted mean of K sites' means, sites without patients left out; none where a site withholds its own.

    Its standard error is sqrt(sum SE_i^2) / K: it holds the chance of which patients of these sites were tested, and is
    silent about other sites. Student's t with the degrees of freedom of Welch and Satterthwaite (Satterthwaite,
    Biometrics Bulletin 2, 1946), (sum SE_i^2)^2 / sum (SE_i^4 / (n_i - 1)). No interval where a site's standard error
    is not known, or below `LEAST_PATIENTS` in all.
    """
    present, absent = [site for site in sites if site.count], sum(site.absent for site in sites)
    # A mean over some of the sites would look like one over all of them.
    if not present or any(site.withheld for site in sites):
        return PatientEstimate(math.nan, 0)
    value, count = float(np.mean([site.value for site in present])), sum(site.count for site in present)
    squares = [site.error**2 for site in present if site.error is not None and site.count > 1]
    if len(squares) < len(present) or count < LEAST_PATIENTS:
        return PatientEstimate(value, count, absent=absent)
    spread = sum(squares)
    below = sum(square**2 / (site.count - 1) for square, site in zip(squares, present, strict=True))
    degrees = spread**2 / below if below else math.inf
    return _interval(value, math.sqrt(spread) / len(present), count, degrees, level, absent)


def _interval(value: float, error: float, count: int, degrees: float, level: float, absent: int) -> PatientEstimate:
    # Imported late: a site that only trains needs no quantiles.
    from scipy.special import ndtri, stdtrit

    share = 0.5 + level / 2.0
    half = error * float(ndtri(share) if math.isinf(degrees) else stdtrit(degrees, share))
    return PatientEstimate(value, count, error, value - half, value + half, absent)
