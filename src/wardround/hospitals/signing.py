"""A site of a federation signs each of its replies with the key that the coordinator pinned when the site joined."""

from __future__ import annotations

from dataclasses import replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from wardround.errors import Rejected
from wardround.protection.identity import Identity, frame
from wardround.wire.message import Message

_PURPOSE = "wardround/reply"


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
