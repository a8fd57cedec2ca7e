"""Private signing keys in files that are made once, and public keys as people read them to each other.

A key's file holds its 32 bytes as 64 hex digits and a newline, and only its owner may read it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from wardround.errors import WardroundError
from wardround.protection.identity import KEY_BYTES, Identity, frame
from wardround.wire.files import reason, sync_folder

_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aiou"
_WORDS = 8


def make_key(path: Path) -> Identity:
    """Make a new key and write it; an existing file is never overwritten.

    Raises `WardroundError` where there is one, or the disk refuses.
    """
    identity = Identity.generate()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise WardroundError(
            f"{path.name} is there already, and a key is never overwritten: move it away first if a new one is meant",
            detail=str(path),
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(identity.private.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return identity


def read_key(path: Path) -> Identity:
    """Read a key; raises `WardroundError` where there is none, or a file of another form."""
    try:
        with path.open("rb") as file:
            data = file.read(2 * KEY_BYTES + 2)
    except OSError as error:
        raise WardroundError(f"{path.name} cannot be read: {reason(error)}", detail=str(path)) from error
    if re.fullmatch(rb"[0-9a-f]{%d}\n?" % (2 * KEY_BYTES), data) is None:
        raise WardroundError(
            f"{path.name} is not a key of {KEY_BYTES} bytes in hex: restore it from a copy", detail=str(path)
        )
    return Identity(bytes.fromhex(data.decode().strip()))


def open_to_others(path: Path) -> bool:
    """Whether users besides a file's owner may read or write it."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def public_key(text: str) -> bytes:
    """A public key as a person typed it: 64 hex digits, with any spaces, colons and hyphens between them.

    Raises `WardroundError` for anything else.

    >>> public_key("00 " * 32) == bytes(32)
    True
    """
    digits = re.sub(r"[\s:-]", "", text).lower()
    if re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", digits) is None:
        raise WardroundError(
            f"a site's key has {2 * KEY_BYTES} digits of 0 to 9 and a to f, not these {len(digits)} characters: copy "
            "the line that `wardround site join` printed at the site"
        )
    return bytes.fromhex(digits)


def fingerprint(key: bytes) -> str:
    """A public key in eight words to read over the telephone: 128 bits of its hash, 16 a word.

    The words are proquints (D. S. Wilkerson, arXiv:0901.4016): a consonant, a vowel, a consonant, a vowel, a consonant.

    >>> fingerprint(bytes(32)).count(" ")
    7
    """
    digest = hashlib.sha256(frame("wardround/fingerprint", key)).digest()
    numbers = (int.from_bytes(digest[2 * n : 2 * n + 2], "big") for n in range(_WORDS))
    return " ".join(_word(number) for number in numbers)


def _word(number: int) -> str:
    return (
        _CONSONANTS[number >> 12]
        + _VOWELS[number >> 10 & 3]
        + _CONSONANTS[number >> 6 & 15]
        + _VOWELS[number >> 4 & 3]
        + _CONSONANTS[number & 15]
    )
