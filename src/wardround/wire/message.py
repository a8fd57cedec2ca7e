"""A message: a header in canonical JSON and a body that is read in chunks and never held as one bytes object."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from wardround.errors import WireError
from wardround.wire.canonical import canonical_json, parse_json
from wardround.wire.parts import Part, parse_parts, present
from wardround.wire.tensors import TensorInfo, parse_table

SCHEMA = 1
# A multiple of 12 bytes, so that chunks of an update never cut an element of 2, 3 or 4 bytes; small enough to stay in
# the cache while it is hashed, checked and added.
CHUNK = 12 << 14
MAX_HEADER = 1 << 22
# Bodies up to this many bytes may be held in memory; longer ones are read from their files, chunk by chunk.
SMALL = 4 << 20
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class Body(Protocol):
    """Bytes that can be read again from any offset."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The bytes from `offset` on; a chunk is valid until the next one is asked for."""


@dataclass(frozen=True)
class FileBody:
    """A body in a file."""

    path: Path
    nbytes: int

    def with_bytes(self, small: HeldBody) -> FileBody:
        """The body with the bytes that were written into its file: `held` reads no file in this process."""
        body = replace(self)
        body.__dict__["_held"] = small
        return body

    @cached_property
    def _held(self) -> HeldBody:
        with self.path.open("rb") as file:
            data = file.read(self.nbytes)
        if len(data) < self.nbytes:
            raise WireError(f"a body ends {self.nbytes - len(data)} bytes before its length of {self.nbytes}")
        return HeldBody(data)

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The bytes from `offset` on; raises `WireError` when the file is shorter than promised."""
        buffer = bytearray(min(CHUNK, max(self.nbytes - offset, 1)))
        view = memoryview(buffer)
        left = self.nbytes - offset
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            while left > 0:
                read = file.readinto(view[: min(left, len(view))])
                if not read:
                    raise WireError(f"a body ends {left} bytes before its length of {self.nbytes}")
                left -= read
                yield view[:read]


@dataclass(frozen=True)
class HeldBody:
    """A small body in memory."""

    data: bytes

    @staticmethod
    def of(chunks: Iterable[bytes | memoryview]) -> HeldBody:
        """The body of these chunks."""
        buffer = io.BytesIO()
        for chunk in chunks:
            buffer.write(chunk)
        return HeldBody(buffer.getvalue())

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def write(self, file: BinaryIO) -> tuple[int, str]:
        """Write it to an open file; its length in bytes and its SHA-256."""
        return file.write(self.data), self.sha256

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The bytes from `offset` on, in one piece."""
        return iter((memoryview(self.data)[offset:],) if offset < len(self.data) else ())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the bytes, in hex: computed once, as they cannot change."""
        return hashlib.sha256(self.data).hexdigest()


def held(body: Body) -> Body:
    """The body itself; in place of a small one in a file, its bytes, for whoever reads them more than once.

    They are read once and are the same each time, whatever happens to the file; all messages that share the body share
    them. Raises `WireError` when the file is shorter than promised.
    """
    if not isinstance(body, FileBody) or body.nbytes > SMALL:
        return body
    return body._held


@dataclass(frozen=True)
class EmptyBody:
    """No bytes."""

    nbytes: int = 0

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """Nothing."""
        return iter(())


EMPTY = EmptyBody()


class HashingBody:
    """A body that is hashed while somebody else reads it, once and from the start."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._total = hashlib.sha256()

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self._body.nbytes

    @property
    def sha256(self) -> str:
        """SHA-256 of what was read so far, in hex."""
        return self._total.hexdigest()

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The bytes from `offset` on."""
        for chunk in self._body.chunks(offset):
            self._total.update(chunk)
            yield chunk


def body_sha256(body: Body) -> str:
    """SHA-256 of all bytes of a body, in hex."""
    if isinstance(body, HeldBody):
        return body.sha256
    total = hashlib.sha256()
    for chunk in body.chunks():
        total.update(chunk)
    return total.hexdigest()


def span_sha256(path: Path, begin: int, end: int) -> str:
    """SHA-256 of the bytes of a file from `begin` to `end`, in hex."""
    total = hashlib.sha256()
    for chunk in FileBody(path, end).chunks(begin):
        total.update(chunk)
    return total.hexdigest()


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    `study` is the hash of study and arm; `round` and `attempt` say which exchange it belongs to; `phase` which step
    of it. `meta` holds small values of the kind's own schema. `reply_to` is the id of the request. What is `absent` of
    the body is named and does not travel. `signature`, 128 hex digits, is that of a site of a federation.
    """

    kind: str
    study: str
    site: str
    round: int = 0
    attempt: int = 0
    phase: int = 0
    reply_to: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorInfo, ...] = ()
    body_nbytes: int = 0
    body_sha256: str = EMPTY_SHA256
    absent: tuple[Part, ...] = ()
    signature: str = ""

    def to_json(self) -> dict[str, Any]:
        """The header as JSON values."""
        value = self._request()
        value |= {_ABSENT: [part.to_json() for part in self.absent]} if self.absent else {}
        return value | ({_SIGNATURE: self.signature} if self.signature else {})

    def _request(self) -> dict[str, Any]:
        """What is asked, however much of it travels."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "study": self.study,
            "site": self.site,
            "round": self.round,
            "attempt": self.attempt,
            "phase": self.phase,
            "reply_to": self.reply_to,
            "meta": dict(self.meta),
            "tensors": [info.to_json() for info in self.tensors],
            "body_nbytes": self.body_nbytes,
            "body_sha256": self.body_sha256,
        }

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return self._bytes

    @cached_property
    def id(self) -> str:
        """SHA-256 of the header but for what is absent and the signature: with one id the same thing is said."""
        bare = not self.absent and not self.signature
        return hashlib.sha256(self._bytes if bare else canonical_json(self._request())).hexdigest()

    @property
    def sent_nbytes(self) -> int:
        """Bytes of the body that travel."""
        return self.body_nbytes - sum(self.tensors[part.index].nbytes for part in self.absent)

    @cached_property
    def _bytes(self) -> bytes:
        return canonical_json(self.to_json())

    @staticmethod
    def from_bytes(data: bytes | memoryview) -> Header:
        """Parse a header; raises `WireError` for unknown or missing keys, wrong types or a foreign schema."""
        if len(data) > MAX_HEADER:
            raise WireError(f"a header of {len(data)} bytes is over the limit of {MAX_HEADER}")
        value = parse_json(bytes(data))
        if not isinstance(value, dict) or value.keys() - {_ABSENT, _SIGNATURE} != _KEYS.keys():
            raise WireError("a header's keys are not those of this version's schema")
        for key, kind in _KEYS.items():
            if type(value[key]) is not kind:
                raise WireError(f"header key {key!r} is not of type {kind.__name__}")
        signature = value.get(_SIGNATURE, "")
        if not isinstance(signature, str) or len(signature) > 128:
            raise WireError("a header's signature is no text of 128 digits")
        if value.pop("schema") != SCHEMA:
            raise WireError(f"a message of another schema version; this side speaks {SCHEMA}")
        if min(value[k] for k in ("round", "attempt", "phase", "body_nbytes")) < 0:
            raise WireError("a header counts below zero")
        value["tensors"] = parse_table(value["tensors"])
        if _ABSENT in value:
            value[_ABSENT] = parse_parts(value[_ABSENT], value["tensors"], value["body_nbytes"])
        return Header(**value)


#: A header has these only where something is absent, and where a site of a federation signed it.
_ABSENT, _SIGNATURE = "absent", "signature"
_KEYS: dict[str, type] = {
    "schema": int,
    "kind": str,
    "study": str,
    "site": str,
    "round": int,
    "attempt": int,
    "phase": int,
    "reply_to": str,
    "meta": dict,
    "tensors": list,
    "body_nbytes": int,
    "body_sha256": str,
}


@dataclass(frozen=True)
class Excerpt:
    """Of a body in a file the bytes that travel: those of some spans, one after the other."""

    file: FileBody
    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def of(file: FileBody, header: Header) -> Excerpt:
        """What travels of a body by its header."""
        return Excerpt(file, tuple(present(header.tensors, header.absent, file.nbytes)))

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(end - begin for begin, end in self.spans)

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The bytes from `offset` on; raises `WireError` when the file is shorter than promised."""
        for begin, end in self.spans:
            start = begin + min(offset, end - begin)
            offset -= start - begin
            yield from FileBody(self.file.path, end).chunks(start)


@dataclass(frozen=True)
class Message:
    """A header and its body."""

    header: Header
    body: Body = EMPTY

    @property
    def id(self) -> str:
        """The header's id."""
        return self.header.id

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: header and body."""
        return len(self.header.to_bytes()) + self.body.nbytes

    def without(self, absent: tuple[Part, ...]) -> Message:
        """The same message, with these parts named and all others sent; it must have a file or an excerpt of one."""
        assert isinstance(self.body, FileBody | Excerpt)
        whole = self.body.file if isinstance(self.body, Excerpt) else self.body
        header = replace(self.header, absent=absent)
        return Message(header, Excerpt.of(whole, header) if absent else whole)

    def reply(self, kind: str, *, meta: Mapping[str, Any] | None = None, phase: int | None = None) -> Message:
        """An answer without a body, addressed by this request."""
        header = replace(
            self.header,
            kind=kind,
            reply_to=self.id,
            meta=meta or {},
            tensors=(),
            body_nbytes=0,
            body_sha256=EMPTY_SHA256,
            absent=(),
            signature="",
            phase=self.header.phase if phase is None else phase,
        )
        return Message(header)


def write_body(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[FileBody, str]:
    """Write chunks to `path` and return the body with its SHA-256."""
    with path.open("wb") as file:
        nbytes, sha256 = write_chunks(file, chunks)
    return FileBody(path, nbytes), sha256


def write_chunks(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write chunks to an open file; their length in bytes and their SHA-256."""
    total, nbytes = hashlib.sha256(), 0
    for chunk in chunks:
        total.update(chunk)
        nbytes += file.write(chunk)
    return nbytes, total.hexdigest()
