"""Messages between processes on one machine: a length, a header in canonical JSON, and the body or its file's path."""

from __future__ import annotations

import struct
from itertools import count
from pathlib import Path
from typing import BinaryIO

from wardround.errors import WireError
from wardround.wire.message import CHUNK, MAX_HEADER, EmptyBody, Excerpt, FileBody, Header, Message

PROGRESS = "progress"
_LENGTH = struct.Struct("<II")
_LONGEST_PATH = 1 << 16


class SharedBodies:
    """Bodies stay in their files, which both processes can read: a frame holds a header and a path."""

    def write(self, stream: BinaryIO, message: Message) -> None:
        """Send a message."""
        header = message.header.to_bytes()
        file = message.body.file if isinstance(message.body, Excerpt) else message.body
        path = str(file.path).encode() if isinstance(file, FileBody) else b""
        stream.write(_LENGTH.pack(len(header), len(path)) + header + path)
        stream.flush()

    def read(self, stream: BinaryIO) -> Message | None:
        """The next message, or nothing at the end of the stream; raises `WireError` for a broken frame."""
        head = _read_head(stream, _LONGEST_PATH)
        if head is None:
            return None
        header, path_size = head
        try:
            path = _read(stream, path_size, required=True).decode()
        except UnicodeDecodeError:
            raise WireError("a frame between processes names no path") from None
        if "\0" in path:
            raise WireError("a frame between processes names no path")
        if not path:
            return Message(header, EmptyBody())
        file = FileBody(Path(path), header.body_nbytes)
        return Message(header, Excerpt.of(file, header) if header.absent else file)

    def drop(self, message: Message) -> None:
        """A message was answered, or its reply is no longer needed: its body belongs to the sender."""


class CopiedBodies:
    """Bodies travel in the frame, behind their headers, and are spooled into `folder`: the processes share no file.

    A body of more than `most` bytes is refused before it is read.
    """

    def __init__(self, folder: Path, most: int = 1 << 32) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._count = count()
        self._most = most

    def write(self, stream: BinaryIO, message: Message) -> None:
        """Send a message."""
        header = message.header.to_bytes()
        stream.write(_LENGTH.pack(len(header), 0) + header)
        if message.header.sent_nbytes:
            for chunk in message.body.chunks():
                stream.write(chunk)
        stream.flush()

    def read(self, stream: BinaryIO) -> Message | None:
        """The next message, or nothing at the end of the stream; raises `WireError` for a broken frame."""
        head = _read_head(stream, 0)
        if head is None:
            return None
        header, _ = head
        nbytes = header.sent_nbytes
        if not nbytes:
            return Message(header)
        if nbytes > self._most:
            raise WireError(f"a body of {nbytes} bytes is over the limit of {self._most}")
        path = self._folder / f"{next(self._count)}.body"
        with path.open("wb") as file:
            left = nbytes
            while left:
                part = stream.read(min(left, CHUNK))
                if not part:
                    raise WireError("a frame between processes ends too early")
                left -= file.write(part)
        return Message(header, FileBody(path, nbytes))

    def drop(self, message: Message) -> None:
        """A message was answered, or its reply is no longer needed: its body goes."""
        if isinstance(message.body, FileBody) and message.body.path.parent == self._folder:
            message.body.path.unlink(missing_ok=True)


Frames = SharedBodies | CopiedBodies


def _read_head(stream: BinaryIO, longest_path: int) -> tuple[Header, int] | None:
    """The header of the next frame, and the length of the path behind it; nothing at the end of the stream."""
    lengths = _read(stream, _LENGTH.size)
    if not lengths:
        return None
    size, path_size = _LENGTH.unpack(lengths)
    if size > MAX_HEADER or path_size > longest_path:
        raise WireError("a frame between processes is oversized")
    return Header.from_bytes(_read(stream, size, required=True)), path_size


def _read(stream: BinaryIO, size: int, *, required: bool = False) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            if data or required:
                raise WireError("a frame between processes ends too early")
            return b""
        data += part
    return data
