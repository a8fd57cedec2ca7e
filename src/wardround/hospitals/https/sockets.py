"""What both ends do to their sockets."""

from __future__ import annotations

import socket
from contextlib import suppress

#: Seconds between probes of a quiet connection, and how many of them may stay unanswered.
_PROBE, _PROBES = 15, 4


def end_connection(connection: socket.socket) -> None:
    """End a connection that another thread reads from or writes to: it gets an error."""
    with suppress(OSError):
        # Not the method of a TLS socket, which lets go of the encryption first: the other thread would write in clear.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def keep_alive(connection: socket.socket) -> None:
    """Probe a quiet connection, so that its end is noticed and routers do not forget it."""
    # Not every system can set how often.
    with suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
