"""What a site and its coordinator say to each other over HTTPS.

A site makes all connections; TLS says on both ends who is there (`certificates`). Every request names the `INSTANCE` of
the site's process. A message travels as its header, then its body in segments:

- `GET /hello` begins: 204.
- `GET /next` waits for the next message: 200 and its header, or 204 after `WAIT` seconds.
- `GET /body/HASH` with `Range`: bytes of the body of a message that was handed out, by the SHA-256 of its header.
- `POST /reply` with a reply's header: 204 where it has no body, else 200 and how many bytes of it the coordinator has.
- `PUT /reply/HASH` with `Content-Range`: bytes of a reply's body, from the first that is missing.
- `POST /progress` with a header that says how far a site is.

Answers: 404 and 410, not (or no more) asked of this site; 409, another process of the site is connected; 507, no space
left; other errors are a fault of the asking side. The text of an error is a sentence for a person.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from wardround.errors import WireError
from wardround.wire.canonical import canonical_json
from wardround.wire.message import Header
from wardround.wire.parts import present

INSTANCE = "Wardround-Instance"
HELLO, NEXT, BODY, REPLY, PROGRESS = "/hello", "/next", "/body/", "/reply", "/progress"
#: Seconds that a site waits for a message in one request: a sign of life each.
WAIT = 4.0
#: Seconds without a byte after which either end gives a connection up.
SILENCE = 30.0
#: The most bytes of a body in one request.
SEGMENT = 32 << 20
#: Bytes of disk that a transfer leaves free.
RESERVE = 64 << 20
#: Seconds after which what is left of a transfer that was never ended is deleted.
FORGOTTEN = 7 * 86400.0
#: The most characters of an error's text.
LONGEST_TEXT = 500

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


class Span(NamedTuple):
    """Bytes from `begin` up to, not including, `end`."""

    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.begin


def header_sha256(header: Header) -> str:
    """What names a message and its body in a request: unlike `id`, other where other parts of the body travel."""
    return hashlib.sha256(header.to_bytes()).hexdigest()


def content(header: Header) -> str:
    """What names the bytes that travel: two messages with one body share it, and what one began the other ends."""
    if not header.absent:
        return header.body_sha256
    spans = [list(span) for span in present(header.tensors, header.absent, header.body_nbytes)]
    return hashlib.sha256(canonical_json([header.body_sha256, spans])).hexdigest()


def asked_span(value: str | None) -> Span:
    """The bytes that `Range` asks for; raises `WireError` unless it is one span of at most `SEGMENT` bytes."""
    return _span(_RANGE.fullmatch(value or ""), "Range")


def sent_span(value: str | None) -> tuple[Span, int]:
    """The bytes that `Content-Range` says are sent, and the length of the whole; raises `WireError`."""
    match = _CONTENT_RANGE.fullmatch(value or "")
    span = _span(match, "Content-Range")
    total = int(match[3]) if match else 0
    if span.end > total:
        raise WireError("a piece of a body goes beyond its end")
    return span, total


def _span(match: re.Match[str] | None, what: str) -> Span:
    if match is None:
        raise WireError(f"a request without a {what} that this version understands")
    span = Span(int(match[1]), int(match[2]) + 1)
    if not 0 < span.nbytes <= SEGMENT:
        raise WireError(f"a piece of a body must have between 1 and {SEGMENT} bytes")
    return span
