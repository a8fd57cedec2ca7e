"""The secure sum among parties that break it: honest sites stop, say who, and nothing is revealed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.protection.parties import Play, Records, context_of, identity, roster_of, sum_of
from wardround.errors import Rejected
from wardround.protection.agreement import ADVERT, CONSENT, COORDINATOR, Misbehaviour, consent_fields
from wardround.protection.identity import Identity
from wardround.protection.secure_coordinator import Unrecoverable
from wardround.protection.secure_site import SiteSession, Stage
from wardround.protection.secure_sum import Announcement, Consent, Deal, Quorum, Roll
from wardround.protection.statements import Advert


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def stops(session: SiteSession, party: str, step: Callable[[], object]) -> None:
    """The step is refused naming the party, and the site has forgotten its keys."""
    with pytest.raises(Misbehaviour) as caught:
        step()
    assert caught.value.party == party
    assert party in str(caught.value)
    assert session._stage is Stage.OVER
    assert session._secrets is None


def resigned(play: Play, site: str, **changes: bytes) -> Advert:
    """A corrupt site's own advert with other content, properly signed."""
    advert = replace(play.coordinator.adverts[site], **changes)
    return replace(advert, signature=identity(site).sign(ADVERT, play.context.sha256, *advert.signed))


def with_advert(roll: Roll, advert: Advert) -> Roll:
    return Roll(tuple(advert if a.site == advert.site else a for a in roll.adverts))


# One fault at a time -------------------------------------------------------------------------------------------------


def test_wrong_signature_on_keys_names_the_site() -> None:
    play = Play(5)
    roll = play.to_shares()
    bad = replace(roll.adverts[1], signature=flip(roll.adverts[1].signature))
    stops(play.session["S00"], "S01", lambda: play.session["S00"].share(with_advert(roll, bad)))
    with pytest.raises(Misbehaviour, match="site S01 did not sign its keys"):
        play.coordinator.advert(bad)


def test_keys_exchanged_on_the_way_name_the_site_whose_they_were() -> None:
    play = Play(5)
    roll = play.to_shares()
    swapped = replace(roll.adverts[1], mask_key=Play(3).to_shares().adverts[0].mask_key)
    stops(play.session["S00"], "S01", lambda: play.session["S00"].share(with_advert(roll, swapped)))


@pytest.mark.parametrize("what", ["model", "request", "layout", "study"])
def test_sites_that_are_told_different_things_name_each_other(what: str) -> None:
    play = Play(5)
    play.session["S03"] = play.join("S03", **{what: "other"})
    adverts = [play.session[site].advertise() for site in play.sites]
    roll = Roll(tuple(adverts))
    stops(play.session["S00"], "S03", lambda: play.session["S00"].share(roll))
    stops(play.session["S03"], "S00", lambda: play.session["S03"].share(roll))
    with pytest.raises(Misbehaviour, match="S03"):
        play.coordinator.advert(adverts[3])


@pytest.mark.parametrize("change", [{"attempt": 1}, {"round": 4}])
def test_replayed_keys_name_the_site_they_were_of(change: dict[str, int]) -> None:
    before, play = Play(4), Play(4)
    old = before.to_shares()
    for site in play.sites:
        play.session[site] = play.join(site, **({"round": 3} | change if "round" in change else {}))
    if "attempt" in change:
        play = Play(4, attempt=1)
    fresh = Roll(tuple(play.session[site].advertise() for site in play.sites))
    stops(play.session["S00"], "S02", lambda: play.session["S00"].share(with_advert(fresh, old.adverts[2])))


@pytest.mark.parametrize("key", ["mask_key", "share_key"])
def test_duplicate_keys_name_the_second_owner(key: str) -> None:
    play = Play(5)
    roll = play.to_shares()
    copied = resigned(play, "S03", **{key: getattr(roll.adverts[1], key)})
    stops(play.session["S00"], "S03", lambda: play.session["S00"].share(with_advert(roll, copied)))
    fresh = Play(5)
    fresh.coordinator.advert(fresh.session["S01"].advertise())
    copied = replace(fresh.session["S03"].advertise(), **{key: getattr(fresh.coordinator.adverts["S01"], key)})
    copied = replace(copied, signature=identity("S03").sign(ADVERT, fresh.context.sha256, *copied.signed))
    with pytest.raises(Misbehaviour, match="S03"):
        fresh.coordinator.advert(copied)


def test_a_key_of_low_order_names_its_site() -> None:
    play = Play(5)
    roll = play.to_shares()
    weak = resigned(play, "S04", share_key=bytes(32))
    stops(play.session["S00"], "S04", lambda: play.session["S00"].share(with_advert(roll, weak)))


def test_a_stranger_a_double_and_another_self_name_the_coordinator() -> None:
    def roll_of(bend: Callable[[Play, Roll], Roll]) -> None:
        play = Play(4)
        bent = bend(play, play.to_shares())
        stops(play.session["S00"], COORDINATOR, lambda: play.session["S00"].share(bent))

    roll_of(lambda play, roll: Roll((*roll.adverts, replace(roll.adverts[1], site="S99"))))
    roll_of(lambda play, roll: Roll((*roll.adverts, roll.adverts[1])))
    roll_of(lambda play, roll: Roll(roll.adverts[1:]))
    roll_of(lambda play, roll: Roll(roll.adverts[:2]))
    roll_of(lambda play, roll: with_advert(roll, resigned(play, "S00", mask_key=bytes(31) + b"\x09")))


def test_another_roster_or_identity_is_refused_at_once() -> None:
    roster = roster_of(["S00", "S01", "S02"])
    with pytest.raises(Misbehaviour, match="does not hold the key"):
        SiteSession("S00", Identity.generate(), roster, context_of(roster, 3))
    with pytest.raises(Misbehaviour, match="another roster"):
        SiteSession("S00", identity("S00"), roster, replace(context_of(roster, 3), roster="0" * 64))


def test_bad_shares_name_the_dealer() -> None:
    play = Play(6)
    deal = play.to_deals()["S00"]
    dealer = sorted(deal.sealed)[0]
    bent = Deal(deal.dealers, {**deal.sealed, dealer: flip(deal.sealed[dealer])})
    stops(play.session["S00"], dealer, lambda: play.session["S00"].mask(bent))


def test_shares_withheld_or_made_up_name_the_coordinator() -> None:
    def deal_of(bend: Callable[[Deal], Deal]) -> None:
        play = Play(6)
        bent = bend(play.to_deals()["S00"])
        stops(play.session["S00"], COORDINATOR, lambda: play.session["S00"].mask(bent))

    deal_of(lambda deal: Deal(deal.dealers, {}))
    # The other five are implied, or sealed: nothing may be sealed of a site whose shares are implied.
    deal_of(lambda deal: Deal(deal.dealers, dict.fromkeys(deal.dealers, bytes(148)) | deal.sealed))
    deal_of(lambda deal: Deal(deal.dealers, {**deal.sealed, "S99": bytes(148)}))
    deal_of(lambda deal: Deal(deal.dealers[1:], deal.sealed))
    deal_of(lambda deal: Deal(deal.dealers[:3], {}))
    deal_of(lambda deal: Deal((*deal.dealers, "S99"), deal.sealed))


@pytest.mark.parametrize(
    ("survivors", "lost"),
    [
        (("S00", "S01", "S02", "S03", "S04"), ("S04",)),
        (("S00", "S01", "S02", "S03"), ()),
        (("S00", "S01", "S02", "S03", "S99"), ("S04",)),
        (("S01", "S02", "S03", "S04"), ("S00",)),
        (("S00", "S01", "S02"), ("S03", "S04")),
    ],
    ids=["alive and dead", "one forgotten", "a stranger", "not on it", "too few"],
)
def test_impossible_survivor_lists_name_the_coordinator(survivors: tuple[str, ...], lost: tuple[str, ...]) -> None:
    play = Play(5)
    play.to_announcement()
    stops(play.session["S00"], COORDINATOR, lambda: play.sign("S00", Announcement(survivors, lost)))
    assert "S00" not in play.records


def test_a_second_survivor_list_names_the_coordinator_in_any_attempt() -> None:
    play = Play(5)
    announcement = play.to_announcement(lost=["S04"])
    play.sign("S00", announcement)
    second = Announcement(("S00", "S01", "S02", "S04"), ("S03",))
    stops(play.session["S00"], COORDINATOR, lambda: play.sign("S00", second))
    again = Play(5, attempt=1, records=play.records)
    other = again.to_announcement(lost=["S04"])
    stops(again.session["S00"], COORDINATOR, lambda: again.sign("S00", other))


def test_a_forged_a_doubled_and_a_missing_signature_reveal_nothing() -> None:
    def reveal_with(party: str, bend: Callable[[tuple[Consent, ...]], tuple[Consent, ...]]) -> None:
        play = Play(5)
        announcement = play.to_announcement()
        consents = tuple(play.sign(site, announcement) for site in announcement.survivors)
        session = play.session["S00"]
        stops(session, party, lambda: session.reveal(Quorum(bend(consents))))

    reveal_with("S01", lambda c: (c[0], replace(c[1], signature=flip(c[1].signature)), *c[2:]))
    reveal_with("S01", lambda c: (c[0], Consent("S01", c[2].signature), *c[2:]))
    reveal_with(COORDINATOR, lambda c: (*c, c[1]))
    reveal_with(COORDINATOR, lambda c: (*c, Consent("S99", c[1].signature)))
    reveal_with(COORDINATOR, lambda c: c[:3])


def test_a_step_again_or_out_of_order_names_the_coordinator() -> None:
    play = Play(4)
    announcement = play.to_announcement()
    stops(play.session["S00"], COORDINATOR, lambda: play.session["S00"].mask(play.coordinator.deals()["S00"]))
    stops(play.session["S01"], COORDINATOR, lambda: play.session["S01"].advertise())
    consents = tuple(play.sign(site, announcement) for site in ("S02", "S03"))
    stops(play.session["S02"], COORDINATOR, lambda: play.session["S02"].reveal(Quorum(consents)))
    fresh = Play(4).session["S00"]
    stops(fresh, COORDINATOR, lambda: fresh.reveal(Quorum(consents)))


def _revealing(play: Play, liars: dict[str, Callable[[int], int]], missing: tuple[str, ...] = ()) -> None:
    announcement = play.to_announcement(lost=["S06"])
    for site in announcement.survivors:
        play.coordinator.consent(play.sign(site, announcement))
    quorum = play.coordinator.quorum()
    for site in announcement.survivors:
        if site in missing:
            continue
        reveal = play.session[site].reveal(quorum)
        bend = liars.get(site, lambda share: share)
        play.coordinator.reveal(
            replace(reveal, seeds=tuple(map(bend, reveal.seeds)), keys=tuple(map(bend, reveal.keys)))
        )


@pytest.mark.parametrize("liar", ["S00", "S03", "S05"])
def test_a_wrong_share_is_found_and_the_sum_is_right_without_it(liar: str) -> None:
    play = Play(7)
    _revealing(play, {liar: lambda share: share ^ 1})
    assert play.unmasked() == sum_of(play.coordinator.uploads, play.segments)
    assert set(play.coordinator.liars) == {liar}


def test_too_many_wrong_shares_void_the_round() -> None:
    play = Play(7)
    _revealing(play, {site: lambda share: share ^ 1 for site in ("S00", "S01")})
    with pytest.raises(Unrecoverable, match="round is aborted"):
        play.unmasked()
    short = Play(7)
    _revealing(short, {"S00": lambda share: share ^ 1}, missing=("S01",))
    with pytest.raises(Unrecoverable, match="round is aborted"):
        short.unmasked()


def test_a_dealer_whose_seed_is_not_the_committed_one_voids_the_round() -> None:
    play = Play(5)
    roll = play.to_shares()
    own = play.session["S02"]._secrets
    assert own is not None
    own.seed = flip(own.seed)
    for site in play.sites:
        play.coordinator.shares(play.session[site].share(roll))
    for site, deal in play.coordinator.deals().items():
        play.upload(site, deal)
    announcement = play.coordinator.announce()
    for site in play.sites:
        play.coordinator.consent(play.sign(site, announcement))
    quorum = play.coordinator.quorum()
    for site in play.sites:
        play.coordinator.reveal(play.session[site].reveal(quorum))
    with pytest.raises(Unrecoverable, match="site S02"):
        play.unmasked()


def test_the_coordinator_refuses_what_no_honest_site_says() -> None:
    play = Play(5)
    roll = play.to_shares()
    other = Play(5).to_shares().adverts[1]
    shares = play.session["S00"].share(roll)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("S01", lambda: play.coordinator.advert(other)),
        ("S99", lambda: play.coordinator.shares(replace(shares, site="S99"))),
        ("S00", lambda: play.coordinator.shares(replace(shares, sealed={}))),
        ("S00", lambda: play.coordinator.uploaded("S00")),
    ]
    for party, step in refused:
        with pytest.raises(Misbehaviour) as caught:
            step()
        assert caught.value.party == party
    assert issubclass(Misbehaviour, Rejected)


# Everything at once --------------------------------------------------------------------------------------------------


def said(step: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a site says, or whom it names instead."""
    try:
        return step(), None
    except Misbehaviour as caught:
        return None, caught.party


@settings(max_examples=examples(80), deadline=None)
@given(st.data(), st.sampled_from([4, 5, 7]))
def test_no_schedule_gives_away_a_site(data: st.DataObject, count: int) -> None:
    """A coordinator with every corrupt site it can have tells each honest site what it likes, in several attempts.

    Of no honest site does it get a threshold of shares of both secrets, and in a round at most one survivor list gets
    to where its sum can be unmasked.
    """
    records, unmaskable = Records(), set()
    for attempt in range(data.draw(st.integers(1, 3), label="attempts")):
        unmaskable |= _attack(data, Play(count, attempt=attempt, records=records))
    assert len(unmaskable) <= 1


View = tuple[bytes, Announcement]


def _attack(data: st.DataObject, play: Play) -> set[tuple[int, bytes, Announcement]]:
    """One attempt under attack; the survivor lists whose sums the coordinator could unmask."""
    corrupt = frozenset(play.sites[: (play.count - 1) // 3])
    honest = [site for site in play.sites if site not in corrupt]
    told = _tell_differently(data, play, honest, play.to_deals())
    lists = _lists(data, play)
    signed: dict[str, View] = {}
    consents: dict[View, list[Consent]] = defaultdict(list)
    for site in told:
        announcement = data.draw(st.sampled_from(lists), label=f"{site} is told")
        consent, party = said(partial(play.sign, site, announcement))
        assert party in (None, COORDINATOR)
        if consent is not None:
            signed[site] = (play.session[site]._dealers, announcement)
            consents[signed[site]].append(consent)
    for (dealers, announcement), list_of in consents.items():
        for site in sorted(corrupt & set(announcement.survivors)):
            signature = identity(site).sign(CONSENT, *consent_fields(dealers, announcement))
            list_of.append(Consent(site, signature))
    seeds: dict[str, set[str]] = {site: set(corrupt) for site in play.sites}
    keys: dict[str, set[str]] = {site: set(corrupt) for site in play.sites}
    shares = Counter({view: len(corrupt) for view in consents})
    for site, view in signed.items():
        shown = data.draw(st.sampled_from(list(consents)), label=f"{site} is shown signatures on")
        reveal, _ = said(partial(play.session[site].reveal, Quorum(tuple(consents[shown]))))
        assert play.session[site]._secrets is None
        if reveal is None:
            continue
        assert shown == view
        assert (len(reveal.seeds), len(reveal.keys)) == (len(view[1].survivors), len(view[1].lost))
        shares[view] += 1
        for peer in view[1].survivors:
            seeds[peer].add(site)
        for peer in view[1].lost:
            keys[peer].add(site)
    for site in honest:
        assert len(seeds[site]) < play.threshold or len(keys[site]) < play.threshold
    return {(play.attempt, *view) for view, count in shares.items() if count >= play.threshold}


def _tell_differently(data: st.DataObject, play: Play, honest: list[str], deals: dict[str, Deal]) -> list[str]:
    """Each honest site hears that all dealt, or that one of the others did not, or gets nothing more."""
    told = []
    for site in honest:
        hidden = data.draw(st.sampled_from([None, None, None, *play.sites]), label=f"hidden from {site}")
        if hidden == site:
            continue
        deal = deals[site]
        if hidden is not None:
            sealed = {dealer: box for dealer, box in deal.sealed.items() if dealer != hidden}
            deal = Deal(tuple(d for d in deal.dealers if d != hidden), sealed)
        masks, party = said(partial(play.session[site].mask, deal))
        assert party in (None, COORDINATOR)
        if masks is not None:
            told.append(site)
    return told


def _lists(data: st.DataObject, play: Play) -> list[Announcement]:
    """The honest list, and one or two others: some over fewer dealers, some impossible."""
    lists = [Announcement(play.sites, ())]
    for number in range(data.draw(st.integers(1, 2), label="lists")):
        parts = {s: data.draw(st.sampled_from("aaaaaabx"), label=f"list {number}: {s}") for s in play.sites}
        survivors = tuple(s for s in play.sites if parts[s] == "a")
        lists.append(Announcement(survivors, tuple(s for s in play.sites if parts[s] == "b")))
    return lists
