"""Replies that sites are sending: the coordinator keeps what came of a body when a connection ends."""

from __future__ import annotations

import hashlib
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wardround.errors import WireError
from wardround.hospitals.coordinator.replies import SpooledBody
from wardround.hospitals.https.partial import PARTIAL, WHOLE, Partial, check_space, tidy
from wardround.hospitals.https.protocol import header_sha256
from wardround.hospitals.https.sockets import end_connection
from wardround.wire.message import Header

#: The most bodies of one site that are under way; the oldest gives way.
MOST_UPLOADS = 8
#: Seconds that a connection waits until an older one lets go of a body.
_LETTING_GO = 10.0


class Busy(WireError):
    """Another connection of the site is still sending the body."""


class Upload:
    """A reply's body under way."""

    def __init__(self, header: Header, path: Path) -> None:
        self.header = header
        self.path = path
        self._turn = threading.Lock()
        self._sender: socket.socket | None = None
        self._partial: Partial | None = None
        self._gone = False

    @contextmanager
    def held(self, sender: socket.socket | None) -> Iterator[Partial]:
        """What is there of the body, for one connection: an older one that was sending it is ended.

        Raises `Busy` where that takes too long, and where the body was given up.
        """
        older = self._sender
        if older is not None and older is not sender:
            end_connection(older)
        if not self._turn.acquire(timeout=_LETTING_GO):
            raise Busy("another connection is still sending this reply; it is sent again")
        try:
            if self._gone:
                raise Busy("the reply was given up for newer ones; it is sent again")
            self._sender = sender
            if self._partial is None:
                # This may read much: what an earlier process of the coordinator kept is hashed.
                self._partial = Partial(self.path, self.header.body_nbytes)
            yield self._partial
        finally:
            self._sender = None
            self._turn.release()

    def drop(self) -> None:
        """Give it up: the file goes."""
        with suppress(Busy), self.held(None) as partial:
            self._gone = True
            partial.drop()

    def taken(self, path: Path) -> SpooledBody:
        """The whole body under another name; only while it is held."""
        assert self._partial is not None
        self._gone = True
        body = self._partial.moved(path)
        # The hub compares the hash with the header's, and need not read the file again.
        return SpooledBody(body.path, body.nbytes, self._partial.sha256)

    def close(self) -> None:
        """Let go of the file, and keep it."""
        with suppress(Busy), self.held(None) as partial:
            self._gone = True
            partial.close()


class Uploads:
    """The bodies under way of all sites, by site and by the SHA-256 of the reply's header. Safe in threads.

    A file's name says both, so that the next process of the coordinator finds it. A body that is too long is the
    caller's to refuse.
    """

    def __init__(self, folder: Path) -> None:
        tidy(folder)
        self._folder = folder
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], Upload] = {}

    def begin(self, site: str, header: Header, sender: socket.socket) -> int:
        """How many bytes of a reply's body are there; raises `NoSpace` where the others do not fit, and `Busy`."""
        key = (site, header_sha256(header))
        with self._lock:
            if key not in self._open:
                self._open[key] = Upload(header, self._folder / f"{_mark(site)}-{key[1]}{PARTIAL}")
            upload, others = self._open[key], [k for k in self._open if k[0] == site and k != key]
            given_up = [self._open.pop(k) for k in others[: max(0, len(others) + 1 - MOST_UPLOADS)]]
        for other in given_up:
            other.drop()
        self._drop_old(site, upload.path)
        with upload.held(sender) as partial:
            check_space(self._folder, partial.nbytes - partial.have)
            return partial.have

    def find(self, site: str, sha256: str) -> Upload | None:
        """The reply whose header has this SHA-256, where one was begun."""
        with self._lock:
            return self._open.get((site, sha256))

    def take(self, site: str, upload: Upload) -> SpooledBody:
        """The whole body of an upload that is held, in a file of its own, which is the hub's from now on."""
        with self._lock:
            self._open.pop((site, header_sha256(upload.header)), None)
        return upload.taken(self._folder / f"{uuid.uuid4().hex}{WHOLE}")

    def close(self) -> None:
        """Let go of all files; what is there of them is kept."""
        with self._lock:
            uploads, self._open = list(self._open.values()), {}
        for upload in uploads:
            upload.close()

    def _drop_old(self, site: str, new: Path) -> None:
        """Of what earlier processes kept of a site, the oldest gives way too."""
        with self._lock:
            used = {upload.path for upload in self._open.values()} | {new}
        with suppress(OSError):
            kept = [path for path in self._folder.glob(f"{_mark(site)}-*{PARTIAL}") if path not in used]
            kept.sort(key=lambda path: path.stat().st_mtime)
            for path in kept[: max(0, len(kept) - MOST_UPLOADS)]:
                path.unlink(missing_ok=True)


def _mark(site: str) -> str:
    """A site's name as a file can have it."""
    return hashlib.sha256(site.encode()).hexdigest()[:16]
