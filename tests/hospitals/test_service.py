"""The coordinator's service: studies from their submission to the last delivery, whatever ends in between."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hospitals.loopback import (
    Coordinators,
    Federated,
    LoopbackSite,
    approve,
    federated,
    make_federation,
    status_of,
    write_toy,
)
from tests.toys import toy_sites, toy_study
from wardround.errors import JournalError, StudyError
from wardround.hospitals.coordinator import service, study_run
from wardround.hospitals.coordinator.service import alone, serve
from wardround.hospitals.coordinator.status import StudyStatus, read_record
from wardround.hospitals.coordinator.submission import resume, submit, withdraw
from wardround.hospitals.folders import CoordinatorFolder, StudyFolder
from wardround.hospitals.proposal import Proposal, Standing
from wardround.protection.identity import Identity
from wardround.results.files import read_result
from wardround.runs.session import run
from wardround.storage.journal import Journal
from wardround.study.schema import Study
from wardround.wire.message import Message


def _finished(study: StudyStatus) -> bool:
    return study.state == "finished"


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that the toy study comes to on one machine."""
    folder = tmp_path_factory.mktemp("local")
    sites = toy_sites(folder / "data")
    return run(toy_study(), sites, folder / "out", engine="local", quiet=True, allow_code=True).model_sha256


def test_a_study_runs_from_its_submission_to_the_delivery(tmp_path: Path, on_one_machine: str) -> None:
    with federated(tmp_path) as made:
        assert made.submit(compare=["local"]) == "toy"
        found = made.until(lambda s: _finished(s) and not s.undelivered)
        out = StudyFolder(made.place.studies / "toy").out
        assert read_result(out).model_sha256 == on_one_machine == found.model_sha256
        assert {arm.name: arm.round for arm in found.arms} == {f"local/{n}": 4 for n in "ABC"} | {"federated": 4}
        assert found.participants == ("A", "B", "C")
        assert found.bytes_up > 0 < found.bytes_down
        assert len(found.log_head) == 64
        assert set(found.site_heads) == {"A", "B", "C"}
        assert {said.state for said in found.sites.values()} == {"approved"}
        decisions = json.loads(StudyFolder(made.place.studies / "toy").decisions.read_text())
        assert {site: each["state"] for site, each in decisions.items()} == dict.fromkeys("ABC", "approved")
        for site in made.sites.values():
            assert any(site.folder.rglob("federated.safetensors"))


def test_two_studies_run_at_once(tmp_path: Path, on_one_machine: str) -> None:
    other = toy_study(("A", "B"), name="other", seed=9)
    with federated(tmp_path) as made:
        made.submit()
        made.submit(other)
        found = made.until(_finished)
        assert found.model_sha256 == on_one_machine
        assert made.until(_finished, "other").model_sha256 != on_one_machine


def test_a_study_waits_for_those_who_have_not_decided(tmp_path: Path) -> None:
    asked = []

    def slow(site: LoopbackSite, study: Study, proposal: Proposal) -> Standing:
        asked.append(site.name)
        return approve(site, study, proposal) if len(asked) > 3 else Standing(state="pending", reason="the board meets")

    with federated(tmp_path, decide={"B": slow}) as made:
        made.submit()
        waiting = made.until(lambda s: s.sites["B"].state == "pending")
        assert waiting.sites["B"].reason == "the board meets"
        made.until(_finished)
        assert "train" in made.sites["B"].asked


def test_a_refusal_stops_the_study_with_its_reason(tmp_path: Path) -> None:
    with federated(tmp_path, decide={"C": lambda *_: Standing(state="refused", reason="no consent")}) as made:
        made.submit()
        found = made.until(lambda s: s.state == "refused")
        assert "site C refused the study: no consent" in found.reason
        assert found.sites["C"].state == "refused"
        assert not any("train" in site.asked for site in made.sites.values())
        # The coordinator submits it without that site.
        made.submit(toy_study(("A", "B")), name="smaller")
        made.until(_finished, "smaller")


def test_an_approval_that_another_key_signed_is_none(tmp_path: Path) -> None:
    def forged(site: LoopbackSite, study: Study, proposal: Proposal) -> Standing:
        standing = approve(site, study, proposal)
        assert standing.decision is not None
        return Standing(state="approved", decision=standing.decision.signed(Identity.generate()))

    with federated(tmp_path, decide={"B": forged}) as made:
        made.submit()
        found = made.until(lambda s: s.state == "stopped")
        assert "not signed with the key of this hospital" in found.reason
        assert "train" not in made.sites["A"].asked


def test_an_approval_of_another_plan_is_none(tmp_path: Path) -> None:
    def other(site: LoopbackSite, study: Study, proposal: Proposal) -> Standing:
        return approve(site, study, proposal.model_copy(update={"plan_sha256": "0" * 64}))

    with federated(tmp_path, decide={"B": other}) as made:
        made.submit()
        assert "of another plan_sha256" in made.until(lambda s: s.state == "stopped").reason


def test_a_site_that_is_away_at_the_end_gets_the_model_when_it_returns(tmp_path: Path, on_one_machine: str) -> None:
    with federated(tmp_path) as made:
        site = made.sites["C"]
        handle = site.handle

        def until_delivery(message: Message) -> Message:
            if message.header.kind == "deliver":
                site._stop.set()
            return handle(message)

        site.handle = until_delivery  # type: ignore[method-assign]
        made.submit()
        found = made.until(lambda s: _finished(s) and s.undelivered == ("C",))
        assert found.model_sha256 == on_one_machine
        site.handle = handle  # type: ignore[method-assign]
    # The coordinator was started again, and the site comes back.
    with federated(tmp_path) as made:
        made.until(lambda s: _finished(s) and not s.undelivered)
        assert made.sites["C"].asked == ["deliver"]


@pytest.mark.slow
def test_a_study_without_enough_sites_goes_on_when_one_is_back(tmp_path: Path, on_one_machine: str) -> None:
    study = toy_study(schedule={"rounds": 4, "min_sites": 3})
    with federated(tmp_path, reply=1.0) as made:
        site = made.sites["C"]
        handle = site.handle

        def vanish(message: Message) -> Message:
            if message.header.kind == "train" and message.header.round == 3:
                site._stop.set()
            return handle(message)

        site.handle = vanish  # type: ignore[method-assign]
        made.submit(study)
        found = made.until(lambda s: s.state == "stopped")
        assert "schedule.min_sites is 3" in found.reason
        assert next(arm.round for arm in found.arms if arm.name == "federated") == 2
        site.handle = handle  # type: ignore[method-assign]
        site.come()
        done = made.until(_finished)
        assert len(done.model_sha256) == 64
        assert not done.left_out


def test_what_is_withdrawn_stops_and_goes_on_when_it_is_resumed(tmp_path: Path, on_one_machine: str) -> None:
    asked = []

    def pending(site: LoopbackSite, study: Study, proposal: Proposal) -> Standing:
        asked.append(1)
        return Standing(state="pending") if len(asked) < 1000 else approve(site, study, proposal)

    with federated(tmp_path, decide={"A": pending}) as made:
        made.submit()
        made.until(lambda s: s.sites["A"].state == "pending")
        assert withdraw(made.place, "toy")
        assert not withdraw(made.place, "toy")
        made.until(lambda s: s.state == "withdrawn")
        asked.extend([1] * 1000)
        resume(made.place, "toy")
        assert made.until(_finished).model_sha256 == on_one_machine


def test_what_is_withdrawn_in_the_middle_of_a_round_leaves_nothing_half_done(
    tmp_path: Path, on_one_machine: str
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    with federated(tmp_path) as made:
        site = made.sites["B"]
        handle = site.handle

        def hold(message: Message) -> Message:
            if message.header.kind == "train" and message.header.round == 2 and not go_on.is_set():
                reached.set()
                go_on.wait(30.0)
            return handle(message)

        site.handle = hold  # type: ignore[method-assign]
        made.submit()
        assert reached.wait(30.0)
        withdraw(made.place, "toy")
        made.until(lambda s: s.state == "withdrawn")
        go_on.set()
        resume(made.place, "toy")
        assert made.until(_finished).model_sha256 == on_one_machine


class _Still:
    """A carrier that carries nothing."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def start(self) -> None:
        self.done.append("start")

    def close(self) -> None:
        self.done.append("close")


def test_the_process_opens_and_closes_what_carries_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, carrier, said = make_federation(tmp_path), _Still(), []
    monkeypatch.setattr(service, "open_carrier", lambda *_: carrier)

    def end_it() -> None:
        _wait(place.status.exists)
        os.kill(os.getpid(), signal.SIGINT)

    # Where tests run in the background of a shell, it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=end_it, daemon=True).start()
        serve(place.root, say=said.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert carrier.done == ["start", "close"]
    assert "sites reach it at localhost:8443" in said[0]
    status = status_of(tmp_path)
    assert status is not None
    assert status.process.state == "ended"
    assert [(site.name, site.state) for site in status.sites] == [(name, "never") for name in "ABC"]


def test_a_page_for_others_without_a_proxy_keeps_the_process_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, carrier = make_federation(tmp_path), _Still()
    monkeypatch.setattr(service, "open_carrier", lambda *_: carrier)
    with pytest.raises(StudyError, match="--page-behind-proxy"):
        serve(place.root, page="0.0.0.0:0", say=print)
    assert carrier.done == ["start", "close"]


# In a process of its own ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coordinators() -> Iterator[Coordinators]:
    """What starts coordinators, and ends what is left of them."""
    made = Coordinators()
    yield made
    made.close()


def _wait(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def _submitted(folder: Path) -> StudyFolder:
    place = make_federation(folder)
    submit(place, write_toy(folder), allow_code=True)
    return StudyFolder(place.studies / "toy")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_coordinator_that_ends_in_the_middle_goes_on_by_itself(
    how: signal.Signals, tmp_path: Path, on_one_machine: str, coordinators: Coordinators
) -> None:
    study, hold = _submitted(tmp_path), tmp_path / "hold"
    hold.touch()
    pid = coordinators.start(tmp_path, hold)
    _wait(hold.with_suffix(".reached").exists)
    os.kill(pid, how)
    if how == signal.SIGTERM:
        _wait(lambda: (found := status_of(tmp_path)) is not None and found.process.state == "ended")
    hold.unlink()
    assert coordinators.wait(pid) == (-how if how == signal.SIGKILL else 0)
    assert read_record(study.record).state == "running"
    again = coordinators.start(tmp_path)
    _wait(lambda: read_record(study.record).state == "finished")
    os.kill(again, signal.SIGTERM)
    assert coordinators.wait(again) == 0
    assert read_result(study.out).model_sha256 == on_one_machine


# Hostile folders ------------------------------------------------------------------------------------------------------


def test_what_else_lies_in_the_folder_of_studies_is_left_alone(tmp_path: Path) -> None:
    place = make_federation(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "submission.json").write_text("{}")
    (place.studies / "..hidden").mkdir(parents=True)
    (place.studies / "a b; rm -rf").mkdir()
    (place.studies / "link").symlink_to(elsewhere)
    (place.studies / "damaged").mkdir()
    (place.studies / "damaged" / "submission.json").write_text('{"version": 1}')
    with federated(tmp_path) as made:
        made.submit()
        made.until(_finished)
        status = status_of(tmp_path)
        assert status is not None
        assert [study.name for study in status.studies] == ["toy"]
    assert os.listdir(elsewhere) == ["submission.json"]


def test_a_study_whose_files_were_swapped_for_links_is_not_touched(tmp_path: Path) -> None:
    place = make_federation(tmp_path)
    made = Federated(tmp_path)
    made.submit()
    study = StudyFolder(place.studies / "toy")
    (tmp_path / "victim").mkdir()
    study.out.rmdir()
    study.out.symlink_to(tmp_path / "victim")
    made.service.look()
    status = made.service.status()
    assert status.studies == ()
    assert any("toy: cannot go on" in event.text and "symbolic link" in event.text for event in status.events)
    assert os.listdir(tmp_path / "victim") == []
    made.hub.close()


def test_a_second_coordinator_is_kept_out(tmp_path: Path) -> None:
    place = make_federation(tmp_path)
    with alone(place), pytest.raises(JournalError, match="at work in this folder already"), alone(place):
        pass


def test_a_list_of_sites_that_the_root_did_not_sign_is_not_taken(tmp_path: Path) -> None:
    made = Federated(tmp_path)
    before = made.known.now()
    forged = before.to_json() | {"keys": {**before.to_json()["keys"], "D": Identity.generate().public.hex()}}
    CoordinatorFolder(tmp_path / "coordinator").roster.write_text(json.dumps(forged))
    assert made.known.key("D") is None
    assert made.known.key("A") == before.keys["A"]
    made.hub.close()


def test_a_full_disk_stops_a_study_and_not_its_coordinator(
    tmp_path: Path, on_one_machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()

    def refusing(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def write(*args: object, **kwargs: object) -> object:
            if full.is_set():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, write)

    refusing(Journal, "commit")
    refusing(study_run, "write_record")
    with federated(tmp_path) as made:
        refusing(service, "write_text")
        made.submit()
        made.until(lambda s: s.state == "running")
        full.set()
        (run_of_it,) = made.service._runs.values()
        end = time.monotonic() + 60.0
        while run_of_it.record.state != "stopped":
            assert time.monotonic() < end
            time.sleep(0.01)
        # Neither the record nor the status could be written; the process is there, and knows.
        assert made.study() is not None
        full.clear()
        assert "No space left on device" in made.until(lambda s: s.state == "stopped").reason
        resume(made.place, "toy")
        assert made.until(_finished).model_sha256 == on_one_machine
