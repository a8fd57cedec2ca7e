"""Bodies on their way to and from a site: a call does what one connection allows, the next goes on from there."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from wardround.errors import WireError
from wardround.hospitals.https.link import Elsewhere, Line
from wardround.hospitals.https.partial import PARTIAL, WHOLE, Partial, check_space, tidy
from wardround.hospitals.https.protocol import BODY, REPLY, SEGMENT, content, header_sha256
from wardround.wire.message import FileBody, Header, Message


class Download:
    """The body of a message under way to the site."""

    def __init__(self, header: Header, path: Path, folder: Path) -> None:
        self._header = header
        self._path = path
        self._folder = folder
        self._name = header_sha256(header)
        self._partial: Partial | None = None

    @property
    def moved(self) -> int:
        """Bytes that are there."""
        return self._partial.have if self._partial is not None else 0

    def go_on(self, line: Line) -> FileBody:
        """Get what is missing; the whole body.

        Raises what `Line.receive` does, `NoSpace`, and `WireError` where the bytes are not those of the header: they
        are forgotten then.
        """
        if self._partial is None:
            self._partial = Partial(self._path, self._header.sent_nbytes)
        partial = self._partial
        check_space(self._folder, partial.nbytes - partial.have)
        while not partial.whole:
            end = min(partial.have + SEGMENT, partial.nbytes)
            asked = {"Range": f"bytes={partial.have}-{end - 1}"}
            for chunk in line.receive(BODY + self._name, asked, end - partial.have):
                partial.write(chunk)
        # The parts of a body that did not travel whole have their own hashes, which the site looks at.
        if not self._header.absent and partial.sha256 != self._header.body_sha256:
            partial.restart()
            raise WireError("a body arrived with other bytes than its header says; it is fetched anew")
        return partial.moved(self._folder / f"{self._name}{WHOLE}")

    def close(self) -> None:
        """Let go of the file; what is there of it is kept."""
        if self._partial is not None:
            self._partial.close()


class Downloads:
    """The folder of a site's bodies under way, by what they hold: a message goes on where another was cut off."""

    def __init__(self, folder: Path) -> None:
        tidy(folder)
        self._folder = folder
        self._lock = threading.Lock()
        self._turns: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()

    def turn(self, header: Header) -> threading.Lock:
        """To be held from before `open` until the body is there: one download of the same bytes at a time."""
        with self._lock:
            turn = self._turns.get(content(header))
            if turn is None:
                turn = self._turns[content(header)] = threading.Lock()
            return turn

    def open(self, header: Header) -> Download:
        """The download of a message's body."""
        path = self._folder / f"{content(header)}-{header.sent_nbytes}{PARTIAL}"
        return Download(header, path, self._folder)


class Sending:
    """A reply under way to the coordinator."""

    def __init__(self, reply: Message) -> None:
        self._reply = reply
        self._path = f"{REPLY}/{header_sha256(reply.header)}"
        self.moved = 0

    def go_on(self, line: Line) -> None:
        """Send what is missing; raises what `Line.ask` does, and `WireError` where the body cannot be read."""
        header = self._reply.header
        status, data = line.ask("POST", REPLY, header.to_bytes())
        if status == HTTPStatus.NO_CONTENT:
            return
        self.moved, total = _have(data, header.body_nbytes), header.body_nbytes
        while self.moved < total:
            end = min(self.moved + SEGMENT, total)
            length = {"Content-Length": str(end - self.moved), "Content-Range": f"bytes {self.moved}-{end - 1}/{total}"}
            line.ask("PUT", self._path, _piece(self._reply, self.moved, end - self.moved), length)
            self.moved = end


def _have(data: bytes, total: int) -> int:
    try:
        have = json.loads(data)["have"]
    except (ValueError, KeyError, TypeError, RecursionError):
        have = None
    if type(have) is not int or not 0 <= have < total:
        raise Elsewhere("the coordinator does not say what is missing")
    return have


def _piece(reply: Message, begin: int, nbytes: int) -> Iterator[memoryview]:
    chunks = reply.body.chunks(begin)
    while nbytes:
        try:
            piece = next(chunks)[:nbytes]
        except (OSError, StopIteration) as error:
            raise WireError(f"the file of a reply cannot be read ({type(error).__name__})") from error
        yield piece
        nbytes -= len(piece)
