"""The list of a federation's sites and their identity keys, which the federation's offline root signs.

Who can write this list can pose as any site in it; so the coordinator's process holds no key that signs one, and a site
takes a list only after the checks of `take_over`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, ValidationError

from wardround.errors import Rejected, WireError
from wardround.protection.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, Roster, frame
from wardround.study.base import Config
from wardround.study.schema import SiteName
from wardround.wire.canonical import canonical_json, parse_json
from wardround.wire.files import reason, written

_PURPOSE = "wardround/roster"
# Ten thousand sites take 1.2 MB.
_LARGEST = 4 << 20
_MOST_SITES = 10_000


class _Written(Config):
    """A list of sites as its JSON has it."""

    federation: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    serial: Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
    keys: Annotated[
        dict[SiteName, Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]], Field(max_length=_MOST_SITES)
    ]
    signature: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SIGNATURE_BYTES}}}$")]


@dataclass(frozen=True)
class SignedRoster:
    """The sites of a federation with their public keys (Ed25519, 32 bytes each), a serial that only grows, and the
    root's signature (64 bytes).

    An object proves nothing until `verify` has passed. Raises `Rejected` where two sites have one key.
    """

    federation: str
    serial: int
    keys: Mapping[str, bytes]
    signature: bytes

    def __post_init__(self) -> None:
        _refuse_shared(self.keys)

    @staticmethod
    def sign(federation: str, serial: int, keys: Mapping[str, bytes], root: Identity) -> SignedRoster:
        """A list that the root signs; raises `Rejected` where two sites have one key."""
        _refuse_shared(keys)
        signature = root.sign(_PURPOSE, *_fields(federation, serial, keys))
        return SignedRoster(federation, serial, dict(keys), signature)

    def verify(self, root_key: bytes) -> None:
        """Raises `Rejected` where the root, whose public key is given, did not sign exactly this list."""
        signed = frame(_PURPOSE, *_fields(self.federation, self.serial, self.keys))
        try:
            Ed25519PublicKey.from_public_bytes(root_key).verify(self.signature, signed)
        except (InvalidSignature, ValueError):
            raise Rejected(
                "the federation's root did not sign this list of sites: it was changed on its way, or is of another "
                "federation; ask the coordinator"
            ) from None

    @property
    def sites(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self.keys))

    def sha256_of(self, sites: Iterable[str]) -> str:
        """The hash of the names and keys of some sites, those of a study say: it changes when one of their keys does.

        It equals `protection.identity.Roster.sha256` of these sites. Raises `Rejected` for a site that is not listed.
        """
        asked = set(sites)
        if missing := sorted(asked - self.keys.keys()):
            raise Rejected(f"the list of sites does not hold {', '.join(missing)}: the coordinator admits a site first")
        return Roster({site: self.keys[site] for site in sorted(asked)}).sha256

    def to_json(self) -> dict[str, Any]:
        """The list as JSON: `federation`, `serial`, `keys` (site -> hex) and `signature` (hex)."""
        return {
            "federation": self.federation,
            "serial": self.serial,
            "keys": {site: self.keys[site].hex() for site in self.sites},
            "signature": self.signature.hex(),
        }

    @staticmethod
    def from_json(value: Any) -> SignedRoster:
        """The list from its JSON, not verified; raises `WireError` where it is of another form."""
        try:
            found = _Written.model_validate(value)
        except ValidationError:
            raise WireError("a list of sites is not of the form that the root signs") from None
        keys = {site: bytes.fromhex(key) for site, key in found.keys.items()}
        return SignedRoster(found.federation, found.serial, keys, bytes.fromhex(found.signature))

    @staticmethod
    def load(path: Path) -> SignedRoster:
        """Read a list from its file, not verified; raises `WireError` where there is none, or one of another form."""
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
        except OSError as error:
            raise WireError(f"the list of sites cannot be read: {reason(error)}", detail=str(path)) from error
        if len(data) > _LARGEST:
            raise WireError(f"the list of sites is longer than {_LARGEST:,} bytes", detail=str(path))
        return SignedRoster.from_json(parse_json(data))

    def save(self, path: Path) -> None:
        """Write the list; it is on the disk when this returns."""
        with written(path, durable=True) as file:
            file.write(canonical_json(self.to_json()) + b"\n")


def _fields(federation: str, serial: int, keys: Mapping[str, bytes]) -> list[bytes | str | int]:
    """What is signed: every field has its length before it, so no two lists have the same bytes."""
    return [federation, serial, *(field for site in sorted(keys) for field in (site, keys[site]))]


def _refuse_shared(keys: Mapping[str, bytes]) -> None:
    holders: dict[bytes, str] = {}
    for site in sorted(keys):
        if (other := holders.setdefault(keys[site], site)) != site:
            raise Rejected(
                f"the list gives sites {other} and {site} one key: every site makes its own (`wardround site join`)"
            )


def admitted(roster: SignedRoster, site: str, key: bytes, root: Identity, *, replace: bool = False) -> SignedRoster:
    """The next list, with a site's key in it; the same list where the key is in it already.

    Raises `Rejected` where the site has another key and `replace` is not set, and where another site has this key.
    """
    known = roster.keys.get(site)
    if known == key:
        return roster
    if known is not None and not replace:
        raise Rejected(
            f"site {site} is in the list with another key. A new key means another computer, or a lost one: ask the "
            "site, by telephone, whether it made a new key, and then give --replace"
        )
    return SignedRoster.sign(roster.federation, roster.serial + 1, {**roster.keys, site: key}, root)


def take_over(
    new: SignedRoster, known: SignedRoster | None, *, federation: str, root_key: bytes, site: str, key: bytes
) -> None:
    """Look whether a site may take a list over; `known` is the last one that it took.

    Raises `Rejected`, with the reason: another federation's; not signed by the root; older than the known one, or
    another of the same serial; the site is not in it, or with a key that is not its own `key`.
    """
    if new.federation != federation:
        raise Rejected(f"the list of sites is of federation {_shown(new.federation)}; this site joined {federation}")
    new.verify(root_key)
    if known is not None and new.serial < known.serial:
        raise Rejected(
            f"the list of sites is an older one (serial {new.serial}; this site has {known.serial}): the coordinator "
            "was set back to an old state; ask for the newest list"
        )
    if known is not None and new.serial == known.serial and new.keys != known.keys:
        raise Rejected(
            f"the root signed two different lists with serial {new.serial}: a copy of the root's key was used; ask the "
            "coordinator before anything goes on"
        )
    if site not in new.keys:
        raise Rejected(f"the list of sites does not hold {site}: the coordinator has yet to admit its key")
    if new.keys[site] != key:
        raise Rejected(f"the list of sites gives {site} another key than its own: another computer poses as this site")


def _shown(name: str) -> str:
    return name if re.fullmatch(r"[a-z0-9-]{1,40}", name) else "of another name"
