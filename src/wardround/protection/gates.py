"""What a message must pass before anything of it counts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from wardround.errors import Rejected
from wardround.wire.message import Body, HashingBody, HeldBody, Message, body_sha256, held
from wardround.wire.sparse import DENSE, Encoding
from wardround.wire.update import Layout, check_range


def check_reply(reply: Message, kind: str, requests: Mapping[str, str]) -> None:
    """Refuse a reply to another request, from another site, or of another kind; raises `Rejected`."""
    header = reply.header
    if header.site not in requests:
        raise Rejected("a reply from a site that was not asked")
    if header.reply_to != requests[header.site]:
        raise Rejected(f"site {header.site} answered another request: late, replayed or of another study")
    if header.kind != kind:
        raise Rejected(f"site {header.site} sent {header.kind[:40]!r} where {kind!r} was expected")


@dataclass(frozen=True)
class Received:
    """A body as it came: that its file is missing, or is none, is its sender's failure and no reason to stop a run."""

    body: Body

    @property
    def nbytes(self) -> int:
        """Length in bytes, as the sender says."""
        return self.body.nbytes

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The bytes from `offset` on; raises `Rejected` when they cannot be read."""
        try:
            yield from self.body.chunks(offset)
        except OSError as error:
            raise _lost(error) from error


def held_reply(reply: Message) -> Message:
    """The reply with a small body in memory, which later readings share; raises `Rejected` when it cannot be read."""
    try:
        return replace(reply, body=held(reply.body))
    except OSError as error:
        raise _lost(error) from error


def _lost(error: OSError) -> Rejected:
    cause = os.strerror(error.errno) if error.errno else type(error).__name__
    return Rejected(f"a body that cannot be read ({cause}): it was lost on the way")


def check_body(message: Message) -> None:
    """Refuse a body whose length or hash is not what the header says; raises `Rejected`."""
    _check_length(message)
    # Bytes in memory cannot be lost, and all sites of a process share one hash of them.
    body = message.body if isinstance(message.body, HeldBody) else Received(message.body)
    if body_sha256(body) != message.header.body_sha256:
        raise Rejected(_CHANGED)


def check_update(layout: Layout, reply: Message, form: Encoding = DENSE) -> None:
    """Refuse an update of another size or layout, other bytes than were sent, or impossible elements: `Rejected`.

    A form that leaves values out has a length of its own, and must be one that expands to the layout.
    Values that are not finite cannot be written in the ring at all: the site that meets one refuses to send.
    """
    _check_layout(layout, reply, form)
    _check_length(reply)
    body = reply.body if isinstance(reply.body, HeldBody) else HashingBody(Received(reply.body))
    try:
        check_range(layout, form.unpack(layout, body))
    except Rejected:
        # Bytes that changed on the way would explain it.
        check_body(reply)
        raise
    if body.sha256 != reply.header.body_sha256:
        raise Rejected(_CHANGED)


def check_masked(layout: Layout, reply: Message) -> None:
    """Refuse an update of another size or layout, or other bytes than were sent; raises `Rejected`.

    A masked update is uniform: it has no range to check.
    """
    _check_layout(layout, reply)
    check_body(reply)


_CHANGED = "a body whose bytes changed on the way: its hash is not the header's"


def _check_length(message: Message) -> None:
    header = message.header
    if message.body.nbytes != header.body_nbytes:
        raise Rejected(f"a body of {message.body.nbytes} bytes where the header says {header.body_nbytes}")


def _check_layout(layout: Layout, reply: Message, form: Encoding = DENSE) -> None:
    # The size is checked before anything is read.
    header, nbytes = reply.header, form.nbytes(layout)
    if header.body_nbytes != nbytes:
        raise Rejected(f"an update of {header.body_nbytes} bytes where the study says {nbytes}")
    if header.meta.get("layout") != layout.sha256:
        raise Rejected("an update of another layout: the site runs another study, model or version")
