"""A site's connections to its coordinator: the site makes them all, and to no other computer."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from random import uniform
from typing import cast

from wardround.errors import Rejected, WardroundError
from wardround.hospitals.certificates import client_context
from wardround.hospitals.federation import Federation
from wardround.hospitals.https.protocol import INSTANCE, LONGEST_TEXT, SILENCE
from wardround.hospitals.https.sockets import end_connection, keep_alive
from wardround.wire.message import CHUNK, MAX_HEADER

#: Seconds in which a connection is made.
_CONNECT = 10.0
#: Seconds for which an unused connection is kept; the coordinator keeps it for `SILENCE`.
_UNUSED = 20.0
_MOST_UNUSED = 4
#: Seconds until the first and between the last attempts to go on after a connection broke.
_FIRST, _LAST = 0.2, 4.0


class NotAsked(WardroundError):
    """The coordinator does not, or no more, ask this of the site."""


class Elsewhere(WardroundError):
    """Other bytes of a body are missing than those that were sent."""


class Later(WardroundError):
    """The coordinator cannot take it now, and a person may have to do something; try again after a while."""


class Refused(WardroundError):
    """The coordinator refuses a request for good."""


class Backoff:
    """Seconds to wait before the next attempt: twice as long each time, and not the same at all sites."""

    def __init__(self, first: float = _FIRST, last: float = _LAST) -> None:
        self._first, self._last = first, last
        self._next = first

    def reset(self) -> None:
        """Something was achieved."""
        self._next = self._first

    def seconds(self) -> float:
        """How long to wait now."""
        now, self._next = self._next, min(2 * self._next, self._last)
        return now * uniform(0.75, 1.25)


class Line:
    """One connection, for one thread at a time; one that raised an error is not used again."""

    def __init__(self, connection: http.client.HTTPSConnection, instance: str) -> None:
        self._connection = connection
        self._headers = {INSTANCE: instance}
        self.used = time.monotonic()

    def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and answer of a request whose answer is at most as long as a header.

        Raises `OSError` and `http.client.HTTPException` where the connection broke, `Rejected` for a twin and a site
        that the coordinator does not know, `NotAsked`, `Elsewhere`, `Later` and `Refused`.
        """
        response = self._sent(method, path, body, headers or {})
        data = response.read(MAX_HEADER + 1)
        if len(data) > MAX_HEADER:
            raise http.client.HTTPException("an answer longer than any header")
        self._check(response.status, data)
        return response.status, data

    def receive(self, path: str, headers: Mapping[str, str], nbytes: int) -> Iterator[memoryview]:
        """The `nbytes` of an answer, in chunks that are valid until the next; raises what `ask` does."""
        response = self._sent("GET", path, None, headers)
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            self._check(response.status, response.read(LONGEST_TEXT))
            raise http.client.HTTPException("an answer that is none to what was asked")
        if response.length != nbytes:
            raise http.client.HTTPException("an answer of another length than was asked for")
        buffer = memoryview(bytearray(min(CHUNK, nbytes)))
        left = nbytes
        while left:
            read = response.readinto(buffer[: min(left, len(buffer))])
            if not read:
                raise ConnectionResetError("cut off")
            left -= read
            yield buffer[:read]
        response.read()

    def expect_within(self, seconds: float) -> None:
        """Give it up when nothing comes for so long."""
        self._connection.sock.settimeout(seconds)

    @property
    def is_open(self) -> bool:
        """Whether the coordinator did not end it with its last answer."""
        return self._connection.sock is not None

    def close(self) -> None:
        """End it, also while another thread waits for an answer."""
        connection: socket.socket | None = self._connection.sock
        if connection is not None:
            end_connection(connection)

    def let_go(self) -> None:
        """Close it, in the thread that used it."""
        self._connection.close()

    def _sent(self, method: str, path: str, body: object, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        self._connection.request(method, path, cast("bytes", body), {**self._headers, **headers})
        response = self._connection.getresponse()
        self.used = time.monotonic()
        return response

    def _check(self, status: int, data: bytes) -> None:
        if status < HTTPStatus.BAD_REQUEST:
            return
        text = data[:LONGEST_TEXT].decode("utf-8", "replace")
        text = "".join(c if c.isprintable() else " " for c in text) or f"status {status}"
        kinds: dict[int, type[WardroundError]] = {
            HTTPStatus.CONFLICT: Rejected,
            HTTPStatus.NOT_FOUND: NotAsked,
            HTTPStatus.GONE: NotAsked,
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: Elsewhere,
            HTTPStatus.INSUFFICIENT_STORAGE: Later,
        }
        raise kinds.get(status, Refused)(text)


class Link:
    """Connections to the coordinator of a federation, kept for the next use. Safe in threads."""

    def __init__(self, federation: Federation, certificates: Path, instance: str) -> None:
        self._federation = federation
        self._certificates = certificates
        self._instance = instance
        self._lock = threading.Lock()
        self._unused: list[Line] = []
        self._open: set[Line] = set()
        self._closed = False

    @contextmanager
    def line(self) -> Iterator[Line]:
        """A connection, to be used by one thread; it is closed after an error.

        Raises `CertificateError`, and `OSError` where none can be made.
        """
        line = self._kept() or self._made()
        try:
            yield line
        except BaseException:
            self._let_go(line)
            raise
        with self._lock:
            keep = line.is_open and not self._closed and len(self._unused) < _MOST_UNUSED
            if keep:
                self._unused.append(line)
        if not keep:
            self._let_go(line)

    def close(self) -> None:
        """End all connections, also those that a thread uses, and make none any more."""
        with self._lock:
            self._closed = True
            unused, self._unused = self._unused, []
            used = self._open - set(unused)
        for line in used:
            line.close()
        for line in unused:
            self._let_go(line)

    def _kept(self) -> Line | None:
        with self._lock:
            now = time.monotonic()
            old = [line for line in self._unused if now - line.used > _UNUSED]
            self._unused = [line for line in self._unused if line not in old]
            line = self._unused.pop() if self._unused else None
        for each in old:
            self._let_go(each)
        return line

    def _made(self) -> Line:
        # A certificate that was renewed is used from now on.
        context = client_context(self._certificates)
        host, port = self._federation.host, self._federation.port
        connection = http.client.HTTPSConnection(host, port, timeout=_CONNECT, context=context)
        try:
            connection.connect()
            # One that the coordinator ended is not made again behind the back of `close`.
            connection.auto_open = 0
            connection.sock.settimeout(SILENCE)
            keep_alive(connection.sock)
            line = Line(connection, self._instance)
            with self._lock:
                if self._closed:
                    raise ConnectionAbortedError("the site is stopping")
                self._open.add(line)
        except BaseException:
            connection.close()
            raise
        return line

    def _let_go(self, line: Line) -> None:
        line.let_go()
        with self._lock:
            self._open.discard(line)
