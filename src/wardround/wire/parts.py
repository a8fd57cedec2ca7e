"""Parts of a body: a tensor that the receiver of a message holds already is named by its hash and not sent again.

A header says what the whole body is, and which of its tensors are `absent`; the bytes that travel are those of the
others. The message's id does not depend on it: the request is the same, however much of it is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from wardround.errors import WireError
from wardround.wire.tensors import TensorInfo

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """A tensor of a body, by its place in the table, and the SHA-256 of its bytes."""

    index: int
    sha256: str

    def to_json(self) -> list[Any]:
        """As a header has it."""
        return [self.index, self.sha256]


def parse_parts(rows: Any, table: Sequence[TensorInfo], body_nbytes: int) -> tuple[Part, ...]:
    """The parts that a header names; raises `WireError` for anything but tensors of its table, each once and in order.

    They must be some, and no more than the body.
    """
    if not isinstance(rows, list) or not 0 < len(rows) <= len(table):
        raise WireError("a header names parts that its table does not have")
    found, last, left = [], -1, body_nbytes
    for row in rows:
        match row:
            case [int(index), str(sha256)] if type(index) is int and last < index < len(table):
                left -= table[index].nbytes
                if not _HASH.fullmatch(sha256) or left < 0:
                    raise WireError("a header names a part by what is no hash, or parts larger than its body")
                found.append(Part(index, sha256))
                last = index
            case _:
                raise WireError("a header names a part twice, out of order, or one that its table does not have")
    return tuple(found)


def spans(table: Iterable[TensorInfo]) -> list[tuple[int, int]]:
    """Where each tensor begins and ends in the body."""
    sizes = [info.nbytes for info in table]
    ends = list(accumulate(sizes))
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def present(table: Sequence[TensorInfo], absent: Iterable[Part], nbytes: int) -> Iterator[tuple[int, int]]:
    """The spans of a body of `nbytes` that travel, as few as can be."""
    where, at = spans(table), 0
    for part in absent:
        begin, end = where[part.index]
        if begin > at:
            yield at, begin
        at = end
    if nbytes > at:
        yield at, nbytes
