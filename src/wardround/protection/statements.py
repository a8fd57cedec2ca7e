"""What the parties of a secure sum say to each other: frozen dataclasses <-> JSON values.

Every `from_json` reads what came from outside: anything but the exact form raises `WireError`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from wardround.errors import WireError
from wardround.protection.identity import KEY_BYTES, SIGNATURE_BYTES, frame_sha256
from wardround.protection.shamir import SHARE_BYTES, share_value

COMMITMENT_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + 16


@dataclass(frozen=True)
class Attempt:
    """What one attempt is about; sites that were told different things sign and derive different things.

    `request` is the hash of what is asked, `model` of the global state, `layout` of the update's form; `attempt` is
    never used twice.
    """

    study: str
    round: int
    attempt: int
    request: str
    model: str
    layout: str
    roster: str
    threshold: int

    @cached_property
    def sha256(self) -> bytes:
        """The context in 32 bytes."""
        return frame_sha256("wardround/sa1/context", *(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Advert:
    """A site's fresh keys for one attempt: for masks, for shares, and the commitment to its own mask's seed."""

    site: str
    mask_key: bytes
    share_key: bytes
    commitment: bytes
    signature: bytes

    @property
    def signed(self) -> tuple[bytes | str, ...]:
        """What the signature is over, behind the context."""
        return (self.site, self.mask_key, self.share_key, self.commitment)

    def to_json(self) -> dict[str, Any]:
        """Name and 160 bytes."""
        return {
            "site": self.site,
            "keys": text_of(self.mask_key + self.share_key + self.commitment + self.signature),
        }

    @staticmethod
    def from_json(value: Any) -> Advert:
        """Parse."""
        site, keys = _parts(value, "site", "keys")
        octets = _octets(keys, 2 * KEY_BYTES + COMMITMENT_BYTES + SIGNATURE_BYTES)
        return Advert(_name(site), octets[:32], octets[32:64], octets[64:96], octets[96:])


@dataclass(frozen=True)
class Roll:
    """The coordinator relays all adverts: the sites that began (U1)."""

    adverts: tuple[Advert, ...]

    def to_json(self) -> dict[str, Any]:
        """A list."""
        return {"adverts": [advert.to_json() for advert in self.adverts]}

    @staticmethod
    def from_json(value: Any) -> Roll:
        """Parse."""
        (adverts,) = _parts(value, "adverts")
        return Roll(tuple(Advert.from_json(a) for a in _list(adverts)))


@dataclass(frozen=True)
class Shares:
    """A site's sealed pairs of shares, by the peer that alone can open them."""

    site: str
    sealed: Mapping[str, bytes]

    def to_json(self) -> dict[str, Any]:
        """Site and peers."""
        return {"site": self.site, "sealed": {peer: text_of(box) for peer, box in self.sealed.items()}}

    @staticmethod
    def from_json(value: Any) -> Shares:
        """Parse."""
        site, sealed = _parts(value, "site", "sealed")
        return Shares(_name(site), _boxes(sealed))


@dataclass(frozen=True)
class Deal:
    """The sites that dealt their shares (U2), and the sealed pairs for one of them, by dealer."""

    dealers: tuple[str, ...]
    sealed: Mapping[str, bytes]

    def to_json(self) -> dict[str, Any]:
        """Names and boxes."""
        return {"dealers": list(self.dealers), "sealed": {dealer: text_of(box) for dealer, box in self.sealed.items()}}

    @staticmethod
    def from_json(value: Any) -> Deal:
        """Parse."""
        dealers, sealed = _parts(value, "dealers", "sealed")
        return Deal(_names(dealers), _boxes(sealed))


@dataclass(frozen=True)
class Announcement:
    """The survivor list: whose masked updates came whole (U3), and who was lost after dealing (U2 without U3)."""

    survivors: tuple[str, ...]
    lost: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Two lists."""
        return {"survivors": list(self.survivors), "lost": list(self.lost)}

    @staticmethod
    def from_json(value: Any) -> Announcement:
        """Parse."""
        survivors, lost = _parts(value, "survivors", "lost")
        return Announcement(_names(survivors), _names(lost))


@dataclass(frozen=True)
class Consent:
    """A survivor's signature on the survivor list."""

    site: str
    signature: bytes

    def to_json(self) -> dict[str, Any]:
        """Name and 64 bytes."""
        return {"site": self.site, "signature": text_of(self.signature)}

    @staticmethod
    def from_json(value: Any) -> Consent:
        """Parse."""
        site, signature = _parts(value, "site", "signature")
        return Consent(_name(site), _octets(signature, SIGNATURE_BYTES))


@dataclass(frozen=True)
class Quorum:
    """The signatures that let sites reveal."""

    consents: tuple[Consent, ...]

    def to_json(self) -> dict[str, Any]:
        """A list."""
        return {"consents": [consent.to_json() for consent in self.consents]}

    @staticmethod
    def from_json(value: Any) -> Quorum:
        """Parse."""
        (consents,) = _parts(value, "consents")
        return Quorum(tuple(Consent.from_json(c) for c in _list(consents)))


@dataclass(frozen=True)
class Reveal:
    """A site's shares of the survivors' seeds and of the lost sites' mask keys, each in the order of sorted names."""

    site: str
    seeds: tuple[int, ...]
    keys: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Name and 66 bytes a share."""
        return {"site": self.site, "seeds": _pack(self.seeds), "keys": _pack(self.keys)}

    @staticmethod
    def from_json(value: Any) -> Reveal:
        """Parse."""
        site, seeds, keys = _parts(value, "site", "seeds", "keys")
        return Reveal(_name(site), _unpack(seeds), _unpack(keys))


def text_of(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def _pack(shares: tuple[int, ...]) -> str:
    return text_of(b"".join(share.to_bytes(SHARE_BYTES, "big") for share in shares))


def _unpack(value: Any) -> tuple[int, ...]:
    octets = _octets(value, None)
    shares = [share_value(octets[at : at + SHARE_BYTES]) for at in range(0, len(octets), SHARE_BYTES)]
    if any(share is None for share in shares):
        raise WireError("a share is not an element of the field")
    return tuple(share for share in shares if share is not None)


def _parts(value: Any, *names: str) -> tuple[Any, ...]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise WireError(f"a statement of the secure sum must have exactly the keys {', '.join(names)}")
    return tuple(value[name] for name in names)


def _octets(value: Any, size: int | None) -> bytes:
    try:
        octets = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except ValueError:
        octets = None
    if octets is None or (size is not None and len(octets) != size):
        raise WireError("a statement of the secure sum holds bytes of a wrong length or form")
    return octets


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise WireError("a statement of the secure sum holds something else where a list should be")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise WireError("a statement of the secure sum holds something else where a site's name should be")
    return value


def _names(value: Any) -> tuple[str, ...]:
    names = tuple(_name(name) for name in _list(value))
    if len(set(names)) != len(names):
        raise WireError("a list of the secure sum names a site twice")
    return names


def _boxes(value: Any) -> dict[str, bytes]:
    if not isinstance(value, dict):
        raise WireError("a statement of the secure sum holds something else where sealed shares should be")
    return {name: _octets(box, SEALED_BYTES) for name, box in value.items()}
