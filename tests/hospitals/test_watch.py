"""What people see of a federation in a terminal: from its status alone, whatever state it is in."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.hospitals.loopback import federated
from wardround.cli import app
from wardround.cli.watch import changes, picture
from wardround.errors import JournalError
from wardround.hospitals.coordinator.status import (
    ArmStatus,
    Event,
    Heard,
    LeftOut,
    Process,
    Said,
    SiteStatus,
    Status,
    StudyStatus,
    read_status,
)
from wardround.hospitals.coordinator.status_lines import lines

NOW = 1_800_000_000.0


def _status(**changes: Any) -> Status:
    study = {
        "name": "knee",
        "study_sha256": "0" * 64,
        "submitted": NOW - 1000.0,
        "state": "running",
        "rounds": 10,
        "training_sites": ("A", "B"),
        "sites": {"A": Said(state="approved"), "B": Said(state="approved")},
        "arms": (ArmStatus(name="federated", round=4, loss=0.5, validation={"psnr": 31.234}),),
        "participants": ("A",),
        "missing": {"B": "no answer within 3600 s"},
        "left_out": {"B": LeftOut(rounds=2, reason="no answer within 3600 s")},
        "working": {"A": Heard(arm="federated", round=5, step=3, steps=9)},
        "seconds_a_round": 60.0,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "budget": 8.0,
        "log_records": 12,
        "log_head": "ab" * 32,
        **changes,
    }
    process = Process(
        state="running", pid=1, version="1", began=NOW - 100.0, at=NOW, carrier="https", address="host:8443"
    )
    sites = (
        SiteStatus(name="A", state="present", seen=NOW - 1.0),
        SiteStatus(name="B", state="lost", seen=NOW - 4000.0, waiting=1, certificate_until=NOW + 3 * 86400.0),
        SiteStatus(name="C", state="never"),
    )
    return Status(
        federation="trial",
        process=process,
        sites=sites,
        studies=(StudyStatus.model_validate(study),),
        events=(Event(at=NOW, text="knee: running"),),
    )


def _drawn(status: Status) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(picture(status, None, NOW))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("shown", [lambda status: "\n".join(lines(status, now=NOW)), _drawn])
def test_a_running_study_is_shown(shown: Any) -> None:
    text = shown(_status())
    for words in (
        "Federation trial: at work for 1 min 40 s on host:8443 (https)",
        "expires in 3 days",
        "lost: its connection is gone",
        "never connected",
        "round 4 of 10",
        "psnr 31.23",
        "A: federated, round 5, step 3 of 9",
        "the last round went on without B: no answer within 3600 s",
        "about 6 min left",
        "2.0 MB to the sites, 1.0 MB from them",
        "the sites say at the end what was spent of 8",
        "12 records, head abab",
    ):
        assert words in text


def test_a_study_that_stands_still_says_why() -> None:
    asking = {"A": Said(state="pending", reason="the board meets"), "B": Said()}
    text = "\n".join(lines(_status(state="asking", sites=asking), now=NOW))
    assert "waits for the hospitals' decisions" in text
    assert "A has not decided yet: the board meets" in text
    assert "B did not answer yet" in text
    text = "\n".join(lines(_status(state="stopped", reason="too few", waits_for=("B",)), now=NOW))
    assert "too few" in text
    assert "goes on by itself when B is back" in text
    text = "\n".join(lines(_status(state="finished", undelivered=("B",), epsilon={"A": 3.0}), now=NOW))
    assert "the released model waits for B" in text
    assert "spent epsilon A 3 of 8" in text


def test_a_coordinator_that_is_silent_is_not_called_at_work() -> None:
    assert "does not answer any more" in next(lines(_status(), now=NOW + 100.0))


def test_the_command_prints_how_it_is_and_follows_to_the_end(tmp_path: Path) -> None:
    with federated(tmp_path) as made:
        made.submit()
        said = list(changes(made.place, "toy"))
        assert "toy: finished" in said
        assert any(line.startswith("toy: round 4 of 4") for line in said)
        made.until(lambda s: s.state == "finished")
        runner = CliRunner()
        once = runner.invoke(app, ["watch", "toy", "--once", "--federation", str(made.place.root)])
        assert once.exit_code == 0
        assert "study toy: finished, round 4 of 4" in once.stdout
        unknown = runner.invoke(app, ["watch", "other", "--once", "--federation", str(made.place.root)])
        assert unknown.exit_code == 2
        assert "there are toy" in unknown.stderr


def test_a_status_that_is_no_status_is_said(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    for text in ("", "[]", '{"version": 2}', "{" * 100_000):
        path.write_text(text)
        with pytest.raises(JournalError, match="start the coordinator again"):
            read_status(path)


def test_what_is_alive_wrote_lately() -> None:
    now = time.time()
    status = _status()
    alive = status.model_copy(update={"process": status.process.model_copy(update={"at": now})})
    assert alive.alive(now)
    assert not alive.alive(now + 60.0)
    ended = alive.model_copy(update={"process": alive.process.model_copy(update={"state": "ended"})})
    assert not ended.alive(now)
