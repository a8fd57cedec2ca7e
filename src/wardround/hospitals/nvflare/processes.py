"""NVFlare's processes: started, started again when they die, and ended with the job processes they leave behind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from wardround.errors import WardroundError

log = logging.getLogger(__name__)
_JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds until a process that died is started again
_SETTLED = 120.0  # seconds after which a process that dies is no failure to start
_FATAL = 10.0  # seconds that a process may take to end by itself
_OLD = 7 * 86400.0  # seconds for which half a body waits for its rest


class Supervised:
    """One of NVFlare's processes, and the processes of its jobs: all have the folder `workspace` in their command."""

    def __init__(self, workspace: Path, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.workspace = workspace.absolute()
        folder = str(self.workspace)
        self._command = [sys.executable, "-u", "-m", module, "-m", folder, *arguments]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._failures, self._started = 0, 0.0

    @property
    def pid(self) -> int | None:
        """The process id while it lives."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    @property
    def failures(self) -> int:
        """How often it died since it last ran for a while."""
        return self._failures

    def tend(self) -> bool:
        """Start it where it does not run and it is time to; whether it was started just now.

        What an earlier one left behind is ended before: job processes without a parent answer to no one.
        Raises `WardroundError` where it cannot be started at all.
        """
        with self._lock:
            if self._closed or self.pid is not None:
                return False
            now = time.monotonic()
            if self._process is not None:
                log.warning("NVFlare's process ended with %s and is started again", self._process.returncode)
                self._process = None
                self._failures = 1 if now - self._started > _SETTLED else self._failures + 1
            pause = _PAUSES[min(self._failures, len(_PAUSES)) - 1] if self._failures else 0.0
            if self._started and now < self._started + pause:
                return False
            self._clean()
            self._started = now
            environment = {**os.environ, **_absolute_path(), "MALLOC_ARENA_MAX": "2", **self._environment}
            # NVFlare rotates a log of its own in the workspace; what it prints is the same.
            nothing = subprocess.DEVNULL
            try:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=self.workspace,
                    env=environment,
                    stdin=nothing,
                    stdout=nothing,
                    stderr=nothing,
                    start_new_session=True,
                )
            except OSError as error:
                raise WardroundError(
                    f"NVFlare's process could not be started: {error.strerror}", detail=str(self.workspace)
                ) from error
            return True

    def close(self) -> None:
        """End it and what it started."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                with suppress(ProcessLookupError):
                    self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=0.5)
            self._end_strays()
            if self._process is not None:
                self._process.wait(timeout=_FATAL)

    def _clean(self) -> None:
        self._end_strays()
        for folder in self.workspace.iterdir():
            if _JOB.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        for name in ("daemon_pid.fl", "pid.fl", "shutdown.fl", "restart.fl"):
            (self.workspace / name).unlink(missing_ok=True)

    def purge(self) -> None:
        """Remove the folders of jobs that no process of this workspace works for, and that are older than a minute."""
        current = " ".join(" ".join(command) for command in self._commands().values())
        for folder in self.workspace.iterdir():
            with suppress(OSError):
                old = time.time() - folder.stat().st_mtime > 60.0
                if _JOB.fullmatch(folder.name) and old and folder.name not in current:
                    shutil.rmtree(folder, ignore_errors=True)

    def _end_strays(self) -> None:
        for _ in range(50):
            strays = list(self._commands())
            if not strays:
                return
            for pid in strays:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if self._process is not None:
                self._process.poll()
            time.sleep(0.1)

    def _commands(self) -> dict[int, list[str]]:
        """The living processes of this workspace and their commands."""
        found = {}
        folder = str(self.workspace)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    ours = folder in command and any(part.startswith("nvflare.") for part in command)
                    if ours and int(entry.name) != os.getpid():
                        found[int(entry.name)] = command
        return found


def _absolute_path() -> dict[str, str]:
    """PYTHONPATH, where it is set, from the root: NVFlare's processes run in another folder."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in entries)} if entries else {}


def tidy(spool: Path) -> None:
    """Remove what earlier processes left in a folder of bodies; half a body stays, so that its transfer can go on."""
    for path in [*spool.glob("*.body"), *spool.glob("*.part")]:
        with suppress(OSError):
            if path.suffix == ".body" or time.time() - path.stat().st_mtime > _OLD:
                path.unlink()
