"""What goes wrong in hospitals: full disks, lost files, changed data, sites that fail, and the wrong folder."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.victims import Nursery
from tests.toys import toy_sites, toy_study
from wardround.errors import JournalError, NotEnoughSites
from wardround.federation.blobs import Blobs
from wardround.federation.journal import Journal
from wardround.federation.record import LOG
from wardround.runner.session import Result, run
from wardround.study.schema import Study

ALL = {"schedule": {"rounds": 3, "min_sites": 3}}


def go(tmp_path: Path, study: Study, **options: Any) -> Result:
    return run(study, toy_sites(tmp_path / "data", tuple(study.sites)), tmp_path / "out", engine="local", **options)


# The disk ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_error_and_nothing_is_half_written(nursery: Nursery, tmp_path: Path) -> None:
    whole = nursery.run(tmp_path / "whole", study=ALL)
    for act in (1, 4, 7):
        out = tmp_path / f"full-{act}"
        said = nursery.run(out, study=ALL, full=act)
        # Whose disk it is that is full decides who says so: the coordinator, or every site and then too few are left.
        assert said["error"] in ("JournalError", "NotEnoughSites"), said
        assert "No space left" in said["text"]
        assert "free some space and resume" in said["text"]
        assert str(tmp_path) not in said["text"]
        assert not list(out.rglob("*.draft"))
        assert not (out / "result.json").exists()
        assert nursery.run(out, study=ALL)["model_sha256"] == whole["model_sha256"]


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


def test_a_disk_that_is_really_full(nursery: Nursery, tmp_path: Path, small_disk: Path) -> None:
    whole = nursery.run(tmp_path / "whole", study=ALL)
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
        said = nursery.run(out, study=ALL)
        if "error" in said:
            failed += 1
            assert said["error"] in ("JournalError", "NotEnoughSites"), said
        ballast.unlink()
        said = nursery.run(out, study=ALL)
        assert said.get("model_sha256") == whole["model_sha256"], said
        subprocess.run(["rm", "-r", str(out)], check=True)
    assert failed


def test_a_lost_answer_is_made_anew_and_a_lost_model_is_said(tmp_path: Path) -> None:
    study = toy_study()
    whole = go(tmp_path / "whole", study)
    lost = go(tmp_path, study)
    for site in study.sites:
        for blob in (lost.out / "work" / "sites" / site / "federated" / "blobs").iterdir():
            blob.unlink()
    assert go(tmp_path, study).values["metrics"] == whole.values["metrics"]
    for blob in (lost.out / "work" / "arms" / "federated" / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(JournalError, match="has lost the model of round"):
        go(tmp_path, study)


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
    (tmp_path / "x.draft").write_bytes(b"half")
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
    go(tmp_path, toy_study(), resume=True)


# Sites ---------------------------------------------------------------------------------------------------------------


def test_changed_data_are_refused_on_resume(tmp_path: Path) -> None:
    study = toy_study(**ALL)
    out = go(tmp_path, study).out
    (tmp_path / "data" / "B" / "changed").touch()
    # A finished run has nothing left to train, so a new round needs the journal's last one gone.
    arm = out / "work" / "arms" / "federated"
    connection = sqlite3.connect(arm / "journal.sqlite")
    with connection:
        for table in ("states", "rounds", "receipts"):
            connection.execute(f"DELETE FROM {table} WHERE round = 3")
    connection.close()
    for site in study.sites:
        connection = sqlite3.connect(out / "work" / "sites" / site / "federated" / "store.sqlite")
        with connection:
            connection.execute("UPDATE replies SET request = 'another' || request")
        connection.close()
    lines = (arm / LOG).read_text().splitlines(keepends=True)
    second = next(i for i, line in enumerate(lines) if '"event":"committed"' in line and '"round":2' in line)
    (arm / LOG).write_text("".join(lines[: second + 1]))
    with pytest.raises(NotEnoughSites, match="DataError: the data of site B changed since the run began"):
        go(tmp_path, study)


def test_a_round_goes_on_without_a_site_that_fails(tmp_path: Path) -> None:
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"fail": "B"}})
    values = go(tmp_path, study).values
    assert values["participants"] == ["A", "C"]
    assert "federated, round 1: without B (RuntimeError)" in values["notes"]
    assert values["withheld"] == {"B": "RuntimeError"}
    assert values["metrics"]["federated"]["B"] is None
    assert values["metrics"]["federated"]["A"] is not None
    assert "without B" in (tmp_path / "out" / "report.html").read_text()


def test_too_few_sites_stop_the_run_with_reasons(tmp_path: Path) -> None:
    options = {"fail": "B"}
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": options}, **ALL)
    with pytest.raises(NotEnoughSites, match=r"2 of 3 sites answered .* \(B: RuntimeError\)"):
        go(tmp_path, study)


def test_a_site_whose_loss_is_not_a_number_sends_nothing(tmp_path: Path) -> None:
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"nan": "C"}})
    values = go(tmp_path, study).values
    assert values["participants"] == ["A", "B"]
    (note,) = (n for n in values["notes"] if "round 1: without C" in n)
    assert "not finite" in note
    assert "local.lr" in note
