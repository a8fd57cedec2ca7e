"""A seeded random rotation of a tensor: it spreads every value over all of them, so that few bits serve all alike.

Random signs, then a Walsh-Hadamard transform (Suresh et al., *Distributed mean estimation with limited
communication*, ICML 2017). A tensor whose size is no power of two is not padded: the transform goes over the largest
block that fits at its start, then over the one at its end. The two overlap, so that no value stays in a small block
of its own, and their product is orthonormal as each of them is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def hadamard(values: Floats) -> Floats:
    """The orthonormal Walsh-Hadamard transform of 2^m values, (n,) -> (n,); it is its own inverse."""
    size = len(values)
    now, following = values.astype(np.float64), np.empty(size)
    # Each pass takes the lowest bit of the index to the top: reads and writes stay long, whatever the pass.
    for _ in range(size.bit_length() - 1):
        even, odd = now[0::2], now[1::2]
        np.add(even, odd, out=following[: size // 2])
        np.subtract(even, odd, out=following[size // 2 :])
        now, following = following, now
    now *= size**-0.5
    return now


def rotate(values: Array, random: np.random.Generator) -> Floats:
    """The rotated values, flattened: (n,). `random` is the round's and the tensor's own, the same at every site."""
    flat = np.array(values, dtype=np.float64).reshape(-1)
    for block, signs in _blocks(flat.size, random):
        flat[block] = hadamard(flat[block] * signs)
    return flat


def unrotate(values: Array, random: np.random.Generator) -> Floats:
    """What `rotate` was given, from its result and a generator in the same state: (n,)."""
    flat = np.array(values, dtype=np.float64).reshape(-1)
    for block, signs in reversed(list(_blocks(flat.size, random))):
        flat[block] = hadamard(flat[block]) * signs
    return flat


def _blocks(size: int, random: np.random.Generator) -> Iterator[tuple[slice, Floats]]:
    if not size:
        return
    length = 1 << (size.bit_length() - 1)
    for start in sorted({0, size - length}):
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-length // 8)), dtype=np.uint8))[:length]
        yield slice(start, start + length), 1.0 - 2.0 * bits.astype(np.float64)
