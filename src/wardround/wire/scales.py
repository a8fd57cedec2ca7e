"""Scales: how large a change of each tensor the fixed point can say, from round to round.

All are functions of public values (the study, the broadcast model, the sum of a round), the same in the clear and under
masks, so that a site can tell how large a scale can be at most. A scale may cost digits of a change, never the change:
what saturates is said by the sum, and the next scale is larger for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt

from wardround.errors import Rejected, WireError
from wardround.wire.ring import levels
from wardround.wire.update import Aggregate, Layout, Scales, scale_key

Array = npt.NDArray[Any]
# No scale grows further in a round.
GROWTH = 16.0
# A larger share of saturated values is reported, and makes a scale jump: twice as far for each tenfold share.
SATURATED = 1e-4
_JUMPS = ((1e-1, GROWTH), (1e-2, 8.0), (1e-3, 4.0), (SATURATED, 2.0))
# Times the peak of the last sum; a tensor of few values has no other peaks to go by, and may be still in one round.
_HEADROOM = 4.0
_FEW, _MOST_HEADROOM, _DIGITS = 64, 64, 10
# The scale of the first round is the study's guess: it may fall to so many times the peak at once. Not that of a tensor
# of few values: their steps may have cancelled, and a peak by chance near 0 would cut off the next round.
_FIRST_HEADROOM = 64.0
# Buffers are statistics of the data: they start with room for what they hold.
_START_HEADROOM = 4.0
# No change in a round is taken to be larger than so many times the largest value that its tensor has, or starts with.
_LARGEST_CHANGE = 16.0
# Of a note that values were cut off: the tensor, and the share in per cent.
CUT_OFF = re.compile(r"(\S+): ([\d.]+)% of values saturated")


def cut_off(key: str, share: float, growth: float) -> str:
    """The note of a round in which such a share of a tensor's values saturated, as `CUT_OFF` finds it."""
    return f"{key}: {share:.2%} of values saturated; its scale grows {growth:.3g}-fold"


def headroom(size: int, bits: int) -> float:
    """How many times the peak of the last sum a scale is: 4, and up to 64 for tensors of fewer than 64 values.

    As many as leave ten bits for a value at the peak: headroom costs digits, and few bits have none to give.
    """
    if size >= _FEW:
        return _HEADROOM
    return float(min(_MOST_HEADROOM, max(_HEADROOM, levels(bits) >> _DIGITS)))


def jump(share: float) -> float:
    """The least factor by which a scale grows after a round in which such a share of values saturated."""
    return next((factor for above, factor in _JUMPS if share > above), 1.0)


def _all(group: str, size: int) -> int:
    return size


def next_scales(
    aggregate: Aggregate, count: Callable[[str, int], int] = _all, *, first: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """The scales of the next round, and the share of saturated values of each tensor where there were any.

    A scale follows `headroom` times the peak of the summed change, and never falls by more than half in a round. A
    share of saturated values above 1e-4 lets it jump. It never grows by more than a factor of 16. The scale of the
    `first` round is the study's guess, far too large where weights are small: that of a tensor of 64 values or more may
    fall to 64 times the peak at once. `count` says how many values a site sends of a group's tensor of a size.
    """
    scales = aggregate.scales
    following: dict[str, float] = {}
    saturated: dict[str, float] = {}
    for group in aggregate.layout.groups:
        bits = aggregate.layout.bits_of(group)
        for info in group.tensors:
            key = scale_key(group.name, info.name)
            scale = scales[key]
            share = aggregate.saturated[key] / max(1, count(group.name, info.size) * aggregate.contributors)
            if share > 0.0:
                saturated[key] = share
            peak = aggregate.peak(group.name, info.name)
            wanted = headroom(info.size, bits) * peak
            if share > SATURATED:
                wanted = max(jump(share) * scale, wanted)
            elif first and info.size >= _FEW:
                wanted = max(wanted, min(scale, _FIRST_HEADROOM * peak)) or scale
            else:
                wanted = max(wanted, 0.5 * scale, 1e-12)
            following[key] = min(wanted, GROWTH * scale)
    return following, saturated


@dataclass(frozen=True)
class ScaleRules:
    """The scales that a study starts with, and the largest that it can come to.

    `layout` is that of what is sent; `initial` is the study's scale, `values` the state before round 1, by group and
    tensor. Groups in `trained` hold what steps change; all others hold averages.
    """

    layout: Layout
    initial: float
    values: Mapping[str, Array]
    trained: frozenset[str] = frozenset()

    @cached_property
    def start(self) -> dict[str, float]:
        """The scales of round 1: the study's; of averages at least four times their largest initial value."""
        found = {}
        for group in self.layout.groups:
            for info in group.tensors:
                key = scale_key(group.name, info.name)
                least = 0.0 if group.name in self.trained else _START_HEADROOM * _largest(self.values.get(key))
                found[key] = max(self.initial, least)
        return found

    def ceiling(self, key: str, public: Mapping[str, Array], scale: float = math.inf) -> float:
        """The largest scale of a tensor in the round that starts with a global state: what a sum of changes can need.

        As many changes as the layout has room for sites, each at most 16 times the largest value that the tensor has or
        the scale that it starts with, and their headroom. A model that grows further does so in more rounds. The tensor
        is looked at only where `scale` lies beyond what it starts with.
        """
        least = self._unit[key] * self.start[key]
        if scale <= least or key not in public:
            return least
        return max(least, self._unit[key] * _largest(public[key]))

    @cached_property
    def _unit(self) -> dict[str, float]:
        """The ceiling of each tensor whose largest value is 1."""
        each = _LARGEST_CHANGE * self.layout.max_sites
        return {
            scale_key(group.name, info.name): each * headroom(info.size, self.layout.bits_of(group))
            for group in self.layout.groups
            for info in group.tensors
        }

    def capped(self, scales: Scales, public: Mapping[str, Array]) -> dict[str, float]:
        """The scales, none above its ceiling: what a coordinator announces."""
        return {key: min(scale, self.ceiling(key, public, scale)) for key, scale in scales.items()}

    def check(self, number: int, scales: Scales, public: Mapping[str, Array], seen: Mapping[str, Any]) -> None:
        """Raises `Rejected` for a scale of round `number` that no honest rounds come to, or for a missing one.

        `seen` is what `remembered` made of the last round that the site took part in; without it, that is round 1.
        Scales far too large would leave nothing of most sites' changes in the sum but the signs of a few.
        """
        last, before = int(seen.get("round", 1)), seen.get("scales", self.start)
        for key, start in self.start.items():
            name = key.partition("/")[2]
            if key not in scales:
                raise Rejected(f"round {number} comes without the scale of the tensor {name}")
            # 16 to the number of rounds: exact, and finite however long the site was away.
            grown = math.ldexp(before.get(key, start), min(4 * max(0, number - last), 900))
            most = min(self.ceiling(key, public, scales[key]), grown)
            if scales[key] > most * (1.0 + 1e-9):
                raise Rejected(
                    f"round {number} comes with a scale of {scales[key]:.3g} for the tensor {name}, and the study's "
                    f"rounds come to {most:.3g} at most; the coordinator must run the study's version of Wardround"
                )


def remembered(number: int, scales: Scales) -> dict[str, Any]:
    """What a site keeps of the scales of a round, for `ScaleRules.check`."""
    return {"round": number, "scales": dict(scales)}


def scales_in(meta: Mapping[str, Any]) -> dict[str, float]:
    """The scales that a training request carries; raises `WireError` where they are missing or not positive."""
    scales = meta.get("scales")
    if not isinstance(scales, dict) or not all(
        isinstance(v, float | int) and 0 < float(v) < float("inf") for v in scales.values()
    ):
        raise WireError("a training request needs the scale of every tensor")
    return {str(name): float(value) for name, value in scales.items()}


def _largest(tensor: Array | None) -> float:
    """The largest magnitude of a tensor; 0 for none, and for one whose values are not finite: they excuse nothing."""
    if tensor is None or not tensor.size:
        return 0.0
    largest = max(float(tensor.max()), -float(tensor.min()))
    return largest if math.isfinite(largest) else 0.0
