"""Shamir's sharing, masks, identities and statements, each on its own."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given
from hypothesis import strategies as st

from tests.protection.parties import Play, bits, identity, roster_of
from wardround.errors import WireError
from wardround.protection import masking
from wardround.protection.identity import Identity, Roster, frame
from wardround.protection.masking import KeyedMask, MaskStream
from wardround.protection.shamir import PRIME, Basis, combine, share_bytes, share_value
from wardround.protection.statements import Advert, Announcement, Consent, Deal, Quorum, Reveal, Roll, Shares
from wardround.wire.ring import ExactSum, Ring

elements = st.integers(0, PRIME - 1)


@given(st.data(), st.integers(2, 12))
def test_any_threshold_of_points_gives_the_polynomial_back(data: st.DataObject, threshold: int) -> None:
    coefficients = data.draw(st.lists(elements, min_size=threshold, max_size=threshold))
    points = data.draw(st.lists(st.integers(1, 50), min_size=threshold, max_size=threshold, unique=True))
    at = data.draw(st.integers(0, 60))

    def polynomial(x: int) -> int:
        return sum(c * pow(x, k, PRIME) for k, c in enumerate(coefficients)) % PRIME

    values = [polynomial(x) for x in points]
    assert combine(Basis(tuple(points)).weights(at), values) == polynomial(at)


def test_one_share_fewer_says_nothing() -> None:
    # With t - 1 points fixed, every secret is the value at 0 of exactly one polynomial: all are as likely as before.
    points, values = (3, 5), [secrets.randbelow(PRIME) for _ in range(2)]
    for secret in (0, 1, PRIME - 1):
        third = combine(Basis((0, *points)).weights(7), [secret, *values])
        assert combine(Basis((*points, 7)).weights(0), [*values, third]) == secret


def test_points_must_differ_and_shares_must_be_elements() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Basis((1, 2, 1))
    assert share_value(share_bytes(PRIME - 1)) == PRIME - 1
    assert share_value(PRIME.to_bytes(66, "big")) is None
    assert share_value(b"short") is None


def _stream(key: bytes, nbytes: int) -> bytes:
    return Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(nbytes))


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_a_mask_is_the_key_stream_modulo_the_ring(ring_bits: int) -> None:
    ring, size = Ring(ring_bits), 1000
    random = np.random.default_rng(1)
    clear = random.integers(0, 1 << ring_bits, size, dtype=np.uint64)
    keys = [random.bytes(16), random.bytes(16)]
    data = bytes(ring.pack(clear.astype(ring.dtype)))
    stream = MaskStream([KeyedMask(keys[0]), KeyedMask(keys[1], negative=True)], ((len(data), ring),))
    found = ring.unpack(b"".join(bytes(c) for c in stream.masked([data]))).astype(np.uint64)
    noise = [np.frombuffer(_stream(k, size * ring.dtype.itemsize), ring.dtype).astype(np.uint64) for k in keys]
    assert np.array_equal(found, (clear + noise[0] - noise[1]) % (1 << ring_bits))


@given(st.lists(st.sampled_from([12, 24, 36, 240]), min_size=1, max_size=30), st.booleans())
def test_how_an_update_is_cut_changes_no_bit(cuts: list[int], opposite: bool) -> None:
    segments = ((240, Ring(16)), (240, Ring(24)), (0, Ring(32)), (240, Ring(32)))
    data, masks = np.random.default_rng(2).bytes(720), [KeyedMask(b"k" * 16), KeyedMask(b"l" * 16, negative=True)]
    whole = b"".join(bytes(c) for c in MaskStream(masks, segments).masked([data]))
    parts, at = [], 0
    for size in cuts * 60:
        parts.append(data[at : at + size])
        at += size
    assert b"".join(bytes(c) for c in MaskStream(masks, segments).masked(parts)) == whole
    total = ExactSum(segments)
    total.add(whole if opposite else data, 0)
    MaskStream([m.opposite for m in masks] if opposite else masks, segments).add_to(total)
    assert total.to_bytes() == (data if opposite else whole)


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    data, segments = bytes(4 * 5000), ((4 * 5000, Ring(32)),)
    once = b"".join(bytes(c) for c in MaskStream([KeyedMask(b"k" * 16)], segments).masked([data]))
    monkeypatch.setattr(masking, "BLOCK", 96)
    assert b"".join(bytes(c) for c in MaskStream([KeyedMask(b"k" * 16)], segments).masked([data])) == once
    assert once == _stream(b"k" * 16, len(data))


@pytest.mark.parametrize("size", [12, 36])
def test_an_update_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(WireError, match="than its layout"):
        list(MaskStream([KeyedMask(b"k" * 16)], ((24, Ring(32)),)).masked([bytes(size)]))


def test_a_masked_update_looks_like_coin_flips() -> None:
    play = Play(3, ((40_000, Ring(32)),))
    deals = play.to_deals()
    for site, deal in deals.items():
        play.upload(site, deal)
    for masked in play.masked.values():
        # 320,000 fair coins: 0.5 within 5 standard deviations.
        assert abs(bits(masked).mean() - 0.5) < 5 * 0.5 / 320_000**0.5


def test_a_signature_counts_for_its_site_purpose_and_fields_only() -> None:
    roster = roster_of(["A", "B"])
    signature = identity("A").sign("purpose", b"ab", "c", 7)
    assert roster.verify("A", signature, "purpose", b"ab", "c", 7)
    assert not roster.verify("B", signature, "purpose", b"ab", "c", 7)
    assert not roster.verify("C", signature, "purpose", b"ab", "c", 7)
    assert not roster.verify("A", signature, "other", b"ab", "c", 7)
    # Fields are framed: moving a byte from one to the next is another statement.
    assert not roster.verify("A", signature, "purpose", b"a", "bc", 7)
    assert frame("a", "bc") != frame("ab", "c")


def test_keys_come_from_the_operating_system_and_are_never_shown() -> None:
    made = {Identity.generate().private for _ in range(50)}
    assert len(made) == 50
    mine = Identity.generate()
    assert mine.private.hex() not in repr(mine)
    assert "k" * 16 not in repr(KeyedMask(b"k" * 16))
    session = Play(3).session["S00"]
    assert "..." in repr(session._secrets)


def test_a_roster_gives_every_site_its_own_key() -> None:
    key = identity("A").public
    with pytest.raises(WireError, match="two sites one key"):
        Roster({"A": key, "B": key})
    roster = roster_of(["A", "B"])
    assert Roster.from_json(roster.to_json()) == roster
    for bad in (None, [], {"A": 3}, {"A": "zz"}, {"A": "00"}):
        with pytest.raises(WireError):
            Roster.from_json(bad)


def _statements() -> list[Any]:
    play = Play(4)
    announcement = play.to_announcement(lost=["S03"])
    for site in announcement.survivors:
        play.coordinator.consent(play.sign(site, announcement))
    quorum = play.coordinator.quorum()
    reveal = play.session["S00"].reveal(quorum)
    roll = Roll(tuple(play.coordinator.adverts.values()))
    return [
        roll.adverts[0],
        roll,
        play.coordinator.dealt["S01"],
        play.coordinator.deals()["S01"],
        announcement,
        quorum.consents[0],
        quorum,
        reveal,
    ]


STATEMENTS = _statements()


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: type(s).__name__)
def test_a_statement_survives_its_json(statement: Any) -> None:
    assert type(statement).from_json(statement.to_json()) == statement


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(STATEMENTS), st.data(), json_values)
def test_a_broken_statement_is_refused_with_one_error(statement: Any, data: st.DataObject, junk: Any) -> None:
    value = statement.to_json()
    value[data.draw(st.sampled_from(sorted(value)))] = junk
    try:
        parsed = type(statement).from_json(value)
    except WireError:
        return
    assert parsed.to_json() == value


def test_statements_are_all_tried() -> None:
    kinds = {type(s) for s in STATEMENTS}
    assert kinds == {Advert, Roll, Shares, Deal, Announcement, Consent, Quorum, Reveal}
