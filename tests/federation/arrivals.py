"""Sites that answer in an order that a test says, and the asynchronous rounds of a toy study over them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.federation.rig import ARM, Rig
from tests.toys import toy_study
from wardround.engines.local import STOPPED
from wardround.errors import Interrupted
from wardround.federation.asynchronous import AsynchronousCoordinator
from wardround.federation.exchange import EVALUATE, Engine
from wardround.storage.journal import State
from wardround.study.schema import Study
from wardround.wire.message import Message

SITES = ("A", "B", "C", "D")


def asynchronous(buffer: int, *, rounds: int = 6, sites: Sequence[str] = SITES, **rules: Any) -> Study:
    """A toy study with asynchronous rounds; `schedule` and other parts as in `toy_study`."""
    schedule = {"rounds": rounds, "asynchronous": {"buffer": buffer, **rules.pop("asynchronous", {})}}
    schedule |= rules.pop("schedule", {})
    return toy_study(sites, schedule=schedule, **rules)


class Ordered:
    """Sites answer a request to train when they are next in `order`, and in any order once that is at its end.

    With a `limit` the engine is closed once that many of `order` have answered, as for a run that is stopped. `asked`
    has every request to train: site, and the number of its round.
    """

    def __init__(self, engine: Engine, order: Sequence[str], limit: int | None = None) -> None:
        self._engine = engine
        self._order = list(order)
        self._limit = len(self._order) + 10**6 if limit is None else limit
        self._turn = threading.Condition()
        self._answered = 0
        self.closed = False
        self.asked: list[tuple[str, int]] = []

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        if self.closed:
            raise Interrupted(STOPPED)
        waiting = list(messages)
        self.asked += [(m.header.site, m.header.round) for m in waiting if m.header.kind != EVALUATE]
        while waiting:
            message = self._next(waiting)
            waiting.remove(message)
            yield from self._engine.exchange([message])
            with self._turn:
                self._answered += message.header.kind != EVALUATE
                self._turn.notify_all()

    def close(self) -> None:
        with self._turn:
            self.closed = True
            self._turn.notify_all()

    def _next(self, waiting: list[Message]) -> Message:
        with self._turn:
            while True:
                if self._answered >= self._limit:
                    self.closed = True
                if self.closed:
                    raise Interrupted(STOPPED)
                if waiting[0].header.kind == EVALUATE or self._answered >= len(self._order):
                    return waiting[0]
                site = self._order[self._answered]
                for message in waiting:
                    if message.header.site == site:
                        return message
                self._turn.wait(20.0)


class AsyncRig(Rig):
    """A rig whose sites answer in an order."""

    def __init__(self, study: Study, folder: Path, order: Sequence[str] = (), limit: int | None = None) -> None:
        super().__init__(study, folder)
        self.line = Ordered(self.engine, order, limit)
        self.coordinator = AsynchronousCoordinator(self.host.plan(ARM), self.method, self.line, self.journal)  # type: ignore[assignment]


def trained(study: Study, folder: Path, order: Sequence[str] = ()) -> tuple[AsyncRig, State]:
    """The rig and the last state of a whole run."""
    rig = AsyncRig(study, folder, order)
    return rig, rig.train()
