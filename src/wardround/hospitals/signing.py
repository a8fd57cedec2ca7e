"""A site signs its replies, and its process's name, with the key that the coordinator pinned when the site joined."""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from wardround.errors import Rejected
from wardround.protection.identity import Identity, frame
from wardround.wire.message import Message

_PURPOSE, _INSTANCE = "wardround/reply", "wardround/instance"
_NONCE = 32


def signed(reply: Message, identity: Identity) -> Message:
    """The reply with the site's signature over its header, which names the request and the hash of the body."""
    signature = identity.sign(_PURPOSE, reply.id)
    return Message(replace(reply.header, signature=signature.hex()), reply.body)


def verified(reply: Message, key: bytes) -> Message:
    """The reply without its signature; raises `Rejected` where `key` (32 bytes, public) did not make it.

    The header is covered, not what is absent of a body: a reply has all of its body.
    """
    header = reply.header
    bare = Message(replace(header, signature=""), reply.body)
    try:
        signature = bytes.fromhex(header.signature)
        Ed25519PublicKey.from_public_bytes(key).verify(signature, frame(_PURPOSE, bare.id))
    except (InvalidSignature, ValueError):
        raise Rejected(
            f"a reply that the key of site {header.site} did not sign: another computer answers in its place"
        ) from None
    return bare


def new_instance(site: str, identity: Identity) -> str:
    """A name for a process of a site that only who holds the site's key can make; 118 characters.

    A certificate alone, which came in a kit by mail, is then not enough to hear what a site is sent.
    """
    nonce = secrets.token_hex(_NONCE // 2)
    return nonce + urlsafe_b64encode(identity.sign(_INSTANCE, site, nonce)).decode().rstrip("=")


def is_of(instance: str, site: str, key: bytes) -> bool:
    """Whether the holder of a site's key (32 bytes, public) made the name of a process."""
    nonce, signature = instance[:_NONCE], instance[_NONCE:]
    try:
        made = urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
        Ed25519PublicKey.from_public_bytes(key).verify(made, frame(_INSTANCE, site, nonce))
    except (InvalidSignature, ValueError):
        return False
    return True
