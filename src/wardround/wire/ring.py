"""Fixed point in the ring Z_2^bits, and the exact sum.

A value y with |y| <= scale becomes the integer floor(y * (2^(b-1) - 1) / scale + u), u uniform in [0, 1), which is
right on average. With b = ring_bits - ceil(log2(max_sites)) the signed sum of up to max_sites such integers fits
the ring, so a sum never wraps by accident and is the same in any order, grouping and after any restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError, WireError

Array = npt.NDArray[Any]

# Values quantised at once: small enough for the cache, large enough that numpy's overhead does not count.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits; `bits` is 16, 24 or 32."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (16, 24, 32):
            raise StudyError(f"ring_bits={self.bits}: choose 16, 24 or 32")

    @property
    def itemsize(self) -> int:
        """Bytes of one element on the wire."""
        return self.bits // 8

    @property
    def dtype(self) -> np.dtype[Any]:
        """The unsigned integer that holds an element in memory (24 bits live in 32)."""
        return np.dtype("<u2") if self.bits == 16 else np.dtype("<u4")

    def pack(self, elements: Array) -> bytes | memoryview:
        """Little-endian bytes of unsigned elements."""
        if self.bits != 24:
            return np.ascontiguousarray(elements, dtype=self.dtype).data.cast("B")
        octets = np.ascontiguousarray(elements, dtype="<u4").view(np.uint8).reshape(-1, 4)
        return octets[:, :3].tobytes()

    def unpack(self, data: bytes | memoryview) -> Array:
        """Unsigned elements from their bytes; raises `WireError` on a ragged length."""
        if len(data) % self.itemsize:
            raise WireError(f"{len(data)} bytes are not a whole number of {self.bits}-bit elements")
        if self.bits != 24:
            return np.frombuffer(data, dtype=self.dtype)
        octets = np.zeros((len(data) // 3, 4), dtype=np.uint8)
        octets[:, :3] = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
        return octets.view("<u4").reshape(-1)

    def signed(self, elements: Array) -> npt.NDArray[np.int64]:
        """The representative of each element in [-2^(bits-1), 2^(bits-1))."""
        if self.bits != 24:
            return elements.view(np.dtype(f"<i{self.itemsize}")).astype(np.int64)
        shift = 64 - self.bits
        return (elements.astype(np.int64) << shift) >> shift

    def extremes(self, elements: Array) -> tuple[int, int]:
        """The smallest and the largest of at least one signed element."""
        narrow = {16: "<i2", 32: "<i4"}.get(self.bits)
        signed = self.signed(elements) if narrow is None else elements.view(narrow)
        return int(signed.min()), int(signed.max())


def value_bits(ring_bits: int, max_sites: int) -> int:
    """Bits left for one site's value when `max_sites` of them must add up without wrapping.

    Raises `StudyError` when fewer than 4 bits remain.
    """
    bits = ring_bits - math.ceil(math.log2(max_sites)) if max_sites > 1 else ring_bits
    if bits < 4:
        raise StudyError(
            f"protection.ring_bits={ring_bits} leaves {bits} bits a value for max_sites={max_sites}; "
            "use a larger ring or fewer sites"
        )
    return bits


def levels(bits: int) -> int:
    """The integer that stands for `scale` itself."""
    return (1 << (bits - 1)) - 1


class Uniform(Protocol):
    """Where the draws of a rounding come from: a numpy generator, or a site's own (`protection.rounding`)."""

    def random(self, size: int, dtype: Any) -> Array:
        """Uniform numbers in [0, 1): (size,)."""
        ...


def quantise(values: Array, scale: float, bits: int, ring: Ring, random: Uniform) -> tuple[Array, int]:
    """Fixed-point elements of `values`, flattened, and how many of them were saturated at `scale`.

    Rounding is stochastic and unbiased; the randomness used depends on the number of values only.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    out = np.empty(flat.size, dtype=ring.dtype)
    top = float(levels(bits))
    factor = top / scale
    saturated = 0
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK] * np.float64(factor)
        noise = random.random(block.size, np.float32)
        outside = int(np.count_nonzero(np.abs(block) > top))
        if outside:
            saturated += outside
            np.clip(block, -top, top, out=block)
        block += noise
        np.floor(block, out=block)
        # Adding u < 1 to a value at the top may reach top + 1, which the sign bit of a full sum has no room for.
        np.minimum(block, top, out=block)
        out[start : start + BLOCK] = block.astype(np.int64).astype(ring.dtype)
    return out, saturated


def whole_elements(values: Array, ring: Ring) -> Array:
    """Elements of signed integers, flattened, modulo the ring: sums of them are the integers' sums, modulo the ring."""
    return (values.reshape(-1).astype(np.int64) & ((1 << ring.bits) - 1)).astype(ring.dtype)


def dequantise(elements: Array, scale: float, bits: int, ring: Ring) -> npt.NDArray[np.float64]:
    """The real value of summed fixed-point elements."""
    # The same doubles as by way of 64-bit integers, without an array of these: large models have large tensors.
    signed = ring.signed(elements) if ring.bits == 24 else elements.view(np.dtype(f"<i{ring.itemsize}"))
    real: npt.NDArray[np.float64] = signed.astype(np.float64)
    real *= np.float64(scale / levels(bits))
    return real


class ExactSum:
    """A running sum of byte chunks as ring elements; its memory is one update, however many sites add to it.

    `segments` lists (bytes, ring) in the order they lie in the body.
    """

    def __init__(self, segments: tuple[tuple[int, Ring], ...]) -> None:
        self._segments = segments
        self._arrays = [np.zeros(size // ring.itemsize, dtype=ring.dtype) for size, ring in segments]
        self.nbytes = sum(size for size, _ in segments)

    def add(self, chunk: bytes | memoryview, offset: int) -> None:
        """Add the bytes of an update that lie at `offset`; any chunking on element borders gives the same sum.

        Raises `WireError` when the chunk leaves the update or cuts an element.
        """
        if offset < 0 or offset + len(chunk) > self.nbytes:
            raise WireError(f"a chunk of {len(chunk)} bytes at {offset} lies outside an update of {self.nbytes} bytes")
        view = memoryview(chunk)
        start = 0
        for (size, ring), array in zip(self._segments, self._arrays, strict=True):
            end = start + size
            low, high = max(offset, start), min(offset + len(view), end)
            if low < high:
                if (low - start) % ring.itemsize or (high - start) % ring.itemsize:
                    raise WireError(f"a chunk at {offset} cuts an element in two")
                where = slice((low - start) // ring.itemsize, (high - start) // ring.itemsize)
                array[where] += ring.unpack(view[low - offset : high - offset])
            start = end

    def segment(self, index: int) -> Array:
        """The unsigned elements of one segment."""
        return self._arrays[index]

    def to_bytes(self) -> bytes:
        """The sum in the form of an update's body, reduced modulo the ring (tests and small sums)."""
        return b"".join(bytes(ring.pack(a)) for (_, ring), a in zip(self._segments, self._arrays, strict=True))
