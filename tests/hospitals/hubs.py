"""A hub whose clock a test moves, sites that sign, and studies that ask from threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wardround.errors import Interrupted
from wardround.federation.exchange import Engine
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.signing import signed
from wardround.protection.identity import Identity
from wardround.wire.message import Header, Message, write_body

SITES = "AB"
KEYS = {site: Identity.generate() for site in SITES}
MOST = 1000
LIMIT = 5.0


def anyone(instance: str, site: str, key: bytes) -> bool:
    """Any name of a process will do."""
    return True


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A hub and what a test holds of it."""

    folder: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        deadlines = Deadlines(reply=3600.0, delivery=7200.0)
        self.hub = Hub(
            self.folder, self.key, deadlines, MOST, clock=self.clock, wall=lambda: self.clock() + 1e9, proof=anyone
        )
        self.count = 0

    @staticmethod
    def key(site: str) -> bytes | None:
        return KEYS[site].public if site in KEYS else None

    def body(self, data: bytes) -> Path:
        """A file as a carrier leaves it in the spool."""
        self.count += 1
        path = self.folder / f"{self.count}.part"
        path.write_bytes(data)
        return path

    def reply(self, request: Message, data: bytes = b"", kind: str = "update", key: Identity | None = None) -> Message:
        """What the site of a request answers, signed, its body in the spool."""
        bare = request.reply(kind)
        if not data:
            return signed(bare, key or KEYS[request.header.site])
        self.count += 1
        body, sha256 = write_body(self.folder / f"{self.count}.part", [data])
        header = replace(bare.header, body_nbytes=len(data), body_sha256=sha256)
        return signed(Message(header, body), key or KEYS[request.header.site])

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


def message(site: str = "A", number: int = 1, study: str = "study", kind: str = "train") -> Message:
    return Message(Header(kind, study, site, number))


class Asking:
    """An exchange in a thread; it is asked once this is made."""

    def __init__(self, engine: Engine, messages: Sequence[Message]) -> None:
        self.messages = list(messages)
        self.replies: list[Message] = []
        self.interrupted = False
        self._asked = threading.Event()
        self._engine = engine
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._asked.wait(LIMIT)

    def _run(self) -> None:
        try:
            for reply in self._engine.exchange(self._given()):
                self.replies.append(reply)
        except Interrupted:
            self.interrupted = True
        finally:
            self._asked.set()

    def _given(self) -> Iterator[Message]:
        yield from self.messages
        self._asked.set()

    def done(self) -> list[Message]:
        """The replies, once all have come."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        return self.replies
