"""A site's mean over its patients, what of it leaves, and the interval that follows from n, value and standard error.

The standard error of a mean over n patients is s / sqrt(n) with the sample standard deviation s. Every metric of today
is a mean over patients.
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
    """A mean over `count` patients and its standard error; `error` is `None` where it is not known."""

    value: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` patients; without standard error and interval where it has none."""

    value: float
    n: int
    se: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


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


def estimate(mean: Mean, level: float = 0.95) -> Estimate:
    """The interval of a mean by Student's t with n - 1 degrees of freedom; none below `LEAST_PATIENTS`."""
    if mean.error is None or mean.count < LEAST_PATIENTS:
        return Estimate(mean.value, mean.count)
    return _interval(mean.value, mean.error, mean.count, mean.count - 1.0, level)


def mean_of_sites(sites: Sequence[Mean], level: float = 0.95) -> Estimate:
    """The unweighted mean of K sites' means, sites without patients left out.

    Its standard error is sqrt(sum SE_i^2) / K: it holds the chance of which patients of these sites were tested, and is
    silent about other sites. Student's t with the degrees of freedom of Welch and Satterthwaite (Satterthwaite,
    Biometrics Bulletin 2, 1946), (sum SE_i^2)^2 / sum (SE_i^4 / (n_i - 1)). No interval where a site's standard error
    is not known, or below `LEAST_PATIENTS` in all.
    """
    present = [site for site in sites if site.count]
    if not present:
        return Estimate(math.nan, 0)
    value, count = float(np.mean([site.value for site in present])), sum(site.count for site in present)
    squares = [site.error**2 for site in present if site.error is not None and site.count > 1]
    if len(squares) < len(present) or count < LEAST_PATIENTS:
        return Estimate(value, count)
    spread = sum(squares)
    below = sum(square**2 / (site.count - 1) for square, site in zip(squares, present, strict=True))
    degrees = spread**2 / below if below else math.inf
    return _interval(value, math.sqrt(spread) / len(present), count, degrees, level)


def _interval(value: float, error: float, count: int, degrees: float, level: float) -> Estimate:
    # Imported late: a site that only trains needs no quantiles.
    from scipy.special import ndtri, stdtrit

    share = 0.5 + level / 2.0
    half = error * float(ndtri(share) if math.isinf(degrees) else stdtrit(degrees, share))
    return Estimate(value, count, error, value - half, value + half)
