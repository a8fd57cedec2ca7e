"""What was asked of sites and is not answered: who waits for it, until when, and which instance was handed it.

Nothing here locks: the hub does.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from wardround.engines.process import Progress
from wardround.wire.message import Header, Message


@dataclass(eq=False)
class Ticket:
    """An exchange that waits for replies; nothing in their place means that it is interrupted."""

    progress: Progress | None = None
    replies: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)
    closed: bool = False


@dataclass(eq=False)
class Asked:
    """A message that is not answered: `until` on the hub's clock, `holder` the instance that was handed it."""

    message: Message
    until: float
    tickets: list[Ticket] = field(default_factory=list)
    holder: str = ""
    refused: int = 0

    @property
    def header(self) -> Header:
        """The message's header."""
        return self.message.header

    def put(self, reply: Message | None) -> None:
        """Give the reply to all who wait, or nothing."""
        for ticket in self.tickets:
            ticket.replies.put(reply)


class Requests:
    """By site, in the order in which they were asked; a message that is asked again while it waits is the same one."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Asked]] = {}

    def add(self, message: Message, until: float, ticket: Ticket) -> None:
        """Another exchange waits for a message; the first one's deadline stands."""
        of_site = self._of.setdefault(message.header.site, {})
        of_site.setdefault(message.id, Asked(message, until)).tickets.append(ticket)

    def next(self, site: str, instance: str) -> Message | None:
        """The first message that this instance was not handed: from now on it was."""
        for asked in self._of.get(site, {}).values():
            if asked.holder != instance:
                asked.holder = instance
                return asked.message
        return None

    def release(self, site: str, instance: str, held: Collection[str] = ()) -> None:
        """Forget that an instance was handed messages, but for those whose ids it holds."""
        for number, asked in self._of.get(site, {}).items():
            if asked.holder == instance and number not in held:
                asked.holder = ""

    def find(self, site: str, number: str) -> Asked | None:
        """What waits under the id of a message to a site."""
        return self._of.get(site, {}).get(number)

    def is_asked(self, number: str) -> bool:
        """Whether a message waits, to whichever site."""
        return any(number in of_site for of_site in self._of.values())

    def waits(self, asked: Asked) -> bool:
        """Whether this very request waits: the same message may have been answered and asked again."""
        return self.find(asked.message.header.site, asked.message.id) is asked

    def forget(self, asked: Asked) -> None:
        """It waits no longer."""
        if self.waits(asked):
            del self._of[asked.message.header.site][asked.message.id]

    def withdraw(self, ticket: Ticket) -> None:
        """An exchange waits no longer, and what no other waits for is forgotten."""
        for asked in self.all():
            asked.tickets = [other for other in asked.tickets if other is not ticket]
            if not asked.tickets:
                self.forget(asked)

    def of(self, site: str) -> list[Asked]:
        """What a site has not answered."""
        return list(self._of.get(site, {}).values())

    def all(self) -> Iterator[Asked]:
        """What no site has answered."""
        for site in list(self._of):
            yield from self.of(site)

    @property
    def sites(self) -> frozenset[str]:
        """The sites that were ever asked."""
        return frozenset(self._of)
