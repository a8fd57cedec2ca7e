"""The coordinator's resident process: it reaches the sites, runs every submitted study, and says how things are."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wardround.errors import JournalError, MissingExtra, WardroundError
from wardround.hospitals.coordinator.proposing import ASK_AGAIN_SECONDS
from wardround.hospitals.coordinator.status import Event, Process, SiteStatus, Status
from wardround.hospitals.coordinator.study_run import Reaches, Seen, StudyRun
from wardround.hospitals.coordinator.submission import submitted
from wardround.hospitals.federation import Federation, load_federation
from wardround.hospitals.folders import CoordinatorFolder, StudyFolder
from wardround.hospitals.roster import SignedRoster
from wardround.version import __version__
from wardround.wire.files import reason, refuse_links, write_text

if TYPE_CHECKING:
    from wardround.hospitals.coordinator.hub import Carrier, Hub

log = logging.getLogger(__name__)
# Seconds between two looks at the disk, between two reports while nothing happens, and for studies to end.
_LOOK, _QUIET, _END = 1.0, 5.0, 10.0
_EVENTS = 200


class KnownSites:
    """The signed list of sites as it is on the disk now. A list that the root did not sign is never taken."""

    def __init__(self, folder: CoordinatorFolder, federation: Federation) -> None:
        self._path, self._federation = folder.roster, federation
        self._stamp: tuple[int, int] | None = None
        self._roster: SignedRoster | None = None
        self._lock = threading.Lock()

    def now(self) -> SignedRoster:
        """The list; raises `WardroundError` where it cannot be read or the root did not sign it."""
        with self._lock:
            try:
                found = self._path.stat()
            except OSError:
                raise WardroundError(
                    "the federation has no list of sites yet: `wardround federation init` writes it",
                    detail=str(self._path),
                ) from None
            if self._roster is None or self._stamp != (found.st_mtime_ns, found.st_size):
                roster = SignedRoster.load(self._path)
                roster.verify(bytes.fromhex(self._federation.root_key))
                if roster.federation != self._federation.name:
                    raise WardroundError(f"the list of sites is of another federation, {roster.federation}")
                self._roster, self._stamp = roster, (found.st_mtime_ns, found.st_size)
            return self._roster

    def key(self, site: str) -> bytes | None:
        """A site's public key; nothing for one that is not listed. The last good list where the file was damaged."""
        with suppress(WardroundError):
            return self.now().keys.get(site)
        return None if self._roster is None else self._roster.keys.get(site)


class Service:
    """Runs the studies of a federation's folder over a hub, several at once."""

    def __init__(
        self,
        folder: CoordinatorFolder,
        federation: Federation,
        sites: KnownSites,
        hub: Reaches,
        *,
        page: str = "",
        pause: float = ASK_AGAIN_SECONDS,
    ) -> None:
        self._folder, self._federation, self._sites, self._hub = folder, federation, sites, hub
        self._page, self._pause = page, pause
        self._runs: dict[str, StudyRun] = {}
        self._broken: dict[str, str] = {}
        self._began = time.time()
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._written: tuple[Status, float] | None = None
        self._presence: dict[str, str] = {}
        self._noted: dict[tuple[str, str], int] = {}
        self._expiries = _Expiries()

    def run(self, stop: threading.Event, look: float = _LOOK) -> None:
        """Work until `stop` is set; then the studies are interrupted, to go on in another process."""
        self.tell(f"the coordinator of {self._federation.name} begins")
        try:
            while not stop.is_set():
                self.look()
                stop.wait(look)
        finally:
            self._end()

    def look(self) -> None:
        """Look once at what is submitted, and report."""
        for name in submitted(self._folder):
            try:
                run = self._runs.get(name)
                if run is None:
                    place = StudyFolder(self._folder.studies / name)
                    refuse_links(place.record, place.study, place.decisions, place.out)
                    run = StudyRun(
                        name, place, self._hub, self._sites.now, self._federation.deadlines, self.tell, self._pause
                    )
                    self._runs[name] = run
                    self.tell(f"{name}: taken up ({run.record.state})")
                run.attend()
                self._broken.pop(name, None)
            except (WardroundError, OSError) as error:
                if self._broken.get(name) != str(error):
                    self._broken[name] = str(error)
                    self.tell(f"{name}: cannot go on: {error}")
                    log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
        for noted in self._hub.events:
            before = self._noted.get((noted.site, noted.text), 0)
            # What is repeated without end is said with its 10th, 100th, ... time.
            if noted.count >= max(1, 10 * before):
                self._noted[noted.site, noted.text] = noted.count
                self.tell(f"site {noted.site}: {noted.text}" + (f" ({noted.count} times)" if before else ""))
        self._report()

    def tell(self, text: str) -> None:
        """Note something that happened."""
        log.info("%s", text)
        self._events.append(Event(at=round(time.time(), 3), text=text))

    def status(self, state: str = "running") -> Status:
        """What there is to see."""
        presence = self._hub.presence()
        sites = tuple(self._site(name, presence.get(name)) for name in sorted({*presence, *self._listed()}))
        for site in sites:
            before = self._presence.get(site.name, "never")
            if before != site.state:
                self.tell(f"site {site.name} is {site.state}" + (f", was {before}" if before != "never" else ""))
            self._presence[site.name] = site.state
        process = Process.model_validate(
            {
                "state": state,
                "pid": os.getpid(),
                "version": __version__,
                "began": self._began,
                "at": time.time(),
                "carrier": self._federation.carrier,
                "address": f"{self._federation.host}:{self._federation.port}",
                "page": self._page,
                "certificate_until": self._expiries.of(self._folder.certificates / "own.crt"),
            }
        )
        return Status(
            federation=self._federation.name,
            process=process,
            sites=sites,
            studies=tuple(run.status() for run in list(self._runs.values())),
            events=tuple(self._events),
        )

    def _site(self, name: str, seen: Seen | None) -> SiteStatus:
        until = self._expiries.of(self._folder.kits / f"{name}.crt")
        if seen is None:
            return SiteStatus(name=name, state="never", certificate_until=until)
        return SiteStatus(name=name, state=seen.state, seen=seen.seen, waiting=seen.waiting, certificate_until=until)

    def _listed(self) -> tuple[str, ...]:
        try:
            return tuple(self._sites.now().keys)
        except WardroundError:
            return ()

    def _report(self, state: str = "running") -> None:
        """Write the status where something changed, and now and then where nothing did: a sign of life."""
        now = self.status(state)
        if self._written is not None:
            before, at = self._written
            same = now.model_copy(update={"process": before.process}) == before and state == before.process.state
            if same and time.monotonic() - at < _QUIET:
                return
        try:
            write_text(self._folder.status, now.model_dump_json() + "\n")
        except OSError as error:
            # Studies say by themselves what a full disk does to them; a status that is missing ends none.
            log.warning("the status file cannot be written: %s", reason(error))
        else:
            self._written = (now, time.monotonic())

    def _end(self) -> None:
        self.tell("the coordinator ends; studies go on when it is started again")
        for run in self._runs.values():
            run.end()
        until = time.monotonic() + _END
        for run in self._runs.values():
            if not run.join(until):
                log.warning("a study did not stop in time; it goes on after its last committed round")
        self._report("ended")


class _Expiries:
    """When certificates expire; a file is read again when it changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, float | None]] = {}

    def of(self, path: Path) -> float | None:
        """Unix time; nothing where there is no certificate."""
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return None
        if self._known.get(path, (0, None))[0] != stamp:
            self._known[path] = (stamp, _expiry(path))
        return self._known[path][1]


def _expiry(path: Path) -> float | None:
    from wardround.hospitals.certificates import read_certificate

    with suppress(WardroundError, OSError, ValueError):
        return read_certificate(path).not_after.timestamp()
    return None


@contextmanager
def alone(folder: CoordinatorFolder) -> Iterator[None]:
    """Keep a second coordinator out of a federation's folder. Raises `JournalError` while one is at work."""
    refuse_links(folder.lock)
    with folder.lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                "a coordinator is at work in this folder already: `wardround watch` shows it", detail=str(folder.root)
            ) from None
        yield


def open_carrier(federation: Federation, folder: CoordinatorFolder, hub: Hub) -> Carrier:
    """What carries messages of a federation between hub and sites. Raises `MissingExtra`."""
    if federation.carrier == "https":
        from wardround.hospitals.https.server import HttpsCarrier

        return HttpsCarrier(hub, federation, folder.certificates, folder.spool)
    try:
        import nvflare  # noqa: F401
    except ImportError:
        raise MissingExtra("NVFlare, which carries this federation's messages,", "hospitals") from None
    from wardround.hospitals.nvflare.carrier import NvflareCarrier

    return NvflareCarrier(hub, federation, folder)


def serve(root: Path, *, page: str | None = None, behind_proxy: bool = False, say: Callable[[str], None]) -> None:
    """Be the coordinator of the federation in a folder, until SIGTERM or Ctrl-C.

    `page` is HOST:PORT of the page that shows it; an address that is not of this machine alone needs `behind_proxy`.
    Raises `JournalError` where another coordinator is at work, and `WardroundError` for what keeps it from beginning.
    """
    from wardround.hospitals.coordinator.hub import Hub

    folder = CoordinatorFolder(root)
    federation = load_federation(folder.federation)
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(alone(folder))
        sites = KnownSites(folder, federation)
        sites.now()
        hub = Hub(folder.spool, sites.key, federation.deadlines, federation.largest_nbytes)
        stack.callback(hub.close)
        carrier = open_carrier(federation, folder, hub)
        stack.callback(carrier.close)
        carrier.start()
        shown = ""
        if page is not None:
            from wardround.hospitals.page.server import serve_page

            shown = stack.enter_context(serve_page(folder, page, behind_proxy=behind_proxy, say=say))
        say(f"The coordinator of {federation.name} is at work; sites reach it at {federation.host}:{federation.port}")
        with suppress(KeyboardInterrupt):
            Service(folder, federation, sites, hub, page=shown).run(stop)
        say("The coordinator has ended. Studies that were under way go on when it is started again.")
