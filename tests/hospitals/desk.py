"""A coordinator's hub in a few lines, for tests of what carries messages: no deadlines, no signatures, no studies."""

from __future__ import annotations

import queue
import threading
import time

from wardround.errors import Rejected
from wardround.wire.message import Header, Message, body_sha256


class TestDesk:
    """Hands out what it is asked to, and keeps what is answered. `sites` are the known ones."""

    __test__ = False

    def __init__(self, *sites: str) -> None:
        self.replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.progress: queue.SimpleQueue[Header] = queue.SimpleQueue()
        self.refused: list[str] = []
        self.handed: list[str] = []
        self.beats = 0
        self._sites = sites
        self._instances: dict[str, str] = {}
        self._asked: dict[str, Message] = {}
        self._holders: dict[str, str] = {}
        self._some = threading.Condition()

    def ask(self, *messages: Message) -> None:
        with self._some:
            self._asked |= {message.id: message for message in messages}
            self._some.notify_all()

    def attach(self, site: str, instance: str) -> None:
        with self._some:
            if site not in self._sites:
                raise Rejected(f"{site} is no site of this federation")
            if self._instances.setdefault(site, instance) != instance:
                raise Rejected(f"site {site} is connected already")

    def take(self, site: str, instance: str, wait: float) -> Message | None:
        until = time.monotonic() + wait
        with self._some:
            while True:
                for number, message in self._asked.items():
                    if message.header.site == site and self._holders.get(number) != instance:
                        self._holders[number] = instance
                        self.handed.append(number)
                        return message
                left = until - time.monotonic()
                if left <= 0.0:
                    return None
                self._some.wait(left)

    def heard(self, site: str, instance: str) -> None:
        self.beats += 1

    def report(self, header: Header) -> None:
        self.progress.put(header)

    def answered(self, site: str, instance: str, reply: Message) -> None:
        header = reply.header
        with self._some:
            if header.reply_to not in self._asked:
                return
            if body_sha256(reply.body) != header.body_sha256 or reply.body.nbytes != header.body_nbytes:
                self.refused.append(header.reply_to)
                self._holders.pop(header.reply_to)
                self._some.notify_all()
                return
            del self._asked[header.reply_to]
            self._holders.pop(header.reply_to, None)
        self.replies.put(reply)

    def lost(self, site: str, instance: str) -> None:
        with self._some:
            if self._instances.get(site) == instance:
                del self._instances[site]
            for number in [n for n, holder in self._holders.items() if holder == instance]:
                del self._holders[number]
            self._some.notify_all()
