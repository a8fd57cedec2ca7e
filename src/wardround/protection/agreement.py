"""What sites and coordinator of a secure sum derive alike: hashes of what was agreed, pairwise keys, implied shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wardround.errors import Rejected
from wardround.protection.identity import frame, frame_sha256
from wardround.protection.masking import MASK_KEY_BYTES, KeyedMask
from wardround.protection.shamir import PRIME, SHARE_BYTES, share_bytes, share_value
from wardround.protection.statements import Advert, Announcement, Attempt

COORDINATOR = "coordinator"
ADVERT = "wardround/sa1/advert"
CONSENT = "wardround/sa1/consent"
# 128 bits more than the prime has, so that reducing modulo it leaves no bias to see.
_WIDE = SHARE_BYTES + 16
# Every key seals one message, so the nonce need not vary.
_NONCE = bytes(12)


class Misbehaviour(Rejected):
    """A party broke the protocol; `party` is a site's name or `coordinator`."""

    def __init__(self, party: str, what: str) -> None:
        who = party if party == COORDINATOR else f"site {party}"
        super().__init__(f"secure sum: {who} {what}; this attempt is given up")
        self.party = party


def private_key(octets: bytes) -> X25519PrivateKey:
    """The X25519 key of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(octets)


def public_key(octets: bytes) -> bytes:
    """The public key of 32 secret bytes."""
    return private_key(octets).public_key().public_bytes_raw()


def shared_secret(private: bytes, public: bytes, party: str) -> bytes:
    """X25519 of one's own private and `party`'s public key; raises `Misbehaviour` for a key of low order."""
    try:
        return private_key(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Misbehaviour(party, "advertised a key that no honest site can have") from None


def commitment(context: Attempt, site: str, seed: bytes) -> bytes:
    """What an advert says of the seed of a site's own mask."""
    return frame_sha256("wardround/sa1/seed", context.sha256, site, seed)


def roll_sha256(context: Attempt, adverts: Iterable[Advert]) -> bytes:
    """What the sites that began agree on: the context and all adverts."""
    fields = [frame(*advert.signed) for advert in sorted(adverts, key=lambda a: a.site)]
    return frame_sha256("wardround/sa1/roll", context.sha256, *fields)


def dealers_sha256(roll: bytes, dealers: Iterable[str]) -> bytes:
    """What the sites that dealt shares agree on."""
    return frame_sha256("wardround/sa1/dealers", roll, *sorted(dealers))


def consent_fields(dealers: bytes, announcement: Announcement) -> tuple[bytes, ...]:
    """What a survivor signs."""
    survivors, lost = sorted(announcement.survivors), sorted(announcement.lost)
    return (dealers, frame(*survivors), frame(*lost))


def partition_fault(announcement: Announcement, dealers: frozenset[str], threshold: int) -> str | None:
    """Why a survivor list cannot be signed, if so."""
    survivors, lost = set(announcement.survivors), set(announcement.lost)
    if survivors & lost:
        return "announced a site both as a survivor and as lost"
    if survivors | lost != dealers:
        return "announced a survivor list that is not made of the sites that dealt shares"
    if len(survivors) < threshold:
        return f"announced {len(survivors)} survivors where the study's threshold is {threshold}"
    return None


def pair_mask(secret: bytes, dealers: bytes, mine: str, theirs: str) -> KeyedMask:
    """The mask that `mine` applies for the pair; the other site applies its opposite."""
    first, second = sorted((mine, theirs))
    key = _derive(secret, MASK_KEY_BYTES, "wardround/sa1/mask", dealers, first, second)
    return KeyedMask(key, negative=mine > theirs)


def implied_peers(order: Sequence[str], dealer: str, threshold: int) -> tuple[str, ...]:
    """The t - 1 peers after the dealer, in a circle: their shares are derived from pair keys and never sent."""
    at = order.index(dealer)
    return tuple(order[(at + step) % len(order)] for step in range(1, threshold))


def implied_pair(secret: bytes, roll: bytes, dealer: str, peer: str) -> tuple[int, int]:
    """The shares (of the seed, of the mask key) that dealer and peer both derive."""
    octets = _derive(secret, 2 * _WIDE, "wardround/sa1/share", roll, dealer, peer)
    return int.from_bytes(octets[:_WIDE], "big") % PRIME, int.from_bytes(octets[_WIDE:], "big") % PRIME


def seal(secret: bytes, roll: bytes, dealer: str, peer: str, pair: tuple[int, int]) -> bytes:
    """The pair of shares under ChaCha20-Poly1305, for one peer."""
    key = _derive(secret, 32, "wardround/sa1/seal", roll, dealer, peer)
    plain = share_bytes(pair[0]) + share_bytes(pair[1])
    return ChaCha20Poly1305(key).encrypt(_NONCE, plain, frame(dealer, peer, roll))


def unseal(secret: bytes, roll: bytes, dealer: str, peer: str, box: bytes) -> tuple[int, int]:
    """The pair of shares; raises `Misbehaviour` naming the dealer."""
    key = _derive(secret, 32, "wardround/sa1/seal", roll, dealer, peer)
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, box, frame(dealer, peer, roll))
    except InvalidTag:
        raise Misbehaviour(dealer, "sent shares that do not open, or they were changed on the way") from None
    seed, mask_key = share_value(plain[:SHARE_BYTES]), share_value(plain[SHARE_BYTES:])
    if seed is None or mask_key is None:
        raise Misbehaviour(dealer, "dealt a share that is not an element of the field")
    return seed, mask_key


def _derive(secret: bytes, length: int, *fields: bytes | str) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=frame(*fields)).derive(secret)
