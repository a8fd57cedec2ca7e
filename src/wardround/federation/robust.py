"""A round whose aggregate is a robust mean: every site's update is kept until all are there, then a rule decides.

It needs each update in the clear, so it excludes the secure sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wardround.errors import NotEnoughSites, Rejected
from wardround.federation.exchange import Call, ExchangeFactory, PlainSum
from wardround.federation.spooled import Spooled, Spooling, changes
from wardround.protection.robust import Defence, combine, gram, norm_gate, plan_of
from wardround.storage.blobs import disk_error
from wardround.wire.message import Message
from wardround.wire.ring import ExactSum
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group, Layout, Scales, scale_key

Floats = npt.NDArray[np.float64]


class RobustAggregate(Aggregate):
    """What the method sees: the robust mean of each tensor in place of the weighted one, and the summed metrics.

    Every kept site weighs the same. `weight` and `peak` are as if each had claimed the median weight, and a tensor
    counts as saturated as often as the (f+1)-th most saturated site says: no f sites move a scale by their word.
    """

    def __init__(self, layout: Layout, scales: Scales, updates: Mapping[str, Spooled], f: int, means: Path) -> None:
        tails = ExactSum((*((0, ring) for _, ring in layout.segments[:-1]), layout.segments[-1]))
        for update in updates.values():
            tails.add(update.tail, 0)
        super().__init__(layout, tails, scales)
        self._means = means
        kept = list(updates.values())
        self._shares = {g.name: len(kept) * float(np.median([u.shares[g.name] for u in kept])) for g in layout.groups}
        rank = min(f, len(kept) - 1)
        self.saturated = {
            key: len(kept) * sorted((u.saturated[key] for u in kept), reverse=True)[rank] for key in self.saturated
        }

    def mean(self, group: str, tensor: str) -> Floats:
        """The robust mean of the sites' changes."""
        offset, info = _locate(self.layout, group, tensor)
        return np.fromfile(self._means, "<f8", info.size, offset=8 * offset).reshape(info.shape)

    def total(self, group: str, tensor: str) -> Floats:
        """The robust mean times the summed weights, relative to max_weight."""
        return self.mean(group, tensor) * self._shares[group]

    def peak(self, group: str, tensor: str) -> float:
        """The largest magnitude in `total`."""
        return float(np.abs(self.total(group, tensor)).max(initial=0.0))


def _locate(layout: Layout, group: str, tensor: str) -> tuple[int, TensorInfo]:
    """Where a tensor's elements begin when all groups follow each other, unpadded."""
    offset = 0
    for candidate in layout.groups:
        for info in candidate.tensors:
            if (candidate.name, info.name) == (group, tensor):
                return offset, info
            offset += info.size
    raise KeyError(scale_key(group, tensor))


class RobustMean(Spooling):
    """Once all updates are there, gate, mixing and rule make one mean of them.

    The gate looks at a site as a whole, the rule at each group of tensors by itself, so that the large numbers of one
    (running variances, say) do not hide what happens in another.
    """

    def __init__(self, call: Call, defence: Defence, folder: Path) -> None:
        super().__init__(call, folder)
        self._defence = defence
        self._notes: tuple[str, ...] = ()
        #: Each site's share in the mean, by group; after `close`.
        self.weights: dict[str, dict[str, float]] = {}

    def close(self) -> list[Message]:
        """Gate and average; raises `NotEnoughSites` when fewer sites are left than the rule needs."""
        layout, defence = self._call.layout, self._defence
        names = [site for site in self._call.sites if site in self._updates]
        updates = [self._updates[site] for site in names]
        grams = [gram(self._chunks(g, updates), len(names)) for g in layout.groups]
        kept = np.ones(len(names), dtype=np.bool_)
        if defence.gate:
            for g in grams:
                kept &= norm_gate(np.sqrt(np.diag(g)))
        try:
            plans = [plan_of(g, defence, kept) for g in grams]
        except Rejected as error:
            raise NotEnoughSites(f"{error}; mend what keeps the others away and run again with --resume") from error
        self._notes = tuple(_gated(site, grams, i) for i, site in enumerate(names) if not kept[i])
        self._updates = {site: update for site, update, stays in zip(names, updates, kept, strict=True) if stays}
        self._receipts = {site: self._receipts[site] for site in self._updates}
        try:
            with self._means.open("wb") as file:
                for group, plan in zip(layout.groups, plans, strict=True):
                    shares = np.zeros(len(self._updates))
                    for values in self._chunks(group, list(self._updates.values())):
                        mean, share = combine(plan, values)
                        shares += share * values.shape[1] / max(1, group.size)
                        file.write(mean.astype("<f8").data)
                    self.weights[group.name] = dict(zip(self._updates, shares.tolist(), strict=True))
        except OSError as error:
            raise disk_error(error) from error
        return []

    @property
    def notes(self) -> tuple[str, ...]:
        """Who was gated, and why."""
        return self._notes

    def aggregate(self) -> Aggregate:
        """The robust mean, and the sums over the kept sites."""
        return RobustAggregate(self._call.layout, self._call.scales, self._updates, self._defence.f, self._means)

    def _chunks(self, group: Group, updates: Sequence[Spooled]) -> Iterator[Floats]:
        return changes(self._call.layout, self._call.scales, group, updates)

    @property
    def _means(self) -> Path:
        return self._folder / "means"


def _gated(site: str, grams: list[Floats], index: int) -> str:
    norms = [np.sqrt(np.diag(g)) for g in grams]
    ratio = max(float(n[index] / m) for n in norms if (m := float(np.median(n))) > 0.0)
    return f"{site} is not in the mean: its update is {ratio:.3g} times as long as the median one"


def robust_mean(defence: Defence, folder: Path) -> ExchangeFactory:
    """The exchange of an arm with a robust mean; sums without a model, as of an evaluation, stay plain."""
    return lambda call: RobustMean(call, defence, folder) if call.layout.groups else PlainSum(call)
