"""The coordinator's end of NVFlare: its server process, one job a site, and the Hub behind a unix socket for them."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from wardround.deidentify import describe_error
from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.errors import MissingExtra, Rejected, WardroundError, WireError
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.hub import Hub
from wardround.hospitals.nvflare.jobs import RUNNING, WAITING, Jobs
from wardround.hospitals.nvflare.names import ALIVE, HELLO, HUB, LARGEST, LOST, PULSE, SPOOL, instance_of
from wardround.hospitals.nvflare.processes import Supervised
from wardround.hospitals.nvflare.provision import JOBS, ORGANISATION, SNAPSHOTS, admin_kit, server_workspace
from wardround.hospitals.replies import SpooledBody
from wardround.wire.message import FileBody, Message

log = logging.getLogger(__name__)
_TICK = 0.25
_LOOK = 1.0  # seconds between two looks at a job whose relay is not connected
_STARTING = 45.0  # seconds that a job may run without its relay; then it is a phantom, and another takes its place
_PURGE = 300.0
_OLD = 7 * 86400.0  # seconds for which half a body waits for its rest
_MOST_CONNECTIONS = 1000


@dataclass(eq=False)
class _Talk:
    """One connection of a relay."""

    site: str
    stream: BinaryIO
    instance: str = ""
    heard: float = 0.0
    over: bool = False


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
        self._hub, self._folder = hub, folder
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
        self._frames = SharedBodies()
        self._lines: dict[str, _Line] = {}
        self._talks: dict[str, _Talk] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listening: socket.socket | None = None
        self._threads: list[threading.Thread] = []
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
        self._tidy_spool()
        self._folder.socket.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX)
        try:
            self._listening.bind(str(self._folder.socket))
        except OSError as error:
            raise WardroundError(
                "the coordinator's socket cannot be made; its path may have 107 bytes at most: choose a shorter folder",
                detail=f"{self._folder.socket}: {error}",
            ) from error
        self._folder.socket.chmod(0o600)
        self._listening.listen(_MOST_CONNECTIONS)
        for work in (self._accept, self._supervise):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """End the server, its jobs and all connections."""
        self._stop.set()
        if self._listening is not None:
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
        for thread in self._threads:
            thread.join(timeout=20.0)
        self._jobs.close()
        self._server.close()
        self._folder.socket.unlink(missing_ok=True)

    # Connections of relays --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listening is not None
        while not self._stop.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        try:
            # A stream that is closed says what it could not write.
            with connection, connection.makefile("rb") as incoming, connection.makefile("wb") as stream:
                self._converse(incoming, stream)
                connection.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError, WardroundError) as error:
            log.debug("a relay's connection ended: %s", describe_error(error), exc_info=True)

    def _converse(self, incoming: BinaryIO, stream: BinaryIO) -> None:
        hello = self._frames.read(incoming)
        if hello is None or hello.header.kind != HELLO or hello.header.site not in self._sites():
            return
        talk = _Talk(hello.header.site, stream)
        with self._lock:
            line = self._lines.setdefault(talk.site, _Line())
            if hello.header.meta.get("job") != line.job:
                return  # a job that was given up: another one has its place
            line.met = True
            before = self._talks.get(talk.site)
            self._talks[talk.site] = talk
        if before is not None:
            self._end(before)
        try:
            self._greet(talk, hello)
            threading.Thread(target=self._hand_out, args=(talk,), daemon=True).start()
            while not talk.over and (frame := self._frames.read(incoming)) is not None:
                self._hear(talk, frame)
        finally:
            self._end(talk)

    def _end(self, talk: _Talk) -> None:
        with self._lock:
            if self._talks.get(talk.site) is talk:
                del self._talks[talk.site]
        if not talk.over:
            talk.over = True
            if talk.instance:
                self._hub.lost(talk.site, talk.instance)

    def _greet(self, talk: _Talk, hello: Message) -> None:
        talk.instance = instance_of(hello.header.meta.get("instance"))
        talk.heard = time.monotonic()
        if talk.instance:
            log.info("site %s is connected", talk.site)

    def _hear(self, talk: _Talk, frame: Message) -> None:
        """Take a frame of a relay; the site in a header is the one whose certificate the relay's line has."""
        kind = frame.header.kind
        if frame.header.site != talk.site:
            raise WireError("a relay speaks for another site")
        if kind == LOST:
            self._hub.lost(talk.site, talk.instance)
            return
        talk.heard = time.monotonic()
        if kind == HELLO:
            self._greet(talk, frame)
        elif kind == ALIVE:
            self._hub.heard(talk.site, talk.instance)
        elif kind == PROGRESS:
            self._hub.report(frame.header)
        else:
            body = frame.body
            if isinstance(body, FileBody):
                # The relay compared the bytes with this hash while it received them.
                body = SpooledBody(body.path, body.nbytes, frame.header.body_sha256)
            self._hub.answered(talk.site, talk.instance, Message(frame.header, body))

    def _hand_out(self, talk: _Talk) -> None:
        """Give the relay what the Hub has for its site, while the site gives signs of life."""
        refused = False
        while not talk.over and not self._stop.is_set():
            if not talk.instance or time.monotonic() - talk.heard > 3 * PULSE:
                self._stop.wait(_TICK)
                continue
            try:
                message = self._hub.take(talk.site, talk.instance, 1.0)
                refused = False
            except Rejected as error:
                if not refused:
                    log.warning("%s", error)
                refused = True
                self._stop.wait(2.0)
                continue
            if message is not None and not self._wrote(talk, message):
                self._end(talk)
                # It was taken after the connection had ended: only now does the Hub know who holds it.
                self._hub.lost(talk.site, talk.instance)

    def _wrote(self, talk: _Talk, message: Message) -> bool:
        if talk.over:
            return False
        try:
            self._frames.write(talk.stream, message)
        except (OSError, ValueError):
            return False
        return True

    # Supervision ------------------------------------------------------------------------------------------------------

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
            line, talk = self._lines.setdefault(site, _Line()), self._talks.get(site)
        if talk is not None:
            line.since = now
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

    def _tidy_spool(self) -> None:
        for path in self._folder.spool.glob("*.part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _OLD:
                    path.unlink()
