"""A line between a site and its coordinator that can fall silent, be cut, and be slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.hospitals.lines import end


class Hole:
    """Passes connections on to a port of loopback. `delay`: seconds that every piece takes.

    While it is `silent` nothing arrives, and no end of a connection is seen, as where a cable is pulled.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self.delay = 0.0
        self._passing = threading.Event()
        self._passing.set()
        self._ended = False
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        """From now on nothing arrives."""
        self._passing.clear()

    def pass_on(self) -> None:
        """What was sent meanwhile arrives, and what comes."""
        self._passing.set()

    def cut(self) -> None:
        """End all connections; new ones are let through."""
        for each in list(self._open):
            end(each)

    def close(self) -> None:
        """Be gone."""
        self._ended = True
        end(self._listening)
        self._listening.close()
        self.pass_on()
        self.cut()

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near:
            self._passing.wait()
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            with far:
                self._open |= {near, far}
                back = threading.Thread(target=self._carry, args=(far, near), daemon=True)
                back.start()
                self._carry(near, far)
                back.join()
                self._open -= {near, far}

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay)
                self._passing.wait()
                target.sendall(data)
        self._passing.wait()
        end(source)
        end(target)


@contextmanager
def hole(port: int) -> Iterator[Hole]:
    """One that is closed in the end."""
    made = Hole(port)
    try:
        yield made
    finally:
        made.close()
