"""Counts what the messages between coordinator and sites weigh, by kind (`wardround.wire.bill`)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from wardround.federation.exchange import UPDATE, Engine
from wardround.federation.facts import DELIVER
from wardround.federation.grouped import GROUPS
from wardround.federation.statistics import STATISTICS
from wardround.wire.bill import NO_BILL, NOTHING, Bill, Kinds, Sizes
from wardround.wire.message import FileBody, Message
from wardround.wire.sparse import DENSE, Encoding
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Layout


@dataclass
class Meter:
    """The bill of messages to sites and of their answers, whose updates have one layout and one form."""

    kinds: Kinds
    layout: Layout
    form: Encoding = DENSE
    bill: Bill = NO_BILL
    _table: tuple[TensorInfo, ...] = ()
    _of_table: Sizes = NOTHING
    _of_update: Sizes | None = None

    def sent(self, message: Message) -> None:
        """Count a message to a site."""
        self.bill += Bill(down=_whole(message, self._down(message), Sizes()))

    def came(self, reply: Message) -> None:
        """Count an answer; bytes that are no update of the layout are `other`."""
        body = NOTHING
        if reply.header.kind == UPDATE:
            self._of_update = self._of_update or self.kinds.of_update(self.layout, self.form)
            body = self._of_update
        # What a site gives by group, and of its images, stands in the header.
        said = len(reply.header.to_bytes()) if reply.header.kind in (GROUPS, STATISTICS) else 0
        self.bill += Bill(up=_whole(reply, body, Sizes(metrics=said)))

    def _down(self, message: Message) -> Sizes:
        if message.header.kind == DELIVER and isinstance(message.body, FileBody):
            return self.kinds.of_file(message.body.path)
        # All messages of a round share the table.
        header = message.header
        if header.tensors is not self._table:
            self._table, self._of_table = header.tensors, self.kinds.of_table(header.tensors)
        if not header.absent:
            return self._of_table
        absent = {part.index for part in header.absent}
        return self.kinds.of_table(info for place, info in enumerate(header.tensors) if place not in absent)


def _whole(message: Message, body: Sizes, header: Sizes) -> Sizes:
    """All bytes of a message: what is not known of body and header is `other`."""
    known = (body if body.total == message.body.nbytes else NOTHING) + header
    return known + Sizes(other=message.nbytes - known.total)


class Metered:
    """An engine that counts what it carries: by the identity of an arm, and `rest` of the study as a whole."""

    def __init__(self, engine: Engine, arms: Mapping[str, Meter], rest: Meter) -> None:
        self._engine = engine
        self._arms = arms
        self._rest = rest
        self._lock = threading.Lock()

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """What the engine gives."""
        for reply in self._engine.exchange(self._sent(messages)):
            with self._lock:
                self._arms.get(reply.header.study, self._rest).came(reply)
            yield reply

    def settle(self) -> Bill:
        """The bill of the study as a whole, which begins anew: messages may be under way meanwhile."""
        with self._lock:
            bill, self._rest.bill = self._rest.bill, NO_BILL
        return bill

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _sent(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            with self._lock:
                self._arms.get(message.header.study, self._rest).sent(message)
            yield message
