"""What happens between a coordinator and the sites that it asks: messages go out, answers are counted and checked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from wardround.errors import NotEnoughSites, WireError
from wardround.federation.exchange import ERROR, Call, Engine, Exchange, ExchangeFactory, RoundAborted
from wardround.federation.logs import CoordinatorLog
from wardround.federation.metering import Meter, Metered
from wardround.federation.parts import Filling
from wardround.wire.bill import NO_BILL, Bill
from wardround.wire.message import Message

if TYPE_CHECKING:
    from wardround.federation.coordinator import Plan


class Asking:
    """Runs the exchanges of one arm.

    `waited` are the seconds spent waiting for answers. `lost` is what aborted rounds sent for nothing: the next round
    that commits has it on its bill.
    """

    def __init__(self, plan: Plan, engine: Engine, log: CoordinatorLog) -> None:
        self._plan = plan
        self._engine = engine
        self._log = log
        self.waited = 0.0
        self.lost = NO_BILL

    def run(
        self, call: Call, protocol: ExchangeFactory, *, required: bool = True
    ) -> tuple[Exchange, dict[str, str], Bill]:
        """The exchange when all its phases are done, the sites that are not in it with the reason, and the bill.

        Raises `NotEnoughSites` where fewer than `min_sites` answer and they are `required`, and `RoundAborted`.
        """
        exchange = protocol(call)
        missing: dict[str, str] = {}
        meter = Meter(self._plan.kinds, call.layout, call.form)
        engine = Filling(Metered(self._engine, {}, meter))
        messages = exchange.open()
        self._log.opened(call, exchange)
        while messages:
            for reply in self._waiting(engine.exchange(messages)):
                site = reply.header.site
                if reply.header.kind == ERROR:
                    missing[site] = str(reply.header.meta.get("reason", "no reason given"))
                    self._log.refused(call, exchange.attempt, reply, missing[site])
                    continue
                try:
                    self._log.check(reply)
                    exchange.accept(reply)
                except WireError as error:
                    missing[site] = str(error)
                    self._log.refused(call, exchange.attempt, reply, missing[site])
                else:
                    missing.pop(site, None)
                    self._log.accepted(call, exchange.attempt, reply)
            if required:
                self._require(exchange, missing)
            try:
                messages = exchange.close()
            except RoundAborted as aborted:
                self.lost += meter.bill
                raise RoundAborted(f"{aborted} ({_reasons(missing)})" if missing else str(aborted)) from aborted
        return exchange, missing, meter.bill

    def _waiting(self, replies: Iterator[Message]) -> Iterator[Message]:
        """The replies, with the time spent waiting for them kept apart from the coordinator's own."""
        while True:
            began = time.perf_counter()
            reply = next(replies, None)
            self.waited += time.perf_counter() - began
            if reply is None:
                return
            yield reply

    def _require(self, exchange: Exchange, missing: Mapping[str, str]) -> None:
        present = len(exchange.present)
        if present < self._plan.min_sites:
            raise NotEnoughSites(
                f"{self._plan.arm}: {present} of {len(self._plan.sites)} sites answered and schedule.min_sites is "
                f"{self._plan.min_sites} ({_reasons(missing)}). Mend the cause and run again with --resume"
            )


def _reasons(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
