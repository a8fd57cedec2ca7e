"""Faults across processes: whatever is killed, halted, cut or put back, the model is that of one machine."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hospitals.hole import hole
from tests.hospitals.namespaces import link
from tests.hospitals.ward import COORDINATOR, LONG, ROUNDS, SECURE, SITES, Ward, released, same_model, ward
from wardround.hospitals.coordinator.attendance import ALIVE
from wardround.hospitals.coordinator.status import StudyStatus, read_status
from wardround.hospitals.federation import Carrier

# Minutes of whole federations whose processes are killed: `make test-faults`.
pytestmark = pytest.mark.processes

CLEAR: dict[str, Any] = {}
#: The study waits for all sites: one that answers with an error does not make another model.
ALL: dict[str, Any] = {"schedule": {"rounds": ROUNDS, "min_sites": 3}}
TWO: dict[str, Any] = {"schedule": {"rounds": 40, "min_sites": 2}}


@pytest.fixture(params=["https", "nvflare"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    if request.param == "nvflare":
        pytest.importorskip("nvflare", reason="NVFlare is not installed")
    return request.param


@pytest.mark.slow
def test_all_kinds_of_processes_are_killed_in_a_study(tmp_path: Path) -> None:
    with ward(tmp_path, holds=["A"], sites="AB", schedule={"rounds": 4, "min_sites": 2}) as made:
        made.begin()
        made.wait_round(1)
        made.hold.touch()
        made.holding()
        made.kill_worker("A")
        made.restart("B")
        made.restart(COORDINATOR)
        made.hold.unlink()
        same_model(made, made.finish())


@pytest.mark.slow
@pytest.mark.parametrize("rules", [CLEAR, SECURE], ids=["clear", "secure"])
@pytest.mark.parametrize("victim", [COORDINATOR, "site", "worker"])
def test_a_process_is_killed_at_random_moments(carrier: Carrier, tmp_path: Path, victim: str, rules: Any) -> None:
    chance = random.Random(f"{victim} {len(rules)}")
    with ward(tmp_path, carrier, **{**ALL, **rules}) as made:
        made.begin()
        for number in (0, 1, 3, 5):
            made.wait_round(number)
            time.sleep(chance.uniform(0.0, 0.4))
            if victim == "worker":
                made.kill_worker(chance.choice(SITES))
            else:
                made.restart(COORDINATOR if victim == COORDINATOR else chance.choice(SITES))
        same_model(made, made.finish())


@pytest.mark.slow
def test_a_site_that_is_halted_for_longer_than_it_may_be_late(carrier: Carrier, tmp_path: Path) -> None:
    with ward(tmp_path, carrier) as made:
        made.begin()
        made.wait_round(2)
        made.federation.kill("B", signal.SIGSTOP)
        if carrier == "https":
            made.wait(lambda: made.said("site B is late"), "B late")
        else:
            # NVFlare's client is a process of its own, which goes on: the site counts as present.
            time.sleep(ALIVE + 2.0)
        made.federation.kill("B", signal.SIGCONT)
        same_model(made, made.finish())


@pytest.mark.slow
@pytest.mark.parametrize("rules", [CLEAR, SECURE], ids=["clear", "secure"])
@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_site_that_is_away_for_three_rounds_comes_back(tmp_path: Path, how: str, rules: Any) -> None:
    # A secure sum of three sites needs all of them, and one of four needs three.
    sites, others = "ABCD", ["B", "C", "D"]
    with ward(tmp_path, holds=["A"], sites=sites, **{**TWO, **rules}) as made, hole(made.port) as line:
        made.through("A", line.port)
        made.begin()
        made.wait_round(1)
        made.set_deadlines(reply=8.0)
        made.present()
        made.hold.touch()
        made.holding()
        if how == "killed":
            made.kill("A")
        else:
            line.fall_silent()
        made.wait(lambda: len(_without(made)) >= 3, "three rounds without A")
        assert made.rounds()[-1]["participants"] == others
        made.hold.unlink()
        if how == "killed":
            made.federation.start("A")
        else:
            line.pass_on()
        last = len(made.rounds())
        made.wait(lambda: any("A" in line["participants"] for line in made.rounds()[last:]), "A is back")
        made.set_deadlines(reply=LONG)
        result = made.finish()
        away = _without(made)
        assert len(away) < len(made.rounds()) == 40
        assert all("8 s, the federation's deadline" in line["missing"]["A"] for line in away)
        (note,) = [note for note in result.notes if "A" in note and "left out" in note]
        assert f"{len(away)} of 40" in note
        released(made)


@pytest.mark.slow
def test_a_link_goes_down_for_longer_than_the_deadline(tmp_path: Path) -> None:
    with link() as (host, inside, down), ward(tmp_path, host=host, **TWO) as made:
        made.federation.commands = {**made.federation.commands, "A": [*inside, *made.federation.commands["A"]]}
        made.begin()
        made.wait_round(1)
        made.set_deadlines(reply=8.0)
        made.present()
        with down():
            made.wait(lambda: len(_without(made)) >= 3, "three rounds without A")
        last = len(made.rounds())
        made.wait(lambda: any("A" in line["participants"] for line in made.rounds()[last:]), "A is back")
        made.set_deadlines(reply=LONG)
        made.finish()
        released(made)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["server_train", "runner_process", "client_train", "worker_process"])
def test_a_process_of_nvflare_is_killed(tmp_path: Path, module: str) -> None:
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    chance = random.Random(module)
    with ward(tmp_path, "nvflare", **ALL) as made:
        made.begin()
        for number in (1, 4):
            made.wait_round(number)
            time.sleep(chance.uniform(0.0, 0.4))
            assert made.kill_module(module)
        same_model(made, made.finish())


def _without(made: Ward) -> list[dict[str, Any]]:
    return [line for line in made.rounds() if "A" in line["missing"]]


@pytest.mark.slow
def test_a_slow_line_that_breaks_again_and_again(tmp_path: Path) -> None:
    chance = random.Random(4)
    with ward(tmp_path) as made, hole(made.port) as line:
        for site in SITES:
            made.through(site, line.port)
        line.delay = 0.02
        made.begin()
        for _ in range(60):
            time.sleep(chance.uniform(0.1, 1.0))
            line.cut()
            if made.ended():
                break
        same_model(made, made.finish())


@pytest.mark.slow
@pytest.mark.parametrize("rules", [CLEAR, SECURE], ids=["clear", "secure"])
def test_a_coordinator_s_folder_comes_back_from_an_old_copy(tmp_path: Path, rules: Any) -> None:
    folder, old, newest = tmp_path / COORDINATOR, tmp_path / "old", tmp_path / "newest"
    with ward(tmp_path, deadlines={"reply": LONG, "attempts": 1, "pause": 0.1}, **{**ALL, **rules}) as made:
        made.begin()
        made.wait_round(2)
        made.kill(COORDINATOR)
        shutil.copytree(folder, old, symlinks=True)
        made.federation.start(COORDINATOR)
        made.wait_round(5)
        made.kill(COORDINATOR)
        assert not (made.out / "result.json").exists()
        folder.rename(newest)
        shutil.copytree(old, folder, symlinks=True)
        made.federation.start(COORDINATOR)
        # No site goes back: another model of its rounds could come of it.
        status = made.wait(lambda: _stopped(made), "a study that stops")
        assert "the coordinator was restored from an older copy" in status.reason
        assert len(made.rounds()) < 5
        assert not (made.out / "models").exists()
        made.kill(COORDINATOR)
        shutil.rmtree(folder)
        newest.rename(folder)
        made.federation.start(COORDINATOR)
        same_model(made, made.finish())


def _stopped(made: Ward) -> StudyStatus | None:
    found = made.status()
    return found if found is not None and found.state == "stopped" else None


#: After the last round: before the release, after it was saved, before and after the result, before it is delivered.
LAST = [
    ("before", "wardround.federation.coordinator:Coordinator.release"),
    ("before", "wardround.runs.conduct:save_release"),
    ("after", "wardround.runs.conduct:save_release"),
    ("after", "wardround.runs.conduct:measured"),
    ("after", "wardround.runs.conduct:write_result"),
    ("after", "wardround.hospitals.coordinator.study_run:coordinate"),
    ("before", "wardround.hospitals.coordinator.study_run:StudyRun._deliver"),
]


@pytest.mark.slow
def test_a_coordinator_dies_again_and_again_after_the_last_round(tmp_path: Path) -> None:
    with ward(tmp_path, **ALL) as made:
        made.submit()
        made.federation.start(*SITES)
        for number, (when, place) in enumerate(LAST):
            folder = made.federation.coordinator.root
            made.federation.commands = {
                **made.federation.commands,
                COORDINATOR: [sys.executable, "-m", "tests.hospitals.mortal", when, place, str(folder)],
            }
            made.federation.start(COORDINATOR)
            if not number:
                made.approve()
            assert made.federation.processes.pop(COORDINATOR).wait(LONG) == -signal.SIGKILL
            assert len(made.rounds()) == ROUNDS
            _not_running_for_ever(made)
        made.federation.commands = {k: v for k, v in made.federation.commands.items() if k != COORDINATOR}
        made.federation.start(COORDINATOR)
        result = made.finish()
        same_model(made, result)
        # The best round, and not the last.
        assert result.selected_round["federated"] != ROUNDS


def _not_running_for_ever(made: Ward) -> None:
    """A dead coordinator's file says that its study runs, and until when that counts."""
    status = read_status(made.federation.coordinator.status)
    assert status is not None
    assert not status.alive(status.process.at + 60.0)
