"""A round whose aggregate is a robust mean: every site's update is kept until all are there, then a rule decides.

It needs each update in the clear, so it excludes the secure sum. Updates are spooled to files and read in chunks, site
by site in the order of the study, so neither their number nor their order of arrival changes memory or result.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wardround.errors import NotEnoughSites, Rejected
from wardround.federation.exchange import Call, ClearExchange, ExchangeFactory, PlainSum
from wardround.protection.gates import Received, check_update
from wardround.protection.robust import Defence, combine, gram, norm_gate, plan_of
from wardround.storage.blobs import disk_error
from wardround.wire.message import FileBody, Message
from wardround.wire.ring import ExactSum, Ring, dequantise
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import TAIL, WEIGHT_BITS, Aggregate, Group, Layout, Scales, scale_key

Floats = npt.NDArray[np.float64]
# Elements of every site's update that are looked at together.
COLUMNS = 1 << 16


@dataclass(frozen=True)
class Spooled:
    """A verified update in a file: `shares` are the site's weights by group, `saturated` its counts by tensor."""

    path: Path
    tail: bytes
    shares: Mapping[str, float]
    saturated: Mapping[str, int]


def spooled(layout: Layout, path: Path) -> Spooled:
    """What the tail of a verified update says; raises `Rejected` for one without weight."""
    size, _ = layout.segments[-1]
    tail = b"".join(bytes(c) for c in FileBody(path, layout.nbytes).chunks(layout.nbytes - size))
    integers = iter(layout.from_digits(TAIL.unpack(tail)))
    next(integers)
    shares, saturated = {}, {}
    for group in layout.groups:
        shares[group.name] = next(integers) / (1 << WEIGHT_BITS)
        if shares[group.name] == 0.0:
            raise Rejected(f"an update without weight in group {group.name!r}: there is nothing to average")
        for info in group.tensors:
            saturated[scale_key(group.name, info.name)] = next(integers)
    return Spooled(path, tail, shares, saturated)


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


class RobustMean(ClearExchange):
    """Once all updates are there, gate, mixing and rule make one mean of them.

    The gate looks at a site as a whole, the rule at each group of tensors by itself, so that the large numbers of one
    (running variances, say) do not hide what happens in another.
    """

    def __init__(self, call: Call, defence: Defence, folder: Path) -> None:
        super().__init__(call)
        self._defence = defence
        self._folder = folder
        self._updates: dict[str, Spooled] = {}
        self._notes: tuple[str, ...] = ()
        #: Each site's share in the mean, by group; after `close`.
        self.weights: dict[str, dict[str, float]] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def _take(self, reply: Message) -> None:
        # Copied, and the copy verified: what was verified is what will be averaged.
        site = reply.header.site
        layout, path = self._call.layout, self._folder / f"{site}.update"
        if reply.body.nbytes != layout.nbytes:
            raise Rejected(f"an update of {reply.body.nbytes} bytes where the study says {layout.nbytes}")
        try:
            with path.open("wb") as file:
                for chunk in Received(reply.body).chunks():
                    file.write(chunk)
        except OSError as error:
            raise disk_error(error) from error
        try:
            check_update(layout, replace(reply, body=FileBody(path, layout.nbytes)))
            self._updates[site] = spooled(layout, path)
        except Rejected:
            path.unlink()
            raise

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

    @property
    def _means(self) -> Path:
        return self._folder / "means"

    def _chunks(self, group: Group, updates: list[Spooled]) -> Iterator[Floats]:
        """The unweighted changes (n, k) of a group, never across two tensors."""
        layout, ring = self._call.layout, Ring(group.ring_bits)
        at = sum(size for size, _ in layout.segments[: layout.groups.index(group)])
        for info in group.tensors:
            scale = self._call.scales[scale_key(group.name, info.name)]
            for start in range(0, info.size, COLUMNS):
                count = min(COLUMNS, info.size - start)
                values = np.empty((len(updates), count))
                for row, update in zip(values, updates, strict=True):
                    octets = np.fromfile(
                        update.path, np.uint8, count * ring.itemsize, offset=at + start * ring.itemsize
                    )
                    elements = ring.unpack(octets.data)
                    row[:] = dequantise(elements, scale / update.shares[group.name], layout.bits_of(group), ring)
                yield values
            at += info.size * ring.itemsize


def _gated(site: str, grams: list[Floats], index: int) -> str:
    norms = [np.sqrt(np.diag(g)) for g in grams]
    ratio = max(float(n[index] / m) for n in norms if (m := float(np.median(n))) > 0.0)
    return f"{site} is not in the mean: its update is {ratio:.3g} times as long as the median one"


def robust_mean(defence: Defence, folder: Path) -> ExchangeFactory:
    """The exchange of an arm with a robust mean; sums without a model, as of an evaluation, stay plain."""
    return lambda call: RobustMean(call, defence, folder) if call.layout.groups else PlainSum(call)
