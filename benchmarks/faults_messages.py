"""Spoiled messages: an engine between coordinator and sites that duplicates, delays, bends, replays and loses."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from faults_study import PLAIN, Federation, Setting, opened
from wardround.errors import NotEnoughSites, WireError
from wardround.federation.exchange import ERROR, TRAIN
from wardround.wire.canonical import canonical_json, parse_json
from wardround.wire.message import FileBody, Header, Message

# What can happen to a message of any phase, and what only to an update.
ANY = (
    "duplicated", "asked_twice", "late", "replayed", "malformed", "lost_answer", "lost_request", "bent_request",
)  # fmt: skip
UPDATES = ("bit_flip", "oversized", "wrong_size", "impossible", "not_a_number", "infinite", "wrong_shape")
# Under masks every byte is possible, and a site can lose the keys that it has in memory only.
SECURE_ANY = (*ANY, "restarted_site")
SECURE_UPDATES = tuple(fault for fault in UPDATES if fault != "impossible")


@dataclass(frozen=True)
class Bytes:
    """A body in memory."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        if offset < len(self.data):
            yield memoryview(self.data)[offset:]


def body_of(message: Message) -> bytes:
    """All bytes of a body."""
    return b"".join(bytes(chunk) for chunk in message.body.chunks())


def flipped(data: bytes, random: Random) -> bytes:
    """The same with one bit flipped."""
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


class Line:
    """An engine that spoils a share of the messages it carries, one fault each, until `left` of them are spent.

    A fault that finds nothing to spoil (no older answer to replay, an answer from the site's store where the training
    was to be spoiled) is not counted, and the message goes on as it is.
    """

    def __init__(self, left: int, random: Random, share: float = 1.0) -> None:
        self.left = left
        self.injected: Counter[str] = Counter()
        self._random = random
        self._share = share
        self._seen: list[Message] = []

    def attach(self, federation: Federation) -> None:
        """Carry the messages of a federation from now on."""
        self._federation, self._engine = federation, federation.engine
        federation.engine = self

    def close(self) -> None:
        """Nothing is open."""

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """The answers, some of them spoiled."""
        for message in messages:
            replies = None
            if self.left and self._random.random() < self._share:
                fault = self._random.choice(self._faults(message))
                replies = getattr(self, fault)(message)
                if replies is not None:
                    self.left -= 1
                    self.injected[fault] += 1
            yield from [self._ask(message)] if replies is None else replies

    def _faults(self, message: Message) -> tuple[str, ...]:
        secure = self._federation.setting.threshold is not None
        everywhere, updates = (SECURE_ANY, SECURE_UPDATES) if secure else (ANY, UPDATES)
        return (*everywhere, *updates) if message.header.kind == TRAIN else everywhere

    def _ask(self, message: Message) -> Message:
        (reply,) = self._engine.exchange([message])
        if reply.header.kind != ERROR:
            self._seen.append(Message(reply.header, Bytes(body_of(reply))))
        return reply

    def duplicated(self, message: Message) -> list[Message]:
        reply = self._ask(message)
        return [reply, reply]

    def asked_twice(self, message: Message) -> list[Message]:
        self._ask(message)
        return [self._ask(message)]

    def late(self, message: Message) -> list[Message] | None:
        """An answer to an earlier request comes before the one to this."""
        if not self._seen:
            return None
        return [self._random.choice(self._seen), self._ask(message)]

    def replayed(self, message: Message) -> list[Message] | None:
        """An answer from before, in place of this one."""
        old = [m for m in self._seen if m.header.reply_to != message.id]
        if not old:
            return None
        self._ask(message)
        return [self._random.choice(old)]

    def malformed(self, message: Message) -> list[Message]:
        """A flipped bit anywhere in the header: it is not read at all, or read as what it says."""
        reply = self._ask(message)
        try:
            header = Header.from_bytes(flipped(reply.header.to_bytes(), self._random))
        except WireError as error:
            return [message.reply(ERROR, meta={"reason": str(error)})]
        return [Message(header, Bytes(body_of(reply)))]

    def lost_answer(self, message: Message) -> list[Message]:
        self._ask(message)
        return self.lost_request(message)

    def lost_request(self, message: Message) -> list[Message]:
        return [message.reply(ERROR, meta={"reason": "the line is dead"})]

    def bent_request(self, message: Message) -> list[Message]:
        """The site gets another global state than was sent; where a phase sends none, other words."""
        if isinstance(message.body, FileBody):
            path = self._federation.journal.blobs.root.parent / "bent"
            path.write_bytes(flipped(body_of(message), self._random))
            bent = replace(message, body=replace(message.body, path=path))
        else:
            try:
                meta = parse_json(flipped(canonical_json(dict(message.header.meta)), self._random))
            except WireError:
                return self.lost_request(message)
            bent = Message(replace(message.header, meta=meta))
        (reply,) = self._engine.exchange([bent])
        return [reply]

    def restarted_site(self, message: Message) -> list[Message]:
        """The site's process is another one than at the phase before."""
        self._federation.restart(message.header.site)
        return [self._ask(message)]

    def bit_flip(self, message: Message) -> list[Message] | None:
        return self._bent(message, lambda data: flipped(data, self._random))

    def oversized(self, message: Message) -> list[Message] | None:
        nbytes = 50 * self._federation.setting.layout.nbytes
        return self._bent(message, lambda data: data * 50, body_nbytes=nbytes)

    def wrong_size(self, message: Message) -> list[Message] | None:
        nbytes = self._federation.setting.layout.nbytes - 4
        return self._bent(message, lambda data: data[:-4], body_nbytes=nbytes)

    def impossible(self, message: Message) -> list[Message] | None:
        """A well-formed update whose elements no site may send."""
        data = b"\xff" * self._federation.setting.layout.nbytes
        return self._bent(message, lambda _: data, body_sha256=hashlib.sha256(data).hexdigest())

    def _bent(self, message: Message, change: Callable[[bytes], bytes], **header: Any) -> list[Message] | None:
        reply = self._ask(message)
        if reply.header.kind == ERROR:
            return None
        return [Message(replace(reply.header, **header), Bytes(change(body_of(reply))))]

    def not_a_number(self, message: Message) -> list[Message] | None:
        return self._spoiled(message, lambda change: change * np.float32("nan"))

    def infinite(self, message: Message) -> list[Message] | None:
        return self._spoiled(message, lambda change: change / np.float32(1e-45))

    def wrong_shape(self, message: Message) -> list[Message] | None:
        return self._spoiled(message, lambda change: change[:-1])

    def _spoiled(self, message: Message, spoil: Callable[[Any], Any]) -> list[Message] | None:
        learner = self._federation.learners[message.header.site]
        learner.spoil = spoil
        with np.errstate(all="ignore"):
            reply = self._ask(message)
        unused, learner.spoil = learner.spoil is not None, None
        return None if unused else [reply]


def spoil_messages(
    folder: Path, count: int, random: Random, setting: Setting = PLAIN, share: float = 1.0
) -> Counter[str]:
    """One study with at most so many spoiled messages, gone on with until it is over; what was injected, by class."""
    line = Line(count, random, share)
    while True:
        with opened(folder, setting) as federation:
            line.attach(federation)
            try:
                for _ in federation.rounds():
                    pass
                return line.injected
            except NotEnoughSites:
                pass
