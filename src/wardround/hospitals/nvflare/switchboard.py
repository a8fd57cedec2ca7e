"""The coordinator's unix socket: between the Hub and the relays in NVFlare's server jobs, one a site."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wardround.deidentify import describe_error
from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.errors import Rejected, WardroundError, WireError
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.coordinator.replies import SpooledBody
from wardround.hospitals.nvflare.names import ALIVE, HELLO, LOST, PULSE, instance_of
from wardround.hospitals.socket_server import reachable
from wardround.wire.message import FileBody, Message

log = logging.getLogger(__name__)
_TICK = 0.25
_REFUSED = 2.0  # seconds until a twin may ask again
_MOST_CONNECTIONS = 1000


@dataclass(eq=False)
class _Talk:
    """One connection of a relay, and the instance of the site's resident process at the other end of its line."""

    site: str
    stream: BinaryIO
    instance: str = ""
    heard: float = 0.0
    over: bool = False


class Switchboard:
    """Hands the Hub's messages to relays and their replies to the Hub.

    `job_of` gives the job that a site's line has now, or nothing for an unknown site: a relay of another job is not
    spoken to.
    """

    def __init__(self, hub: Hub, path: Path, job_of: Callable[[str], str | None]) -> None:
        self._hub, self._path, self._job_of = hub, path, job_of
        self._frames = SharedBodies()
        self._talks: dict[str, _Talk] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listening = socket.socket(socket.AF_UNIX)

    def start(self) -> None:
        """Listen. Raises `WardroundError` where the socket cannot be made."""
        self._path.unlink(missing_ok=True)
        try:
            with reachable(self._path) as address:
                self._listening.bind(address)
        except OSError as error:
            self._listening.close()
            raise WardroundError(
                f"the coordinator's socket cannot be made ({error.strerror}): choose a folder on a local disk",
                detail=str(self._path),
            ) from error
        self._path.chmod(0o600)
        self._listening.listen(_MOST_CONNECTIONS)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        self._stop.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._path.unlink(missing_ok=True)

    def is_connected(self, site: str) -> bool:
        """Whether the relay of a site's line is there."""
        with self._lock:
            return site in self._talks

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        try:
            # A stream that is closed says what it could not write.
            with connection, connection.makefile("rb") as incoming, connection.makefile("wb") as stream:
                self._converse(incoming, stream)
                connection.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError, WardroundError) as error:
            log.debug("a relay's connection ended: %s", describe_error(error), exc_info=True)

    def _converse(self, incoming: BinaryIO, stream: BinaryIO) -> None:
        hello = self._frames.read(incoming)
        if hello is None or hello.header.kind != HELLO:
            return
        talk = _Talk(hello.header.site, stream)
        job = self._job_of(talk.site)
        if job is None or hello.header.meta.get("job") != job:
            return  # of an unknown site, or of a job that was given up
        with self._lock:
            before = self._talks.get(talk.site)
            self._talks[talk.site] = talk
        if before is not None:
            self._end(before)
        try:
            self._greet(talk, hello)
            threading.Thread(target=self._hand_out, args=(talk,), daemon=True).start()
            while not talk.over and (frame := self._frames.read(incoming)) is not None:
                self._hear(talk, frame)
        finally:
            self._end(talk)

    def _end(self, talk: _Talk) -> None:
        with self._lock:
            if self._talks.get(talk.site) is talk:
                del self._talks[talk.site]
        talk.over = True
        self._lost(talk)

    def _lost(self, talk: _Talk) -> None:
        if talk.instance:
            self._hub.lost(talk.site, talk.instance)

    def _greet(self, talk: _Talk, hello: Message) -> None:
        talk.instance = instance_of(hello.header.meta.get("instance"))
        talk.heard = time.monotonic()
        if talk.instance:
            log.info("site %s is connected", talk.site)

    def _hear(self, talk: _Talk, frame: Message) -> None:
        """Take a frame of a relay, which speaks for one site."""
        kind = frame.header.kind
        if frame.header.site != talk.site:
            raise WireError("a relay speaks for another site")
        if kind == LOST:
            return self._lost(talk)
        talk.heard = time.monotonic()
        if kind == HELLO:
            self._greet(talk, frame)
        elif kind == ALIVE:
            self._hub.heard(talk.site, talk.instance)
        elif kind == PROGRESS:
            self._hub.report(frame.header)
        else:
            body = frame.body
            if isinstance(body, FileBody):
                # The relay compared the bytes with this hash while it received them.
                body = SpooledBody(body.path, body.nbytes, frame.header.body_sha256)
            self._hub.answered(talk.site, talk.instance, Message(frame.header, body))
        return None

    def _hand_out(self, talk: _Talk) -> None:
        """Give the relay what the Hub has for its site, while the site gives signs of life: to ask counts as one."""
        refused = ""
        while not talk.over and not self._stop.is_set():
            instance = talk.instance
            if not instance or instance == refused or time.monotonic() - talk.heard > 3 * PULSE:
                self._stop.wait(_TICK if instance != refused else _REFUSED)
                refused = ""
                continue
            try:
                message = self._hub.take(talk.site, instance, _TICK)
            except Rejected:
                refused = instance  # the Hub notes it for the coordinator
                continue
            if message is not None and not self._wrote(talk, message):
                self._end(talk)
            if talk.over or not talk.instance:
                # To ask was a sign of life, and may have got a message, after the Hub was told of the end.
                self._hub.lost(talk.site, instance)

    def _wrote(self, talk: _Talk, message: Message) -> bool:
        if talk.over:
            return False
        try:
            self._frames.write(talk.stream, message)
        except (OSError, ValueError):
            return False
        return True
