"""Encryption of what a site keeps: AES-256-GCM with a key of the site's own.

Files are sealed in chunks of 1 MiB, each under the nonce `7 random bytes || counter (4) || last (1)`: no chunk can be
changed, moved, left out or cut off (STREAM: Hoang, Reyhanitabar, Rogaway, Vizar, CRYPTO 2015).
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wardround.errors import JournalError

KEY_BYTES = 32
CHUNK = 1 << 20
_NONCE, _PREFIX, _TAG = 12, 7, 16


class StoreCipher:
    """Seals and opens with keys derived from one of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self._text, self._file = (
            AESGCM(HKDF(SHA256(), KEY_BYTES, None, b"wardround store " + use).derive(key)) for use in (b"text", b"file")
        )

    @staticmethod
    def of(key: bytes | None) -> StoreCipher | None:
        """The store's cipher of a key; nothing without one."""
        return None if key is None else StoreCipher(key)

    def __repr__(self) -> str:
        return "store's cipher(...)"

    def seal(self, text: str, name: str) -> str:
        """A value that only opens under the same name."""
        nonce = secrets.token_bytes(_NONCE)
        return base64.b64encode(nonce + self._text.encrypt(nonce, text.encode(), name.encode())).decode()

    def open(self, sealed: str, name: str) -> str:
        """The value; raises `JournalError` when it was sealed with another key, or changed."""
        try:
            raw = base64.b64decode(sealed, validate=True)
            return self._text.decrypt(raw[:_NONCE], raw[_NONCE:], name.encode()).decode()
        except (ValueError, InvalidTag):
            raise wrong_key() from None

    def writer(self, file: BinaryIO) -> SealingFile:
        """A file that seals what is written to it."""
        return SealingFile(file, self._file)

    def read(self, path: Path) -> bytearray:
        """The plain bytes of a sealed file, in memory; raises `JournalError` as `open` does."""
        plain = bytearray()
        with path.open("rb") as file:
            prefix, counter = file.read(_PREFIX), 0
            chunk = file.read(CHUNK + _TAG)
            while True:
                following = file.read(CHUNK + _TAG)
                try:
                    plain += self._file.decrypt(_nonce(prefix, counter, last=not following), chunk, None)
                except (ValueError, InvalidTag):
                    raise wrong_key() from None
                if not following:
                    return plain
                chunk, counter = following, counter + 1


class SealingFile:
    """Writes sealed chunks; `close` writes the last one. `sha256` and `nbytes` are of what lies in the file."""

    def __init__(self, file: BinaryIO, key: AESGCM) -> None:
        self._file = file
        self._key = key
        self._prefix = secrets.token_bytes(_PREFIX)
        self._counter = 0
        self._waiting = bytearray()
        self._hash = hashlib.sha256()
        self._put(self._prefix)

    def write(self, data: bytes | memoryview) -> int:
        """Take plain bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            self._waiting += view[start : start + CHUNK]
            while len(self._waiting) > CHUNK:
                self._seal(CHUNK, last=False)
        return len(view)

    def close(self) -> str:
        """Write what is left; the SHA-256 of the file's bytes."""
        self._seal(len(self._waiting), last=True)
        return self._hash.hexdigest()

    def _seal(self, nbytes: int, *, last: bool) -> None:
        nonce = _nonce(self._prefix, self._counter, last=last)
        self._put(self._key.encrypt(nonce, bytes(self._waiting[:nbytes]), None))
        del self._waiting[:nbytes]
        self._counter += 1

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)


def sealed_nbytes(nbytes: int) -> int:
    """Length of the sealed file of so many plain bytes."""
    return _PREFIX + nbytes + _TAG * max(1, -(-nbytes // CHUNK))


def wrong_key() -> JournalError:
    """What to tell a person when something does not open."""
    return JournalError(
        "a site's store does not open: its encryption key (sites.SITE.encryption_key) is not the one the run began "
        "with, or the store was changed"
    )


def _nonce(prefix: bytes, counter: int, *, last: bool) -> bytes:
    return prefix + counter.to_bytes(4, "big") + bytes([last])
