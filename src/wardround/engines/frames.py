"""Messages between processes on one machine: a length, a canonical-JSON header and the path of the body's file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from wardround.errors import WireError
from wardround.wire.message import MAX_HEADER, EmptyBody, FileBody, Header, Message

PROGRESS = "progress"
_LENGTH = struct.Struct("<II")


def write_frame(stream: BinaryIO, message: Message) -> None:
    """Send a message; its body stays in its file, which both processes can read."""
    header = message.header.to_bytes()
    path = str(message.body.path).encode() if isinstance(message.body, FileBody) else b""
    stream.write(_LENGTH.pack(len(header), len(path)) + header + path)
    stream.flush()


def read_frame(stream: BinaryIO) -> Message | None:
    """The next message, or nothing at the end of the stream; raises `WireError` for a broken frame."""
    lengths = _read(stream, _LENGTH.size)
    if not lengths:
        return None
    size, path_size = _LENGTH.unpack(lengths)
    if size > MAX_HEADER or path_size > 1 << 16:
        raise WireError("a frame between processes is oversized")
    header = Header.from_bytes(_read(stream, size, required=True))
    try:
        path = _read(stream, path_size, required=True).decode()
    except UnicodeDecodeError:
        raise WireError("a frame between processes names no path") from None
    if "\0" in path:
        raise WireError("a frame between processes names no path")
    return Message(header, FileBody(Path(path), header.body_nbytes) if path else EmptyBody())


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
