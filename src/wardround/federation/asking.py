"""What happens between a coordinator and the sites that it asks: messages go out, answers are counted and checked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wardround.errors import NotEnoughSites, WireError
from wardround.federation.exchange import ERROR, Call, Engine, Exchange, ExchangeFactory, RoundAborted
from wardround.federation.logs import CoordinatorLog
from wardround.federation.metering import Meter, Metered
from wardround.federation.parts import Filling
from wardround.wire.bill import NO_BILL, Bill
from wardround.wire.message import Message

if TYPE_CHECKING:
    from wardround.federation.commits import Plan

log = logging.getLogger(__name__)
# Characters of what a site says of itself that go into a report: its own words are shorter, and another's may not be.
LONGEST_REASON = 2000
# Seconds between two looks at whether the engine was closed.
_LOOK = 0.25


@dataclass(frozen=True)
class Patience:
    """How many times in a row a round that too few sites answered is tried again, and the seconds before each time."""

    attempts: int = 0
    pause: float = 0.0


IMPATIENT = Patience()


class Asking:
    """Runs the exchanges of one arm.

    `waited` are the seconds spent waiting for answers. `lost` is what aborted rounds sent for nothing: the next round
    that commits has it on its bill. `again` is how often the last exchange was tried again.
    """

    def __init__(self, plan: Plan, engine: Engine, log: CoordinatorLog, patience: Patience) -> None:
        self._plan = plan
        self._engine = engine
        self._log = log
        self._patience = patience
        self.waited = 0.0
        self.lost = NO_BILL
        self.again = 0

    def run(
        self, call: Call, protocol: ExchangeFactory, *, required: bool = True
    ) -> tuple[Exchange, dict[str, str], Bill]:
        """The exchange when all its phases are done, the sites that are not in it with the reason, and the bill.

        Raises `NotEnoughSites` where fewer than `min_sites` answer, they are `required` and patience is at its end, and
        `RoundAborted`. What was tried before is on the bill.
        """
        meter = Meter(self._plan.kinds, call.layout, call.form)
        self.again = 0
        while True:
            # Each time another exchange: a secure sum is never of the same keys again.
            exchange = protocol(call)
            try:
                return exchange, self._once(call, exchange, meter, required), meter.bill
            except NotEnoughSites as few:
                if self.again == self._patience.attempts:
                    raise
                self.again += 1
                log.warning("%s. Tried again, %d of %d times", few, self.again, self._patience.attempts)
                self.pause()

    def pause(self) -> None:
        """Wait before something is tried again; raises `Interrupted` once the engine is closed."""
        began = time.monotonic()
        while True:
            # Asked nothing, an engine that is closed says so.
            for _ in self._engine.exchange(()):
                pass
            left = began + self._patience.pause - time.monotonic()
            if left <= 0.0:
                break
            time.sleep(min(left, _LOOK))
        self.waited += time.monotonic() - began

    def _once(self, call: Call, exchange: Exchange, meter: Meter, required: bool) -> dict[str, str]:
        missing: dict[str, str] = {}
        engine = Filling(Metered(self._engine, {}, meter))
        messages = exchange.open()
        self._log.opened(call, exchange)
        while messages:
            for reply in self._waiting(engine.exchange(messages)):
                site = reply.header.site
                if reply.header.kind == ERROR:
                    missing[site] = str(reply.header.meta.get("reason", "no reason given"))[:LONGEST_REASON]
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
        return missing

    def _waiting(self, replies: Iterator[Message]) -> Iterator[Message]:
        """The replies, with the time spent waiting for them kept apart from the coordinator's own."""
        while True:
            began = time.perf_counter()
            reply = next(replies, None)
            self.waited += time.perf_counter() - began
            if reply is None:
                return
            yield reply

    def few(self, present: int, missing: Mapping[str, str]) -> NotEnoughSites:
        """The error of a round that too few sites answered."""
        return NotEnoughSites(
            f"{self._plan.arm}: {present} of {len(self._plan.sites)} sites answered and schedule.min_sites is "
            f"{self._plan.min_sites} ({_reasons(missing)}). Mend the cause and run again with --resume"
        )

    def _require(self, exchange: Exchange, missing: Mapping[str, str]) -> None:
        if len(exchange.present) < self._plan.min_sites:
            raise self.few(len(exchange.present), missing)


def _reasons(missing: Mapping[str, str]) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in sorted(missing.items()))
