"""What goes wrong in hospitals: full disks, lost files, changed data, sites that fail, and the wrong folder."""

from __future__ import annotations

import errno
import fcntl
import html
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.victims import ForkServer
from tests.federation.rig import Rig, Sent
from tests.toys import toy_sites, toy_study
from wardround.engines.local import LocalEngine
from wardround.errors import Interrupted, JournalError, NotEnoughSites, WardroundError
from wardround.federation.exchange import UPDATE
from wardround.protection.gates import check_body
from wardround.results.terminal import lacking_in
from wardround.runs import conduct, folder
from wardround.runs.folder import alone
from wardround.runs.session import Result, evaluate, run
from wardround.runs.watching import Silent
from wardround.site.site import Site
from wardround.storage.blobs import Blobs, disk_error
from wardround.storage.journal import Journal, RoundReport
from wardround.study.schema import Study
from wardround.wire.message import FileBody, Message

ALL = {"schedule": {"rounds": 3, "min_sites": 3}}


def go(tmp_path: Path, study: Study, **options: Any) -> Result:
    return run(study, toy_sites(tmp_path / "data", tuple(study.sites)), tmp_path / "out", engine="local", **options)


# The disk ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a run that nothing happened to."""
    return str(fork_server.run(tmp_path_factory.mktemp("whole") / "out", study=ALL)["model_sha256"])


@pytest.mark.parametrize("act", [4, *(pytest.param(act, marks=pytest.mark.slow) for act in (1, 7))])
@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_nothing_is_half_written(
    fork_server: ForkServer, expected: str, tmp_path: Path, act: int
) -> None:
    out = tmp_path / f"full-{act}"
    said = fork_server.run(out, study=ALL, full=act)
    # Whose disk it is that is full decides who says so: the coordinator, or every site and then too few are left.
    assert said["error"] in ("JournalError", "NotEnoughSites"), said
    assert "No space left" in said["text"]
    assert "free some space and resume" in said["text"]
    assert str(tmp_path) not in said["text"]
    assert not list(out.rglob("*.draft"))
    assert not (out / "result.json").exists()
    assert fork_server.run(out, study=ALL)["model_sha256"] == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(fork_server: ForkServer, expected: str, small_disk: Path) -> None:
    failed = 0
    for left in (60_000, 250_000, 600_000):
        out = small_disk / f"out-{left}"
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - left))
        said = fork_server.run(out, study=ALL)
        if "error" in said:
            failed += 1
            assert said["error"] in ("JournalError", "NotEnoughSites"), said
        ballast.unlink()
        said = fork_server.run(out, study=ALL)
        assert said.get("model_sha256") == expected, said
        subprocess.run(["rm", "-r", str(out)], check=True)
    assert failed


@pytest.mark.parametrize("method", ["fedavg", "fedbn"])
def test_a_disk_that_is_full_when_the_model_is_to_be_written(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The shared part of a model, and the part that a site keeps."""
    task = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
    study, sites = toy_study(**ALL, method={"kind": method}, task=task), toy_sites(tmp_path / "data")
    out, ballast = small_disk / "out", small_disk / "ballast"
    call, name = (conduct.save_release, "save_release") if method == "fedavg" else (Site._release, "_release")

    def filling(*arguments: Any) -> Any:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(conduct if method == "fedavg" else Site, name, filling)
        with pytest.raises(WardroundError, match=r"No space left on device\); free some space and resume") as caught:
            run(study, sites, out, engine="local")
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.detail == (str(out / "models" / "federated.safetensors") if method == "fedavg" else "")
    assert (out / "rounds.jsonl").exists()
    assert not list(out.rglob("*.draft"))
    assert len(list(out.rglob("*.safetensors"))) == (0 if method == "fedavg" else 1)
    ballast.unlink()
    again, whole = (run(study, sites, folder, engine="local") for folder in (out, tmp_path / "whole"))
    for key in ("model_sha256", "local_sha256", "metrics"):
        assert getattr(again, key) == getattr(whole, key)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, None])
def test_only_a_full_disk_is_called_full(number: int | None) -> None:
    error = OSError("/data/DOE^JANE is gone") if number is None else OSError(number, "odd", "/data/DOE^JANE")
    said = disk_error(error)
    assert ("free some space" in str(said)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert ("check the run's folder and its rights" in str(said)) != ("free some space" in str(said))
    assert f"({'OSError' if number is None else os.strerror(number)})" in str(said)
    assert "JANE" not in str(said)
    assert "/data/DOE^JANE" in said.detail


def test_a_folder_that_is_in_the_way_is_said(tmp_path: Path) -> None:
    with alone(tmp_path / "out"):
        (tmp_path / "out" / "models").touch()
    with pytest.raises(JournalError, match=r"\(File exists\); check the run's folder and its rights") as caught:
        go(tmp_path, toy_study())
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path / "out" / "models") in caught.value.detail


def test_a_lost_answer_is_made_anew_and_a_lost_model_is_said(tmp_path: Path) -> None:
    study = toy_study()
    whole = go(tmp_path / "whole", study)
    lost = go(tmp_path, study)
    for site in study.sites:
        for blob in (lost.out / "work" / "sites" / site / "federated" / "blobs").iterdir():
            blob.unlink()
    assert go(tmp_path, study).metrics == whole.metrics
    for blob in (lost.out / "work" / "arms" / "federated" / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(JournalError, match="has lost the model of round"):
        go(tmp_path, study)


def test_a_site_whose_disk_is_full_drops_out_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(toy_study(schedule={"rounds": 3, "min_sites": 2, "validate_every": 0, "release": "last"}), tmp_path)
    write, full = os.write, False

    def written(handle: int, data: bytes) -> int:
        if full and "/sites/B/" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(os, "write", written)
    for report in rig.coordinator.rounds(rig.start()):
        full = report.round == 1
    first, second, third = rig.journal.reports()
    assert (first.participants, third.participants) == (("A", "B", "C"), ("A", "B", "C"))
    assert second.participants == ("A", "C")
    assert "No space left on device); free some space and resume" in second.missing["B"]
    assert str(tmp_path) not in second.missing["B"]
    assert not list(tmp_path.rglob("*.draft"))


def test_a_second_answer_with_other_bytes_is_refused_and_on_record(tmp_path: Path) -> None:
    study = toy_study(schedule={"rounds": 2, "validate_every": 0, "release": "last"})
    expected = Rig(study, tmp_path / "whole").train().scales
    rig = Rig(study, tmp_path / "twice")
    exchange, first = rig.engine.exchange, list[Sent]()

    def twice(messages: Iterable[Message]) -> Iterator[Message]:
        for reply in exchange(messages):
            yield reply
            if reply.header.site == "B" and first:
                # The same request, answered with the bytes of another round.
                other = tmp_path / "other"
                other.write_bytes(first[0].body)
                header = replace(reply.header, body_sha256=first[0].message.header.body_sha256)
                yield Message(header, FileBody(other, len(first[0].body)))
            first.extend(rig.engine.sent[-1:] if reply.header.site == "B" else [])

    rig.engine.exchange = twice  # type: ignore[method-assign]
    assert rig.train().scales == expected
    (refused,) = [entry for entry in rig.journal.record.entries() if entry.event == "refused"]
    assert (refused.payload["site"], refused.payload["round"]) == ("B", 2)
    assert "twice, differently" in refused.payload["reason"]
    assert rig.journal.reports()[-1].participants == ("A", "B", "C")


def rot(folder: Path) -> int:
    """Flip a bit of every file in a folder; how many there were."""
    files = [path for path in folder.iterdir() if path.stat().st_size]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    return len(files)


def test_an_answer_that_rots_on_the_disk_is_made_anew(tmp_path: Path) -> None:
    """Sent again as it is, it would be refused each time, and the run could never go on."""
    rig = Rig(toy_study(**ALL), tmp_path)
    states = rig.states()
    next(states)
    next(states)
    request = next(s.message for s in rig.engine.sent if s.message.header.site == "B")
    reply = rig.sites["B"].handle(request)
    check_body(reply)
    assert rot(tmp_path / "sites" / "B" / "blobs") >= 1
    again = rig.sites["B"].handle(request)
    check_body(again)
    assert again.header.kind == reply.header.kind == UPDATE


def test_a_private_part_or_a_model_that_rots_on_the_disk_is_said(tmp_path: Path) -> None:
    study = toy_study(
        method={"kind": "fedbn"},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
        schedule={"rounds": 3, "min_sites": 3, "validate_every": 0, "release": "last"},
    )
    rig = Rig(study, tmp_path / "site")
    rounds = rig.coordinator.rounds(rig.start())
    next(rounds)
    rot(tmp_path / "site" / "sites" / "B" / "blobs")
    with pytest.raises(NotEnoughSites, match="B: JournalError: a site's store has lost the private part"):
        next(rounds)
    rig = Rig(study, tmp_path / "coordinator")
    rig.train()
    rot(tmp_path / "coordinator" / "coordinator" / "blobs")
    for act in (rig.start, rig.coordinator.release):
        with pytest.raises(JournalError, match="has lost the model of round 3: its file changed on the disk"):
            act()


def test_a_lost_private_part_is_said(tmp_path: Path) -> None:
    study = toy_study(
        method={"kind": "fedbn"},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
        schedule={"rounds": 2, "min_sites": 3},
    )
    out = go(tmp_path, study).out
    for blob in (out / "work" / "sites" / "B" / "federated" / "blobs").iterdir():
        blob.unlink()
    # Its answers are gone too, so the release must be asked for again.
    store = out / "work" / "sites" / "B" / "federated" / "store.sqlite"
    connection = sqlite3.connect(store)
    with connection:
        connection.execute("DELETE FROM replies")
    connection.close()
    with pytest.raises(Exception, match="has lost the private part"):
        go(tmp_path, study)


def test_a_record_that_is_no_database_is_said(tmp_path: Path) -> None:
    study = toy_study()
    out = go(tmp_path, study).out
    journal = out / "work" / "arms" / "federated" / "journal.sqlite"
    for file in journal.parent.glob("journal.sqlite-*"):
        file.unlink()
    journal.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(JournalError, match="could not be read or written"):
        go(tmp_path, study)


def test_drafts_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / "tmp01234567.draft").write_bytes(b"half")
    assert not list(Blobs(tmp_path).root.iterdir())


# The wrong folder ----------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_study_and_one_comparison(tmp_path: Path) -> None:
    go(tmp_path, toy_study(), compare=("local",))
    with pytest.raises(JournalError, match="another study"):
        go(tmp_path, toy_study(seed=4), compare=("local",))
    with pytest.raises(JournalError, match="another --compare"):
        go(tmp_path, toy_study(), compare=("local", "pooled"))
    with pytest.raises(JournalError, match="no run to go on with"):
        go(tmp_path / "empty", toy_study(), resume=True)
    with pytest.raises(JournalError, match="record of another study"):
        Journal(tmp_path / "out" / "work" / "arms" / "federated", "another identity")


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    out = go(tmp_path, toy_study()).out
    with (out / "work" / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(JournalError, match="another run is at work"):
            go(tmp_path, toy_study())
        # What a process at work is still writing would be swept away.
        draft = out / "work" / "sites" / "A" / "federated" / "blobs" / "x.draft"
        draft.write_bytes(b"half")
        with pytest.raises(JournalError, match="another run is at work"):
            evaluate(out, toy_sites(tmp_path / "data"), engine="local")
        assert draft.exists()
    go(tmp_path, toy_study(), resume=True)
    evaluate(out, toy_sites(tmp_path / "data"), engine="local")


class Stopping(Silent):
    """Ctrl-C after the first round."""

    def round(self, report: RoundReport) -> None:
        raise Interrupted("stop")


def test_a_run_resumed_on_another_fingerprint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study, ours = toy_study(), {**folder.fingerprint(), "device": "cpu", "precision": "fp32", "threads": "1"}
    with pytest.raises(Interrupted):
        go(tmp_path, study, watcher=Stopping())
    assert json.loads((tmp_path / "out" / "work" / "fingerprint.json").read_text()) == [ours]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "fingerprint", lambda: {**ours, "torch": "9.9", "cpu_capability": "ABACUS"})
        with pytest.raises(Interrupted):
            go(tmp_path, study, watcher=Stopping())
    # Back where it began: the rounds in between are another machine's all the same.
    caplog.clear()
    values = go(tmp_path, study)
    (note,) = values.notes
    assert f"torch 9.9 and {ours['torch']}; cpu_capability ABACUS and {ours['cpu_capability']}" in note
    assert "numpy" not in note
    assert note in caplog.messages
    assert values.fingerprint == ours
    assert note in html.unescape((tmp_path / "out" / "report.html").read_text())
    assert go(tmp_path / "plain", study).notes == go(tmp_path / "plain", study).notes == ()


# Sites ---------------------------------------------------------------------------------------------------------------


def test_a_round_goes_on_without_a_site_that_fails(tmp_path: Path) -> None:
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"fail": "B"}})
    values = go(tmp_path, study)
    assert values.participants == ("A", "C")
    assert values.notes == (
        "federated: B was left out of 4 of 4 rounds (rounds 1–4); what share of the training patients it holds is not "
        "known: it did not give their number",
        "federated, rounds 1–4: without B (RuntimeError) (4 times)",
    )
    assert values.failed == {"B": "RuntimeError"}
    assert values.withheld == {}
    assert values.metrics["federated"]["B"] is None
    assert values.metrics["federated"]["A"] is not None
    report = (tmp_path / "out" / "report.html").read_text()
    assert "without B" in report
    for page in (report, (tmp_path / "out" / "model_card.md").read_text()):
        assert "could not be measured" in page
        assert "withheld by the site" not in page.lower()
    assert lacking_in(values) == ["B: could not be measured (RuntimeError)"]


def test_a_site_that_was_away_is_named_with_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(LocalEngine):
        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for reply in super().exchange(messages):
                header = reply.header
                lost = (header.site, header.kind, header.round) == ("B", UPDATE, 2)
                yield Message(replace(header, kind="error", meta={"reason": "away"})) if lost else reply

    monkeypatch.setattr("wardround.engines.local.LocalEngine", Losing)
    values = go(tmp_path, toy_study())
    said = "federated: B was left out of 1 of 4 rounds (round 2); it holds 33% of the 12 training patients"
    assert values.notes == (said, "federated, round 2: without B (away)")
    assert said in html.unescape((tmp_path / "out" / "report.html").read_text())


class Broken(Silent):
    """A watcher that is not up to its work."""

    def step(self, arm: str, site: str, *_: int) -> None:
        if site == "B":
            raise Interrupted("not in the middle of a step")

    def round(self, report: RoundReport) -> None:
        raise RuntimeError("/data/DOE^JANE cannot be drawn")

    arms = evaluated = round  # type: ignore[assignment]


def test_a_broken_watcher_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study, sites = toy_study(), toy_sites(tmp_path / "data")
    watched = run(study, sites, tmp_path / "watched", engine="local", watcher=Broken())
    (said,) = [record.getMessage() for record in caplog.records if "watcher" in record.getMessage()]
    assert "the run goes on" in said
    assert "JANE" not in said
    assert watched.participants == ("A", "B", "C")
    assert watched.notes == ()
    assert watched.model_sha256 == run(study, sites, tmp_path / "plain", engine="local").model_sha256


def test_too_few_sites_stop_the_run_with_reasons(tmp_path: Path) -> None:
    options = {"fail": "B"}
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": options}, **ALL)
    with pytest.raises(NotEnoughSites, match=r"2 of 3 sites answered .* \(B: RuntimeError\)"):
        go(tmp_path, study)


def test_a_site_whose_loss_is_not_a_number_sends_nothing(tmp_path: Path) -> None:
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"nan": "C"}})
    values = go(tmp_path, study)
    assert values.participants == ("A", "B")
    (note,) = (n for n in values.notes if "round 1: without C" in n)
    assert "not finite" in note
    assert "local.lr" in note
