"""Bodies of messages over NVFlare: small ones travel with their header, longer ones in parts the receiver asks for.

NVFlare's own file transfer has no limit of size and begins again after a cut. Here the receiver knows the size before
the first byte and refuses what is too long; a transfer that was cut goes on behind the last part that arrived, in
another process too; the hash is checked at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from wardround.errors import WireError
from wardround.wire.message import EMPTY, Excerpt, FileBody, Header, Message, body_sha256

INLINE = 8 << 20  # bytes of a body that travels with its header
PART = 4 << 20  # bytes of a part
WINDOW = 4  # parts that one transfer asks for at once: a part is held in memory by four processes on its way
KEPT = 64  # bodies that are offered at once; the oldest is forgotten, and offered again when its message is

Ask = Callable[[str, int], bytes]
_KEY = re.compile(r"[0-9a-f]{64}")


class Offers:
    """Bodies that the other side may ask for, by the SHA-256 of the bytes that travel."""

    def __init__(self) -> None:
        self._bodies: OrderedDict[str, FileBody | Excerpt] = OrderedDict()
        self._lock = threading.Lock()

    def packed(self, message: Message) -> dict[str, Any]:
        """What is sent of a message: its header, and the body or the key under which it is offered."""
        header, body = message.header.to_bytes(), message.body
        if not body.nbytes:
            return {"header": header}
        if body.nbytes <= INLINE or not isinstance(body, FileBody | Excerpt):
            return {"header": header, "body": b"".join(bytes(chunk) for chunk in body.chunks())}
        key = body_sha256(body) if isinstance(body, Excerpt) else message.header.body_sha256
        with self._lock:
            self._bodies[key] = body
            self._bodies.move_to_end(key)
            while len(self._bodies) > KEPT:
                self._bodies.popitem(last=False)
        return {"header": header, "key": key}

    def part(self, key: Any, offset: Any) -> bytes:
        """The part of a body at `offset`; raises `WireError` for what is not offered, `OSError` where it is gone."""
        with self._lock:
            body = self._bodies.get(key) if isinstance(key, str) else None
        if body is None or type(offset) is not int or not 0 <= offset < body.nbytes:
            raise WireError("a part was asked for that is not offered")
        if isinstance(body, FileBody):
            with body.path.open("rb") as file:
                file.seek(offset)
                return file.read(min(PART, body.nbytes - offset))
        found = bytearray()
        for chunk in body.chunks(offset):
            found += chunk[: PART - len(found)]
            if len(found) == PART:
                break
        return bytes(found)


@dataclass(frozen=True)
class Spool:
    """Where bodies are received: `folder` on the disk, `owner` in their names, at most `most` bytes each."""

    folder: Path
    owner: str
    most: int

    def received(self, data: Any, ask: Ask) -> Message:
        """The message that was packed into `data`; its body is in a file of this spool, which the caller removes.

        `ask` gets a part. Raises `WireError` for what is not its header's body, and what `ask` raises: called again,
        it goes on where it stopped.
        """
        header = header_of(data)
        if header.sent_nbytes > self.most:
            raise WireError(f"a body of {header.sent_nbytes} bytes is over the limit of {self.most}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not header.sent_nbytes:
            return Message(header, self._laid_out(header, None) if header.absent else EMPTY)
        small = data.get("body")
        path = self._inline(header, small) if isinstance(small, bytes) else self._fetched(header, data.get("key"), ask)
        return Message(header, self._laid_out(header, path) if header.absent else FileBody(path, header.body_nbytes))

    def _path(self, end: str) -> Path:
        return self.folder / f"{self.owner}-{uuid.uuid4().hex}.{end}"

    def _inline(self, header: Header, body: bytes) -> Path:
        wrong = not header.absent and hashlib.sha256(body).hexdigest() != header.body_sha256
        if len(body) != header.sent_nbytes or wrong:
            raise WireError("a body is not what its header says")
        path = self._path("body")
        path.write_bytes(body)
        return path

    def _fetched(self, header: Header, key: Any, ask: Ask) -> Path:
        if not isinstance(key, str) or not _KEY.fullmatch(key) or not (header.absent or key == header.body_sha256):
            raise WireError("a body is offered under a key that is not its hash")
        nbytes = header.sent_nbytes
        with self._draft(key) as (file, draft):
            total = _hashed(file, nbytes)
            for part in _parts(key, file.tell(), nbytes, ask):
                total.update(part)
                file.write(part)
            if total.hexdigest() != key:
                draft.unlink(missing_ok=True)
                raise WireError("a body is not what its header says")
            file.flush()
            path = self._path("body")
            os.replace(draft, path)
        return path

    @contextmanager
    def _draft(self, key: str) -> Iterator[tuple[BinaryIO, Path]]:
        """The file that an earlier transfer began, or a new one where another process is still writing that."""
        draft = self.folder / f"{self.owner}-{key}.part"
        file = _opened(draft)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last writer may have finished in between, and given it another name.
            mine = os.path.exists(draft) and os.path.samestat(os.fstat(file.fileno()), os.stat(draft))
        except BlockingIOError:
            mine = False
        if not mine:
            file.close()
            draft = self._path("part")
            file = _opened(draft)
        with file:
            yield file, draft

    def _laid_out(self, header: Header, packed: Path | None) -> Excerpt:
        """What arrived of a body, each tensor at its place in it: the rest of the file is a hole."""
        path = self._path("body")
        with path.open("wb") as file:
            file.truncate(header.body_nbytes)
            excerpt = Excerpt.of(FileBody(path, header.body_nbytes), header)
            if packed is not None:
                with packed.open("rb") as source:
                    for begin, end in excerpt.spans:
                        file.seek(begin)
                        while begin < end:
                            begin += file.write(source.read(min(PART, end - begin)))
                packed.unlink()
        return excerpt

    def forget(self, message: Message) -> None:
        """Remove the body of a received message."""
        body = message.body.file if isinstance(message.body, Excerpt) else message.body
        if isinstance(body, FileBody) and body.path.parent == self.folder:
            body.path.unlink(missing_ok=True)


def header_of(data: Any) -> Header:
    """The header of what was packed; raises `WireError`."""
    header = data.get("header")
    if not isinstance(header, bytes):
        raise WireError("a message without a header")
    return Header.from_bytes(header)


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")


def _hashed(file: BinaryIO, nbytes: int) -> Any:
    """The hash of what a draft has, which is then positioned at its end: a whole number of parts."""
    size = os.fstat(file.fileno()).st_size
    whole = 0 if size > nbytes else size - size % PART
    file.truncate(whole)
    total = hashlib.sha256()
    while data := file.read(PART):
        total.update(data)
    return total


def _parts(key: str, offset: int, nbytes: int, ask: Ask) -> Iterator[bytes]:
    """The parts from `offset` on, in order, a few of them under way at once."""
    waiting: deque[tuple[int, Future[bytes]]] = deque()
    ahead = offset
    with ThreadPoolExecutor(WINDOW) as pool:
        try:
            while offset < nbytes:
                while ahead < nbytes and len(waiting) < WINDOW:
                    waiting.append((min(PART, nbytes - ahead), pool.submit(ask, key, ahead)))
                    ahead += PART
                size, future = waiting.popleft()
                part = future.result()
                if len(part) != size:
                    raise WireError(f"a part has {len(part)} bytes in place of {size}")
                offset += size
                yield part
        finally:
            for _, future in waiting:
                future.cancel()
