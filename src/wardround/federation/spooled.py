"""A round in which every update is kept in a file until all are there, for what a sum alone does not tell.

It needs each update in the clear, so it excludes the secure sum. Updates are read in chunks, site by site in the order
of the study, so neither their number nor their order of arrival changes memory or result.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wardround.errors import Rejected
from wardround.federation.exchange import Call, ClearExchange, ExchangeFactory, PlainSum, add_body
from wardround.protection.gates import Received, check_update
from wardround.storage.blobs import disk_error
from wardround.wire.message import FileBody, Message
from wardround.wire.ring import ExactSum, Ring, dequantise
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


class Spooling(ClearExchange):
    """Keeps every update until the round is closed."""

    def __init__(self, call: Call, folder: Path) -> None:
        super().__init__(call)
        self._folder = folder
        self._updates: dict[str, Spooled] = {}
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


def changes(
    layout: Layout, scales: Scales, group: Group, updates: Sequence[Spooled], only: str | None = None
) -> Iterator[Floats]:
    """The unweighted changes (n, k) of a group, or of one tensor of it, never across two tensors."""
    ring = Ring(group.ring_bits)
    at = sum(size for size, _ in layout.segments[: layout.groups.index(group)])
    for info in group.tensors:
        scale = scales[scale_key(group.name, info.name)]
        for start in range(0, info.size if only in (None, info.name) else 0, COLUMNS):
            count = min(COLUMNS, info.size - start)
            values = np.empty((len(updates), count))
            for row, update in zip(values, updates, strict=True):
                octets = np.fromfile(update.path, np.uint8, count * ring.itemsize, offset=at + start * ring.itemsize)
                elements = ring.unpack(octets.data)
                row[:] = dequantise(elements, scale / update.shares[group.name], layout.bits_of(group), ring)
            yield values
        at += info.size * ring.itemsize


class Updates(Aggregate):
    """The sum, and every site's own change: for methods whose mean is of more than the changes."""

    def __init__(self, layout: Layout, total: ExactSum, scales: Scales, updates: Sequence[Spooled]) -> None:
        super().__init__(layout, total, scales)
        self._updates = updates

    def parts(self, group: str) -> Floats:
        """Each site's weight over the sum of all: (n,), in the order of the study."""
        weights = np.array([update.shares[group] for update in self._updates])
        found: Floats = weights / weights.sum()
        return found

    def each(self, group: str, tensor: str) -> Floats:
        """The change of a tensor at each site, in the same order: (n, *shape)."""
        found = next(g for g in self.layout.groups if g.name == group)
        info = next(info for info in found.tensors if info.name == tensor)
        alone = changes(self.layout, self.scales, found, self._updates, tensor)
        return np.concatenate(list(alone), axis=1).reshape(len(self._updates), *info.shape)


class EachUpdate(Spooling):
    """The plain sum of updates that are kept until the round is closed."""

    def aggregate(self) -> Updates:
        """The sum, and each of what it is of."""
        layout = self._call.layout
        updates = [self._updates[site] for site in self._call.sites if site in self._updates]
        total = ExactSum(layout.segments)
        for update in updates:
            add_body(total, FileBody(update.path, layout.nbytes))
        return Updates(layout, total, self._call.scales, updates)


def each_update(folder: Path) -> ExchangeFactory:
    """The exchange of an arm whose method needs each update; sums without a model, as of an evaluation, stay plain."""
    return lambda call: EachUpdate(call, folder) if call.layout.groups else PlainSum(call)
