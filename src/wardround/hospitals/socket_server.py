"""A unix socket at which processes of the same user hand messages over; it opens no port."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wardround.engines.frames import SharedBodies
from wardround.errors import WireError
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
Handle = Callable[[Message, Callable[[Header], None]], Message]
# A kind of frame at the socket that is for this process and no message of a coordinator.
HELLO = "hello"
# Connections that wait to be taken; a carrier has one a message.
_BACKLOG = 64


class SocketServer:
    """Answers messages at `path` with `handle`, each connection in a thread of its own, one message after the other.

    Bodies stay in their files. While a message is at work its progress goes ahead of the reply, as frames of their own.
    Who says `hello` hears the `instance` of this process, and knows that it lives while the connection is open.
    """

    def __init__(self, path: Path, handle: Handle, instance: str) -> None:
        self._path, self._handle, self._instance = path, handle, instance
        self._frames = SharedBodies()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listening: socket.socket | None = None

    def start(self) -> None:
        """Begin to answer. The socket of a process that was killed is replaced: keep a second process out by a lock."""
        self._path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        with reachable(self._path) as address:
            listening.bind(address)
        # Closed to other users before it listens. The umask would close it, too, but it belongs to the whole process:
        # two threads that set it and set it back can leave the process with the narrow one.
        self._path.chmod(0o600)
        listening.listen(_BACKLOG)
        self._listening = listening
        threading.Thread(target=self._accept, args=(listening,), daemon=True, name="socket").start()

    def close(self) -> None:
        """Answer nothing any more."""
        if self._listening is None:
            return
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._path.unlink(missing_ok=True)

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="socket").start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as incoming, connection.makefile("wb") as outgoing:

                def progress(header: Header) -> None:
                    # Who asked may be gone; the work goes on, and its reply is kept at the site.
                    with suppress(OSError):
                        self._frames.write(outgoing, Message(header))

                while (message := self._frames.read(incoming)) is not None:
                    hello = message.header.kind == HELLO
                    said = message.reply(HELLO, meta={"instance": self._instance}) if hello else None
                    self._frames.write(outgoing, said or self._handle(message, progress))
        except (OSError, WireError) as error:
            log.debug("a connection to the site's socket ended: %s", type(error).__name__)
        finally:
            with self._lock:
                self._open.discard(connection)


def connect(path: Path) -> socket.socket:
    """A connection to a unix socket; raises `OSError` where nothing answers there."""
    found = socket.socket(socket.AF_UNIX)
    try:
        with reachable(path) as address:
            found.connect(address)
    except BaseException:
        found.close()
        raise
    return found


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """An address of a unix socket, by its open folder: the path of one may have no more than 107 bytes."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
