"""The law of resuming: killed at any instant and started again, a run ends with the same bits, each round once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.faults.killed import CASES, Case, Undisturbed, Whole, rounds
from tests.faults.victims import ForkServer
from tests.toys import toy_sites, toy_study

SLOW = {
    "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"pause": 0.04}},
    "schedule": {"rounds": 4, "min_sites": 1},
}


@pytest.fixture(params=CASES)
def whole(request: pytest.FixtureRequest, undisturbed: Undisturbed) -> Whole:
    """An uninterrupted run: what every other one must come to."""
    return undisturbed[request.param]


@pytest.mark.parametrize(
    ("case", "act"),
    [
        ("personal", "before commit"),
        pytest.param("asynchronous", "before commit", marks=pytest.mark.slow),
        *(pytest.param("personal", act, marks=pytest.mark.slow) for act in ("before rename", "after loss")),
    ],
)
def test_killed_in_the_middle_of_the_run(undisturbed: Undisturbed, tmp_path: Path, case: str, act: str) -> None:
    """Of the matrix below, an act of each kind."""
    whole = undisturbed[case]
    acts = [number for number, heard in enumerate(whole.heard, 1) if heard == act]
    killed = whole.killed(tmp_path / "out", acts[len(acts) // 2])
    # Where sites answer beside each other, an act has another number each time.
    assert killed == act or case == "asynchronous"
    whole.resume(tmp_path / "out")


@pytest.mark.slow
def test_killed_at_any_act(whole: Whole, tmp_path: Path) -> None:
    """An act is a file written, synced, renamed or deleted, a transaction begun or committed, a step of training."""
    heard, parts, chance = whole.heard, 8, random.Random(7)
    killed_at: set[str] = set()
    for part in range(parts):
        acts = range(part * len(heard) // parts + 1, (part + 1) * len(heard) // parts + 1)
        # At a kind of act that was not tried yet, where this part of the run has one.
        fatal = chance.choice([act for act in acts if heard[act - 1] not in killed_at] or acts)
        out = tmp_path / f"killed-at-{fatal}"
        killed_at.add(whole.killed(out, fatal))
        whole.resume(out)
    assert len(killed_at) >= 6


@pytest.mark.slow
def test_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """Each life is a little longer than the one before: a start alone may need as many acts as the first life has."""
    out, lives = whole.case.prepared(tmp_path / "out"), 0
    acts = whole.said["acts"]
    while (victim := whole.start(out, fatal=acts // 5 + lives * acts // 20)).wait():
        lives += 1
        assert lives < 20
        whole.case.after_death(out)
    assert lives >= 3
    whole.assert_same(out, victim.said)


@pytest.mark.slow
def test_killed_at_any_moment(whole: Whole, tmp_path: Path) -> None:
    chance = random.Random(11)
    for index in range(3):
        out = whole.case.prepared(tmp_path / str(index))
        victim = whole.start(out)
        time.sleep(chance.uniform(0.02, 0.4))
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        whole.case.after_death(out)
        whole.resume(out)


# Worker processes and Ctrl-C -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A whole run whose steps take long enough to be hit; one site is enough for a round, so none may get lost."""
    out = tmp_path_factory.mktemp("slow") / "out"
    return Whole(Case(SLOW), fork_server, fork_server.run(out, study=SLOW), rounds(out), {})


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that will hold: long, for a process that starts beside many others takes its time."""
    end = time.monotonic() + 300.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs. One whose parent died first may stay as a zombie: not every pid 1 takes them away."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_has_ended_is_not_alive_though_none_has_asked_for_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    assert alive(os.getpid())
    until(lambda: not alive(process.pid))
    assert Path(f"/proc/{process.pid}").exists()
    process.wait()
    assert not alive(process.pid)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(fork_server: ForkServer, slow: Whole, tmp_path: Path) -> None:
    victim = fork_server.start(tmp_path / "out", study=SLOW, engine="workers", processes=1, hold=True)
    until(lambda: victim.held)
    os.kill(children(victim.pid)[0], signal.SIGKILL)
    victim.release()
    assert victim.wait() == 0
    slow.assert_same(victim.out, victim.said)


@pytest.mark.slow
def test_a_coordinator_that_dies_takes_its_workers_along(fork_server: ForkServer, slow: Whole, tmp_path: Path) -> None:
    victim = fork_server.start(tmp_path / "out", study=SLOW, engine="workers", processes=1, hold=True)
    until(lambda: victim.held)
    workers = children(victim.pid)
    assert workers
    os.kill(victim.pid, signal.SIGKILL)
    victim.release()
    assert victim.wait() == -signal.SIGKILL
    slow.resume(victim.out)
    until(lambda: not any(map(alive, workers)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "workers"])
def test_ctrl_c_stops_cleanly_and_changes_nothing(
    fork_server: ForkServer, slow: Whole, tmp_path: Path, engine: str
) -> None:
    victim = fork_server.start(tmp_path / "out", study=SLOW, engine=engine, processes=1, hold=True)
    until(lambda: victim.held)
    workers = children(victim.pid)
    os.killpg(victim.pid, signal.SIGINT)
    time.sleep(0.2)
    victim.release()
    assert victim.wait() == 0
    assert victim.said["error"] == "Interrupted", victim.said
    assert "run the same command again" in victim.said["text"]
    assert not any(map(alive, workers))
    assert not (victim.out / "result.json").exists()
    # Every round has all three sites: who had answered before Ctrl-C is not all there is.
    slow.resume(victim.out)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "workers"])
def test_a_service_that_is_stopped_ends_as_with_ctrl_c(
    fork_server: ForkServer, slow: Whole, tmp_path: Path, engine: str
) -> None:
    """SIGTERM to the command and to every process it started, as a service manager or a batch system sends it."""
    study, out = toy_study(**SLOW), tmp_path / "out"
    sites = toy_sites(tmp_path / "data", tuple(study.sites))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(sites.model_dump(mode="json")))
    words = ["run", str(tmp_path / "study.yaml"), "--sites", str(tmp_path / "sites.yaml"), "--out", str(out)]
    words += ["--engine", engine, "--processes", "1", "--allow-code"]
    victim = fork_server.start(out, command=words, hold=True)
    until(lambda: victim.held)
    workers = children(victim.pid)
    os.killpg(victim.pid, signal.SIGTERM)
    time.sleep(0.2)
    victim.release()
    assert victim.wait() == 130, victim.printed
    assert "run the same command again" in victim.printed
    assert not any(map(alive, workers))
    assert not (out / "result.json").exists()
    again = fork_server.start(out, command=words)
    assert again.wait() == 0, again.printed
    assert rounds(out) == slow.rounds
    assert json.loads((out / "result.json").read_text())["model_sha256"] == slow.said["model_sha256"]
