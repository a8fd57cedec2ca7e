"""A whole federation on one machine: every party has a folder and a process of its own, as it would at a hospital.

People rehearse with it before hospitals are asked; tests and benchmarks kill its processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wardround.errors import WardroundError
from wardround.hospitals.federation import Carrier, Deadlines, Federation
from wardround.hospitals.folders import CoordinatorFolder, SiteFolder
from wardround.hospitals.membership.joining import join
from wardround.hospitals.membership.kits import admit, init, invite
from wardround.wire.files import write_text

#: The party that is no site.
COORDINATOR = "coordinator"
_HOST = "127.0.0.1"
_NO_KEY = "0" * 64


@dataclass
class Rehearsal:
    """The folders of a federation on one machine, and the processes of its parties that are at work.

    `commands` gives the command of a party where another than the product's own is to be run.
    """

    root: Path
    coordinator: CoordinatorFolder
    sites: Mapping[str, SiteFolder]
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def parties(self) -> tuple[str, ...]:
        """The coordinator and all sites."""
        return (COORDINATOR, *self.sites)

    def log(self, party: str) -> Path:
        """What a party's process says."""
        return self.root / f"{party}.log"

    def start(self, *parties: str, more: Sequence[str] = ()) -> None:
        """Start processes, by default those of all parties; each is the leader of a process group of its own.

        `more` are further words of the coordinator's command.
        """
        for party in parties or self.parties:
            folder = self.coordinator.root if party == COORDINATOR else self.sites[party].root
            role = "federation" if party == COORDINATOR else "site"
            usual = [sys.executable, "-m", "wardround", role, "start", str(folder)]
            command = [*self.commands.get(party, usual), *(more if party == COORDINATOR else ())]
            with self.log(party).open("ab") as log:
                self.processes[party] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )

    def kill(self, party: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a party's process alone: what it started is left to find out by itself."""
        self.processes[party].send_signal(how)
        if how in (signal.SIGKILL, signal.SIGTERM):
            self.processes[party].wait()

    def stop(self, patience: float = 20.0) -> None:
        """End all processes and whatever they started: first by asking, then by force."""
        for process in self.processes.values():
            if process.poll() is None:
                # One that is halted hears nothing.
                process.send_signal(signal.SIGCONT)
                process.terminate()
        until = time.monotonic() + patience
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()

    def require(self, party: str) -> None:
        """Raise `WardroundError` where a party's process that was started has ended by itself."""
        process = self.processes.get(party)
        if process is not None and process.poll() is not None:
            tail = self.log(party).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise WardroundError(f"the process of {party} ended", detail=" ".join(tail))

    def wait_for(self, what: Callable[[], Any], seconds: float, name: str, look: float = 0.1) -> Any:
        """The first answer of `what` that is not nothing; raises `WardroundError` after `seconds` without one."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = what()
            if found:
                return found
            for party in self.parties:
                self.require(party)
            time.sleep(look)
        raise WardroundError(f"{name} did not happen within {seconds:.0f} s; what the processes say is in the logs")


def rehearse(
    root: Path,
    carrier: Carrier,
    data: Mapping[str, Mapping[str, Any]],
    *,
    deadlines: Deadlines | None = None,
    largest_gb: float = 4.0,
    host: str = _HOST,
) -> Rehearsal:
    """Make a federation of the sites of `data`, which holds each one's entry of a sites file; nothing is started.

    Goes the way that people go: init, invite, join, admit. The coordinator and each site get a folder in `root`. `host`
    is the coordinator's name or address, where sites are to reach it by another than loopback's.
    """
    coordinator = CoordinatorFolder(root / COORDINATOR)
    federation = Federation(
        name="rehearsal",
        carrier=carrier,
        host=host,
        port=free_port(),
        root_key=_NO_KEY,
        deadlines=deadlines or Deadlines(),
        largest_gb=largest_gb,
    )
    init(coordinator.root, federation)
    sites = {}
    for name, entry in data.items():
        invitation = invite(coordinator.root, name)
        joined = join(invitation.kit, root / name)
        admit(coordinator.root, name, joined.key)
        write_text(joined.folder.site, yaml.safe_dump({"sites": {name: dict(entry)}}, sort_keys=False))
        sites[name] = joined.folder
    return Rehearsal(root, coordinator, sites)


def free_port() -> int:
    """A port of the loopback interface that nothing uses now."""
    with socket.socket() as found:
        found.bind((_HOST, 0))
        return int(found.getsockname()[1])
