"""A reply that came over a connection: what it must pass before a study sees it, and whose its file is."""

from __future__ import annotations

import os
import shutil
import uuid
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from wardround.errors import Rejected
from wardround.federation.parts import LACKS, lacked
from wardround.hospitals.signing import verified
from wardround.protection.gates import check_body
from wardround.wire.message import FileBody, Header, Message


@dataclass(frozen=True)
class SpooledBody(FileBody):
    """A body in a file whose SHA-256, in hex, was computed while it was written: it is not read again for that."""

    sha256: str = ""


def checked(request: Header, reply: Message, key: bytes | None, largest_nbytes: int) -> Message:
    """The reply without its signature; raises `WireError` where it is not what the site of `key` signed for a request.

    In this order: signature, round, size, bytes. Nothing of a body is read before its header is known to be the site's.
    """
    header = reply.header
    if key is None:
        raise Rejected(f"site {header.site} is not in the federation any more")
    bare = verified(reply, key)
    if (header.study, header.round, header.attempt) != (request.study, request.round, request.attempt):
        raise Rejected(f"site {header.site} answered another round than it was asked for")
    if header.body_nbytes > largest_nbytes:
        raise Rejected(
            f"a reply of {header.body_nbytes} bytes, and the federation's file allows {largest_nbytes} (largest_gb)"
        )
    if not isinstance(reply.body, SpooledBody) or reply.body.nbytes != header.body_nbytes:
        check_body(bare)
    elif reply.body.sha256 != header.body_sha256:
        raise Rejected("a body whose bytes changed on the way: its hash is not the header's")
    if header.kind == LACKS and not lacked(bare) & {part.index for part in request.absent}:
        # One that was sent twice must not answer the request that came after it.
        raise Rejected(f"site {header.site} asks for parts that it was sent")
    return bare


class Spool:
    """The folder where carriers put bodies of replies, and in it the hub's own, of those that are being used.

    What an earlier process left of the hub's own goes when this one begins; a carrier's unfinished files stay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._own = self.folder / "replies"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self._own, ignore_errors=True)
        self._own.mkdir(mode=0o700)

    def adopt(self, reply: Message) -> Message:
        """The reply with its file under a name of the hub's own: the carrier may write its own name again."""
        body = reply.body
        if not self._holds(body):
            return reply
        path = self._own / f"{uuid.uuid4().hex}.body"
        with suppress(OSError):
            # A file that is gone is found to be when it is read.
            body.path.rename(path)
        return Message(reply.header, replace(body, path=path))

    def lend(self, reply: Message) -> None:
        """Keep the file of a reply for as long as something holds its body."""
        if self._holds(reply.body):
            weakref.finalize(reply.body, _unlink, reply.body.path)

    def drop(self, reply: Message) -> None:
        """Delete the file of a reply that counts for nothing."""
        if self._holds(reply.body):
            _unlink(reply.body.path)

    def _holds(self, body: object) -> TypeGuard[FileBody]:
        """Whether it is a file in this folder: no other is the hub's to move or to delete."""
        return isinstance(body, FileBody) and Path(os.path.abspath(body.path)).is_relative_to(self.folder)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
