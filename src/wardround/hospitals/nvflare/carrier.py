"""The coordinator's end of NVFlare: its server process, one job a site, and the Hub behind a unix socket for them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from wardround.deidentify import describe_error
from wardround.errors import MissingExtra, WardroundError
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.nvflare.jobs import RUNNING, WAITING, Jobs
from wardround.hospitals.nvflare.names import HUB, LARGEST, SPOOL
from wardround.hospitals.nvflare.processes import Supervised, tidy
from wardround.hospitals.nvflare.provision import JOBS, ORGANISATION, SNAPSHOTS, admin_kit, server_workspace
from wardround.hospitals.nvflare.switchboard import Switchboard

log = logging.getLogger(__name__)
_TICK = 0.25
_LOOK = 1.0  # seconds between two looks at a job whose relay is not connected
_STARTING = 45.0  # seconds that a job may run without its relay; then it is a phantom, and another takes its place
_PURGE = 300.0


@dataclass(eq=False)
class _Line:
    """A site's job: its number, since when it is waited for, when it was looked at, and whether its relay was there."""

    job: str = ""
    since: float = 0.0
    looked: float = 0.0
    met: bool = False
    ended: list[str] = field(default_factory=list)


class NvflareCarrier:
    """Moves the Hub's messages over NVFlare. Kits were made by `provision`; sites are those of the signed list."""

    def __init__(self, hub: Hub, federation: Federation, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._workspace = server_workspace(folder)
        environment = {
            HUB: str(folder.socket.absolute()),
            SPOOL: str(folder.spool.absolute()),
            LARGEST: str(federation.largest_nbytes),
        }
        arguments = ["-s", "fed_server.json", "--set", "secure_train=true", f"org={ORGANISATION}"]
        module = "nvflare.private.fed.app.server.server_train"
        self._server = Supervised(self._workspace, module, [*arguments, "config_folder=config"], environment)
        self._jobs = Jobs(admin_kit(folder), folder.nvflare / "lines")
        self._board = Switchboard(hub, folder.socket, self._job_of)
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._complaint = ""

    @property
    def server_pid(self) -> int | None:
        """The process id of NVFlare's server while it lives."""
        return self._server.pid

    def start(self) -> None:
        """Listen at the socket, and start NVFlare's server and a job a site, again whenever they end.

        Raises `MissingExtra` without NVFlare, `WardroundError` without the server's kit.
        """
        import importlib.util

        if importlib.util.find_spec("nvflare") is None:
            raise MissingExtra("the carrier NVFlare", "hospitals")
        if not (self._workspace / "startup").is_dir():
            raise WardroundError(
                "the coordinator's folder has no start-up kit of NVFlare's server; make it with `wardround federation "
                "init`, or choose `carrier: https` in federation.yaml",
                detail=str(self._workspace),
            )
        tidy(self._folder.spool)
        self._board.start()
        self._thread.start()

    def close(self) -> None:
        """End the server, its jobs and all connections."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=20.0)
        self._board.close()
        self._jobs.close()
        self._server.close()

    def _job_of(self, site: str) -> str | None:
        with self._lock:
            line = self._lines.get(site)
            return None if line is None or not line.job else line.job

    def _supervise(self) -> None:
        purged = time.monotonic()
        while not self._stop.wait(_TICK):
            try:
                if self._server.pid is None:
                    self._restart()
                else:
                    for site in self._sites():
                        self._tend(site)
                if time.monotonic() - purged > _PURGE:
                    purged = time.monotonic()
                    self._purge()
                self._complaint = ""
            except Exception as error:
                # The server is being started, or is stuck: the next attempt has another session.
                self._complain(error)
                self._stop.wait(_LOOK)

    def _complain(self, error: Exception) -> None:
        said = describe_error(error)
        if said != self._complaint:
            self._complaint = said
            log.log(logging.WARNING if self._server.failures else logging.DEBUG, "NVFlare's server: %s", said)
            log.debug("detail", exc_info=True)

    def _restart(self) -> None:
        """Start the server with an empty store: jobs hold nothing, and of old ones it would say that they run."""
        self._jobs.close()
        for name in (JOBS, SNAPSHOTS):
            shutil.rmtree(self._workspace / name, ignore_errors=True)
        if self._server.tend():
            log.info("NVFlare's server is started")
            with self._lock:
                self._lines = {}

    def _tend(self, site: str) -> None:
        now = time.monotonic()
        with self._lock:
            line = self._lines.setdefault(site, _Line())
        if self._board.is_connected(site):
            line.met = True
            return
        if now - line.looked < _LOOK:
            return
        line.looked = now
        if line.job:
            state = self._jobs.state(line.job)
            if state in WAITING:
                line.since = now
                return
            if state in RUNNING and not line.met and now - line.since < _STARTING:
                return
            if state in RUNNING:
                # Its relay gave up, or never came. NVFlare takes long to see that, so its end is not waited for.
                with suppress(Exception):
                    self._jobs.abort(line.job)
            line.ended.append(line.job)
            log.info("the line of site %s ended (%s) and is begun again", site, state)
        line.job, line.since, line.met = "", now, False
        line.job = self._jobs.submit(site)

    def _purge(self) -> None:
        self._server.purge()
        for line in list(self._lines.values()):
            ended, line.ended = line.ended, []
            for job in ended:
                with suppress(Exception):
                    self._jobs.delete(job)

    def _sites(self) -> list[str]:
        """The sites of the signed list; the Hub looks at keys and signatures."""
        try:
            keys = json.loads(self._folder.roster.read_bytes())["keys"]
            return sorted(keys)
        except (OSError, ValueError, KeyError, TypeError):
            return []
