"""Runs in processes of their own, to be killed (see `tests.faults.fork_server`)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast


@dataclass(frozen=True)
class Victim:
    """A run in its own process and process group."""

    pid: int
    out: Path
    notes: Path
    fork_server: ForkServer

    @property
    def died_at(self) -> str:
        """The act it was killed at."""
        return (self.notes / "act").read_text()

    def wait(self) -> int:
        """The exit code; negative is the signal that killed it."""
        return int(self.fork_server.ask({"wait": self.pid}))

    @property
    def held(self) -> bool:
        """Whether it stands in the middle of training, and will until it is released."""
        return (self.notes / "hold.reached").exists()

    def release(self) -> None:
        """Let it go on."""
        (self.notes / "hold").unlink()

    @property
    def printed(self) -> str:
        """What a command printed."""
        return (self.notes / "printed").read_text()

    @property
    def said(self) -> dict[str, Any]:
        """What the run came to; empty while it has not."""
        path = self.notes / "said"
        return dict(json.loads(path.read_text())) if path.exists() else {}


class ForkServer:
    """Starts runs; see `tests.faults.fork_server`."""

    def __init__(self) -> None:
        self._notes = tempfile.TemporaryDirectory()
        self._count = 0
        command = [sys.executable, "-m", "tests.faults.fork_server"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def ask(self, job: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, out: Path, *, hold: bool = False, **job: Any) -> Victim:
        """A victim that is on its way; one to `hold` stops in the middle of training."""
        self._count += 1
        notes = Path(self._notes.name) / str(self._count)
        notes.mkdir()
        if hold:
            (notes / "hold").touch()
            job["hold"] = str(notes / "hold")
        job = {"out": str(out), "notes": str(notes), "data": str(notes / "data"), **job}
        return Victim(int(self.ask(job)), out, notes, self)

    def run(self, out: Path, **job: Any) -> dict[str, Any]:
        """A victim that lives to the end of its run, and what it said."""
        victim = self.start(out, **job)
        assert victim.wait() == 0
        return victim.said

    def close(self) -> None:
        # It has nothing to put in order, and leaving torch in peace takes seconds.
        self._process.kill()
        self._process.wait(timeout=30)
        cast(Any, self._process.stdin).close()
        cast(Any, self._process.stdout).close()
        self._notes.cleanup()
