"""How an update travels: whole, or with the few values of each tensor that are not zero.

    sparse body = for every tensor of every group: indices | elements, then the tail

A tensor of n values has exactly k = `kept(n, ratio)` of them sent: their positions, ascending, in 32 bits each, then
their ring elements in that order. k is public, so the length of a body is known before it is read. Tensors with k = n
have no indices. Expanded, the bytes are those of a whole update (`wardround.wire.update`), chunk by chunk: whatever
checks and adds an update does not know the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from wardround.errors import Rejected, StudyError, WireError
from wardround.wire.message import Body
from wardround.wire.ring import BLOCK, Array, Ring
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Group, Layout

INDEX = np.dtype("<u4")
# Smaller tensors (biases, norms) weigh nothing and matter much: they are never cut.
SMALLEST = 64


def kept(size: int, ratio: float) -> int:
    """How many of a tensor's `size` values are sent at this ratio."""
    return size if size < SMALLEST else min(size, math.ceil(size * ratio))


class Encoding:
    """The form of an update on the wire; this one is the update itself."""

    def nbytes(self, layout: Layout) -> int:
        """Bytes of a body."""
        return layout.nbytes

    def tensor_nbytes(self, group: Group, info: TensorInfo, ring: Ring) -> int:
        """Bytes of a tensor of a group in a body."""
        return info.size * ring.itemsize

    def pack(self, layout: Layout, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """The body from what `encode` yields."""
        yield from chunks

    def unpack(self, layout: Layout, body: Body) -> Body:
        """The whole update from a body of the right length, read lazily; reading raises `Rejected` when malformed."""
        return body


DENSE = Encoding()


@dataclass(frozen=True)
class Sparse(Encoding):
    """At most `kept(n, ratio)` values of each tensor; the groups named in `whole` are not cut."""

    ratio: float
    whole: frozenset[str] = frozenset()

    def count(self, group: str, size: int) -> int:
        """How many values of a tensor of a group are sent."""
        return size if group in self.whole else kept(size, self.ratio)

    def nbytes(self, layout: Layout) -> int:
        """Bytes of a body; raises `StudyError` for a tensor too large for its indices."""
        total = layout.segments[-1][0]
        for group, info, ring in _tensors(layout):
            if info.size > 1 << 32:
                raise StudyError(f"tensor {info.name!r} has more values than top_k can number; use another compression")
            total += self.tensor_nbytes(group, info, ring)
        return total

    def tensor_nbytes(self, group: Group, info: TensorInfo, ring: Ring) -> int:
        """Bytes of the values that are sent of a tensor, and of their indices."""
        count = self.count(group.name, info.size)
        return count * (ring.itemsize + (INDEX.itemsize if count < info.size else 0))

    def pack(self, layout: Layout, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """The body from what `encode` yields; raises `WireError` when a tensor has more non-zero values than it may."""
        stream = iter(chunks)
        for group in layout.groups:
            ring = Ring(group.ring_bits)
            for info in group.tensors:
                chunk, count = next(stream), self.count(group.name, info.size)
                if count == info.size:
                    yield chunk
                    continue
                elements = ring.unpack(chunk)
                indices = _filled(np.flatnonzero(elements), elements, count, info)
                yield indices.astype(INDEX).tobytes()
                yield ring.pack(elements[indices])
            next(stream)  # padding
        yield from stream

    def unpack(self, layout: Layout, body: Body) -> Body:
        """The whole update, with zeros where nothing was sent."""
        return _Expanded(self, layout, body)


def _tensors(layout: Layout) -> Iterator[tuple[Group, TensorInfo, Ring]]:
    return ((group, info, Ring(group.ring_bits)) for group in layout.groups for info in group.tensors)


def _filled(indices: Array, elements: Array, count: int, info: TensorInfo) -> Array:
    """Exactly `count` indices: zeros make up for values that were rounded away."""
    if len(indices) > count:
        raise WireError(f"tensor {info.name!r} has {len(indices)} values to send where the study allows {count}")
    zeros = np.flatnonzero(elements == 0)[: count - len(indices)]
    return np.union1d(indices, zeros)


@dataclass(frozen=True)
class _Expanded:
    """A sparse body seen as a whole update; memory is the indices and elements of one tensor."""

    form: Sparse
    layout: Layout
    body: Body

    @property
    def nbytes(self) -> int:
        """Bytes of the whole update."""
        return self.layout.nbytes

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        """The whole update from `offset` on; raises `Rejected` for indices that no site can have sent."""
        for chunk in self._dense():
            if offset < len(chunk):
                yield memoryview(chunk)[offset:]
            offset = max(0, offset - len(chunk))

    def _dense(self) -> Iterator[bytes | memoryview]:
        reader = _Reader(self.body)
        for group, (nbytes, ring) in zip(self.layout.groups, self.layout.segments, strict=False):
            for info in group.tensors:
                count = self.form.count(group.name, info.size)
                if count < info.size:
                    yield from _scatter(reader, info, count, ring)
                else:
                    yield from reader.pieces(count, ring.itemsize)
            yield bytes(nbytes - group.size * ring.itemsize)
        tail, ring = self.layout.segments[-1]
        yield from reader.pieces(tail // ring.itemsize, ring.itemsize)


def _scatter(reader: _Reader, info: TensorInfo, count: int, ring: Ring) -> Iterator[bytes | memoryview]:
    indices = np.frombuffer(reader.take(count * INDEX.itemsize), dtype=INDEX)
    elements = ring.unpack(reader.take(count * ring.itemsize))
    if count and int(indices[-1]) >= info.size:
        raise Rejected(f"tensor {info.name!r}: an index lies outside the tensor")
    if (indices[1:] <= indices[:-1]).any():
        raise Rejected(f"tensor {info.name!r}: indices are not ascending")
    for start in range(0, info.size, BLOCK):
        dense = np.zeros(min(BLOCK, info.size - start), dtype=ring.dtype)
        low, high = np.searchsorted(indices, (start, start + len(dense)))
        dense[indices[low:high] - start] = elements[low:high]
        yield ring.pack(dense)


class _Reader:
    """Reads a body in pieces of any size."""

    def __init__(self, body: Body) -> None:
        self._chunks = body.chunks()
        self._left = memoryview(b"")

    def take(self, nbytes: int) -> memoryview:
        """The next bytes; raises `WireError` when the body ends before."""
        taken = bytearray()
        while len(taken) < nbytes:
            if not self._left:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise WireError("a sparse update ends before its values do")
                self._left = memoryview(chunk)
            part = self._left[: nbytes - len(taken)]
            taken += part
            self._left = self._left[len(part) :]
        return memoryview(taken)

    def pieces(self, elements: int, itemsize: int) -> Iterator[bytes]:
        """The next elements, a block at a time."""
        for start in range(0, elements, BLOCK):
            yield bytes(self.take(min(BLOCK, elements - start) * itemsize))
