"""Noise in whole numbers: an exact sampler, and what a sum of it from several sites protects. No floats in the noise.

The sampler is that of Canonne, Kamath & Steinke (NeurIPS 2020, algorithms 1 to 3), in integers alone and over arrays.
What the sum is worth is by Kairouz, Liu & Steinke (*The distributed discrete Gaussian mechanism for federated
learning with secure aggregation*, ICML 2021, arXiv:2102.06387).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.protection.secret import SecretStream

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Booleans = npt.NDArray[np.bool_]
# With larger ones the products of the sampler would not fit 64 bits.
LARGEST_DEVIATION = 1024
# Chance that one rounding is drawn again, at most; Kairouz et al. call it beta.
_REDRAWN = math.exp(-0.5)
_BLOCK = 1 << 16


def discrete_gaussians(stream: SecretStream, deviation: int, count: int) -> Integers:
    """Integers x with probability proportional to exp(-x^2 / (2 deviation^2)), exactly: (count,).

    Raises ValueError for a deviation outside 1 to 1024.
    """
    if not 1 <= deviation <= LARGEST_DEVIATION:
        raise ValueError(f"deviation {deviation} is not between 1 and {LARGEST_DEVIATION}")
    found = [np.zeros(0, dtype=np.int64)]
    missing = count
    while missing > 0:
        candidates = _laplaces(stream, deviation + 1, min(2 * missing + 16, _BLOCK))
        kept = candidates[_accepted(stream, candidates, deviation)][:missing]
        found.append(kept)
        missing -= len(kept)
    return np.concatenate(found)


def _accepted(stream: SecretStream, candidates: Integers, deviation: int) -> Booleans:
    """True with probability exp(-(|y| - s^2/t)^2 / (2 s^2)), t = s + 1, for each candidate y."""
    t, variance = deviation + 1, deviation * deviation
    # A candidate of 2000 t would overflow, and has probability e^-2000.
    numerator = (np.abs(candidates) * t - variance) ** 2
    return _bernoulli_exp(stream, numerator.astype(np.uint64), 2 * variance * t * t)


def _laplaces(stream: SecretStream, scale: int, tries: int) -> Integers:
    """What is left of so many tries at integers x with probability proportional to exp(-|x| / scale)."""
    low = _below(stream, np.full(tries, scale, dtype=np.uint64))
    low = low[_bernoulli_exp(stream, low, scale)]
    high = np.zeros(len(low), dtype=np.uint64)
    going = np.arange(len(low))
    while len(going):
        going = going[_bernoulli_exp(stream, np.ones(len(going), dtype=np.uint64), 1)]
        high[going] += np.uint64(1)
    size = (low + np.uint64(scale) * high).astype(np.int64)
    negative = (stream.words(len(size)) & np.uint64(1)).astype(bool)
    # Zero has one sign only, or it would come twice as often.
    signed = np.where(negative, -size, size)
    return np.asarray(signed[~(negative & (size == 0))], dtype=np.int64)


def _bernoulli_exp(stream: SecretStream, numerator: Words, denominator: int) -> Booleans:
    """True with probability exp(-numerator / denominator): (n,)."""
    whole, rest = np.divmod(numerator, np.uint64(denominator))
    alive = np.ones(len(numerator), dtype=np.bool_)
    number = 0
    while len(going := np.flatnonzero(alive & (whole > number))):
        alive[going] = _bernoulli_exp_part(stream, np.ones(len(going), dtype=np.uint64), 1)
        number += 1
    going = np.flatnonzero(alive)
    alive[going] = _bernoulli_exp_part(stream, rest[going], denominator)
    return alive


def _bernoulli_exp_part(stream: SecretStream, numerator: Words, denominator: int) -> Booleans:
    """The same for exponents of at most 1: whether the first failure of draws of x/1, x/2, ... is an odd one."""
    result = np.zeros(len(numerator), dtype=np.bool_)
    going, number = np.arange(len(numerator)), 1
    while len(going):
        bound = np.full(len(going), denominator * number, dtype=np.uint64)
        hit = _below(stream, bound) < numerator[going]
        result[going[~hit]] = number % 2 == 1
        going, number = going[hit], number + 1
    return result


def _below(stream: SecretStream, bounds: Words) -> Words:
    """Uniform integers in [0, bound) of each bound, without bias: (n,)."""
    result = np.zeros(len(bounds), dtype=np.uint64)
    going = np.arange(len(bounds))
    # Words above the last whole multiple of the bound are drawn again.
    excess = (np.uint64(0) - bounds) % bounds
    while len(going):
        words = stream.words(len(going))
        good = words <= np.uint64(2**64 - 1) - excess[going]
        result[going[good]] = words[good] % bounds[going[good]]
        going = going[~good]
    return result


def rounded_bound(norm: float, dimension: int) -> float:
    """The largest squared norm that a vector of at most `norm` may have once it is rounded to integers.

    Equation 1 of Kairouz et al., with granularity 1: roundings beyond it are drawn again.
    """
    typical = norm**2 + dimension / 4 + math.sqrt(2 * math.log(1 / _REDRAWN)) * (norm + math.sqrt(dimension) / 2)
    return min((norm + math.sqrt(dimension)) ** 2, typical)


def rounded(values: npt.NDArray[Any], bound: int, stream: SecretStream) -> Integers:
    """The values rounded up or down at random, right on average, with a squared norm of at most `bound`: (n,).

    After 100 draws beyond the bound they are rounded towards zero, which lengthens no vector.
    """
    down = np.floor(values)
    part = values - down
    for _ in range(100):
        up = (stream.words(len(values)) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < part
        whole = down.astype(np.int64) + up
        if squared_norm(whole) <= bound:
            return np.asarray(whole, dtype=np.int64)
    return np.asarray(np.trunc(values), dtype=np.int64)


def squared_norm(values: Integers) -> int:
    """The sum of squares; exact while it is below 2^63."""
    return int(np.dot(values, values))


def zcdp(bound: int, deviation: int, parties: int, dimension: int) -> float:
    """The rho of zero-concentrated differential privacy of one noisy sum.

    The bound of proposition 14 of Kairouz et al. that grows with the dimension and holds at every Renyi order alike.

    `bound` is the largest squared norm by which one patient moves the sum, `deviation` that of each party's own noise.
    """
    terms = (math.exp(-2.0 * math.pi**2 * deviation**2 * k / (k + 1)) for k in range(1, parties))
    tau = 10.0 * sum(terms)
    return 0.5 * (math.sqrt(bound / parties) / deviation + tau * math.sqrt(dimension)) ** 2


def epsilon_of_zcdp(rho: float, delta: float) -> float:
    """The epsilon at `delta` of rho-zCDP (Canonne, Kamath & Steinke, 2020, proposition 12)."""
    if rho <= 0.0:
        return 0.0
    # Late: slow to import, and only noise that sites share is accounted so.
    from scipy.optimize import minimize_scalar

    def bound(logarithm: float) -> float:
        alpha = 1.0 + math.exp(logarithm)
        return alpha * rho + math.log1p(-1.0 / alpha) - math.log(delta * alpha) / (alpha - 1.0)

    best = minimize_scalar(bound, bounds=(-12.0, 25.0), method="bounded", options={"xatol": 1e-9})
    return max(0.0, float(best.fun))


def zcdp_for(epsilon: float, delta: float) -> float:
    """The largest rho (to a part in 10^9, rounded down) that costs at most `epsilon` at `delta`."""
    low, high = 0.0, epsilon + 1.0
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if epsilon_of_zcdp(middle, delta) <= epsilon else (low, middle)
    return low
