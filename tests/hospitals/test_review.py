"""What a hospital reads before it decides, and the commands by which it decides, starts and stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.hospitals.joined import Consortium, NoCourier, resident, wait_for
from tests.toys import toy_study
from wardround.cli import app
from wardround.errors import StudyError
from wardround.hospitals.proposal import proposal_message
from wardround.hospitals.site.control import resume, stop_all_work
from wardround.hospitals.site.decisions import Decisions
from wardround.hospitals.site.review import Review, review
from wardround.study.hashes import study_sha256
from wardround.study.load import load_study
from wardround.study.schema import Study

SMALL = {"name": "small", "sites": {"A": {}, "B": {}}, "schedule": {"rounds": 2}}


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


def looked(consortium: Consortium, study: Study, compare: tuple[str, ...] = (), **how: Any) -> Review:
    resident(consortium.of("A")).handle(consortium.propose("A", study, compare))
    decisions = Decisions(consortium.of("A"))
    found = decisions.get(study_sha256(study))
    assert found is not None
    return review(decisions, found, **{"allow_code": True, "floor": 1, **how})


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_review_says_what_runs_on_whom_and_what_leaves(consortium: Consortium) -> None:
    study = toy_study({"A": {}, "B": {}, "C": {"role": "evaluate"}}, description="Lines through points")
    seen = looked(consortium, study, ("local",))
    text = flat(seen.text)
    assert seen.obstacles == ()
    for words in (
        "Lines through points",
        "B trains",
        "C evaluates: validates and tests",
        "train 4 the model learns from them",
        "test 2 the released model is measured on them",
        "local/A",
        "model 4 65 integers of 32 bits, 26 for the value",
        "Tensors: 0.weight, 0.bias, 2.weight, 2.bias.",
        "r -100 to 100 1e-06",
        "4 rounds of each of 2 models",
        "could read this hospital's",
        "make_task (task), not installed here",
        "drawn from the study's seed",
        "device cpu, threads on the CPU: 1",
        study_sha256(study),
    ):
        assert words in text, words
    assert str(consortium.folder) not in text


@pytest.mark.slow
def test_a_review_says_what_protects_the_patients(consortium: Consortium) -> None:
    private = toy_study(
        task={"kind": "custom", "factory": "tests.toys:Regression", "options": {"patients": 40}},
        method={"kind": "fedavg", "weights": "equal"},
        schedule={"rounds": 1, "release": "last"},
        protection={"secure": True, "privacy": {"patients_per_step": 2}},
    )
    text = flat(looked(consortium, private, floor=11).text)
    assert "learns the sum over the hospitals and nothing of this one" in text
    assert "36 training patients" in text
    assert "epsilon" in text
    assert "keys and shares of the secure sum" in text
    assert "nothing of test patients leaves" in text
    assert "fewer than 11 patients leaves" in text


def test_a_review_of_a_hospital_that_does_not_train_says_that_no_update_leaves(consortium: Consortium) -> None:
    text = flat(looked(consortium, toy_study({"A": {"role": "unseen"}, "B": {}})).text)
    assert "every round" not in text
    assert "train 4 not used" in text


def test_what_cannot_be_approved_is_said(consortium: Consortium) -> None:
    study = toy_study()
    seen = looked(consortium, study, allow_code=False)
    assert "site.yaml does not allow it" in flat(seen.text)
    assert any("code by its place" in why for why in seen.obstacles)
    other = consortium.proposal(study).model_copy(update={"plan_sha256": "1" * 64, "package": "0.0.1"})
    each = resident(consortium.of("A"))
    each.handle(proposal_message(other, "A"))
    decisions = Decisions(consortium.of("A"))
    found = decisions.get(study_sha256(study))
    assert found is not None
    seen = review(decisions, found, allow_code=True)
    assert any("other defaults" in why for why in seen.obstacles)
    plugin = toy_study(seed=5).model_dump(mode="json", exclude_unset=True)
    named = load_study({**plugin, "task": {**plugin["task"], "factory": "their_task"}})
    seen = looked(consortium, named, allow_code=False)
    assert seen.obstacles == (
        "site.yaml does not allow the plug-in their_task: if you trust the package that has it, add it to `plugins`",
    )


def told(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return flat(done.output)


def test_a_hospital_reviews_then_approves_then_refuses(consortium: Consortium) -> None:
    folder = str(consortium.of("A").root)
    study = load_study(SMALL)
    sha256 = study_sha256(study)
    each = resident(consortium.of("A"), allow_code=False)
    assert "No study waits" in told("site", "review", "--folder", folder)
    assert "none was proposed" in told("site", "review", "small", "--folder", folder, code=2)
    each.handle(consortium.propose("A", study))
    assert f"small {sha256[:12]}" in told("site", "review", "--folder", folder)
    assert "review the study first" in told("site", "approve", "small", "--folder", folder, code=2)
    text = told("site", "review", sha256[:8], "--folder", folder)
    assert "the data cannot be opened" in text
    assert f"site approve {sha256[:12]}" in text
    # Between review and approval the coordinator asks for more.
    each.handle(consortium.propose("A", study, ("local",)))
    assert "review it again" in told("site", "approve", "small", "--folder", folder, code=2)
    told("site", "review", "small", "--folder", folder)
    assert "Approved small" in told("site", "approve", "small", "--folder", folder)
    assert each.decisions.standing(sha256).state == "approved"
    assert "approved" in told("site", "status", folder)
    assert "Refused" in told("site", "refuse", "small", "--reason", "no time", "--folder", folder)
    assert each.decisions.standing(sha256).reason == "no time"
    text = told("site", "refuse", "small", "--reason", "see /data/DOE^JANE 19600101", "--folder", folder)
    assert "It reads of your reason: see [path]" in text
    assert "DOE" not in each.decisions.standing(sha256).reason
    kept = (consortium.of("A").studies / sha256 / "decisions.jsonl").read_text().splitlines()
    assert [json.loads(line)["state"] for line in kept] == ["approved", "refused", "refused"]
    assert "no folder of a site" in told("site", "status", str(consortium.folder / "B" / "data"), code=2)


def test_two_studies_of_one_name_are_told_apart_by_their_hashes(consortium: Consortium) -> None:
    each = resident(consortium.of("A"))
    for seed in (1, 2):
        each.handle(consortium.propose("A", toy_study(seed=seed)))
    decisions = Decisions(consortium.of("A"))
    with pytest.raises(StudyError, match="2 studies"):
        decisions.find("toy")
    one = study_sha256(toy_study(seed=1))
    assert decisions.find(one[:10]).sha256 == one


def test_the_kill_switch_works_without_a_process(consortium: Consortium) -> None:
    folder = consortium.of("A")
    assert stop_all_work(folder, "a doubt") == []
    assert folder.stopped.read_text() == "a doubt\n"
    assert "is stopped" in told("site", "status", str(folder.root))
    assert "resume" in told("site", "start", str(folder.root), code=2)
    assert resume(folder)
    assert not resume(folder)


def test_a_worker_of_a_process_that_hangs_is_killed_too(consortium: Consortium) -> None:
    folder = consortium.of("A")
    spec = folder.studies / ("0" * 64) / "worker.json"
    sleeping = "import time, sys; time.sleep(60)"
    command = [sys.executable, "-c", sleeping, "wardround.engines.worker", str(spec)]
    other = [*command[:-1], "/elsewhere/worker.json"]
    with subprocess.Popen(command) as ours, subprocess.Popen(other) as theirs:
        try:
            wait_for(lambda: b"worker.json" in Path(f"/proc/{ours.pid}/cmdline").read_bytes())
            assert stop_all_work(folder) == [ours.pid]
            assert ours.wait(20) < 0
            assert theirs.poll() is None
        finally:
            for process in (ours, theirs):
                process.kill()


@pytest.mark.slow
def test_the_process_starts_and_stops_by_command(consortium: Consortium) -> None:
    folder = consortium.of("A")
    place = str(folder.root)
    code = (
        "import sys; from wardround.hospitals.site import agent; import tests.hospitals.joined as joined; "
        "agent.couriers_of = lambda _: lambda *_: joined.NoCourier(); "
        "from wardround.cli import main; sys.argv = ['wardround', 'site', 'start', sys.argv[1]]; main()"
    )
    assert NoCourier.state == "idle"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(("src", "."))}
    with subprocess.Popen([sys.executable, "-c", code, place], env=environment, stdout=subprocess.PIPE) as process:
        try:
            wait_for(lambda: folder.socket.exists() and folder.status.exists())
            assert "https: idle" in told("site", "status", place)
            assert "All work is stopped" in told("site", "stop", place, "--now")
            wait_for(lambda: json.loads(folder.status.read_text())["state"] == "stopped")
            assert "Work goes on" in told("site", "resume", place)
            assert "The process ended" in told("site", "stop", place)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert "not running" in told("site", "status", place)
    assert "No process was running" in told("site", "stop", place)
