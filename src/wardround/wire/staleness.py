"""How much an update that comes late counts, and one mean of updates that trained from states of different rounds.

After FedBuff (Nguyen et al., AISTATS 2022) and the polynomial weights of FedAsync (Xie et al., 2019): an update whose
state is t rounds older than the newest counts s(t) = (1 + t)^-a of a fresh one. Here s(t) is a whole number of steps of
2^-16 that multiplies the whole update, its weighted change and its weight alike, so that what comes out is a weighted
mean, and not a smaller step as in FedBuff.

All updates of one base round were asked for with one set of scales and are t rounds old together, so they are summed
as ever, exactly and in any order, and the sum is what is multiplied: in 64-bit and Python's integers, so the ring needs
no room for it. Sums of different base rounds have different scales; they are brought together in double precision, in
the order of their rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wardround.errors import Rejected
from wardround.wire.update import WEIGHT_BITS, Aggregate, Floats, Layout, Scales

# A fresh update counts this many.
FRESH = 1 << 16


@dataclass(frozen=True)
class Staleness:
    """A round is committed with `buffer` updates; one older than `most` rounds is left out.

    `exponent` is a of (1 + t)^-a.
    """

    buffer: int
    exponent: float
    most: int

    def multiplier(self, age: int) -> int:
        """The whole number by which an update is multiplied whose state is `age` rounds older than the newest."""
        return multiplier(age, self.exponent)


def multiplier(age: int, exponent: float) -> int:
    """round(2^16 (1 + age)^-exponent): what a fresh update counts is 2^16.

    >>> multiplier(0, 0.5), multiplier(3, 0.5), multiplier(9, 0.0)
    (65536, 32768, 65536)
    """
    share: float = (1.0 + age) ** -exponent
    return round(FRESH * share)


@dataclass(frozen=True)
class Part:
    """The sum of the updates of one base round, and the whole number by which it is multiplied."""

    multiplier: int
    aggregate: Aggregate


class Mixed(Aggregate):
    """The sum of parts, each times its multiplier over 2^16, in their order: as one sum, with `scales` of the newest.

    Counts of sites, of saturated values and metrics are plain sums. All parts have one layout.
    """

    def __init__(self, layout: Layout, parts: Sequence[Part], scales: Scales) -> None:
        self.layout = layout
        self.scales = scales
        self._parts = tuple(parts)
        sums = [part.aggregate for part in parts]
        self.contributors = sum(each.contributors for each in sums)
        self.saturated = {key: sum(each.saturated[key] for each in sums) for key in sums[0].saturated}
        self.metrics = {name: np.sum([each.metrics[name] for each in sums], axis=0) for name in sums[0].metrics}

    def steps(self, group: str) -> int:
        """The sum of the multiplied weights, in steps of 2^-16 of a weight's own."""
        return sum(part.multiplier * part.aggregate.steps(group) for part in self._parts)

    def weight(self, group: str) -> float:
        """The sum of the multiplied weights, over 2^16."""
        return self._share(group) * self.layout.max_weight

    def total(self, group: str, tensor: str) -> Floats:
        """The sum of the multiplied totals, over 2^16."""
        first, *others = self._parts
        total = first.aggregate.total(group, tensor)
        total *= first.multiplier / FRESH
        for part in others:
            more = part.aggregate.total(group, tensor)
            more *= part.multiplier / FRESH
            total += more
        return total

    def peak(self, group: str, tensor: str) -> float:
        """No less than the largest magnitude in `total`: the sum of the parts' own, whose values need not be made."""
        return sum(part.multiplier / FRESH * part.aggregate.peak(group, tensor) for part in self._parts)

    def mean(self, group: str, tensor: str) -> Floats:
        """The mean of the changes by multiplied weights; raises `Rejected` when all weights are zero."""
        share = self._share(group)
        if share <= 0.0:
            raise Rejected(f"the weights of group {group!r} sum to zero; no site had anything to learn from")
        mean = self.total(group, tensor)
        mean /= share
        return mean

    def _share(self, group: str) -> float:
        # Of whole numbers, so that it is rounded once.
        return self.steps(group) / (FRESH << WEIGHT_BITS)


def mixed(layout: Layout, parts: Sequence[Part], scales: Scales) -> Aggregate:
    """The parts as one sum; fresh updates alone are the plain sum, to the last bit."""
    if len(parts) == 1 and parts[0].multiplier == FRESH:
        return parts[0].aggregate
    return Mixed(layout, parts, scales)
