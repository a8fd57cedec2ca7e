"""A site's secret randomness: a root from the operating system, and key streams of ChaCha20 for every purpose.

Privacy noise and private sampling must come from here and never from `wardround.wire.random`, which everybody knows.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy.special import ndtri

from wardround.wire.canonical import canonical_json

_ROOT = "privacy/root"
_CHUNK = 1 << 18


class Keeper(Protocol):
    """Where a site keeps its word: the first value that was written under a name and number stands."""

    def write_once(self, name: str, number: int, value: str) -> str:
        """Write a value durably, unless there is one; the value that stands."""
        ...


class SecretRoot:
    """32 bytes from the operating system that never leave the site's store."""

    def __init__(self, root: bytes) -> None:
        self._root = root

    @classmethod
    def of(cls, keeper: Keeper) -> SecretRoot:
        """The root in a site's store, drawn when it is first asked for."""
        return cls(bytes.fromhex(keeper.write_once(_ROOT, 0, secrets.token_hex(32))))

    def key(self, *purpose: Any) -> bytes:
        """32 bytes that depend on the root and on everything named (HMAC-SHA256)."""
        return hmac.digest(self._root, canonical_json(list(purpose)), "sha256")


class SecretStream:
    """The key stream of ChaCha20 (RFC 8439) under one key, read as random numbers."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Uniform 64-bit integers: (count,)."""
        drawn = np.zeros(count, dtype="<u8")
        # In place: a stream cipher reads each byte before it writes it.
        self._cipher.update_into(drawn.data.cast("B"), drawn.data.cast("B"))
        return drawn

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        """Standard normal numbers in double precision: (count,).

        Each is half the sum of four, which denies an observer the pattern in a double's last bits that one alone would
        show (Mironov, CCS 2012; Holohan & Braghin, ESORICS 2021).
        """
        return np.concatenate([np.zeros(0), *self._normals(count)])

    def generator(self) -> np.random.Generator:
        """A numpy generator seeded from here, for draws on which no guarantee rests: slices, augmentation."""
        return np.random.Generator(np.random.SFC64([int(word) for word in self.words(4)]))

    def _normals(self, count: int) -> Iterator[npt.NDArray[np.float64]]:
        for start in range(0, count, _CHUNK):
            length = min(_CHUNK, count - start)
            # Half a step above a multiple of 2^-53: neither 0 nor 1 can occur, whose quantiles are infinite.
            uniform = ((self.words(4 * length) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
            yield 0.5 * ndtri(uniform).reshape(4, length).sum(axis=0)


def coin(key: bytes, rate: float) -> bool:
    """Whether a key draws what has probability `rate`, rounded down to a multiple of 2^-64."""
    return rate >= 1.0 or int.from_bytes(key[:8], "little") < int(rate * 2.0**64)
