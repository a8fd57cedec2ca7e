"""The coordinator's end of the HTTPS carrier: one port, certificates on both sides, nothing but Python."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import sys
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any

from wardround.errors import WardroundError
from wardround.hospitals.certificates import OWN, CertificateError, server_context
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Federation
from wardround.hospitals.https.requests import Office, Requests, peer_of
from wardround.hospitals.https.seats import Seats
from wardround.hospitals.https.sockets import keep_alive
from wardround.hospitals.https.uploads import Uploads
from wardround.wire.files import reason

log = logging.getLogger(__name__)
#: Seconds in which a connection must have shown its certificate.
_HANDSHAKE = 10.0
#: Seconds after which the listening thread looks whether it is to end.
_LOOK = 0.2
#: The most connections that have not shown one yet, and the most of all.
_MOST_STRANGERS, _MOST_CONNECTIONS = 64, 1024


class HttpsCarrier:
    """Serves the messages of a hub to sites over HTTPS.

    `certificates` is the coordinator's folder of them; a renewed certificate is used without a new start. `spool` is
    the folder of the hub's bodies. `port` is the one that it listens on, on all of the computer's addresses, or on
    loopback alone where the federation's host is a loopback one.
    """

    def __init__(self, hub: Hub, federation: Federation, certificates: Path, spool: Path) -> None:
        self.port = federation.port
        self._federation = federation
        self._contexts = _Contexts(certificates)
        seats = Seats(hub)
        self._office = Office(hub, seats, Uploads(spool / "https"), federation.largest_nbytes)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. Raises `CertificateError`, and `WardroundError` where the port cannot be had."""
        self._contexts.current()
        try:
            self._server = _Server(self._federation.host, self.port, self._contexts, self._office)
        except OSError as error:
            raise WardroundError(
                f"the coordinator cannot listen on port {self.port} ({reason(error)}); end the program that has it, or "
                "set another `port` in federation.yaml, in all kits too"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK,), name="https", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections; sites come back once something listens again, and transfers go on where they were."""
        self._office.ending.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._office.seats.close()
        if self._thread is not None:
            self._thread.join()
        self._office.uploads.close()


class _Contexts:
    """The TLS context of the certificate that lies in the folder now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._stamp = 0

    def current(self) -> ssl.SSLContext:
        """The context; of the last good certificate where a new one cannot be used. Raises `CertificateError`."""
        with self._lock:
            try:
                stamp = (self._folder / OWN).stat().st_mtime_ns
            except OSError:
                stamp = 0
            if self._context is None or stamp != self._stamp:
                try:
                    self._context, self._stamp = server_context(self._folder), stamp
                except CertificateError as error:
                    if self._context is None:
                        raise
                    log.error("the new certificate is not used: %s", error)
                    self._stamp = stamp
            return self._context


class _Server(ThreadingHTTPServer):
    """A thread for each connection; TLS is agreed on in that thread."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, contexts: _Contexts, office: Office) -> None:
        self._contexts = contexts
        self._office = office
        self._lock = threading.Lock()
        self._strangers, self._connections = 0, 0
        address = _listening_address(host)
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # `finish_request` makes what answers.
        super().__init__((address, port), BaseRequestHandler)

    def server_bind(self) -> None:
        """Take the port. The class above would look the host's name up in the network."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "coordinator", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread, where there are not too many."""
        with self._lock:
            crowded = self._strangers >= _MOST_STRANGERS or self._connections >= _MOST_CONNECTIONS
            if not crowded:
                self._strangers += 1
                self._connections += 1
        if crowded:
            log.debug("a connection too many is refused")
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Agree on TLS, then answer requests until the connection ends."""
        known = False
        try:
            request.settimeout(_HANDSHAKE)
            keep_alive(request)
            with self._contexts.current().wrap_socket(request, server_side=True) as connection:
                peer = peer_of(connection)
                if peer is None:
                    return
                known = True
                self._count(strangers=-1)
                self._serve(connection, client_address, peer)
        finally:
            self._count(strangers=0 if known else -1, connections=-1)

    def _serve(self, connection: ssl.SSLSocket, address: Any, peer: Any) -> None:
        seats = self._office.seats
        seats.opened(peer.site, connection)
        try:
            if not self._office.ending.is_set():
                Requests(connection, address, self, self._office, peer)
        finally:
            seats.closed(peer.site, connection)

    def _count(self, strangers: int = 0, connections: int = 0) -> None:
        with self._lock:
            self._strangers += strangers
            self._connections += connections

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke, or one that is none of a site's: the log has it, for those who look for a fault."""
        error = sys.exception()
        level = logging.DEBUG if isinstance(error, OSError | CertificateError) else logging.ERROR
        log.log(level, "a connection ended: %s", type(error).__name__, exc_info=level == logging.ERROR)


def _listening_address(host: str) -> str:
    """Loopback for a federation on one computer, else all addresses, of both kinds where the system has both."""
    if host == "localhost":
        return "127.0.0.1"
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return host
    if socket.has_dualstack_ipv6():
        with suppress(OSError), socket.create_server(("::", 0), family=socket.AF_INET6):
            return "::"
    return ""
