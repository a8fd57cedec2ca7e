"""The secure sum among honest parties: the same bits as the plain sum, whoever drops out and when."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.protection.parties import PHASES, Play, Segments, fixed_entropy, names, safe_threshold, sum_of
from wardround.errors import NotEnoughSites, StudyError
from wardround.protection.agreement import implied_peers
from wardround.protection.secure_coordinator import Unrecoverable
from wardround.study.protection import Protection
from wardround.wire.ring import Ring

VECTORS = Path(__file__).with_name("vectors.json")

segments = st.lists(
    st.tuples(st.integers(1, 20).map(lambda n: 12 * n), st.sampled_from([Ring(16), Ring(24), Ring(32)])),
    min_size=1,
    max_size=4,
).map(tuple)


@settings(max_examples=examples(120), deadline=None)
@given(st.data(), st.integers(3, 9), segments, st.sampled_from([12, 24, 48]))
def test_masked_is_plain_bit_for_bit_in_every_schedule(
    data: st.DataObject, count: int, layout: Segments, chunk: int
) -> None:
    threshold = data.draw(st.integers(count // 2 + 1, count), label="threshold")
    may_leave = data.draw(st.integers(0, count - threshold), label="leave")
    lost = {
        site: data.draw(st.sampled_from(PHASES), label=site)
        for site in data.draw(st.permutations(names(count)))[:may_leave]
    }
    play = Play(count, layout, threshold)
    total = play.run(lost, chunk)
    survivors = [site for site in play.sites if lost.get(site) not in ("advert", "shares", "upload")]
    assert total == sum_of(survivors, layout)
    assert set(play.coordinator.announce().survivors) == set(survivors)
    assert play.coordinator.liars == {}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [3, 10])
def test_one_site_too_few_stops_whatever_the_phase(count: int, phase: str) -> None:
    play = Play(count)
    leave = count - play.threshold + 1
    before = phase in PHASES[:3]
    with pytest.raises(NotEnoughSites if before else Unrecoverable, match=f"threshold is {play.threshold}"):
        play.run(dict.fromkeys(play.sites[:leave], phase))


@pytest.mark.parametrize("count", [10, 50])
def test_large_federations_sum_with_every_dropout_that_is_allowed(count: int) -> None:
    allowed = count - safe_threshold(count)
    lost = dict(zip(names(count)[::2], itertools.cycle(PHASES), strict=False))
    lost = dict(itertools.islice(lost.items(), allowed))
    play = Play(count)
    assert play.run(lost) == sum_of(play.coordinator.uploads, play.segments)


def test_every_peer_knows_its_share_or_gets_it_sealed() -> None:
    play = Play(7)
    deals = play.to_deals()
    order = list(play.sites)
    for dealer, peer in itertools.permutations(order, 2):
        implied = peer in implied_peers(order, dealer, play.threshold)
        assert implied == (peer not in play.coordinator.dealt[dealer].sealed)
        assert implied == (dealer not in deals[peer].sealed)
    # A dealer derives t - 1 shares, and seals the n - t others that are not its own.
    assert all(len(s.sealed) == 7 - play.threshold for s in play.coordinator.dealt.values())


def test_attempts_share_no_key_and_no_mask() -> None:
    records = [{}, {}]
    plays = [Play(4, attempt=attempt) for attempt in range(2)]
    for play, seen in zip(plays, records, strict=True):
        for site, deal in play.to_deals().items():
            seen[site] = {m.key for m in play.session[site].mask(deal)}
    keys = [
        {k for a in play.coordinator.adverts.values() for k in (a.mask_key, a.share_key, a.commitment)}
        for play in plays
    ]
    assert not keys[0] & keys[1]
    assert all(len(seen[site]) == 4 for seen in records for site in seen)
    assert not set().union(*records[0].values()) & set().union(*records[1].values())


def test_two_sites_share_one_mask_with_opposite_signs() -> None:
    play = Play(3)
    masks = {site: {m.key: m.negative for m in play.session[site].mask(d)} for site, d in play.to_deals().items()}
    for one, other in itertools.combinations(play.sites, 2):
        (key,) = masks[one].keys() & masks[other].keys()
        assert (masks[one][key], masks[other][key]) == (False, True)


def test_keys_are_forgotten_when_the_attempt_is_over() -> None:
    play = Play(3)
    play.run()
    assert all(session._secrets is None for session in play.session.values())


@pytest.mark.parametrize(
    ("count", "asked", "curious", "expected"),
    [
        (3, None, False, 3),
        (3, None, True, 2),
        (4, None, False, 3),
        (10, None, False, 7),
        (50, None, False, 34),
        (10, 9, False, 9),
        (10, 6, True, 6),
    ],
)
def test_threshold_of_a_study(count: int, asked: int | None, curious: bool, expected: int) -> None:
    protection = Protection(secure=True, threshold=asked, honest_but_curious=curious)
    assert protection.threshold_for(count) == expected


@pytest.mark.parametrize(
    ("count", "asked", "curious", "words"),
    [
        (2, None, False, "at least 3"),
        (10, 6, False, "choose 7 to 10"),
        (10, 11, False, "choose 7 to 10"),
        (10, 5, True, "choose 6 to 10"),
    ],
)
def test_unsafe_thresholds_are_refused(count: int, asked: int | None, curious: bool, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        Protection(secure=True, threshold=asked, honest_but_curious=curious).threshold_for(count)


def test_a_threshold_without_secure_is_refused() -> None:
    with pytest.raises(ValueError, match="secure: true"):
        Protection(threshold=3)


def test_protection_needs_no_torch() -> None:
    code = "import sys, wardround.protection.secure_sum; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Test vectors --------------------------------------------------------------------------------------------------------


def vectors() -> dict[str, object]:
    """What another implementation must reproduce: five sites, one lost before its upload, all secrets fixed."""
    play = Play(5, ((24, Ring(16)), (24, Ring(24)), (24, Ring(32))), entropy="test vectors")
    announcement = play.to_announcement(lost=["S02"])
    for site in announcement.survivors:
        play.coordinator.consent(play.sign(site, announcement))
    quorum = play.coordinator.quorum()
    for site in announcement.survivors:
        play.coordinator.reveal(play.session[site].reveal(quorum))
    coordinator = play.coordinator
    return {
        "about": "SA1 of wardround. Secrets: SHAKE-256 of `test vectors of SITE/COUNTER` (mask key 32, share key 32, "
        "seed 16 bytes) and of `identity of SITE/0` (32 bytes).",
        "roster": play.roster.to_json(),
        "context": {**vars(play.context), "sha256": play.context.sha256.hex()},
        "secrets": {
            site: [draw(32).hex(), draw(32).hex(), draw(16).hex()]
            for site in play.sites
            for draw in [fixed_entropy(f"test vectors of {site}")]
        },
        "adverts": {site: advert.to_json() for site, advert in coordinator.adverts.items()},
        "shares": {site: shares.to_json() for site, shares in coordinator.dealt.items()},
        "segments": [[size, ring.bits] for size, ring in play.segments],
        "masked": {site: data.hex() for site, data in play.masked.items()},
        "announcement": announcement.to_json(),
        "quorum": quorum.to_json(),
        "reveals": {site: reveal.to_json() for site, reveal in coordinator.reveals.items()},
        "cancelling_masks": [[mask.key.hex(), mask.negative] for mask in coordinator.unmask()],
        "sum": play.unmasked().hex(),
    }


def test_published_vectors() -> None:
    found = json.loads(json.dumps(vectors()))
    expected = json.loads(VECTORS.read_text())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name
    survivors = [site for site in names(5) if site != "S02"]
    layout = tuple((size, Ring(ring_bits)) for size, ring_bits in expected["segments"])
    assert found["sum"] == sum_of(survivors, layout).hex()
