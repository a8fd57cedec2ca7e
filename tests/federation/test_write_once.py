"""A coordinator that asks out of turn, and replies that name what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.federation.rig import Rig
from tests.federation.test_inspection import planted
from tests.protection.test_secure_rounds import SecureRig, losing, study_of
from tests.toys import toy_sites, toy_study
from wardround.errors import Interrupted, JournalError, NotEnoughSites
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import ALONE, ERROR, EVALUATE, RELEASE, TRAIN, UPDATE, PlainSum
from wardround.federation.measuring import RELEASED
from wardround.federation.robust import robust_mean
from wardround.federation.secure import ADVERTISE, SIGN
from wardround.protection.robust import Defence
from wardround.runs.session import run
from wardround.site.evaluators import evaluators_of
from wardround.storage.journal import State
from wardround.storage.verify import read_log
from wardround.wire.message import FileBody, Header, Message


def nudged(rig: Rig, state: State, step: int) -> State:
    def nudge(tensors: dict[str, object]) -> None:
        tensors["model/2.bias"] = state.public["model/2.bias"] + 1e-6 * step

    return planted(rig, state, nudge)


def ask_train(rig: Rig, state: State, number: int, *, validate: bool, keep: int = 0) -> Message:
    layout = rig.arm_spec.codec.sent(rig.arm_spec.layout)
    call = rig.coordinator._call(TRAIN, state, number, {"keep": [keep], "validate": validate}, layout)
    return rig.sites["A"].handle(call.message("A"))


def test_training_requests_buy_one_validation_a_round(tmp_path: Path) -> None:
    """The attack: many models, a bit apart, each validated by a request to train."""
    rig = Rig(toy_study(schedule={"rounds": 3}), tmp_path)
    state = rig.start()
    answers = [ask_train(rig, nudged(rig, state, step), 1, validate=True) for step in range(1, 6)]
    assert [a.header.kind for a in answers] == [UPDATE, *[ERROR] * 4]
    assert "gives validation sums of one model of a round" in answers[1].header.meta["reason"]
    # Asked again for the same it answers again, and it trains on others as long as it is not asked to measure them.
    assert ask_train(rig, nudged(rig, state, 1), 1, validate=True, keep=1).header.kind == UPDATE
    assert ask_train(rig, nudged(rig, state, 2), 1, validate=False).header.kind == UPDATE


def test_a_round_has_one_validation_whichever_kind_of_request_asks(tmp_path: Path) -> None:
    rig = Rig(toy_study(schedule={"rounds": 4}), tmp_path)
    states = rig.states()
    next(states)
    state = next(states)

    def evaluate(measured: State) -> Message:
        layout = rig.arm_spec.metrics_layout
        return rig.sites["A"].handle(
            rig.coordinator._call(EVALUATE, measured, 1, {"split": "validation"}, layout).message("A")
        )

    assert evaluate(state).header.kind == UPDATE
    assert ask_train(rig, nudged(rig, state, 1), 2, validate=True).header.kind == ERROR
    assert ask_train(rig, state, 2, validate=True).header.kind == UPDATE
    assert evaluate(nudged(rig, state, 1)).header.kind == ERROR


def test_a_round_has_one_validation_however_its_model_is_served(tmp_path: Path) -> None:
    """The attack: the same bytes as the round's model, and as a released one, which has another private part."""
    norm = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
    rig = Rig(toy_study(task=norm, method={"kind": "fedbn"}, schedule={"rounds": 2}), tmp_path)
    state = next(rig.states())
    models = tmp_path / "models"
    models.mkdir()
    site = rig.sites["A"]
    site._evaluators = evaluators_of(models, tmp_path / "pictures")

    def ask(**how: object) -> Message:
        call = rig.coordinator._call(EVALUATE, state, 1, {"split": "validation", **how}, rig.arm_spec.metrics_layout)
        return site.handle(call.message("A"))

    assert ask().header.kind == UPDATE
    for how in ({"evaluator": RELEASED}, {"evaluator": RELEASED, "unseen_site": True}):
        reply = ask(**how)
        assert reply.header.kind == ERROR
        assert "gives validation sums of one model of a round" in reply.header.meta["reason"]


@pytest.mark.parametrize("kind", [RELEASE, EVALUATE, TRAIN, ALONE, ADVERTISE, SIGN, "unheard of"])
def test_no_kind_of_message_shuts_a_site_out_of_its_rounds(tmp_path: Path, kind: str) -> None:
    """The attack: an answer of round 10^6 is the last the site gives; every honest round comes before it."""
    rig = Rig(toy_study(schedule={"rounds": 2}), tmp_path)
    reply = rig.sites["A"].handle(Message(Header(kind, rig.arm_spec.identity, "A", 10**6)))
    assert "the study ends with round 2" in reply.header.meta["reason"]
    rig.train()
    assert [r.participants for r in rig.journal.reports()] == [("A", "B", "C")] * 2


def test_a_secure_site_is_not_shut_out_by_an_offer_of_keys(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1), tmp_path)
    secure.train()
    header = replace(secure.sent_to("A", ADVERTISE)[0].header, round=10**6)
    assert "the study ends with round 1" in secure.sites["A"].handle(Message(header)).header.meta["reason"]


def test_rounds_that_took_the_place_of_void_ones_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have numbers after the study's last, in all phases and in the request that writes the private part."""
    study = toy_study(
        ("A", "B", "C"),
        method={"kind": "fedbn"},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
        protection={"secure": True, "initial_scale": 8.0},
        schedule={"rounds": 2, "release": "last"},
    )
    from wardround.engines.local import LocalEngine

    class Losing(LocalEngine):
        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                (reply,) = super().exchange([message])
                lost = message.header.kind == SIGN and message.header.round == 2 and message.header.site == "A"
                yield message.reply(ERROR, meta={"reason": "the line is dead"}) if lost else reply

    monkeypatch.setattr("wardround.engines.local.LocalEngine", Losing)
    result = run(study, toy_sites(tmp_path, ("A", "B", "C")), tmp_path / "out", engine="local")
    assert result.selected_round == {"federated": 3}
    assert set(result.local_sha256) == {"A", "B", "C"}


# A reply whose body is not there -----------------------------------------------------------------------------------


class Losing:
    """An engine whose replies of one site name a file that is gone, or that is none."""

    def __init__(self, engine: Any, site: str, path: Path, number: int = 2) -> None:
        self._engine, self._site, self._path, self._number = engine, site, path, number

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for reply in self._engine.exchange(messages):
            header = reply.header
            spoilt = (header.site, header.kind, header.round) == (self._site, UPDATE, self._number)
            yield Message(header, FileBody(self._path, header.body_nbytes)) if spoilt else reply

    def close(self) -> None:
        self._engine.close()


def plain(rig: Rig, folder: Path) -> Callable[[Any], Any]:
    return PlainSum


def robust(rig: Rig, folder: Path) -> Callable[[Any], Any]:
    return robust_mean(Defence("median", 1, "none", False), folder / "updates")


@pytest.mark.parametrize("protocol", [plain, robust])
@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_reply_without_its_body_is_its_sites_failure(tmp_path: Path, protocol: Any, what: str) -> None:
    rig = Rig(toy_study(("A", "B", "C", "D"), schedule={"rounds": 2}), tmp_path)
    path = tmp_path / "gone"
    if what == "folder":
        path.mkdir()
    engine = Losing(rig.engine, "B", path)
    rig.coordinator = Coordinator(rig.host.plan("federated"), rig.method, engine, rig.journal, protocol(rig, tmp_path))
    rig.train()
    report = rig.journal.reports()[1]
    assert report.participants == ("A", "C", "D")
    assert "a body that cannot be read" in report.missing["B"]
    assert str(tmp_path) not in report.missing["B"]


def test_a_masked_reply_without_its_body_drops_out(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1, schedule={"validate_every": 0}), tmp_path)
    engine = Losing(secure.engine, "D", tmp_path / "gone", number=1)
    secure.line._engine = engine
    secure.train()
    (report,) = secure.journal.reports()
    assert report.participants == ("A", "B", "C")
    assert "a body that cannot be read" in report.missing["D"]


def test_a_body_that_goes_while_it_is_added_spoils_no_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it would be in the sum: the round stops, and is done again from the start."""
    rig = Rig(toy_study(schedule={"rounds": 1, "validate_every": 0}), tmp_path / "rig")
    expected = Rig(toy_study(schedule={"rounds": 1, "validate_every": 0}), tmp_path / "whole").train().public_sha256
    from wardround.federation import exchange as module

    # Bodies above this stay in their files.
    monkeypatch.setattr("wardround.wire.message.SMALL", 0)
    check, calls = module.check_update, []

    def vanishing(layout: Any, reply: Message, form: Any) -> None:
        check(layout, reply, form)
        calls.append(reply.header.site)
        if len(calls) == 2:
            assert isinstance(reply.body, FileBody)
            reply.body.path.unlink()

    monkeypatch.setattr(module, "check_update", vanishing)
    with pytest.raises(JournalError, match="changed on the disk while it was added"):
        rig.train()
    assert rig.train().public_sha256 == expected


def test_a_test_result_without_its_body_is_its_sites_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy_study(schedule={"rounds": 1, "validate_every": 0})
    from wardround.engines.local import LocalEngine

    class Spoiling(LocalEngine):
        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                (reply,) = super().exchange([message])
                spoilt = message.header.kind == EVALUATE and message.header.site == "B"
                yield Message(reply.header, FileBody(tmp_path / "gone", reply.body.nbytes)) if spoilt else reply

    monkeypatch.setattr("wardround.engines.local.LocalEngine", Spoiling)
    result = run(study, toy_sites(tmp_path, study.training_sites), tmp_path / "out", engine="local")
    assert "a body that cannot be read" in result.failed["B"]
    assert result.metrics["federated"]["A"] is not None


# Aborted rounds on record ---------------------------------------------------------------------------------------------


def aborted(secure: SecureRig) -> list[tuple[str, int]]:
    entries = secure.journal.record.entries()
    return [(e.payload.get("kind", TRAIN), e.round) for e in entries if e.event == "aborted"]


def test_a_round_that_a_restart_made_void_is_in_the_log(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=2), tmp_path)

    def die(message: Message) -> None:
        if losing("C", SIGN, 2)(message):
            raise Interrupted("killed")

    secure.line.before = die
    with pytest.raises(Interrupted):
        secure.train()
    assert aborted(secure) == []
    for _ in range(2):
        secure.restart_coordinator()
        secure.train()
        assert aborted(secure) == [(TRAIN, 2)]
    assert read_log(secure.journal.record.path, "coordinator").damages == []


def test_a_void_round_that_was_seen_is_in_the_log_once(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1), tmp_path)
    secure.line.lose = lambda m: m.header.kind == SIGN and m.header.site in "AB"
    with pytest.raises(NotEnoughSites):
        secure.train()
    secure.line.lose = lambda m: False
    secure.restart_coordinator()
    secure.train()
    assert aborted(secure) == [(TRAIN, 1), (TRAIN, 2), (TRAIN, 3)]


def test_a_void_validation_is_in_the_log_once(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1), tmp_path)
    secure.line.lose = lambda m: m.header.kind == SIGN and m.header.site in "AB" and bool(secure.journal.reports())
    secure.train()
    for _ in range(2):
        assert aborted(secure) == [(EVALUATE, 1)]
        secure.restart_coordinator()
        secure.train()
