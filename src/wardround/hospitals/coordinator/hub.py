"""The coordinator's end of a federation: an engine whose messages outlive the connections that carry them.

The hub holds what was asked until it is answered. Carriers take messages from it for one site and bring replies; it
opens no connection and starts no thread. Sites answer a message that they know from their store, so it may be handed
out twice. How long it waits stands in `federation.yaml`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from wardround.engines.frames import PROGRESS
from wardround.engines.local import STOPPED
from wardround.engines.process import Progress
from wardround.errors import Interrupted, Rejected, WardroundError, WireError
from wardround.federation.facts import DELIVER
from wardround.federation.refusals import refusal
from wardround.hospitals.coordinator.attendance import ALIVE, Attendance, Clock, Event, Events, Presence
from wardround.hospitals.coordinator.replies import Spool, checked
from wardround.hospitals.coordinator.requests import Asked, Requests, Ticket
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.signing import is_of
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
#: How often a request is handed out again after a reply that was refused.
REFUSALS = 3
# The longest wait for a reply in one piece, in seconds: deadlines are looked at again after it.
_LONGEST_WAIT = 3600.0
_MOST_STEPS = 1 << 40


class Carrier(Protocol):
    """What moves messages between a hub and the sites; the coordinator's end."""

    def start(self) -> None:
        """Begin to accept connections."""

    def close(self) -> None:
        """End all connections."""


class Hub:
    """Hands messages of any number of studies to carriers, and their replies to the studies. Safe in threads.

    `spool` is the folder of the bodies of replies: the hub takes over the file of each that a carrier brings from
    there. `keys` gives the public key (32 bytes) that was pinned for a site, or nothing for an unknown one. A body of
    more than `largest_nbytes` is refused. `clock` runs on and never back, `wall` is Unix time, both in seconds.
    `proof` says whether the holder of a site's key made the name of an instance; tests give one that always does.
    """

    def __init__(
        self,
        spool: Path,
        keys: Callable[[str], bytes | None],
        deadlines: Deadlines,
        largest_nbytes: int,
        *,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        proof: Callable[[str, str, bytes], bool] = is_of,
    ) -> None:
        self.largest_nbytes = largest_nbytes
        self._spool = Spool(spool)
        self._keys = keys
        self._deadlines = deadlines
        self._clock = clock
        self._lock = threading.RLock()
        self._arrived: dict[str, threading.Condition] = {}
        self._requests = Requests()
        self._attendance = Attendance(clock, wall)
        self._events = Events(wall)
        self._proof = proof
        self._proven: dict[str, tuple[str, bytes]] = {}
        self._closed = False

    # For studies and those who watch them -----------------------------------------------------------------------------

    def engine(self, progress: Progress | None = None) -> HubEngine:
        """The engine of one study; `progress` is called with the steps of its sites. Closing it leaves the hub open."""
        return HubEngine(self, progress)

    def presence(self) -> dict[str, Presence]:
        """How each site is that was ever heard or asked."""
        with self._lock:
            sites = sorted(self._attendance.sites | self._requests.sites)
            return {s: Presence(*self._attendance.state(s), len(self._requests.of(s))) for s in sites}

    @property
    def events(self) -> list[Event]:
        """What a person should look at: twins, and replies that were refused; the latest last."""
        with self._lock:
            return self._events.listed()

    def close(self) -> None:
        """Hand out nothing more; all exchanges under way raise `Interrupted`."""
        with self._lock:
            self._closed = True
            for asked in self._requests.all():
                asked.put(None)
            self._requests = Requests()
            for arrived in self._arrived.values():
                arrived.notify_all()

    # For carriers -----------------------------------------------------------------------------------------------------

    def attach(self, site: str, instance: str) -> None:
        """A site's process is connected. What an earlier process was handed and did not answer is handed to this one.

        Raises `Rejected` for a site that is not in the federation, and for a twin: another instance of the site was
        heard less than `ALIVE` seconds ago.
        """
        with self._lock:
            self._admit(site, instance)

    def take(self, site: str, instance: str, wait: float) -> Message | None:
        """The next message that this instance has not been handed; nothing after `wait` seconds without one.

        It waits half of `ALIVE` at most, for a site that waits here is not heard. Raises `Rejected` as `attach` does.
        """
        until = self._clock() + min(wait, ALIVE / 2)
        with self._lock:
            while not self._closed:
                self._admit(site, instance)
                message = self._requests.next(site, instance)
                if message is not None:
                    return message
                left = until - self._clock()
                if left <= 0.0:
                    break
                self._arrivals(site).wait(left)
        return None

    def heard(self, site: str, instance: str) -> None:
        """A sign of life between two messages: a poll, a chunk, a step. One of a twin counts for nothing."""
        with self._lock, suppress(Rejected):
            self._admit(site, instance)

    def holds(self, site: str, instance: str, ids: Iterable[str]) -> None:
        """The ids of the messages that an instance is at work on: what else it was handed was lost on the way.

        That is handed out again. A carrier that sees each lost connection (`lost`) has no need of it.
        """
        with self._lock:
            self._requests.release(site, instance, frozenset(ids))
            self._wake(site)

    def lost(self, site: str, instance: str) -> None:
        """A connection is gone: what its instance was handed and did not answer is handed out again."""
        with self._lock:
            self._attendance.lost(site, instance)
            self._requests.release(site, instance)
            self._wake(site)

    def report(self, header: Header) -> None:
        """Show the studies that asked how far a site is; a header that is no progress of theirs counts for nothing."""
        step, steps = header.meta.get("step"), header.meta.get("steps")
        if header.kind != PROGRESS or type(step) is not int or type(steps) is not int:
            return
        if not 0 <= step <= steps <= _MOST_STEPS:
            return
        with self._lock:
            about = (header.study, header.round)
            asked = [a for a in self._requests.of(header.site) if about == (a.header.study, a.header.round)]
            watching = {ticket.progress for each in asked for ticket in each.tickets if ticket.progress is not None}
        for progress in watching:
            progress(header.study, header.site, header.round, step, steps)

    def answered(self, site: str, instance: str, reply: Message) -> None:
        """Take a reply that came over the connection of a site, with the file of its body.

        One that no study waits for is dropped. One that is refused (another site's name, a signature that is not the
        site's, a body that is too long or other bytes than were signed) answers nothing: it is kept as an event, and
        the request is handed out again, `REFUSALS` times.
        """
        with self._lock:
            asked = self._expected(site, instance, reply.header)
        if asked is None:
            return self._spool.drop(reply)
        reply = self._spool.adopt(reply)
        try:
            bare = checked(asked.header, reply, self._keys(site), self.largest_nbytes)
        except WireError as error:
            self._spool.drop(reply)
            return self._refuse(asked, str(error))
        with self._lock:
            if not self._requests.waits(asked):
                return self._spool.drop(reply)
            self._spool.lend(bare)
            return self._finish(asked, bare)

    def expire(self) -> None:
        """Give an `error` reply in place of each site whose time is over. Exchanges call this while they wait."""
        with self._lock:
            now = self._clock()
            for asked in [asked for asked in self._requests.all() if asked.until <= now]:
                self._finish(asked, refusal(asked.message, WardroundError(self._late(asked))))

    # For engines ------------------------------------------------------------------------------------------------------

    def ask(self, message: Message, ticket: Ticket) -> None:
        """Put a message where carriers take it; raises `Interrupted` once the hub or the ticket is closed."""
        site = message.header.site
        with self._lock:
            self.check_open(ticket)
            if self._keys(site) is None:
                ticket.replies.put(refusal(message, WardroundError("this federation has no such site")))
                return
            self._requests.add(message, self._clock() + self._patience(message.header), ticket)
            self._wake(site)

    def check_open(self, ticket: Ticket) -> None:
        """Raise `Interrupted` once the hub or the ticket is closed."""
        if self._closed or ticket.closed:
            raise Interrupted(STOPPED)

    def withdraw(self, ticket: Ticket) -> None:
        """An exchange waits no longer: what no other waits for is not handed out any more."""
        with self._lock:
            self._requests.withdraw(ticket)

    @property
    def seconds_left(self) -> float:
        """Until the next deadline."""
        with self._lock:
            nearest = min((asked.until for asked in self._requests.all()), default=float("inf"))
        return max(0.0, min(nearest - self._clock(), _LONGEST_WAIT))

    # ------------------------------------------------------------------------------------------------------------------

    def _expected(self, site: str, instance: str, header: Header) -> Asked | None:
        """The request that a reply is to, where the site was asked it, speaks for itself and has no twin."""
        if not self._requests.is_asked(header.reply_to):
            log.debug("site %s answered what is not asked, or not any more", site[:40])
            return None
        asked = self._requests.find(site, header.reply_to)
        if asked is None or header.site != site:
            self._note(site, "a reply in the name of another site was refused")
            return None
        try:
            self._admit(site, instance)
        except Rejected:
            return None
        return asked

    def _refuse(self, asked: Asked, why: str) -> None:
        with self._lock:
            self._note(asked.header.site, f"a reply was refused: {why}")
            if not self._requests.waits(asked):
                return
            asked.refused += 1
            asked.holder = ""
            if asked.refused > REFUSALS:
                self._finish(asked, refusal(asked.message, Rejected(f"{REFUSALS + 1} replies were refused: {why}")))
            else:
                self._wake(asked.header.site)

    def _finish(self, asked: Asked, reply: Message) -> None:
        self._requests.forget(asked)
        asked.put(reply)

    def _patience(self, header: Header) -> float:
        # A released model waits longer for a site that is away than a round does.
        waits = self._deadlines
        return max(waits.reply, waits.delivery) if header.kind == DELIVER else waits.reply

    def _late(self, asked: Asked) -> str:
        how = {
            "never": "it never connected",
            "lost": "its connection was lost and it did not come back",
            "late": "it was no longer heard",
            "present": "it is connected and did not finish",
        }
        state, _ = self._attendance.state(asked.header.site)
        return f"no answer within {self._patience(asked.header):.0f} s, the federation's deadline: {how[state]}"

    def _admit(self, site: str, instance: str) -> None:
        key = self._keys(site)
        if key is None:
            raise Rejected(f"{site[:40]} is no site of this federation: ask its coordinator to admit it")
        if self._proven.get(site) != (instance, key):
            if not self._proof(instance, site, key):
                self._note(site, "a process that does not hold the site's key was refused, with its certificate")
                raise Rejected(
                    f"this computer has the certificate of site {site} and not its identity key: start the site where "
                    "it joined, or restore identity.key from a copy"
                )
            self._proven[site] = (instance, key)
        try:
            self._attendance.admit(site, instance)
        except Rejected:
            self._note(site, "a second process of the site was refused while the first was connected")
            raise

    def _note(self, site: str, text: str) -> None:
        # A twin that tries on and on is one line of the log.
        if self._events.note(site[:40], text) == 1:
            log.warning("site %s: %s", site[:40], text)

    def _arrivals(self, site: str) -> threading.Condition:
        return self._arrived.setdefault(site, threading.Condition(self._lock))

    def _wake(self, site: str) -> None:
        if site in self._arrived:
            self._arrived[site].notify_all()


class HubEngine:
    """A study's share of a hub."""

    def __init__(self, hub: Hub, progress: Progress | None = None) -> None:
        self._hub = hub
        self._progress = progress
        self._lock = threading.Lock()
        self._open: set[Ticket] = set()
        self._closed = False

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, as they come; raises `Interrupted` once this or the hub is closed.

        The file of a reply's body is there for as long as the body is.
        """
        with self._lock:
            ticket = Ticket(self._progress, closed=self._closed)
            self._open.add(ticket)
        try:
            self._hub.check_open(ticket)
            waiting = 0
            for message in messages:
                self._hub.ask(message, ticket)
                waiting += 1
            while waiting:
                try:
                    reply = ticket.replies.get(timeout=self._hub.seconds_left)
                except queue.Empty:
                    self._hub.expire()
                    continue
                self._hub.check_open(ticket)
                if reply is None:
                    raise Interrupted(STOPPED)
                waiting -= 1
                yield reply
                del reply
        finally:
            with self._lock:
                self._open.discard(ticket)
            self._hub.withdraw(ticket)

    def close(self) -> None:
        """Raise `Interrupted` in the exchanges of this study, and hand out none of their messages any more."""
        with self._lock:
            self._closed = True
            for ticket in self._open:
                ticket.closed = True
                self._hub.withdraw(ticket)
                ticket.replies.put(None)
