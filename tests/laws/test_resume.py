"""The law of resuming: killed at any instant and started again, a run ends with the same bits, each round once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.victims import ForkServer
from tests.scanners import PROTOCOLS
from tests.toys import toy_sites, toy_study

# Everything that a site or the coordinator must not lose: private layers, optimiser state, server momentum, and what
# waits at a site to be sent.
STUDIES: dict[str, dict[str, Any]] = {
    "personal": {
        "method": {"kind": "fedbn"},
        "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
        "local": {"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.02, "optimizer_state": "keep"},
        "schedule": {"rounds": 3, "min_sites": 3},
    },
    # The coordinator's mean of private parts, and each site's own.
    "stranger": {
        "method": {"kind": "hyperfed", "stranger": "mean"},
        "task": {"kind": "custom", "factory": "tests.scanners:make_scans", "options": {}},
        "sites": {name: {"acquisition": PROTOCOLS[name].model_dump()} for name in ("Alpha", "Beta", "Gamma")},
        "acquisition": {"kind": "ct"},
        "schedule": {"rounds": 3, "min_sites": 3},
    },
    "momentum": {
        "method": {"kind": "fedavgm", "momentum": 0.8},
        "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"features": 40}},
        "protection": {"compression": {"kind": "top_k", "ratio": 0.1}},
        "schedule": {"rounds": 3, "min_sites": 3, "release": "last"},
    },
}
COMPARE = {"personal": ["local"], "stranger": [], "momentum": []}
SLOW = {
    "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"pause": 0.04}},
    "schedule": {"rounds": 4, "min_sites": 1},
}


@pytest.fixture(scope="module", params=STUDIES)
def whole(
    request: pytest.FixtureRequest, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """An uninterrupted run: what every other one must come to."""
    study = STUDIES[request.param]
    out = tmp_path_factory.mktemp("whole") / "out"
    said = fork_server.run(out, study=study, compare=COMPARE[request.param], listen=True)
    assert "model_sha256" in said, said
    return {"study": study, "compare": COMPARE[request.param], "said": said, "rounds": rounds(out)}


def rounds(out: Path) -> list[dict[str, Any]]:
    """rounds.jsonl without what is timed."""
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    timed = ("seconds", "coordinator_seconds", "training_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_same(out: Path, said: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("model_sha256", "local_sha256", "metrics"):
        assert said.get(key) == whole["said"][key], said
    told = rounds(out)
    numbers = [(line["arm"], line["round"]) for line in told]
    assert len(set(numbers)) == len(numbers)
    assert told == whole["rounds"]
    assert not list(out.rglob("*.draft"))


@pytest.mark.slow
def test_killed_at_any_act(fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path) -> None:
    """An act is a file written, synced, renamed or deleted, a transaction begun or committed, a step of training."""
    heard, parts, chance = whole["said"]["heard"], 8, random.Random(7)
    killed_at: set[str] = set()
    for part in range(parts):
        acts = range(part * len(heard) // parts + 1, (part + 1) * len(heard) // parts + 1)
        # At a kind of act that was not tried yet, where this part of the run has one.
        fatal = chance.choice([act for act in acts if heard[act - 1] not in killed_at] or acts)
        out = tmp_path / f"killed-at-{fatal}"
        victim = fork_server.start(out, fatal=fatal, study=whole["study"], compare=whole["compare"])
        assert victim.wait() == -signal.SIGKILL
        killed_at.add(victim.died_at)
        assert_same(out, fork_server.run(out, study=whole["study"], compare=whole["compare"]), whole)
    assert len(killed_at) >= 6


@pytest.mark.slow
def test_killed_again_and_again(fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path) -> None:
    """Every life is a little longer than the one before would need, so the run gets on, one shred at a time."""
    out, lives = tmp_path / "out", 0
    fatal = whole["said"]["acts"] // 5
    while (victim := fork_server.start(out, fatal=fatal, study=whole["study"], compare=whole["compare"])).wait():
        lives += 1
        assert lives < 20
    assert lives >= 3
    assert_same(out, victim.said, whole)


@pytest.mark.slow
def test_killed_at_any_moment(fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path) -> None:
    chance = random.Random(11)
    for index in range(3):
        out = tmp_path / str(index)
        victim = fork_server.start(out, study=whole["study"], compare=whole["compare"])
        time.sleep(chance.uniform(0.02, 0.4))
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        assert_same(out, fork_server.run(out, study=whole["study"], compare=whole["compare"]), whole)


# Worker processes and Ctrl-C -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run whose steps take long enough to be hit; one site is enough for a round, so none may get lost."""
    out = tmp_path_factory.mktemp("slow") / "out"
    said = fork_server.run(out, study=SLOW)
    return {"said": said, "rounds": rounds(out)}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
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


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(fork_server: ForkServer, slow: dict[str, Any], tmp_path: Path) -> None:
    victim = fork_server.start(tmp_path / "out", study=SLOW, engine="workers", processes=1, hold=True)
    until(lambda: victim.held)
    os.kill(children(victim.pid)[0], signal.SIGKILL)
    victim.release()
    assert victim.wait() == 0
    assert_same(victim.out, victim.said, slow)


@pytest.mark.slow
def test_a_coordinator_that_dies_takes_its_workers_along(
    fork_server: ForkServer, slow: dict[str, Any], tmp_path: Path
) -> None:
    victim = fork_server.start(tmp_path / "out", study=SLOW, engine="workers", processes=1, hold=True)
    until(lambda: victim.held)
    workers = children(victim.pid)
    assert workers
    os.kill(victim.pid, signal.SIGKILL)
    victim.release()
    assert victim.wait() == -signal.SIGKILL
    assert_same(victim.out, fork_server.run(victim.out, study=SLOW), slow)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10.0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "workers"])
def test_ctrl_c_stops_cleanly_and_changes_nothing(
    fork_server: ForkServer, slow: dict[str, Any], tmp_path: Path, engine: str
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
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (victim.out / "result.json").exists()
    # Every round has all three sites: who had answered before Ctrl-C is not all there is.
    assert_same(victim.out, fork_server.run(victim.out, study=SLOW), slow)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "workers"])
def test_a_service_that_is_stopped_ends_as_with_ctrl_c(
    fork_server: ForkServer, slow: dict[str, Any], tmp_path: Path, engine: str
) -> None:
    """SIGTERM to the command and to every process it started, as a service manager or a batch system sends it."""
    study, out = toy_study(**SLOW), tmp_path / "out"
    sites = toy_sites(tmp_path / "data", tuple(study.sites))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(sites.model_dump(mode="json")))
    words = ["run", str(tmp_path / "study.yaml"), "--sites", str(tmp_path / "sites.yaml"), "--out", str(out)]
    words += ["--engine", engine, "--processes", "1"]
    victim = fork_server.start(out, command=words, hold=True)
    until(lambda: victim.held)
    workers = children(victim.pid)
    os.killpg(victim.pid, signal.SIGTERM)
    time.sleep(0.2)
    victim.release()
    assert victim.wait() == 130, victim.printed
    assert "run the same command again" in victim.printed
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (out / "result.json").exists()
    again = fork_server.start(out, command=words)
    assert again.wait() == 0, again.printed
    assert rounds(out) == slow["rounds"]
    assert json.loads((out / "result.json").read_text())["model_sha256"] == slow["said"]["model_sha256"]
