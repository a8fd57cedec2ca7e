"""The resident process of a hospital: it decides what is answered, signs it, and hands the work to worker processes.

It holds the approvals, the kill switch and the identity key, and imports neither torch nor what opens data. Messages
come from a carrier, which runs in a thread here or in processes of its own that find the unix socket.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wardround.deidentify import describe_error
from wardround.errors import Rejected, WardroundError, WireError
from wardround.federation.facts import meta_of
from wardround.federation.refusals import refusal
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.membership.site_file import sites_at
from wardround.hospitals.proposal import PROPOSE, PROPOSED
from wardround.hospitals.signing import new_instance, signed
from wardround.hospitals.site.approval import installed_code
from wardround.hospitals.site.decisions import Decisions, NotApproved, Proposed, Stopped
from wardround.hospitals.site.running import held
from wardround.hospitals.site.workers import Progress, Start, Workers, kept_process
from wardround.hospitals.socket_server import Handle, SocketServer
from wardround.site.agreed import AgreedStudy, spec_of
from wardround.site.egress import ACROSS_HOSPITALS
from wardround.study.base import at
from wardround.study.schema import Study
from wardround.version import __version__
from wardround.wire.files import reason as reason_of
from wardround.wire.files import write_text
from wardround.wire.message import Excerpt, FileBody, Message

log = logging.getLogger(__name__)
STOPPED = "this hospital stopped all work; it goes on when the hospital says so, and nothing needs to be done elsewhere"
# Seconds between two looks at the kill switch, and between two reports of the process on itself.
_LOOK, _REPORT = 0.25, 5.0
# Seconds until a carrier that failed begins again.
_AGAIN = 5.0
# Seconds that a message waits for this process to end, and the process for its carrier's processes.
_ENDING, _LAST = 60.0, 20.0
_SHOWN = 40


class Courier(Protocol):
    """The site's end of a carrier: it fetches messages until it is stopped. `state` is a line for people."""

    state: str

    def run(self, stop: threading.Event) -> None:
        """Carry messages; returns once `stop` is set."""


Couriers = Callable[[Federation, SiteFolder, str, str, Handle], Courier]


@dataclass(frozen=True)
class Limits:
    """How a site runs its workers: how many at once, and after how many seconds an idle one is ended."""

    workers: int = 2
    idle: float = 300.0


class Resident:
    """A hospital's resident process.

    The keywords are for tests on one machine, and no file and no message sets them: `allow_code` lets a study name any
    code, `floor` is the fewest patients whose sums leave, `rounding` gives a study's root of rounding, `start` another
    worker process. Raises `WardroundError` for a folder that is not that of a site which joined a federation.
    """

    def __init__(
        self,
        folder: SiteFolder,
        limits: Limits | None = None,
        *,
        couriers: Couriers | None = None,
        allow_code: bool = False,
        floor: int = ACROSS_HOSPITALS,
        rounding: Callable[[Study], bytes] | None = None,
        start: Start = kept_process,
    ) -> None:
        self.folder = folder
        self.decisions = Decisions(folder)
        self.site, self.federation = self.decisions.site, self.decisions.federation
        self._identity = self.decisions.identity
        self.instance = new_instance(self.site, self._identity)
        self._allow_code, self._floor, self._rounding = allow_code, floor, rounding
        limits = limits or Limits()
        self._workers = Workers(limits.workers, limits.idle, start)
        self._couriers = couriers
        self._courier: Courier | None = None
        self._carrier_state = "not started"
        self._since = time.time()
        self._answered = 0

    # What is asked of it ---------------------------------------------------------------------------------------------

    def handle(self, message: Message, progress: Progress = lambda _: None) -> Message:
        """The signed reply to a message; an `error` reply where it is refused or fails. Never raises.

        Several threads may ask: the messages of one study wait for each other.
        """
        header = message.header
        try:
            reply = self._answer(message, progress)
        except Exception as error:
            log.warning("%r of study %r: %s", header.kind[:_SHOWN], header.study[:12], describe_error(error))
            log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
            reply = refusal(message, error)
        else:
            log.info("%r of study %s, round %d, was answered", header.kind[:_SHOWN], header.study[:12], header.round)
        self._answered += 1
        return signed(reply, self._identity)

    def _answer(self, message: Message, progress: Progress) -> Message:
        header = message.header
        if header.site != self.site:
            raise Rejected(f"a message for another site reached {self.site}")
        self._refuse_if_stopped()
        if header.body_nbytes > self.federation.largest_nbytes:
            raise Rejected(f"a message's body has at most {self.federation.largest_gb:g} GB in this federation")
        if header.sent_nbytes and not isinstance(message.body, FileBody | Excerpt):
            raise WireError("a carrier brings a body in a file, which a worker process can read too")
        if header.kind == PROPOSE:
            return message.reply(PROPOSED, meta=meta_of(self.decisions.propose(message)))
        found = self.decisions.approved(self.decisions.named(header.study).sha256)
        reply = self._workers.ask(found.sha256, self._stamp(found), lambda: self._spec(found), message, progress)
        # What was at work when everything was stopped, or when its approval went, does not leave either.
        self._refuse_if_stopped()
        if reply is None:
            # An error would be an answer, and the round would go on without this site: the next process answers.
            time.sleep(_ENDING)
            raise Stopped("this hospital's process is ending; the message is answered when it is back")
        self.decisions.check_approved(found)
        return reply

    def _refuse_if_stopped(self) -> None:
        if os.path.lexists(self.folder.stopped):
            raise Stopped(STOPPED)

    def _stamp(self, found: Proposed) -> tuple[object, ...]:
        """What a worker was started for: a change in it ends the worker, and another one takes its place."""
        proposal = found.proposal
        try:
            own = self.folder.site.stat()
        except OSError as error:
            raise WardroundError(f"site.yaml cannot be read: {reason_of(error)}") from error
        return (proposal.plan_sha256, proposal.compare, __version__, own.st_mtime_ns, own.st_size, own.st_ino)

    def _spec(self, found: Proposed) -> Path:
        """Write what the worker of a study is given: this one study, and the site's own entry."""
        # What it will import is what was approved.
        installed_code(found.study, anew=True)
        self.decisions.check_approved(found)
        sites = sites_at(self.folder)
        agreed = AgreedStudy(found.study, found.folder.own, found.proposal.compare, found.proposal.plan_sha256)
        spec = spec_of(
            self.site,
            sites.with_code() if self._allow_code else sites,
            None,
            [agreed],
            rounding_root=None if self._rounding is None else self._rounding(found.study),
            floor=self._floor,
            identity=self.folder.identity.absolute(),
            package=__version__,
        )
        try:
            found.folder.own.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(found.folder.spec, json.dumps(spec))
        except OSError as error:
            raise WardroundError(f"this site's disk refuses: {reason_of(error)}") from error
        return found.folder.spec

    # The process -----------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, began: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is set: the socket, the carrier, the kill switch, the status file. `began` is called once.

        Raises `WardroundError` where another process serves this folder, or all work was stopped.
        """
        if os.path.lexists(self.folder.stopped):
            raise Stopped("all work of this site was stopped; `wardround site resume` lets it go on")
        with ExitStack() as closing:
            closing.enter_context(held(self.folder.lock))
            server = SocketServer(self.folder.socket, self.handle, self.instance)
            server.start()
            courier = threading.Thread(target=self._carry, args=(stop,), daemon=True, name="courier")
            courier.start()
            # In reverse: no more messages, no more workers, the carrier's end, the last status.
            closing.callback(self._report, "ended")
            closing.callback(courier.join, _LAST)
            closing.callback(stop.set)
            closing.callback(self._workers.halt)
            closing.callback(server.close)
            began()
            self._watch(stop)

    def _watch(self, stop: threading.Event) -> None:
        """Look at the kill switch often, and say now and then how things are."""
        halted, due = False, 0.0
        while not stop.wait(_LOOK):
            stopped = os.path.lexists(self.folder.stopped)
            if stopped != halted:
                halted, due = stopped, 0.0
                if stopped:
                    log.warning("all work was stopped; nothing is answered until it is resumed")
                    self._workers.halt()
                else:
                    log.warning("work goes on")
                    self._workers.go_on()
            if time.monotonic() >= due:
                due = time.monotonic() + _REPORT
                self._workers.end_idle()
                self._report("stopped" if stopped else "running")

    def _carry(self, stop: threading.Event) -> None:
        """Run the carrier's end; one that fails begins again."""
        while not stop.is_set():
            try:
                make = self._couriers or couriers_of(self.federation)
                self._courier = make(self.federation, self.folder, self.site, self.instance, self.handle)
                self._courier.run(stop)
                self._carrier_state = "ended"
            except Exception as error:
                self._courier, self._carrier_state = None, f"failed and begins again: {describe_error(error)}"
                log.warning("the carrier %s", self._carrier_state)
                log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
            stop.wait(_AGAIN)

    def _report(self, state: str) -> None:
        """Write the status file; a disk that refuses ends nothing."""
        try:
            write_text(self.folder.status, json.dumps(self.status(state), indent=1))
        except OSError as error:
            log.warning("the status file cannot be written: %s", reason_of(error))

    def status(self, state: str) -> dict[str, Any]:
        """What the process says of itself, for `wardround site status`: it stays at the site."""
        courier = self._courier
        studies = []
        for found in self.decisions.all():
            standing = self.decisions.standing(found.sha256)
            studies.append(
                {"study": found.sha256, "name": found.study.name, "state": standing.state, "reason": standing.reason}
            )
        return {
            "version": 1,
            "federation": self.federation.name,
            "site": self.site,
            "package": __version__,
            "pid": os.getpid(),
            "instance": self.instance,
            "state": state,
            "since": round(self._since, 3),
            "at": round(time.time(), 3),
            "carrier": self.federation.carrier,
            "carrier_state": self._carrier_state if courier is None else str(getattr(courier, "state", "running")),
            "answered": self._answered,
            "studies": studies,
            "workers": self._workers.at_work(),
        }


def couriers_of(federation: Federation) -> Couriers:
    """What makes the site's end of a federation's carrier; imported only when it is needed."""
    if federation.carrier == "https":
        made: Couriers = at("wardround.hospitals.https.courier:Courier")
        return made
    client = at("wardround.hospitals.nvflare.client:ClientProcess")

    def supervised(federation: Federation, folder: SiteFolder, site: str, instance: str, handle: Handle) -> Courier:
        # Its processes find the socket; they carry nothing through this one.
        found: Courier = client(federation, folder, site)
        return found

    return supervised


__all__ = ["STOPPED", "Courier", "Limits", "NotApproved", "Resident", "Stopped", "couriers_of"]
