"""A double of the exchange that hands on what sites learned in double precision, as if no codec lay in between.

What a study learns with the codec is compared with what it learns here. Sites and coordinator are the product's; one
process holds both ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from wardround.federation.exchange import Call, PlainSum
from wardround.site import site as sites
from wardround.wire.message import Message
from wardround.wire.update import Aggregate, encode

Changes = dict[str, dict[str, np.ndarray]]
Told = dict[tuple[str, int, str], tuple[Mapping[str, float], Changes]]


class ExactAggregate(Aggregate):
    """The weighted sums and means of what was told, without a fixed point."""

    def __init__(self, plain: PlainSum, call: Call, told: list[tuple[Mapping[str, float], Changes]]) -> None:
        super().__init__(call.layout, plain._total, call.scales)
        self._told = told

    def weight(self, group: str) -> float:
        return sum(weights[group] for weights, _ in self._told)

    def total(self, group: str, tensor: str) -> np.ndarray:
        most = self.layout.max_weight
        return np.asarray(sum(weights[group] / most * changes[group][tensor] for weights, changes in self._told))

    def peak(self, group: str, tensor: str) -> float:
        return float(np.abs(self.total(group, tensor)).max(initial=0.0))

    def mean(self, group: str, tensor: str) -> np.ndarray:
        return self.total(group, tensor) * self.layout.max_weight / self.weight(group)


def exact_exchange(monkeypatch: pytest.MonkeyPatch) -> type[PlainSum]:
    """From now until the test ends, sites put what they learned aside; the exchange that sums it."""
    told: Told = {}
    asked: list[tuple[str, int, str]] = []
    work = sites.Site.work

    def noted(self: sites.Site, request: Message) -> Any:
        asked.append((request.header.study, request.header.round, self.name))
        return work(self, request)

    def aside(layout: Any, scales: Any, weights: Any, changes: Any, *rest: Any) -> Iterator[bytes | memoryview]:
        if layout.groups:
            exact = {g: {n: np.array(t, np.float64) for n, t in tensors.items()} for g, tensors in changes.items()}
            told[asked[-1]] = (dict(weights), exact)
        return encode(layout, scales, weights, changes, *rest)

    class ExactExchange(PlainSum):
        def aggregate(self) -> Aggregate:
            if not self._call.layout.groups:
                return super().aggregate()
            keys = [(self._call.study, self._call.round, site) for site in sorted(self.receipts)]
            return ExactAggregate(self, self._call, [told[key] for key in keys])

    monkeypatch.setattr(sites.Site, "work", noted)
    monkeypatch.setattr(sites, "encode", aside)
    return ExactExchange
