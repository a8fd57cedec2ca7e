"""That a round was aborted is the coordinator's word: what a site believes of it, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.federation.rig import Rig
from tests.protection.test_secure_rounds import SecureRig, losing, study_of
from wardround.errors import NotEnoughSites
from wardround.federation.exchange import EVALUATE, TRAIN
from wardround.federation.secure import ADVERTISE, SIGN
from wardround.site.aborted import UNSEEN, AbortedRounds
from wardround.site.rules import rules_of
from wardround.storage.journal import State
from wardround.wire.message import Header, Message

ENDS = "the study ends with round"


def offer(secure: SecureRig, number: int, aborted: list[int], model: str | None = None) -> str:
    """What site A says to the offer of another masked round."""
    header = next(m.header for m in reversed(secure.sent_to("A", ADVERTISE)) if m.header.meta["kind"] == TRAIN)
    meta = {**header.meta, "aborted": aborted, "model": header.meta["model"] if model is None else model}
    reply = secure.sites["A"].handle(Message(replace(header, round=number, meta=meta)))
    return str(reply.header.meta.get("reason"))


def ask(rig: Rig, state: State, kind: str, number: int, aborted: list[int]) -> str:
    layout = rig.arm_spec.metrics_layout if kind == EVALUATE else rig.arm_spec.codec.sent(rig.arm_spec.layout)
    meta = {"split": "validation"} if kind == EVALUATE else {"keep": [], "validate": False}
    call = rig.coordinator._call(kind, state, number, {**meta, "aborted": aborted}, layout)
    return str(rig.sites["A"].handle(call.message("A")).header.meta.get("reason"))


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_an_arm_in_the_clear_has_no_void_rounds(tmp_path: Path, kind: str) -> None:
    """The attack: as many aborted numbers as one likes buy as many rounds and validations of other models."""
    rig = Rig(study_of(rounds=2), tmp_path)
    assert not rules_of(rig.host, "federated").extends
    state = rig.train()
    assert "a secure sum has none" in ask(rig, state, kind, 3, [1])
    assert f"{ENDS} 2" in ask(rig, state, kind, 3, [])


def test_committed_rounds_that_are_called_void_buy_no_more_than_a_few(tmp_path: Path) -> None:
    """The attack under masks: rounds + 100 further ones."""
    secure = SecureRig(study_of(rounds=3), tmp_path)
    state = secure.train()
    said = [1, 2, 3, *range(4, 200)]
    last = 3 + UNSEEN
    assert f"{ENDS} {last}" in offer(secure, last + 1, said, state.public_sha256)
    assert ENDS not in offer(secure, last, said, state.public_sha256)
    assert f"{ENDS} {last}" in ask(secure, state, EVALUATE, last + 1, said)
    # A round that was offered is not one that was done: it is no proof that the one before it was aborted.
    assert ENDS not in offer(secure, last, said)
    assert f"{ENDS} {last}" in ask(secure, state, EVALUATE, last + 1, said)
    assert f"{ENDS} {last}" in offer(secure, last + 1, said, state.public_sha256)


def test_rounds_that_the_site_saw_to_be_void_all_count(tmp_path: Path) -> None:
    """A run that is resumed after every three aborted rounds goes on as long as it takes, also at restarted sites."""
    secure = SecureRig(study_of(rounds=2), tmp_path)
    secure.line.lose = lambda m: m.header.kind == SIGN and m.header.site in "AB" and m.header.round <= 2 * UNSEEN
    for _ in range(2):
        with pytest.raises(NotEnoughSites, match="3 rounds in a row were aborted"):
            secure.train()
        secure.restart_coordinator()
        for name in "ABCD":
            secure.restart_site(name)
    secure.train()
    assert [(r.round, "".join(r.participants)) for r in secure.journal.reports()] == [(7, "ABCD"), (8, "ABCD")]
    seen = list(range(1, 2 * UNSEEN + 1))
    assert f"{ENDS} 8" in offer(secure, 9, seen, "another model")
    # The site knows of no more.
    assert f"{ENDS} {8 + UNSEEN}" in offer(secure, 8 + UNSEEN + 1, list(range(1, 100)), "another model")


def evaluated(secure: SecureRig, state: State, number: int) -> None:
    """A masked validation of a model under a number of the coordinator's choice, after two aborted rounds."""
    meta = {"split": "validation", "aborted": [1, 2]}
    call = secure.coordinator._call(EVALUATE, state, number, meta, secure.arm_spec.metrics_layout)
    secure.coordinator._asking.run(call, secure.coordinator._protocol)


def test_rounds_that_are_repeated_buy_no_validations(tmp_path: Path) -> None:
    """The attack: the same round again and again, and under each number a validation of another model."""
    secure = SecureRig(study_of(rounds=2, schedule={"validate_every": 0}), tmp_path)
    secure.line.lose = lambda m: m.header.kind == SIGN and m.header.site in "AB" and m.header.round < 3
    secure.train()
    state, site = secure.journal.latest(), secure.sites["A"]
    assert state is not None
    assert site.aborted.saw(1)
    assert site.aborted.saw(2)
    for number in (1, 2):
        with pytest.raises(NotEnoughSites, match=f"asked to validate round {number}, which was aborted"):
            evaluated(secure, state, number)
    assert f"{ENDS} 4" in offer(secure, 5, [1, 2])
    # Validated first, a round is no aborted one when it is done again: the number is spent.
    evaluated(secure, state, 4)
    site.aborted.answered(5, site.aborted._known()[1])
    assert not site.aborted.saw(4)


def test_a_site_believes_a_few_rounds_that_it_was_away_from(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=3), tmp_path)
    object.__setattr__(secure.sites["D"].rules, "catch_up", 3)
    secure.restart_site("D")
    away = (losing("D", ADVERTISE, 2), losing("A", SIGN, 2))
    secure.line.lose, secure.line.heard = (lambda m: any(lost(m) for lost in away)), False
    secure.train()
    found = [(r.round, "".join(r.participants)) for r in secure.journal.reports()]
    assert found == [(1, "ABCD"), (3, "ABC"), (4, "ABCD")]


def header(kind: str, number: int, start: str) -> Header:
    if kind == ADVERTISE:
        return Header(kind, "study", "A", number, meta={"kind": TRAIN, "model": start})
    return Header(kind, "study", "A", number, body_sha256=start)


def test_a_void_number_counts_where_the_next_round_begins_where_it_did(tmp_path: Path) -> None:
    secure = SecureRig(study_of(), tmp_path)
    store = secure.sites["A"].store
    store.set_fact("aborted rounds", '{"last": 9, "start": "s", "aborted": [2, 4]}')
    many = frozenset(range(1, 50))
    for kind in (TRAIN, ADVERTISE):
        assert AbortedRounds(store).believed(header(kind, 10, "s"), many) == 3 + UNSEEN
        assert AbortedRounds(store).believed(header(kind, 10, "t"), many) == 2 + UNSEEN
        # The round itself, asked for again.
        assert AbortedRounds(store).believed(header(kind, 9, "s"), many) == 2 + UNSEEN
        assert AbortedRounds(store).believed(header(kind, 10, "s"), frozenset({4})) == 1
    # A model to be measured starts no round.
    assert AbortedRounds(store).believed(header(EVALUATE, 10, "s"), many) == 2 + UNSEEN
    AbortedRounds(store).answered(10, "t")
    assert AbortedRounds(store).believed(header(TRAIN, 11, "s"), many) == 2 + UNSEEN
    AbortedRounds(store).answered(11, "t")
    assert AbortedRounds(store).believed(header(TRAIN, 12, "u"), many) == 3 + UNSEEN
