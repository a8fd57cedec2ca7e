"""What a site says is signed: with another key, for another request or with another body it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wardround.errors import Rejected, WireError
from wardround.hospitals.signing import signed, verified
from wardround.protection.identity import Identity
from wardround.wire.message import Header, HeldBody, Message

REQUEST = Message(Header("train", "study", "A", 3))
REPLY = REQUEST.reply("update", meta={"n": 1})
KEY = Identity.generate()


def test_what_a_site_signed_is_verified_and_arrives_as_it_was() -> None:
    sent = signed(REPLY, KEY)
    arrived = Message(Header.from_bytes(sent.header.to_bytes()))
    assert arrived.header.signature
    assert verified(arrived, KEY.public) == REPLY
    assert arrived.id == REPLY.id


def test_a_body_travels_under_the_signature_of_its_hash() -> None:
    body = HeldBody(b"abc")
    reply = Message(replace(REPLY.header, body_nbytes=3, body_sha256=body.sha256), body)
    assert verified(signed(reply, KEY), KEY.public).body is body
    swapped = replace(signed(reply, KEY).header, body_sha256="0" * 64)
    with pytest.raises(Rejected):
        verified(Message(swapped, body), KEY.public)


@pytest.mark.parametrize(
    "change",
    [{"site": "B"}, {"round": 4}, {"reply_to": "0" * 64}, {"meta": {"n": 2}}, {"signature": "zz"}, {"signature": ""}],
)
def test_what_was_changed_afterwards_is_refused(change: dict[str, object]) -> None:
    sent = signed(REPLY, KEY)
    with pytest.raises(Rejected, match="another computer answers"):
        verified(Message(replace(sent.header, **change)), KEY.public)  # type: ignore[arg-type]


def test_another_key_is_refused() -> None:
    with pytest.raises(Rejected):
        verified(signed(REPLY, Identity.generate()), KEY.public)


def test_a_signature_of_another_form_is_no_header() -> None:
    sent = replace(REPLY.header, signature="0" * 200)
    with pytest.raises(WireError):
        Header.from_bytes(sent.to_bytes())
