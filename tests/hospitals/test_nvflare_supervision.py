"""A process of NVFlare is started again when it dies, and what an earlier start left behind is ended and removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wardround.hospitals.nvflare.processes import Supervised, tidy

JOB = "0c1106c2-6877-475e-b6d7-1beca217454c"
OTHER = "2866fe63-9ce4-4fe4-a0e6-b0b86c95e122"


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end, "not within the limit"
        time.sleep(0.02)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Supervised]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "waits.py").write_text("import time\ntime.sleep(60)\n")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    made = Supervised(workspace, "waits", [], {"PYTHONPATH": str(tmp_path / "modules")})
    yield made
    made.close()
    assert made.pid is None


def test_a_process_that_died_is_started_again(process: Supervised) -> None:
    assert process.tend()
    first = process.pid
    assert first is not None
    assert not process.tend()
    os.kill(first, signal.SIGKILL)
    until(process.tend)
    assert process.pid not in (None, first)
    assert process.failures == 1
    process.close()
    assert not process.tend()


def left_behind(workspace: Path, job: str = "") -> subprocess.Popen[bytes]:
    """A process that looks like a job of a workspace, whose parent was killed."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", "nvflare.job", str(workspace), job]
    made = subprocess.Popen(command)
    until(lambda: str(workspace).encode() in Path(f"/proc/{made.pid}/cmdline").read_bytes())
    return made


def test_what_an_earlier_start_left_is_ended_and_removed(process: Supervised, tmp_path: Path) -> None:
    workspace = process.workspace
    (workspace / JOB / "app").mkdir(parents=True)
    (workspace / "startup").mkdir()
    (workspace / "daemon_pid.fl").write_text("1")
    ours, others = left_behind(workspace), left_behind(tmp_path / "another")
    try:
        assert process.tend()
        assert ours.wait(20.0) == -signal.SIGKILL
        assert others.poll() is None
        assert [path.name for path in workspace.iterdir()] == ["startup"]
    finally:
        for each in (ours, others):
            each.kill()
            each.wait()


def test_folders_of_jobs_go_once_no_process_works_for_them(process: Supervised) -> None:
    for job in (JOB, OTHER):
        (process.workspace / job).mkdir()
    process.purge()  # both are new
    assert (process.workspace / JOB).is_dir()
    for job in (JOB, OTHER):
        os.utime(process.workspace / job, (1, 1))
    working = left_behind(process.workspace, OTHER)
    try:
        process.purge()
        assert [path.name for path in process.workspace.iterdir()] == [OTHER]
    finally:
        working.kill()
        working.wait()


def test_half_a_body_is_kept_for_a_while_and_a_whole_one_of_an_earlier_process_is_not(tmp_path: Path) -> None:
    for name in ("a.body", "new.part", "old.part", "other"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "old.part", (1, 1))
    (tmp_path / "replies").mkdir()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.part", "other", "replies"]
