"""A coordinator and sites over HTTPS on loopback, and a line between them that can be cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tests.hospitals.desk import TestDesk
from wardround.hospitals.certificates import issue, make_authority
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.https.courier import Courier, Handle
from wardround.hospitals.https.server import HttpsCarrier
from wardround.wire.message import FileBody, Header, HeldBody, Message, write_body

SECONDS = 20.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def federation(port: int, **changes: object) -> Federation:
    """The file of a federation on this computer."""
    values = {"name": "one", "host": "127.0.0.1", "port": port, "root_key": "0" * 64, "carrier": "https", **changes}
    return Federation.model_validate(values)


def make_kits(root: Path) -> Path:
    """Certificates of a coordinator and sites A, B and C."""
    make_authority(root / "root", "one")
    issue(root / "root", root / "coordinator", "coordinator", host="127.0.0.1")
    for site in "ABC":
        issue(root / "root", SiteFolder(root / site).certificates, site)
    return root


def message(site: str, body: bytes = b"", **fields: object) -> Message:
    """A request with a body."""
    content = HeldBody(body)
    header = Header("train", "study", site, body_nbytes=len(body), body_sha256=content.sha256)
    return Message(replace(header, **fields), content)  # type: ignore[arg-type]


def echoed(folder: Path) -> Handle:
    """Answers each message with its own body, in a file."""

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        reply = request.reply("update")
        if not request.body.nbytes:
            return reply
        body, sha256 = write_body(folder / f"{request.id}.reply", request.body.chunks())
        return Message(replace(reply.header, body_nbytes=body.nbytes, body_sha256=sha256), body)

    return handle


class House:
    """The coordinator, and couriers that are stopped with it."""

    def __init__(self, kits: Path, folder: Path) -> None:
        self.kits, self.folder = kits, folder
        self.port = free_port()
        self.desk = TestDesk("A", "B", "C")
        self.carrier = self.serve()
        self._stops: list[tuple[threading.Event, threading.Thread]] = []

    def serve(self, **changes: object) -> HttpsCarrier:
        """Start the coordinator's end, again too."""
        rules = federation(self.port, **changes)
        carrier = HttpsCarrier(self.desk, rules, self.kits / "coordinator", self.folder / "spool")
        carrier.start()
        self.carrier = carrier
        return carrier

    def site(self, name: str = "A", port: int | None = None, **options: object) -> Courier:
        """Start a site's end: `handle`, `certificates`, `instance`, and settings of the federation's file."""
        folder = SiteFolder(self.folder / name)
        folder.certificates.parent.mkdir(parents=True, exist_ok=True)
        if not folder.certificates.exists():
            folder.certificates.symlink_to(options.pop("certificates", SiteFolder(self.kits / name).certificates))  # type: ignore[arg-type]
        handle = options.pop("handle", None) or echoed(folder.root)
        instance = options.pop("instance", f"instance-{name}")
        rules = federation(port or self.port, **options)
        courier = Courier(rules, folder, name, instance, handle)  # type: ignore[arg-type]
        stop = threading.Event()
        thread = threading.Thread(target=courier.run, args=(stop,), daemon=True)
        thread.start()
        self._stops.append((stop, thread))
        return courier

    def stop_site(self, index: int = -1) -> None:
        """Stop a site's end."""
        stop, thread = self._stops.pop(index)
        stop.set()
        thread.join(SECONDS)
        assert not thread.is_alive()

    def exchanged(self, *requests: Message) -> dict[str, Message]:
        """Ask, and wait for a reply to each: by the request's id."""
        self.desk.ask(*requests)
        replies = [self.desk.replies.get(timeout=SECONDS) for _ in requests]
        return {reply.header.reply_to: reply for reply in replies}

    def close(self) -> None:
        """Stop all."""
        while self._stops:
            self.stop_site()
        self.carrier.close()


def read(reply: Message) -> bytes:
    """The bytes of a reply's body, whose file goes."""
    data = b"".join(bytes(chunk) for chunk in reply.body.chunks())
    if isinstance(reply.body, FileBody):
        reply.body.path.unlink()
    return data


class CutLine:
    """Stands between sites and the coordinator; ends a connection once so many bytes went down or up over all of them.

    `down` and `up` count bytes; each number of `cuts` is used once.
    """

    def __init__(self, port: int) -> None:
        self.counts = {"down": 0, "up": 0}
        self.cuts: dict[str, list[int]] = {"down": [], "up": []}
        self.cut_now: Callable[[], None] = lambda: None
        self._to = port
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        self._open: set[socket.socket] = set()

    def close(self) -> None:
        """End all connections."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in list(self._open):
            end(each)
        for thread in self._threads:
            thread.join(SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                near.close()
                continue
            for each in (near, far):
                # Little is under way when the line is cut.
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            self._open |= {near, far}
            thread = threading.Thread(target=self._carry_both, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry_both(self, near: socket.socket, far: socket.socket) -> None:
        other = threading.Thread(target=self._carry, args=("down", far, near), daemon=True)
        other.start()
        self._carry("up", near, far)
        other.join()
        # Only now does a sender get an error: what comes for a socket that was shut down is still taken.
        near.close()
        far.close()

    def _carry(self, way: str, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self.counts[way] += len(data)
                    cut = bool(self.cuts[way]) and self.counts[way] >= self.cuts[way][0]
                    if cut:
                        self.cuts[way].pop(0)
                if cut:
                    self.cut_now()
                    break
                target.sendall(data)
        end(source)
        end(target)


def end(connection: socket.socket) -> None:
    """End both ways of a connection, whatever became of it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def cut_line(port: int) -> Iterator[CutLine]:
    """A line that is closed in the end."""
    line = CutLine(port)
    try:
        yield line
    finally:
        line.close()
