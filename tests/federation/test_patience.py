"""Over bad links a round that too few sites answered is tried again, and the model is the same to the last bit."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.apart import engine_of
from tests.examples import quickly
from tests.federation.rig import Rig
from tests.protection.test_secure_rounds import Fault, Faulty, SecureRig, clear, study_of
from tests.toys import toy_sites, toy_study
from wardround.engines.local import LocalEngine
from wardround.errors import Interrupted, NotEnoughSites
from wardround.federation.asking import Patience
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import ERROR, TRAIN
from wardround.federation.secure import ADVERTISE, REVEAL, SHARE, SIGN
from wardround.runs.conduct import coordinate
from wardround.runs.session import run
from wardround.storage.journal import RoundReport
from wardround.study.schema import Study
from wardround.wire.message import Message

ALL = {"min_sites": 4}


def times(count: int, fault: Fault) -> Fault:
    """A fault of the first few messages that have it, of each round."""
    left: Counter[int] = Counter()

    def lose(message: Message) -> bool:
        if not fault(message) or left[message.header.round] == count:
            return False
        left[message.header.round] += 1
        return True

    return lose


def at(site: str, kind: str, *numbers: int) -> Fault:
    return lambda m: (m.header.site, m.header.kind) == (site, kind) and m.header.round in numbers


def patient(rig: Rig, line: Faulty, patience: Patience) -> None:
    protocol = rig.coordinator._protocol
    rig.coordinator = Coordinator(rig.host.plan("federated"), rig.method, line, rig.journal, protocol, patience)


def plain(study: Study, folder: Path, lose: Fault, patience: Patience) -> Rig:
    rig = clear(study, folder)
    line = Faulty(rig.engine)
    line.lose = lose
    patient(rig, line, patience)
    return rig


def masked(study: Study, folder: Path, lose: Fault, patience: Patience, *, heard: bool = True) -> SecureRig:
    rig = SecureRig(study, folder)
    rig.line.lose, rig.line.heard = lose, heard
    patient(rig, rig.line, patience)
    return rig


def again(reports: list[RoundReport]) -> list[str]:
    return [note.partition(": ")[2] for r in reports for note in r.notes if note.startswith("too few sites")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a run that every site answered."""
    return clear(study_of(schedule=ALL), tmp_path_factory.mktemp("plain")).train().public_sha256


def test_a_site_that_fails_twice_and_then_answers_changes_no_bit(
    tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    # In a row: what was tried in one round does not count in the next.
    rig = plain(study_of(schedule=ALL), tmp_path, times(2, at("B", TRAIN, 2, 3)), Patience(2))
    assert rig.train().public_sha256 == expected
    reports = rig.journal.reports()
    assert [("".join(r.participants), dict(r.missing)) for r in reports] == [("ABCD", {})] * 3
    assert again(reports) == ["tried again 2 times"] * 2
    assert "3 of 4 sites answered" in caplog.text
    assert "Tried again, 2 of 2 times" in caplog.text
    # What was sent for nothing is on the bill of the round.
    assert reports[1].bytes_down > 2 * reports[0].bytes_down


def test_patience_has_an_end_and_without_it_there_is_none(tmp_path: Path) -> None:
    for attempts in (0, 2):
        seen: list[int] = []
        rig = plain(study_of(schedule=ALL), tmp_path / str(attempts), at("B", TRAIN, 2), Patience(attempts))
        rig.coordinator._asking._engine.before = lambda m, seen=seen: seen.append(m.header.round)  # type: ignore[attr-defined]
        with pytest.raises(NotEnoughSites, match="3 of 4 sites answered"):
            rig.train()
        assert seen.count(2) == 4 * (attempts + 1)
        assert [r.round for r in rig.journal.reports()] == [1]


def test_a_round_that_enough_sites_answered_is_not_tried_again(tmp_path: Path) -> None:
    study = study_of()
    one = clear(study, tmp_path / "one", at("B", TRAIN, 2)).train()
    rig = plain(study, tmp_path / "two", at("B", TRAIN, 2), Patience(5))
    assert rig.train().public_sha256 == one.public_sha256
    assert again(rig.journal.reports()) == []


PHASES = (ADVERTISE, SHARE, TRAIN, SIGN, REVEAL)


@pytest.mark.parametrize(("kind", "heard"), quickly(product(PHASES, (True, False)), 1, 2, 4, 7))
def test_a_site_may_be_away_in_any_phase_of_a_secure_sum(tmp_path: Path, expected: str, kind: str, heard: bool) -> None:
    lose = times(2, at("B", kind, 2))
    rig = masked(study_of(schedule=ALL), tmp_path, lose, Patience(2), heard=heard)
    assert rig.train().public_sha256 == expected
    reports = rig.journal.reports()
    assert [(r.round, "".join(r.participants)) for r in reports] == [(1, "ABCD"), (2, "ABCD"), (3, "ABCD")]
    # Once the survivors are named, the others are enough to read the sum; before, it is another attempt.
    assert [r.attempt for r in reports] == ([0, 0, 0] if kind in (SIGN, REVEAL) else [0, 2, 0])


def test_a_round_after_an_aborted_one_waits_for_the_same_sites(tmp_path: Path) -> None:
    """Never the same model with other survivors: with patience the coordinator waits, and no other site trains."""
    fault = times(3, at("A", ADVERTISE, 3))
    both = [at("A", SIGN, 2), at("B", SIGN, 2)]
    rig = masked(study_of(), tmp_path, lambda m: fault(m) or any(lose(m) for lose in both), Patience(3), heard=False)
    rig.train()
    found = [(r.round, "".join(r.participants), r.attempt) for r in rig.journal.reports()]
    assert found == [(1, "ABCD", 0), (3, "ABCD", 3), (4, "ABCD", 0)]
    assert sum(m.header.round == 3 for m in rig.sent_to("C", TRAIN)) == 1
    # Away for good, it is waited for in vain.
    other = masked(
        study_of(),
        tmp_path / "other",
        lambda m: at("A", ADVERTISE, 3)(m) or any(lose(m) for lose in both),
        Patience(3),
    )
    with pytest.raises(NotEnoughSites, match="without A the difference of the two would be what they sent"):
        other.train()
    assert [r.round for r in other.journal.reports()] == [1]


def test_patience_bears_more_aborted_rounds_in_a_row(tmp_path: Path) -> None:
    def lose(message: Message) -> bool:
        return message.header.kind == SIGN and message.header.site in "AB" and message.header.round < 6

    rig = masked(study_of(rounds=2), tmp_path / "one", lose, Patience(4))
    rig.train()
    assert [r.round for r in rig.journal.reports()] == [6, 7]
    rig = masked(study_of(rounds=2), tmp_path / "two", lose, Patience(1))
    with pytest.raises(NotEnoughSites, match="4 rounds in a row were aborted"):
        rig.train()


class Line(LocalEngine):
    """An engine on which a site is away."""

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for reply in super().exchange(messages):
            away = reply.header.site == "B"
            yield Message(replace(reply.header, kind=ERROR, meta={"reason": "away"})) if away else reply


def test_a_study_that_is_stopped_does_not_wait(tmp_path: Path) -> None:
    rig = clear(study_of(schedule=ALL), tmp_path)
    line = Line(lambda header: rig.sites[header.site])
    rig.coordinator = Coordinator(
        rig.host.plan("federated"), rig.method, line, rig.journal, patience=Patience(5, 3600.0)
    )
    asking, waits = rig.coordinator._asking, threading.Event()
    pause = asking.pause
    asking.pause = lambda: (waits.set(), pause())[1]  # type: ignore[func-returns-value,method-assign]

    def close() -> None:
        assert waits.wait(20.0)
        line.close()

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    with pytest.raises(Interrupted):
        rig.train()
    thread.join(20.0)


@pytest.mark.slow
def test_a_whole_run_of_parties_apart_is_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy_study(("A", "B"), schedule={"rounds": 2, "min_sites": 2})
    sites = toy_sites(tmp_path / "data", ("A", "B"))
    one = run(study, sites, tmp_path / "together", engine="local", quiet=True)
    engine: Any = engine_of(study, sites, tmp_path)
    away = times(2, at("B", TRAIN, 2))
    exchange: Callable[[Any], Iterator[Message]] = engine.exchange

    def losing(messages: Any) -> Iterator[Message]:
        asked = list(messages)
        lost = [message for message in asked if away(message)]
        yield from (message.reply(ERROR, meta={"reason": "away"}) for message in lost)
        yield from exchange([message for message in asked if message not in lost])

    monkeypatch.setattr(engine, "exchange", losing)
    try:
        other = coordinate(study, tmp_path / "out", engine, quiet=True, allow_code=True, patience=Patience(2))
    finally:
        engine.close()
    assert other.model_sha256 == one.model_sha256
    assert any("tried again 2 times" in note for note in other.notes)
