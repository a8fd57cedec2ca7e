"""Masks: pseudorandom ring elements, streamed over an update and never held whole.

A mask is the keystream of AES-128-CTR under a key that is used once, read as unsigned integers of the ring's type in
memory (2 bytes for 16 bits, else 4), segment after segment. All masks go onto a block while it is in the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from wardround.errors import WireError
from wardround.wire.ring import ExactSum, Ring

Array = npt.NDArray[Any]

MASK_KEY_BYTES = 16
# Elements masked at once: the block, the keystream and the zeros it is made from fit a core's own cache.
BLOCK = 3 << 14
_ITEM = 4
_ZEROS = bytes(BLOCK * _ITEM)


@dataclass(frozen=True)
class KeyedMask:
    """A keystream that is added, or taken away when `negative`."""

    key: bytes
    negative: bool = False

    def __repr__(self) -> str:
        return f"Mask(negative={self.negative})"

    @property
    def opposite(self) -> KeyedMask:
        """What cancels it."""
        return KeyedMask(self.key, not self.negative)


class MaskStream:
    """Adds masks to the elements of an update, in order, once; `segments` are those of the update's layout."""

    def __init__(self, masks: Sequence[KeyedMask], segments: tuple[tuple[int, Ring], ...]) -> None:
        self._streams = [(_keystream(mask.key), np.subtract if mask.negative else np.add) for mask in masks]
        self._segments = segments
        # update_into asks for a block less one byte of room behind what it writes.
        self._buffer = bytearray(BLOCK * _ITEM + 15)
        self._zeros = memoryview(_ZEROS)

    def masked(self, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """The masked bytes of an update; a chunk is valid until the next one is asked for.

        Raises `WireError` when the chunks are not an update of the layout.
        """
        pending = deque((size, ring) for size, ring in self._segments if size)
        left, ring = 0, Ring(32)
        for chunk in chunks:
            view = memoryview(chunk)
            while len(view):
                if not left:
                    if not pending:
                        raise WireError("an update is longer than its layout says")
                    left, ring = pending.popleft()
                take = min(len(view), left, BLOCK * ring.itemsize)
                elements = np.array(ring.unpack(view[:take]))
                self._add(elements)
                yield ring.pack(elements)
                view, left = view[take:], left - take
        if left or pending:
            raise WireError("an update is shorter than its layout says")

    def add_to(self, total: ExactSum) -> None:
        """Add the masks to a sum in place."""
        for index in range(len(self._segments)):
            elements = total.segment(index)
            for start in range(0, len(elements), BLOCK):
                self._add(elements[start : start + BLOCK])

    def _add(self, elements: Array) -> None:
        nbytes = elements.nbytes
        zeros, stream = self._zeros[:nbytes], np.frombuffer(self._buffer, elements.dtype, len(elements))
        for cipher, apply in self._streams:
            cipher.update_into(zeros, self._buffer)
            apply(elements, stream, out=elements)


def _keystream(key: bytes) -> CipherContext:
    if len(key) != MASK_KEY_BYTES:
        raise WireError(f"a mask key has {MASK_KEY_BYTES} bytes, not {len(key)}")
    return Cipher(AES(key), CTR(bytes(16))).encryptor()
