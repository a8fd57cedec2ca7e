"""A hospital's resident process: nothing runs that was not approved, and whatever dies is an answer or a retry."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hospitals import waiting
from tests.hospitals.joined import Consortium, resident, serving, wait_for
from tests.toys import toy_sites, toy_study
from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.errors import JournalError, StudyError, WardroundError
from wardround.federation.exchange import ERROR
from wardround.federation.facts import FACTS, PLAN, SiteFacts, parsed
from wardround.hospitals.proposal import PROPOSED, Standing
from wardround.hospitals.site import agent, approval, decisions
from wardround.hospitals.site.agent import Limits, Resident
from wardround.hospitals.socket_server import HELLO, connect
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import FEDERATED
from wardround.protection.identity import Identity
from wardround.results.schema import Result
from wardround.runs.conduct import coordinate
from wardround.runs.session import run
from wardround.site.agreed import AgreedStudy, spec_of
from wardround.site.holdings import enrolled
from wardround.site.process import agent_finder
from wardround.storage.store import SiteStore
from wardround.study.hashes import study_sha256
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import load_sites
from wardround.wire.canonical import digest
from wardround.wire.message import Header, HeldBody, Message

STUDY = toy_study(schedule={"rounds": 2})


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


class Direct:
    """An engine whose sites are residents of this process; it looks at every signature."""

    def __init__(self, consortium: Consortium, residents: dict[str, Resident]) -> None:
        self._consortium, self._residents = consortium, residents

    def exchange(self, messages: Any) -> Any:
        for message in messages:
            site = message.header.site
            yield self._consortium.said(site, self._residents[site].handle(message))

    def close(self) -> None:
        """Nothing is open."""


def facts_of(study: Study, site: str = "A") -> Message:
    plan = ArmSpecs(study, (), None, Plugins({}, True)).plan_sha256
    return Message(Header(FACTS, study_sha256(study), site, meta={PLAN: plan}))


def reason(reply: Message) -> str:
    assert reply.header.kind == ERROR
    return str(reply.header.meta["reason"])


def stood(reply: Message) -> Standing:
    assert reply.header.kind == PROPOSED, reply.header.meta
    return parsed(Standing, reply.header.meta)


def test_nothing_runs_before_it_is_approved(consortium: Consortium) -> None:
    each, sha256 = resident(consortium.of("A")), study_sha256(STUDY)
    assert "not proposed" in reason(each.handle(facts_of(STUDY)))
    assert stood(each.handle(consortium.propose("A", STUDY))).state == "pending"
    refused = consortium.said("A", each.handle(facts_of(STUDY)))
    assert "has not approved" in reason(refused)
    assert refused.header.meta["kind"] == "NotApproved"
    assert each._workers.at_work() == []
    assert not (consortium.of("A").studies / sha256 / "own").exists()
    consortium.approve("A", sha256)
    standing = stood(each.handle(consortium.propose("A", STUDY)))
    assert standing.state == "approved"
    assert standing.decision is not None
    standing.decision.verify(consortium.keys["A"])
    said = parsed(SiteFacts, consortium.said("A", each.handle(facts_of(STUDY))).header.meta)
    # One key in all that the site signs.
    assert said.public_key == consortium.keys["A"].hex()
    assert said.patients is not None
    each._workers.halt()


@pytest.mark.slow
def test_a_study_comes_to_the_same_model_as_on_one_machine(consortium: Consortium, tmp_path: Path) -> None:
    residents = {name: resident(consortium.of(name)) for name in "ABC"}
    for each in residents.values():
        approved(consortium, each)
    with closing(Direct(consortium, residents)) as engine:
        apart = coordinate(STUDY, tmp_path / "out", engine, quiet=True, allow_code=True)
    assert apart.values["model_sha256"] == _alone(tmp_path).values["model_sha256"]
    for each in residents.values():
        each._workers.halt()


def _alone(tmp_path: Path) -> Result:
    return run(STUDY, toy_sites(tmp_path / "data"), tmp_path / "alone", engine="local", quiet=True)


def approved(consortium: Consortium, each: Resident, study: Study = STUDY) -> str:
    each.handle(consortium.propose(each.site, study))
    consortium.approve(each.site, study_sha256(study))
    return study_sha256(study)


class Echo:
    """In place of a worker process, where only the gate before it is looked at."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.killed = False
        self.pid = None

    def ask(self, message: Message) -> Message:
        self.asked.append(message.header.kind)
        return message.reply("done")

    def kill(self) -> None:
        self.killed = True

    close = kill


def gated(consortium: Consortium, **how: Any) -> tuple[Resident, list[Echo]]:
    made: list[Echo] = []

    def start(*_: Any) -> Any:
        made.append(Echo())
        return made[-1]

    return resident(consortium.of("A"), start=start, **how), made


def test_an_approval_is_void_after_a_change(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    each, made = gated(consortium)
    approved(consortium, each)
    assert each.handle(facts_of(STUDY)).header.kind == "done"
    with monkeypatch.context() as patch:
        patch.setattr(approval, "__version__", "9.9")
        assert "no longer counts" in reason(each.handle(facts_of(STUDY)))
        assert "9.9" in reason(each.handle(facts_of(STUDY)))
    assert each.handle(facts_of(STUDY)).header.kind == "done"
    consortium.roster(B=b"n" * 32)
    standing = stood(each.handle(consortium.propose("A", STUDY)))
    assert standing.state == "pending"
    assert "another key" in standing.reason
    assert "another key" in reason(each.handle(facts_of(STUDY)))
    consortium.approve("A", study_sha256(STUDY))
    assert each.handle(facts_of(STUDY)).header.kind == "done"
    # Other comparisons are other models: more leaves, and more privacy is spent.
    assert stood(each.handle(consortium.propose("A", STUDY, ("local",)))).state == "pending"
    assert made[0].asked == [FACTS] * 3
    assert len(made) == 1


def test_a_decision_on_disk_is_only_the_sites_own(consortium: Consortium) -> None:
    each, made = gated(consortium)
    sha256 = approved(consortium, each)
    file = consortium.of("A").studies / sha256 / "decision.json"
    whole = json.loads(file.read_bytes())
    forged = {
        "edited": {**whole, "state": "refused"},
        "of another hospital": {**whole, "site": "B"},
        "unsigned": {**whole, "signature": ""},
        "another schema": {**whole, "more": 1},
    }
    for content in (*forged.values(), [], None, "x" * 100):
        file.write_text(json.dumps(content), encoding="utf-8")
        assert "has not approved" in reason(each.handle(facts_of(STUDY)))
    file.write_bytes(b"\xff")
    assert "has not approved" in reason(each.handle(facts_of(STUDY)))
    # That of one study copied to another.
    other = toy_study(seed=9)
    each.handle(consortium.propose("A", other))
    (consortium.of("A").studies / study_sha256(other) / "decision.json").write_text(json.dumps(whole), encoding="utf-8")
    assert "another study" in reason(each.handle(facts_of(other)))
    file.write_text(json.dumps(whole), encoding="utf-8")
    # The proposal under an approval is another one: what would run is not what was approved.
    proposal = file.with_name("proposal.json")
    proposal.write_bytes((consortium.of("A").studies / study_sha256(other) / "proposal.json").read_bytes())
    assert "another study" in reason(each.handle(facts_of(STUDY)))
    assert made == []


def test_a_body_that_no_worker_could_read_is_refused(consortium: Consortium) -> None:
    each, made = gated(consortium)
    approved(consortium, each)
    header = replace(facts_of(STUDY).header, body_nbytes=3, body_sha256="0" * 64)
    assert "in a file" in reason(each.handle(Message(header, HeldBody(b"abc"))))
    assert "at most" in reason(each.handle(Message(replace(header, body_nbytes=1 << 40), HeldBody(b"abc"))))
    assert made == []


def test_a_refused_study_stays_refused_with_its_reason(consortium: Consortium) -> None:
    each, made = gated(consortium)
    each.handle(consortium.propose("A", STUDY))
    consortium.approve("A", study_sha256(STUDY), "refused", "no patients of this kind")
    standing = stood(each.handle(consortium.propose("A", STUDY)))
    assert (standing.state, standing.reason) == ("refused", "no patients of this kind")
    assert "no patients" in reason(each.handle(facts_of(STUDY)))
    assert made == []


def test_hostile_proposals_leave_nothing(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    each, made = gated(consortium)
    whole = consortium.propose("A", STUDY).header

    def answer(**changes: Any) -> str:
        fields = {name: getattr(whole, name) for name in ("kind", "study", "site", "meta")}
        return reason(each.handle(Message(Header(**{**fields, **changes}))))

    meta = dict(whole.meta)
    elsewhere = {**meta["roster"], "federation": "others"}
    for changes in (
        {"study": "../../../../tmp/x"},
        {"study": "0" * 64},
        {"site": "B"},
        {"meta": {**meta, "study": {**meta["study"], "name": "../../x"}}},
        {"meta": {**meta, "roster": elsewhere}},
        {"meta": {**meta, "roster": {**meta["roster"], "serial": 77}}},
        {"meta": {**meta, "roster": {}}},
        {"meta": {**meta, "study": {**meta["study"], "description": "x" * (1 << 20)}}},
        {"meta": {}},
    ):
        answer(**changes)
    assert not consortium.of("A").studies.exists()
    assert not consortium.of("A").roster.exists()
    each.handle(Message(whole))
    assert consortium.of("A").roster.exists()
    old = consortium.propose("A", STUDY)
    consortium.roster(B=b"n" * 32)
    each.handle(consortium.propose("A", STUDY))
    assert "older" in reason(each.handle(old))
    monkeypatch.setattr(decisions, "MOST_PENDING", 2)
    each.handle(consortium.propose("A", toy_study(seed=1)))
    assert "wait for a decision" in reason(each.handle(consortium.propose("A", toy_study(seed=2))))
    # One that is there already is still answered.
    assert stood(each.handle(consortium.propose("A", STUDY))).state == "pending"
    others = toy_study(("B", "C"))
    assert "not name this site" in reason(each.handle(consortium.propose("A", others)))
    assert made == []


@pytest.mark.slow
def test_code_is_not_called_for_being_named(consortium: Consortium, tmp_path: Path) -> None:
    """A study may name code, and be approved in error: the site's own file has the last word."""
    each = resident(consortium.of("A"), allow_code=False)
    trap = {"kind": "custom", "factory": "tests.hospitals.trap:spring", "options": {"file": str(tmp_path / "sprung")}}
    study = toy_study(task=trap)
    message = consortium.propose("A", study)
    each.handle(message)
    consortium.approve("A", study_sha256(study))
    arm = digest([study_sha256(study), message.header.meta["plan_sha256"], FEDERATED])
    said = reason(each.handle(Message(Header("train", arm, "A", round=1))))
    assert "code by its place" in said
    assert not (tmp_path / "sprung").exists()
    each._workers.halt()


@pytest.fixture
def wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file is there, workers of `waiting` wait."""
    file = tmp_path / "wait"
    monkeypatch.setenv(waiting.VARIABLE, str(file))
    return file


def asked_meanwhile(each: Resident, wait: Path, steps: list[Header]) -> tuple[threading.Thread, list[Message], int]:
    """A message that is at work; the replies once the thread ended, and the process id of the worker."""
    wait.touch()
    answers: list[Message] = []
    asked = threading.Thread(target=lambda: answers.append(each.handle(facts_of(STUDY), steps.append)))
    asked.start()
    wait_for(lambda: wait.with_suffix(".reached").exists())
    (pid,) = [worker["pid"] for worker in each._workers.at_work()]
    assert isinstance(pid, int)
    return asked, answers, pid


def test_the_kill_switch_ends_what_is_at_work(consortium: Consortium, wait: Path) -> None:
    folder = consortium.of("A")
    with serving(resident(folder, start=waiting.start)) as each:
        sha256 = approved(consortium, each)
        asked, answers, pid = asked_meanwhile(each, wait, [])
        folder.stopped.touch()
        asked.join(20)
        assert "stopped all work" in reason(consortium.said("A", answers[0]))
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
        assert "stopped all work" in reason(each.handle(consortium.propose("A", STUDY)))
        wait_for(lambda: json.loads(folder.status.read_text())["state"] == "stopped")
        folder.stopped.unlink()
        wait.unlink()
        wait_for(lambda: json.loads(folder.status.read_text())["state"] == "running")
        assert each.handle(facts_of(STUDY)).header.kind == "waited"
        states = {study["study"]: study["state"] for study in each.status("running")["studies"]}
        assert states == {sha256: "approved"}
    assert json.loads(folder.status.read_text())["state"] == "ended"
    folder.stopped.touch()
    with pytest.raises(WardroundError, match="resume"):
        resident(folder).run(threading.Event())


def test_a_reply_that_was_ready_does_not_leave_once_all_work_is_stopped(consortium: Consortium) -> None:
    each, made = gated(consortium)
    approved(consortium, each)
    each.handle(facts_of(STUDY))

    def late(message: Message) -> Message:
        consortium.of("A").stopped.touch()
        return message.reply("done")

    made[0].ask = late  # type: ignore[method-assign]
    assert "stopped all work" in reason(each.handle(facts_of(STUDY)))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(consortium: Consortium, wait: Path) -> None:
    each, steps = resident(consortium.of("A"), start=waiting.start), list[Header]()
    approved(consortium, each)
    asked, answers, pid = asked_meanwhile(each, wait, steps)
    wait.unlink()
    # It may have seen that before it was killed; then its reply is as good.
    os.kill(pid, signal.SIGKILL)
    asked.join(20)
    assert consortium.said("A", answers[0]).header.kind == "waited"
    assert {step.kind for step in steps} == {PROGRESS}
    wait.with_suffix(".broken").touch()
    os.kill(answers[0].header.meta["pid"], signal.SIGKILL)
    assert "died" in reason(consortium.said("A", each.handle(facts_of(STUDY))))
    wait.with_suffix(".broken").unlink()
    assert each.handle(facts_of(STUDY)).header.kind == "waited"
    each._workers.halt()


def test_two_studies_are_at_work_at_once(consortium: Consortium, wait: Path) -> None:
    each = resident(consortium.of("A"), start=waiting.start)
    other = toy_study(seed=9)
    approved(consortium, each)
    approved(consortium, each, other)
    asked, answers, _ = asked_meanwhile(each, wait, [])
    second = threading.Thread(target=lambda: answers.append(each.handle(facts_of(other))))
    second.start()
    wait_for(lambda: len([worker for worker in each._workers.at_work() if worker["kind"]]) == 2)
    wait.unlink()
    for thread in (asked, second):
        thread.join(20)
    assert {answer.header.study for answer in answers} == {study_sha256(STUDY), study_sha256(other)}
    assert {answer.header.kind for answer in answers} == {"waited"}
    each._workers.halt()


def test_two_studies_take_turns_where_one_worker_is_allowed(consortium: Consortium) -> None:
    each, made = gated(consortium, limits=Limits(workers=1, idle=0.0))
    other = toy_study(seed=9)
    approved(consortium, each)
    approved(consortium, each, other)
    for study in (STUDY, other, STUDY):
        assert each.handle(facts_of(study)).header.kind == "done"
    assert [echo.killed for echo in made] == [True, True, False]
    each._workers.end_idle()
    assert made[-1].killed
    assert each._workers.at_work() == []


def test_a_changed_site_file_ends_the_worker_that_began_with_the_other(consortium: Consortium) -> None:
    each, made = gated(consortium)
    approved(consortium, each)
    each.handle(facts_of(STUDY))
    site = consortium.of("A").site
    site.write_text(site.read_text() + "# \n", encoding="utf-8")
    each.handle(facts_of(STUDY))
    assert [echo.killed for echo in made] == [True, False]
    (consortium.of("A").root / "data").rmdir()
    site.write_text(site.read_text() + "# \n", encoding="utf-8")
    said = reason(each.handle(facts_of(STUDY)))
    assert "sites.A.data" in said
    assert str(consortium.folder) not in said


def test_the_socket_answers_several_at_once_and_only_its_user(consortium: Consortium) -> None:
    folder = consortium.of("A")
    each, _ = gated(consortium)
    with serving(each):
        approved(consortium, each)
        assert stat.S_IMODE(folder.socket.stat().st_mode) == 0o600
        frames = SharedBodies()
        with connect(folder.socket) as one, connect(folder.socket) as other:
            for connection in (one, other):
                with connection.makefile("rwb") as stream:
                    frames.write(stream, facts_of(STUDY))  # type: ignore[arg-type]
                    reply = frames.read(stream)  # type: ignore[arg-type]
                assert reply is not None
                assert consortium.said("A", reply).header.kind == "done"
        with connect(folder.socket) as one, one.makefile("rwb") as stream:
            frames.write(stream, Message(Header(HELLO, "", "A")))  # type: ignore[arg-type]
            hello = frames.read(stream)  # type: ignore[arg-type]
            assert hello is not None
            assert hello.header.meta == {"instance": each.instance}
        with connect(folder.socket) as broken:
            broken.sendall(b"\xff" * 64)
            assert broken.recv(1) == b""
        with pytest.raises(WardroundError, match="already"):
            resident(folder).run(threading.Event())
    assert not folder.socket.exists()


def test_a_carrier_that_fails_begins_again(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_AGAIN", 0.01)
    tries = []

    def couriers(*_: Any) -> Any:
        tries.append(1)
        raise OSError("/secret/path")

    folder = consortium.of("A")
    with serving(resident(folder, couriers=couriers)) as each:
        wait_for(lambda: len(tries) > 3)
        assert "failed" in each.status("running")["carrier_state"]
        assert "secret" not in json.dumps(each.status("running"))


def test_the_resident_process_imports_no_torch() -> None:
    rooms = "wardround.cli, wardround.hospitals.site.agent, wardround.hospitals.site.control"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"package": "0.0.1"}, "is installed now"),
        ({"plan_sha256": "1" * 64}, "other defaults"),
        ({"identity": None}, "key cannot be read"),
    ],
)
def test_a_worker_says_why_it_cannot_begin_and_begins_once_it_can(
    consortium: Consortium, change: dict[str, Any], said: str
) -> None:
    folder = consortium.of("A")
    plan = ArmSpecs(STUDY, (), None, Plugins({}, True)).plan_sha256
    study = AgreedStudy(STUDY, folder.root / "own", (), str(change.get("plan_sha256", plan)))
    sites = load_sites(folder.site).with_code()
    spec = spec_of("A", sites, None, [study], identity=folder.identity, package=change.get("package"), floor=1)
    away = folder.identity.with_suffix(".away")
    if "identity" in change:
        folder.identity.rename(away)
    find = agent_finder(json.loads(json.dumps(spec)))
    with pytest.raises(StudyError, match=said):
        find(facts_of(STUDY).header)
    if "identity" in change:
        away.rename(folder.identity)
        reply = find(facts_of(STUDY).header).handle(facts_of(STUDY))
        assert parsed(SiteFacts, reply.header.meta).public_key == consortium.keys["A"].hex()


def test_a_store_that_was_made_with_another_key_is_an_error(tmp_path: Path) -> None:
    with closing(SiteStore(tmp_path)) as store:
        one = enrolled(store, None)
        assert enrolled(store, one).public == one.public
        with pytest.raises(JournalError, match="another key"):
            enrolled(store, Identity(b"o" * 32))
