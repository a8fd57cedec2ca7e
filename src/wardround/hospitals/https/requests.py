"""What the coordinator answers to each request of a site."""

from __future__ import annotations

import json
import logging
import re
import select
import ssl
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, NamedTuple, cast

from wardround.errors import Rejected, WireError
from wardround.hospitals.certificates import peer_name
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.https import protocol
from wardround.hospitals.https.partial import NoSpace, Partial
from wardround.hospitals.https.protocol import BODY, HELLO, INSTANCE, LONGEST_TEXT, NEXT, PROGRESS, REPLY, WAIT, Span
from wardround.hospitals.https.seats import Seats
from wardround.hospitals.https.uploads import Upload, Uploads
from wardround.wire.message import CHUNK, MAX_HEADER, Header, Message

if TYPE_CHECKING:
    from io import BufferedReader
    from socketserver import BaseServer

log = logging.getLogger(__name__)
#: Seconds after which the server looks whether a site that waits is still there, and whether it is to end itself.
_PIECE = 1.0
_INSTANCE = re.compile(r"[0-9A-Za-z_-]{1,128}")


class Peer(NamedTuple):
    """A site, by the certificate that it showed, and until when (Unix time) that holds."""

    site: str
    until: float


def peer_of(connection: ssl.SSLSocket) -> Peer | None:
    """Who is at the other end; nothing for a certificate without a name."""
    certificate = connection.getpeercert() or {}
    name = peer_name(cast("tuple[tuple[tuple[str, str], ...], ...]", certificate.get("subject", ())))
    return None if not name else Peer(name, ssl.cert_time_to_seconds(str(certificate["notAfter"])))


class Office:
    """What the requests of all sites share."""

    def __init__(self, hub: Hub, seats: Seats, uploads: Uploads, largest_nbytes: int) -> None:
        self.hub = hub
        self.seats = seats
        self.uploads = uploads
        self.largest_nbytes = largest_nbytes
        self.ending = threading.Event()


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


_GONE = "this is not, or no more, asked of this site"


class Requests(BaseHTTPRequestHandler):
    """The requests on one connection of a site, one after the other."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Wardround", ""
    # Of a socket's reads and writes, and of the wait for the next request.
    timeout = protocol.SILENCE
    disable_nagle_algorithm = True

    def __init__(
        self, connection: ssl.SSLSocket, address: object, server: BaseServer, office: Office, peer: Peer
    ) -> None:
        self._office = office
        self._peer = peer
        self._site = peer.site
        self._instance = ""
        self._heard = time.monotonic()
        super().__init__(connection, address, server)

    def do_GET(self) -> None:
        """`/hello`, `/next` and `/body/`."""
        self._answered({HELLO: self._hello, NEXT: self._next}.get(self.path, self._body))

    def do_POST(self) -> None:
        """`/reply` and `/progress`."""
        self._answered(self._reply if self.path == REPLY else self._progress)

    def do_PUT(self) -> None:
        """`/reply/`."""
        self._answered(self._piece)

    def log_message(self, format: str, *values: object) -> None:
        """What `http.server` has to say goes to the log, for those who look for a fault."""
        log.debug("site %s: %r", self._site, format % values)

    # ------------------------------------------------------------------------------------------------------------------

    def _answered(self, answer: Callable[[], None]) -> None:
        """Run what answers a request, once it is known that the site may ask; a refusal is an answer too."""
        try:
            if time.time() > self._peer.until:
                self.close_connection = True
                raise _Refused(HTTPStatus.FORBIDDEN, "this site's certificate has expired; ask for a new kit")
            self._instance = self.headers.get(INSTANCE, "")
            if not _INSTANCE.fullmatch(self._instance) or self.headers.get("Transfer-Encoding"):
                self.close_connection = True
                raise _Refused(HTTPStatus.BAD_REQUEST, "a request of another version; install the coordinator's")
            self._office.seats.active(self._site, self.connection)
            answer()
        except _Refused as refused:
            self._say(refused.status, str(refused).encode())
        except Rejected as rejected:
            self._say(HTTPStatus.CONFLICT, str(rejected).encode())
        except NoSpace as full:
            log.error("the coordinator's disk: %s", full)
            self._say(HTTPStatus.INSUFFICIENT_STORAGE, f"at the coordinator: {full}".encode())
        except WireError as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error).encode())

    def _say(self, status: HTTPStatus, data: bytes = b"") -> None:
        """Answer; an error's text is cut where it is too long."""
        if status >= HTTPStatus.BAD_REQUEST:
            data = data[:LONGEST_TEXT]
            log.debug("site %s: %d %s", self._site, status, data.decode())
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if data:
            self.wfile.write(data)

    # Messages ---------------------------------------------------------------------------------------------------------

    def _hello(self) -> None:
        self._office.seats.polls(self._site, self._instance, self.connection)
        self._say(HTTPStatus.NO_CONTENT)

    def _next(self) -> None:
        office = self._office
        office.seats.polls(self._site, self._instance, self.connection)
        message = self._taken()
        if message is None:
            return self._say(HTTPStatus.NO_CONTENT)
        if not office.seats.hand(self._site, self._instance, self.connection, message):
            # Another connection of the site waits in this one's place, and gets it.
            office.hub.lost(self._site, self._instance)
            self.close_connection = True
            raise _Refused(HTTPStatus.CONFLICT, "a newer connection of the site waits for messages")
        return self._say(HTTPStatus.OK, message.header.to_bytes())

    def _taken(self) -> Message | None:
        """The next message; nothing after a while, or once the site went away."""
        until = time.monotonic() + WAIT
        while not self._office.ending.is_set() and (left := until - time.monotonic()) > 0.0:
            message = self._office.hub.take(self._site, self._instance, min(left, _PIECE))
            if message is not None:
                return message
            if until - time.monotonic() > left - _PIECE / 2:
                # A hub that was closed does not wait.
                self._office.ending.wait(_PIECE)
            # A site says nothing while it waits: what can be read is the end of the connection.
            if self._readable():
                break
        self.close_connection = self._office.ending.is_set()
        return None

    def _readable(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0))

    def _body(self) -> None:
        sha256 = self.path.removeprefix(BODY)
        message = self._office.seats.handed(self._site, self._instance, sha256)
        if message is None:
            raise _Refused(HTTPStatus.NOT_FOUND, _GONE)
        total = message.header.sent_nbytes
        span = protocol.asked_span(self.headers.get("Range"))
        if span.end > total:
            raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "the body ends before what is asked for")
        try:
            pieces = _pieces(message, span)
            first = next(pieces)
        except (OSError, WireError, StopIteration):
            # A round that was given up takes its files along.
            raise _Refused(HTTPStatus.NOT_FOUND, _GONE) from None
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(span.nbytes))
        self.send_header("Content-Range", f"bytes {span.begin}-{span.end - 1}/{total}")
        self.end_headers()
        with closing(pieces):
            self.wfile.write(first)
            for piece in pieces:
                self.wfile.write(piece)
                self._is_heard()

    # Replies ----------------------------------------------------------------------------------------------------------

    def _reply(self) -> None:
        header, office = self._header(), self._office
        if header.absent:
            raise _Refused(HTTPStatus.BAD_REQUEST, "a reply has all of its body")
        if header.body_nbytes > office.largest_nbytes:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a reply of {header.body_nbytes} bytes; the coordinator's file allows {office.largest_nbytes} "
                "(largest_gb)",
            )
        if not office.seats.is_asked(self._site, self._instance, header.reply_to):
            raise _Refused(HTTPStatus.GONE, _GONE)
        if not header.body_nbytes:
            self._deliver(Message(header))
            return self._say(HTTPStatus.NO_CONTENT)
        have = office.uploads.begin(self._site, header, self.connection)
        if have == header.body_nbytes:
            upload = office.uploads.find(self._site, protocol.header_sha256(header))
            if upload is not None and self._finish(upload):
                return self._say(HTTPStatus.NO_CONTENT)
        return self._say(HTTPStatus.OK, json.dumps({"have": have}).encode())

    def _piece(self) -> None:
        # What is left of a piece that is refused would be read as the next request.
        self.close_connection = True
        upload = self._office.uploads.find(self._site, self.path.removeprefix(f"{REPLY}/"))
        if upload is None or not self._office.seats.is_asked(self._site, self._instance, upload.header.reply_to):
            raise _Refused(HTTPStatus.NOT_FOUND, _GONE)
        span, total = protocol.sent_span(self.headers.get("Content-Range"))
        if total != upload.header.body_nbytes or self._length() != span.nbytes:
            raise _Refused(HTTPStatus.BAD_REQUEST, "a body of another length than its header says")
        with upload.held(self.connection) as partial:
            if span.begin != partial.have:
                raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "other bytes of the body are missing")
            self._read_into(partial, span.nbytes)
        self.close_connection = False
        self._finish(upload)
        return self._say(HTTPStatus.NO_CONTENT)

    def _read_into(self, partial: Partial, left: int) -> None:
        buffer = memoryview(bytearray(min(CHUNK, left)))
        while left:
            read = cast("BufferedReader", self.rfile).readinto1(buffer[: min(left, len(buffer))])
            if not read:
                raise ConnectionResetError("cut off")
            partial.write(buffer[:read])
            left -= read
            self._is_heard()

    def _finish(self, upload: Upload) -> bool:
        """Hand in a reply whose body is whole; whether it is."""
        with upload.held(self.connection) as partial:
            if not partial.whole:
                return False
            body = self._office.uploads.take(self._site, upload)
        self._deliver(Message(upload.header, body))
        return True

    def _deliver(self, reply: Message) -> None:
        # In this order: the hub may ask the same at once, and that is handed out again.
        self._office.seats.answered(self._site, reply.header.reply_to)
        self._office.hub.answered(self._site, self._instance, reply)

    def _progress(self) -> None:
        header = self._header()
        if self.path != PROGRESS:
            raise _Refused(HTTPStatus.NOT_FOUND, "no such request; install the coordinator's version")
        if not self._office.seats.is_twin(self._site, self._instance):
            self._office.hub.heard(self._site, self._instance)
            self._office.hub.report(header)
        return self._say(HTTPStatus.NO_CONTENT)

    # ------------------------------------------------------------------------------------------------------------------

    def _header(self) -> Header:
        """The header that a request carries, in the name of the site that sends it."""
        length = self._length()
        if length > MAX_HEADER:
            self.close_connection = True
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a header of more than {MAX_HEADER} bytes")
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionResetError("cut off")
        header = Header.from_bytes(data)
        if header.site != self._site:
            raise _Refused(HTTPStatus.FORBIDDEN, "a message in the name of another site")
        return header

    def _length(self) -> int:
        value = self.headers.get("Content-Length", "")
        if not value.isascii() or not value.isdecimal() or len(value) > 18:
            self.close_connection = True
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a request that does not say how long it is")
        return int(value)

    def _is_heard(self) -> None:
        """A transfer is a sign of life, about once a second."""
        now = time.monotonic()
        if now - self._heard >= _PIECE:
            self._heard = now
            self._office.hub.heard(self._site, self._instance)


def _pieces(message: Message, span: Span) -> Generator[memoryview, None, None]:
    """The bytes of a span of a body that travels."""
    left = span.nbytes
    for chunk in message.body.chunks(span.begin):
        for at in range(0, len(chunk), CHUNK):
            piece = chunk[at : at + min(CHUNK, left)]
            yield piece
            left -= len(piece)
            if not left:
                return
    raise WireError("a body ends before its length")
