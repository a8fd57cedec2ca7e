"""The secure sum through the real coordinator, journal, sites and stores: dropouts, aborted rounds, restarts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.examples import quickly
from tests.federation.rig import Rig
from tests.toys import toy_sites, toy_study
from wardround.errors import Interrupted, JournalError, NotEnoughSites, StudyError
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import ERROR, EVALUATE, TRAIN, UPDATE, Engine
from wardround.federation.secure import (
    ADVERTISE,
    DEAL,
    REVEAL,
    SHARE,
    SIGN,
    SecureSum,
    secure_sum,
)
from wardround.protection.identity import Roster
from wardround.runs.session import run
from wardround.site.secure import SecureUpload
from wardround.site.site import Site
from wardround.storage.journal import Journal
from wardround.study.schema import Study
from wardround.wire.message import Header, Message

SITES = "ABCD"
THRESHOLD = 3
Fault = Callable[[Message], bool]


def study_of(rounds: int = 3, **changes: Any) -> Study:
    schedule = {"rounds": rounds, "validate_every": 1, "keep": rounds + 3, **changes.pop("schedule", {})}
    protection = {"initial_scale": 8.0, "max_sites": 4, **changes.pop("protection", {})}
    return toy_study(SITES, schedule=schedule, protection=protection, **changes)


def masked(study: Study) -> Study:
    """The same study, summed securely."""
    return study.model_copy(update={"protection": study.protection.model_copy(update={"secure": True})})


class Faulty:
    """An engine that loses the replies to some messages; the site has answered, or never heard, as `heard` says."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lose: Fault = lambda message: False
        self.before: Callable[[Message], None] = lambda message: None
        self.heard = True

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            self.before(message)
            lost = self.lose(message)
            if not lost or self.heard:
                (reply,) = self._engine.exchange([message])
            yield message.reply(ERROR, meta={"reason": "the line is dead"}) if lost else reply

    def close(self) -> None:
        self._engine.close()


class SecureRig(Rig):
    """A rig that sums securely, with a line that can break."""

    def __init__(self, study: Study, folder: Path) -> None:
        super().__init__(
            masked(study),
            folder,
            protocol=lambda call: SecureSum(call, self.roster(), THRESHOLD, self.journal),
            site_protocol=lambda name: SecureUpload(THRESHOLD, self.roster),
        )
        self.line = Faulty(self.engine)
        self.restart_coordinator()

    def roster(self) -> Roster:
        return Roster({name: site.store.enrol().public for name, site in self.sites.items()})

    def restart_coordinator(self) -> None:
        protocol = secure_sum(self.roster(), THRESHOLD, self.journal)
        self.coordinator = Coordinator(self.host.plan("federated"), self.method, self.line, self.journal, protocol)

    def restart_site(self, name: str) -> None:
        old = self.sites[name]
        protocol = SecureUpload(THRESHOLD, self.roster)
        self.sites[name] = Site(name, old.rules, lambda: self.learner(name), old.store, protocol=protocol)

    def sent_to(self, site: str, kind: str) -> list[Message]:
        return [s.message for s in self.engine.sent if (s.message.header.site, s.message.header.kind) == (site, kind)]


def losing(site: str, kind: str, number: int) -> Fault:
    return lambda m: (m.header.site, m.header.kind, m.header.round) == (site, kind, number)


def clear(study: Study, folder: Path, lose: Fault = lambda message: False) -> Rig:
    rig = Rig(study, folder)
    line = Faulty(rig.engine)
    line.lose = lose
    rig.coordinator = Coordinator(rig.host.plan("federated"), rig.method, line, rig.journal)
    return rig


@pytest.mark.parametrize("ring_bits", quickly([16, 24, 32], 1))
def test_turning_it_on_changes_no_bit(tmp_path: Path, ring_bits: int) -> None:
    study = study_of(protection={"ring_bits": ring_bits})
    plain, secure = clear(study, tmp_path / "plain"), SecureRig(study, tmp_path / "secure")
    expected, found = plain.train(), secure.train()
    assert (found.public_sha256, found.scales) == (expected.public_sha256, expected.scales)
    ours, theirs = secure.journal.reports(), plain.journal.reports()
    assert [(r.loss, r.validation, r.participants) for r in ours] == [
        (r.loss, r.validation, r.participants) for r in theirs
    ]
    assert all(r.validation for r in ours)


def test_nothing_of_a_site_is_in_what_it_sends(tmp_path: Path) -> None:
    study = study_of(rounds=2)
    plain, secure = clear(study, tmp_path / "plain"), SecureRig(study, tmp_path / "secure")
    plain.train()
    secure.train()
    updates = {s.body for s in plain.engine.sent if s.message.header.kind == UPDATE}
    masked = [s for s in secure.engine.sent if s.message.header.kind == UPDATE]
    assert len(masked) == 12
    assert not updates & {s.body for s in masked}
    assert {len(body) for body in updates} == {len(s.body) for s in masked}
    everything = b"".join(s.data for s in secure.engine.sent)
    for site in secure.sites.values():
        private = site.store.enrol().private
        assert private not in everything
        assert private.hex().encode() not in everything


@pytest.fixture(scope="module")
def plain_sums(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """The models of clear runs in which B's update of round 2 is lost, and in which it counts."""
    lost = {False: losing("B", TRAIN, 2), True: lambda m: False}
    folder = tmp_path_factory.mktemp("plain")
    return {
        counted: clear(study_of(), folder / str(counted), lose).train().public_sha256 for counted, lose in lost.items()
    }


@pytest.mark.parametrize(
    ("kind", "heard"), quickly(product((ADVERTISE, SHARE, TRAIN, SIGN, REVEAL), (True, False)), 1, 4, 5, 9)
)
def test_a_site_may_leave_in_any_phase(tmp_path: Path, plain_sums: dict[bool, str], kind: str, heard: bool) -> None:
    study = study_of()
    secure = SecureRig(study, tmp_path / "secure")
    secure.line.lose, secure.line.heard = losing("B", kind, 2), heard
    counted = kind in (SIGN, REVEAL)
    trained = counted or (kind == TRAIN and heard)
    assert secure.train().public_sha256 == plain_sums[counted]
    report = secure.journal.reports()[1]
    assert ("B" in report.participants) == counted
    assert "the line is dead" in report.missing["B"]
    assert len(secure.sent_to("B", TRAIN)) == (3 if trained else 2)


def test_a_lost_round_is_void_and_its_number_is_never_used_again(tmp_path: Path) -> None:
    secure = SecureRig(study_of(), tmp_path)
    secure.line.lose = lambda m: losing("A", REVEAL, 2)(m) or losing("B", REVEAL, 2)(m)
    secure.train()
    reports = secure.journal.reports()
    assert [r.round for r in reports] == [1, 3, 4]
    assert any("round 2 is aborted" in note for note in reports[1].notes)
    assert all(not any("aborted" in note for note in r.notes) for r in (reports[0], reports[2]))
    # Two validations of one model by other sites would differ by one site's: the aborted round's is not repeated.
    asked = {m.header.round: m.header.meta["validate"] for m in secure.sent_to("C", TRAIN)}
    assert asked == {1: False, 2: True, 3: False, 4: True}
    assert [r.validation is None for r in reports] == [True, False, False]


PRIVATE = {
    "protection": {"secure": True, "privacy": {"patients_per_step": 2, "noise_multiplier": 1.0, "epsilon": 100.0}},
    "method": {"kind": "fedavg", "weights": "equal"},
    "schedule": {"release": "last"},
}


def test_a_void_round_of_a_private_study_uses_up_the_schedule(tmp_path: Path) -> None:
    """It was paid for, and the budget is for the rounds of the schedule."""
    secure = SecureRig(study_of(**PRIVATE), tmp_path)
    secure.line.lose = lambda m: m.header.kind == REVEAL and m.header.site in "AB" and m.header.round in (2, 3)
    secure.train()
    assert [report.round for report in secure.journal.reports()] == [1]
    released = secure.coordinator.release()
    assert (released.number, released.state.round) == (1, 1)
    # Whoever goes on finds nothing left to do.
    secure.restart_coordinator()
    secure.train()
    assert {m.header.round for m in secure.sent_to("C", TRAIN)} == {1, 2, 3}


def test_a_private_study_of_void_rounds_alone_releases_nothing(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=2, **PRIVATE), tmp_path)
    secure.line.lose = lambda m: m.header.kind == REVEAL and m.header.site in "AB"
    with pytest.raises(NotEnoughSites, match="all 2 rounds were aborted"):
        secure.train()


def test_what_was_learned_in_a_void_round_is_forgotten(tmp_path: Path) -> None:
    study = study_of(local={"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.1, "optimizer_state": "keep"})
    secure = SecureRig(study, tmp_path)
    secure.line.lose = lambda m: losing("A", SIGN, 2)(m) or losing("B", SIGN, 2)(m)
    began: dict[int, Any] = {}
    memory = secure.sites["C"].store.memory

    def watch(number: int, **how: Any) -> Any:
        found = memory(number, **how)
        began.setdefault(number + 1, {name: found.tensors[name].tobytes() for name in found.tensors})
        return found

    secure.sites["C"].store.memory = watch  # type: ignore[method-assign]
    secure.train()
    assert began[2]
    assert began[3] == began[2]
    assert began[4] != began[3]


def test_a_site_that_signed_takes_part_in_no_other_attempt_of_the_round(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=2), tmp_path)
    secure.train()
    for request, said in zip(secure.sent_to("A", ADVERTISE)[:2], ("older copy", "under a new number"), strict=True):
        again = Message(replace(request.header, attempt=1))
        reply = secure.sites["A"].handle(again)
        assert reply.header.kind == ERROR
        assert "has signed the survivor list of round 2" in reply.header.meta["reason"]
        assert said in reply.header.meta["reason"]


def test_too_many_void_rounds_stop_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=2), tmp_path)
    secure.line.lose = lambda m: m.header.kind == SIGN and m.header.site in "AB"
    with pytest.raises(NotEnoughSites, match="3 rounds in a row were aborted"):
        secure.train()
    assert secure.journal.reports() == []
    secure.line.lose = lambda m: False
    secure.restart_coordinator()
    secure.train()
    assert [r.round for r in secure.journal.reports()] == [4, 5]


def test_a_void_validation_is_not_repeated(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=2), tmp_path)
    secure.line.lose = lambda m: m.header.kind == SIGN and m.header.site in "AB" and len(secure.journal.reports()) == 2
    secure.train()
    for _ in range(2):
        assert [r.validation is None for r in secure.journal.reports()] == [False, True]
        secure.line.lose = lambda m: False
        secure.restart_coordinator()
        sent = len(secure.engine.sent)
        secure.train()
        assert len(secure.engine.sent) == sent


@pytest.mark.parametrize(("kind", "numbers", "attempt"), [(TRAIN, [1, 2, 3], 1), (SIGN, [1, 3, 4], 0)])
def test_a_coordinator_that_dies_goes_on_with_a_new_attempt_or_number(
    tmp_path: Path, kind: str, numbers: list[int], attempt: int
) -> None:
    study = study_of()
    secure = SecureRig(study, tmp_path / "secure")

    def die(message: Message) -> None:
        if losing("C", kind, 2)(message) and message.header.attempt == 0:
            raise Interrupted("killed")

    secure.line.before = die
    with pytest.raises(Interrupted):
        secure.train()
    secure.restart_coordinator()
    state = secure.train()
    reports = secure.journal.reports()
    assert [r.round for r in reports] == numbers
    assert reports[1].attempt == attempt
    if kind == TRAIN:
        # Nothing was announced: the same round, hence the same update under fresh masks, and the same bits.
        assert state.public_sha256 == clear(study, tmp_path / "plain").train().public_sha256


@pytest.mark.parametrize("kind", [SHARE, TRAIN, SIGN, REVEAL])
def test_a_restarted_site_drops_out_of_the_attempt_and_comes_back(tmp_path: Path, kind: str) -> None:
    secure = SecureRig(study_of(), tmp_path)
    secure.line.before = lambda m: secure.restart_site("D") if losing("D", kind, 2)(m) else None
    secure.train()
    report = secure.journal.reports()[1]
    assert "holds no keys for this attempt" in report.missing["D"]
    assert ("D" in report.participants) == (kind in (SIGN, REVEAL))
    assert "D" in secure.journal.reports()[2].participants


def test_too_few_sites_stop_before_anything_is_announced(tmp_path: Path) -> None:
    secure = SecureRig(study_of(), tmp_path)
    secure.line.lose = lambda m: m.header.kind == TRAIN and m.header.site in "AB"
    with pytest.raises(NotEnoughSites, match=r"2 sites sent their masked updates .* threshold is 3; nothing was"):
        secure.train()
    assert secure.sent_to("C", SIGN) == []


def test_a_repeated_request_gets_the_same_bytes_and_a_bent_one_none(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1, schedule={"validate_every": 0}), tmp_path)
    secure.train()
    (request,) = secure.sent_to("A", TRAIN)
    (sent,) = [s for s in secure.engine.sent if s.message.header.reply_to == request.id]
    again = secure.sites["A"].handle(request)
    assert b"".join(bytes(c) for c in again.body.chunks()) == sent.body
    for bent in ({"keep": [1]}, {DEAL: {"dealers": ["A", "B", "C"], "sealed": {}}}):
        header = replace(request.header, meta={**request.header.meta, **bent})
        assert secure.sites["A"].handle(Message(header, request.body)).header.kind == ERROR


def test_the_model_that_was_announced_is_the_one_that_trains(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=2), tmp_path)
    states = secure.states()
    next(states)
    next(states)
    told = next(m for m in secure.sent_to("A", TRAIN) if m.header.round == 1)
    other = {m.header.body_sha256 for m in secure.sent_to("A", TRAIN)}
    assert other == {told.header.body_sha256}

    def swap(message: Message) -> None:
        if losing("A", TRAIN, 2)(message):
            meta = {**message.header.meta, "scales": told.header.meta["scales"]}
            object.__setattr__(message, "header", replace(told.header, round=2, phase=3, meta=meta))
            object.__setattr__(message, "body", told.body)

    secure.line.before = swap
    list(states)
    assert "something else than was announced" in secure.journal.reports()[1].missing["A"]


def test_a_clear_request_is_refused_but_a_sites_own_results_are_its_own(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1, schedule={"validate_every": 1}), tmp_path)
    secure.train()
    site, study = secure.sites["A"], secure.arm_spec.identity
    train = secure.sent_to("A", TRAIN)[0]
    meta = {name: value for name, value in train.header.meta.items() if name != DEAL}
    reply = site.handle(Message(replace(train.header, meta=meta, phase=0), train.body))
    assert "a clear update is not given" in reply.header.meta["reason"]
    pooled = secure.sent_to("A", EVALUATE)[0]
    meta = {name: value for name, value in pooled.header.meta.items() if name != DEAL}
    reply = site.handle(Message(replace(pooled.header, meta=meta, phase=0), pooled.body))
    assert "a clear update is not given" in reply.header.meta["reason"]
    own = {"split": "test", "layout": secure.arm_spec.evaluation_layout.sha256}
    header = Header(EVALUATE, study, "A", 1, meta=own, tensors=pooled.header.tensors)
    header = replace(header, body_nbytes=pooled.header.body_nbytes, body_sha256=pooled.header.body_sha256)
    assert site.handle(Message(header, pooled.body)).header.kind == UPDATE


def test_a_changed_roster_is_refused(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1), tmp_path)
    secure.train()
    protocol = SecureUpload(THRESHOLD, lambda: Roster({"A": secure.sites["A"].store.enrol().public}))
    with pytest.raises(JournalError, match="roster is not the one site A began with"):
        protocol.answer(secure.sent_to("A", ADVERTISE)[0], secure.sites["A"])


def test_a_survivor_list_is_on_record_before_any_site_sees_it(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1, schedule={"validate_every": 0}), tmp_path)

    def look(message: Message) -> None:
        if message.header.kind == SIGN:
            other = Journal(tmp_path / "coordinator", secure.arm_spec.identity)
            assert other.rounds_with("survivors/train") == other.aborted(TRAIN) == {1}
            other.close()

    secure.line.before = look
    secure.train()
    assert secure.journal.aborted(TRAIN) == frozenset()


def test_sites_promise_once_and_never_go_back(tmp_path: Path) -> None:
    store = SecureRig(study_of(), tmp_path).sites["A"].store
    assert store.last_written("survivors/train") == -1
    assert store.write_once("survivors/train", 3, "x") == "x"
    assert store.write_once("survivors/train", 3, "y") == "x"
    assert store.write_once("survivors/train", 2, "y") == "x"
    assert store.write_once("survivors/train", 4, "y") == "y"
    assert store.last_written("survivors/train") == 4


# Through the runner --------------------------------------------------------------------------------------------------


def _hash(tmp_path: Path, name: str, *overrides: str, **how: Any) -> str:
    sites = toy_sites(tmp_path / "data", tuple(SITES))
    result = run(study_of(2), sites, tmp_path / name, overrides=overrides, **how)
    return str(result.model_sha256)


def test_a_laptop_run_gives_the_same_model(tmp_path: Path) -> None:
    expected = _hash(tmp_path, "plain", engine="local")
    assert _hash(tmp_path, "secure", "protection.secure=true", engine="local", compare=["local"]) == expected
    lines = [json.loads(line) for line in (tmp_path / "secure" / "rounds.jsonl").read_text().splitlines()]
    # What a site trains alone has no rounds that anybody else could see.
    assert {line["arm"] for line in lines} == {"federated"}


@pytest.mark.slow
def test_workers_keep_the_keys_of_an_attempt_in_one_process(tmp_path: Path) -> None:
    expected = _hash(tmp_path, "plain", engine="local")
    assert _hash(tmp_path, "secure", "protection.secure=true", engine="workers", processes=2) == expected


@pytest.mark.parametrize(
    ("sites", "overrides", "words"),
    [
        ("AB", (), "at least 3 training sites, not 2"),
        ("ABCD", ("protection.threshold=2",), "choose 3 to 4"),
        ("ABCD", ("protection.threshold=5",), "choose 3 to 4"),
    ],
)
def test_studies_that_cannot_be_secure_say_so(
    tmp_path: Path, sites: str, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        run(
            toy_study(tuple(sites)),
            toy_sites(tmp_path / "data", tuple(sites)),
            tmp_path / "out",
            overrides=("protection.secure=true", *overrides),
        )
