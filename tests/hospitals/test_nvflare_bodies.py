"""Bodies over NVFlare arrive as they were, go on after a cut, and are refused unread where they are too long."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from wardround.errors import WireError
from wardround.hospitals.nvflare import bodies
from wardround.hospitals.nvflare.bodies import Offers, Spool
from wardround.wire.message import EMPTY, FileBody, Header, HeldBody, Message, body_sha256, write_body
from wardround.wire.parts import Part
from wardround.wire.tensors import TensorInfo

PART = 1000
LIMIT = 100_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PART", PART)
    monkeypatch.setattr(bodies, "INLINE", 500)


def message(folder: Path, nbytes: int, **header: object) -> Message:
    data = bytes(i * i % 251 for i in range(nbytes))
    body, sha256 = write_body(folder / f"sent-{nbytes}", [data])
    return Message(replace(Header("train", "study", "A", body_nbytes=nbytes, body_sha256=sha256), **header), body)  # type: ignore[arg-type]


class Wire:
    """Asks for parts, counts them, and is cut after some."""

    def __init__(self, offers: Offers, cut: int | None = None) -> None:
        self.offers, self.cut = offers, cut
        self.asked: list[int] = []

    def __call__(self, key: str, offset: int) -> bytes:
        if self.cut is not None and offset >= self.cut:
            raise OSError("cut")
        self.asked.append(offset)
        return self.offers.part(key, offset)


@pytest.mark.parametrize("nbytes", [0, 1, 500, 501, 999, 1000, 1001, 5000, 12_345])
def test_a_body_arrives_as_it_was(tmp_path: Path, nbytes: int) -> None:
    offers, sent = Offers(), message(tmp_path, nbytes)
    packed = offers.packed(sent)
    assert ("key" in packed) == (nbytes > 500)
    got = Spool(tmp_path / "spool", "A", LIMIT).received(packed, Wire(offers))
    assert got.header == sent.header
    assert (got.body == EMPTY) if not nbytes else body_sha256(got.body) == sent.header.body_sha256


def test_a_held_body_travels_with_its_header(tmp_path: Path) -> None:
    body = HeldBody(b"abc")
    sent = Message(Header("train", "study", "A", body_nbytes=3, body_sha256=body.sha256), body)
    got = Spool(tmp_path, "A", LIMIT).received(Offers().packed(sent), Wire(Offers()))
    assert isinstance(got.body, FileBody)
    assert got.body.path.read_bytes() == b"abc"


def test_a_cut_transfer_goes_on_behind_the_last_part_that_arrived(tmp_path: Path) -> None:
    offers, sent = Offers(), message(tmp_path, 12_345)
    packed = offers.packed(sent)
    with pytest.raises(OSError, match="cut"):
        Spool(tmp_path / "spool", "A", LIMIT).received(packed, Wire(offers, cut=7000))
    wire = Wire(offers)
    got = Spool(tmp_path / "spool", "A", LIMIT).received(packed, wire)  # another process
    assert min(wire.asked) == 7000
    assert body_sha256(got.body) == sent.header.body_sha256
    assert not list((tmp_path / "spool").glob("*.part"))


def test_two_processes_do_not_write_one_draft(tmp_path: Path) -> None:
    offers, sent = Offers(), message(tmp_path, 5000)
    spool, packed = Spool(tmp_path / "spool", "A", LIMIT), offers.packed(sent)

    def ask(key: str, offset: int) -> bytes:
        if not inner:
            inner.append(spool.received(packed, Wire(offers)))
        return offers.part(key, offset)

    inner: list[Message] = []
    outer = spool.received(packed, lambda key, offset: ask(key, offset))
    assert body_sha256(outer.body) == body_sha256(inner[0].body) == sent.header.body_sha256


def test_a_body_that_is_too_long_is_refused_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    offers, sent = Offers(), message(tmp_path, 5000)
    wire = Wire(offers)
    with pytest.raises(WireError, match="over the limit"):
        Spool(tmp_path / "spool", "A", 4999).received(offers.packed(sent), wire)
    assert not wire.asked


@pytest.mark.parametrize("key", ["0" * 64, "../../evil", "", None, 7])
def test_a_key_that_is_not_the_hash_is_refused(tmp_path: Path, key: object) -> None:
    offers, sent = Offers(), message(tmp_path, 5000)
    with pytest.raises(WireError, match="key"):
        Spool(tmp_path / "spool", "A", LIMIT).received({**offers.packed(sent), "key": key}, Wire(offers))


def test_other_bytes_are_refused_and_not_kept(tmp_path: Path) -> None:
    offers, sent = Offers(), message(tmp_path, 5000)
    packed = offers.packed(sent)
    assert isinstance(sent.body, FileBody)
    sent.body.path.write_bytes(bytes(5000))
    with pytest.raises(WireError, match="not what its header says"):
        Spool(tmp_path / "spool", "A", LIMIT).received(packed, Wire(offers))
    assert not list((tmp_path / "spool").iterdir())


@pytest.mark.parametrize("part", [b"", bytes(999), bytes(1001), bytes(100_000)])
def test_a_part_of_another_length_is_refused(tmp_path: Path, part: bytes) -> None:
    with pytest.raises(WireError, match="a part has"):
        Spool(tmp_path / "spool", "A", LIMIT).received(
            Offers().packed(message(tmp_path, 5000)), lambda key, offset: part
        )


def test_an_inline_body_of_other_bytes_is_refused(tmp_path: Path) -> None:
    packed = Offers().packed(message(tmp_path, 400))
    for body in (bytes(400), packed["body"][:-1], packed["body"] + b"x"):
        with pytest.raises(WireError, match="not what its header says"):
            Spool(tmp_path / "spool", "A", LIMIT).received({**packed, "body": body}, Wire(Offers()))


@pytest.mark.parametrize(("key", "offset"), [("0" * 64, 0), ("", -1), (None, 0), ("real", 5000), ("real", 1.0)])
def test_only_what_is_offered_is_given(tmp_path: Path, key: object, offset: object) -> None:
    offers, sent = Offers(), message(tmp_path, 5000)
    offered = offers.packed(sent)["key"]
    with pytest.raises(WireError, match="not offered"):
        offers.part(offered if key == "real" else key, offset)


def test_the_oldest_offer_is_forgotten(tmp_path: Path) -> None:
    offers = Offers()
    first = offers.packed(message(tmp_path, 600))["key"]
    for nbytes in range(601, 601 + bodies.KEPT):
        offers.packed(message(tmp_path, nbytes))
    with pytest.raises(WireError, match="not offered"):
        offers.part(first, 0)


@pytest.mark.parametrize("size", [100, 2000])
def test_what_is_absent_of_a_body_does_not_travel_and_the_rest_lies_at_its_place(tmp_path: Path, size: int) -> None:
    info = [TensorInfo(name, "float32", (size // 4,)) for name in "abc"]
    whole = message(tmp_path, 3 * size, tensors=tuple(info))
    assert isinstance(whole.body, FileBody)
    data = whole.body.path.read_bytes()
    sent = whole.without((Part(1, hashlib.sha256(data[size : 2 * size]).hexdigest()),))
    offers = Offers()
    got = Spool(tmp_path / "spool", "A", LIMIT).received(offers.packed(sent), Wire(offers))
    assert got.header == sent.header
    assert b"".join(bytes(chunk) for chunk in got.body.chunks()) == data[:size] + data[2 * size :]
    assert len(list((tmp_path / "spool").iterdir())) == 1
    Spool(tmp_path / "spool", "A", LIMIT).forget(got)
    assert not list((tmp_path / "spool").iterdir())


def test_what_is_no_message_is_refused(tmp_path: Path) -> None:
    for data in ({}, {"header": "text"}, {"header": b"{}"}):
        with pytest.raises(WireError):
            Spool(tmp_path, "A", LIMIT).received(data, Wire(Offers()))
