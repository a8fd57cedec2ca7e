"""What noisy steps cost: (epsilon, delta) of Poisson-sampled Gaussian steps, composed over rounds and studies.

The number shown to people comes from privacy loss distributions (Koskela et al., AISTATS 2020; Doroshenko et al.,
PoPETs 2022) as Google's dp-accounting computes them, pessimistically; the one of Opacus (Gopi et al., NeurIPS 2021)
is there to check it. Neighbours differ by adding or removing one patient.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from wardround.errors import MissingExtra, StudyError
from wardround.protection.discrete_gaussian import epsilon_of_zcdp
from wardround.protection.opacus import EXTRA, from_opacus

Accountant: TypeAlias = Literal["pld", "prv"]
WHAT = "differential privacy"
_LARGEST_NOISE = 1e4


@dataclass(frozen=True)
class Spending:
    """Some steps alike: noise in multiples of the clip norm, the probability that a patient is in a step.

    Where sites share the noise, `rho` is what one of their sums costs in zero-concentrated differential privacy, as if
    every patient were in every step, and says all.
    """

    noise: float
    rate: float
    steps: int
    rho: float = 0.0


def epsilon_of(spendings: Iterable[Spending], delta: float, accountant: Accountant = "pld") -> float:
    """The epsilon at `delta` of all these steps together; 0 for none, `inf` where the accountant finds no bound.

    Raises `MissingExtra` where the accountant is not installed.
    """
    counts: Counter[tuple[float, float]] = Counter()
    rho = 0.0
    for spending in spendings:
        if spending.rho > 0.0:
            rho += spending.rho * spending.steps
        else:
            counts[spending.noise, spending.rate] += spending.steps
    steps = tuple((noise, rate, count) for (noise, rate), count in sorted(counts.items()) if count)
    if not steps:
        return epsilon_of_zcdp(rho, delta)
    if rho > 0.0:
        # Two kinds of loss: their epsilons and deltas add.
        delta = 0.5 * delta
        return _composed(steps, delta, accountant) + epsilon_of_zcdp(rho, delta)
    return _composed(steps, delta, accountant)


def _composed(steps: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    return float(_pld(steps, delta) if accountant == "pld" else _prv(steps, delta))


@lru_cache(maxsize=256)
def _pld(steps: tuple[tuple[float, float, int], ...], delta: float) -> float:
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError:
        raise MissingExtra(WHAT, EXTRA) from None
    # Little noise means wide distributions, whose epsilon needs no third digit behind the point.
    interval = 1e-3 if min(noise for noise, _, _ in steps) >= 0.25 else 1e-2
    total: Any = None
    for noise, rate, count in steps:
        one: Any = pld.from_gaussian_mechanism(
            noise, sampling_prob=rate, use_connect_dots=True, value_discretization_interval=interval
        )
        part = one.self_compose(count)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def _prv(steps: tuple[tuple[float, float, int], ...], delta: float) -> float:
    with warnings.catch_warnings():
        # Overflows far out in the tails, and deprecations of its own.
        warnings.simplefilter("ignore")
        accountant = from_opacus("opacus.accountants", "PRVAccountant", WHAT)()
        accountant.history = list(steps)
        found = float(accountant.get_epsilon(delta=delta))
    return found if math.isfinite(found) else math.inf


def noise_for(epsilon: float, delta: float, rate: float, steps: int, accountant: Accountant = "pld") -> float:
    """The smallest noise multiplier (to 4 digits, rounded up) with which so many steps cost at most `epsilon`.

    Raises `StudyError` where no noise up to 10^4 would do.
    """

    def fits(noise: float) -> bool:
        return epsilon_of([Spending(noise, rate, steps)], delta, accountant) <= epsilon

    high = 0.5
    while not fits(high):
        high *= 2.0
        if high > _LARGEST_NOISE:
            raise StudyError(f"protection.privacy: no noise makes {steps} steps cost epsilon {epsilon:g}; take fewer")
    low = high / 2.0 if high > 0.5 else 0.1
    while high / low > 1.0 + 5e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    digits = 3 - math.floor(math.log10(high))
    return float(math.ceil(high * 10**digits) / 10**digits)
