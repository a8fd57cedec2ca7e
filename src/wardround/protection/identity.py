"""Who a site is: a long-term Ed25519 key, and the study's list of them.

Whatever is signed or hashed here is a list of fields with their lengths before them, the first of which names the
purpose: no signature can be read as another statement.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wardround.errors import WireError
from wardround.wire.canonical import digest

Entropy = Callable[[int], bytes]
KEY_BYTES = 32
SIGNATURE_BYTES = 64


def frame(*fields: bytes | str | int) -> bytes:
    """The fields one after the other, each behind its length (4 bytes, little-endian); integers as 8 bytes."""
    octets = (
        f.to_bytes(8, "little") if isinstance(f, int) else f.encode() if isinstance(f, str) else f for f in fields
    )
    return b"".join(len(field).to_bytes(4, "little") + field for field in octets)


def frame_sha256(*fields: bytes | str | int) -> bytes:
    """SHA-256 of the framed fields."""
    return hashlib.sha256(frame(*fields)).digest()


@dataclass(frozen=True)
class Identity:
    """A site's private signing key; it is made at the site and never leaves it."""

    private: bytes

    @staticmethod
    def generate(entropy: Entropy = secrets.token_bytes) -> Identity:
        """A new key from the operating system's randomness."""
        return Identity(entropy(KEY_BYTES))

    def __repr__(self) -> str:
        return "Identity(private=...)"

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.private)

    @cached_property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, purpose: str, *fields: bytes | str | int) -> bytes:
        """Sign fields for one purpose: 64 bytes."""
        return self._key.sign(frame(purpose, *fields))


@dataclass(frozen=True)
class Roster:
    """The public keys of a study's sites by name: the only sites whose statements count."""

    keys: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if len(set(self.keys.values())) != len(self.keys):
            raise WireError("the roster gives two sites one key; every site needs its own")

    @property
    def sites(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self.keys))

    @cached_property
    def sha256(self) -> str:
        """Identity of the roster."""
        return digest(self.to_json())

    def verify(self, site: str, signature: bytes, purpose: str, *fields: bytes | str | int) -> bool:
        """Whether `site` is on the roster and signed exactly these fields for this purpose."""
        if site not in self.keys:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.keys[site]).verify(signature, frame(purpose, *fields))
        except InvalidSignature:
            return False
        return True

    def to_json(self) -> dict[str, Any]:
        """Site -> public key in hex."""
        return {site: key.hex() for site, key in self.keys.items()}

    @staticmethod
    def from_json(value: Any) -> Roster:
        """The roster from its JSON; raises `WireError`."""
        try:
            keys = {str(site): bytes.fromhex(key) for site, key in value.items()}
        except (AttributeError, TypeError, ValueError):
            raise WireError("a roster must be site names with public keys in hex") from None
        if any(len(key) != KEY_BYTES for key in keys.values()):
            raise WireError(f"a public key of the roster does not have {KEY_BYTES} bytes")
        return Roster(keys)
