"""NVFlare's real processes on loopback: all is answered, whatever is killed; code and other classes are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hospitals.nvflare_stand import Echo, Stand, random_body, until
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.nvflare.jobs import RUNNING, WAITING, Jobs, write_job
from wardround.hospitals.nvflare.provision import admin_kit, server_workspace
from wardround.protection.identity import Identity

pytest.importorskip("nvflare", reason="NVFlare is not installed")
# NVFlare uses what its dependencies announce to remove, and a warning that is an error ends its connection.
pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.filterwarnings("ignore")]

MB = 1 << 20


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    made = Stand(tmp_path_factory.mktemp("fl"), ("Aachen", "Bonn"))
    try:
        made.start()
        yield made
    finally:
        made.close()
        assert [made.processes(workspace) for workspace in made.workspaces] == [[], [], []]


@pytest.mark.parametrize("megabytes", [0, 1, 20])
def test_bodies_go_to_all_sites_and_back(stand: Stand, tmp_path: Path, megabytes: int) -> None:
    body, sha256 = random_body(tmp_path / "body", megabytes * MB)
    assert stand.ask(body, sha256) == ["echo", "echo"]
    until(lambda: not list((stand.folders["Bonn"].spool / "nvflare").iterdir()))
    assert not list(stand.folder.spool.glob("*.body"))


@pytest.mark.parametrize("what", ["site's job", "server's job", "client", "client and job", "server", "agent"])
def test_all_is_answered_whatever_is_killed(stand: Stand, tmp_path: Path, what: str) -> None:
    stand.wait()
    body, sha256 = random_body(tmp_path / "body", MB)
    kinds: list[str] = []
    for echo in stand.echoes.values():
        echo.pause = 0.5
    asking = threading.Thread(target=lambda: kinds.extend(stand.ask(body, sha256)))
    before = stand.echoes["Aachen"].asked
    asking.start()
    until(lambda: stand.echoes["Aachen"].asked > before)
    site, server = stand.folders["Aachen"].nvflare, server_workspace(stand.folder)
    pids = {
        "site's job": stand.processes(site, "worker_process"),
        "server's job": stand.processes(server, "runner_process"),
        "client": stand.processes(site, "client_train"),
        "client and job": stand.processes(site),
        "server": stand.processes(server, "server_train"),
        "agent": [],
    }[what]
    assert pids or what == "agent"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    if what == "agent":
        stand.echoes["Aachen"].close()
        stand.echoes["Aachen"] = Echo(stand.folders["Aachen"].socket, "Aachen", stand.keys["Aachen"])
    asking.join()
    assert kinds == ["echo", "echo"]
    for echo in stand.echoes.values():
        echo.pause = 0.0


def test_a_twin_with_the_same_kit_answers_nothing(stand: Stand, tmp_path: Path) -> None:
    stand.wait()
    twin = SiteFolder(tmp_path / "twin")
    twin.spool.mkdir(parents=True)
    shutil.copytree(stand.folders["Aachen"].nvflare, twin.nvflare)
    echo = Echo(twin.socket, "Aachen", Identity.generate())
    stop = stand.client("Aachen", twin)
    log = twin.nvflare / "log.txt"
    try:
        until(lambda: log.exists() and "Successfully registered" in log.read_text())
        body, sha256 = random_body(tmp_path / "body", MB)
        for _ in range(5):
            assert stand.ask(body, sha256) == ["echo", "echo"]  # by the keys that were pinned: the hub looks at each
    finally:
        stop.set()
        until(lambda: not stand.processes(twin.nvflare))
        echo.close()


def test_a_site_refuses_code_and_classes_of_others_from_a_server_that_allows_them(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The path of a unix socket is short, and this test's name is not.
    stand = Stand(tmp_path_factory.mktemp("fl"), ("Aachen",))
    local = server_workspace(stand.folder) / "local"
    for name, change in (
        ("resources.json", {"class_list_enforcement_mode": "warn"}),
        ("authorization.json", {"permissions": {"lead": "any", "project_admin": "any"}}),
    ):
        value = json.loads((local / name).read_text()) | change
        (local / name).write_text(json.dumps(value))
    mark = tmp_path / "mark"
    jobs = Jobs(admin_kit(stand.folder), tmp_path / "jobs")
    try:
        stand.start()
        code = write_job(tmp_path / "code", "Aachen")
        (code / "app" / "custom").mkdir()
        (code / "app" / "custom" / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
        foreign = write_job(tmp_path / "foreign", "Aachen")
        config = foreign / "app" / "config" / "config_fed_client.json"
        executor = {"path": "subprocess.Popen", "args": {"args": ["touch", str(mark)]}}
        value = json.loads(config.read_text()) | {"executors": [{"tasks": ["none"], "executor": executor}]}
        config.write_text(json.dumps(value))
        states = []
        for folder in (code, foreign):
            number = jobs.hand_in(folder)
            until(lambda number=number: jobs.state(number) not in WAITING | RUNNING)
            states.append(jobs.state(number))
        assert all("COMPLETED" not in state for state in states), states
        assert not mark.exists()
        log = "".join(path.read_text() for path in stand.folders["Aachen"].nvflare.rglob("*log.txt"))
        assert "BYOC not permitted" in log or any("BYOC" in p.read_text() for p in local.parent.rglob("log.txt"))
        assert "allow_list" in log
    finally:
        jobs.close()
        stand.close()
