"""Sites of a federation in threads of the coordinator's process: what travels goes through the hub, signed, as it does
across hospitals."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tests.toys import Hold, toy_sites, toy_study
from wardround.errors import Rejected, WireError
from wardround.federation.exchange import Party
from wardround.federation.refusals import refusal
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.coordinator.service import KnownSites, Service
from wardround.hospitals.coordinator.status import Status, StudyStatus, read_status
from wardround.hospitals.coordinator.submission import submit
from wardround.hospitals.federation import Deadlines, Federation, load_federation, save_federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.proposal import PROPOSE, PROPOSED, Decision, Proposal, Standing, proposal_in
from wardround.hospitals.roster import SignedRoster
from wardround.hospitals.signing import signed
from wardround.learning.model_context import _DRAWING
from wardround.learning.training import Learner
from wardround.protection.identity import Identity
from wardround.protection.rounding import study_root
from wardround.site.process import AgreedStudy, agent_finder, spec_of
from wardround.study.hashes import study_sha256, written
from wardround.study.schema import Study
from wardround.wire.message import Header, Message

NAMES = ("A", "B", "C")
_train = Learner.train


def _in_turn(*arguments: Any, **named: Any) -> Any:
    """Train while no model is built: torch's generator is one for all parties here, as it is not across hospitals."""
    with _DRAWING:
        return _train(*arguments, **named)


Learner.train = _in_turn  # type: ignore[method-assign]


def identity_of(folder: Path, site: str) -> Identity:
    """The key of a site, made when it is first asked for."""
    path = folder / "sites" / site / "identity.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Identity.generate().private)
    return Identity(path.read_bytes())


def make_federation(folder: Path, names: Sequence[str] = NAMES, **deadlines: Any) -> CoordinatorFolder:
    """A federation's folder at its coordinator, with its sites on the signed list."""
    root = Identity.generate()
    place = CoordinatorFolder(folder / "coordinator")
    place.root.mkdir(parents=True)
    waits = Deadlines(**{"reply": 30.0, "attempts": 0, "pause": 0.1, **deadlines})
    federation = Federation(name="toys", carrier="https", host="localhost", root_key=root.public.hex(), deadlines=waits)
    save_federation(federation, place.federation)
    keys = {name: identity_of(folder, name).public for name in names}
    SignedRoster.sign("toys", 1, keys, root).save(place.roster)
    return place


def write_toy(folder: Path, study: Study | None = None) -> Path:
    """The file of a toy study."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(written(study or toy_study())), encoding="utf-8")
    return path


def approve(site: LoopbackSite, study: Study, proposal: Proposal) -> Standing:
    """A hospital that approves whatever it is asked."""
    roster = SignedRoster.from_json(proposal.roster)
    decision = Decision(
        state="approved",
        site=site.name,
        study_sha256=study_sha256(study),
        plan_sha256=proposal.plan_sha256,
        package=proposal.package,
        start_sha256=proposal.start_sha256,
        teacher_sha256=proposal.teacher_sha256,
        plugins={},
        roster_sha256=roster.sha256_of(study.sites),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Standing(state="approved", decision=decision.signed(site.identity))


Decide = Callable[["LoopbackSite", Study, Proposal], Standing]


class LoopbackSite:
    """A site in a thread. `decide` says how it stands to a study."""

    def __init__(self, name: str, folder: Path, hub: Hub, decide: Decide = approve) -> None:
        self.name, self._hub, self.decide = name, hub, decide
        self.folder = folder / "sites" / name
        self.identity = identity_of(folder, name)
        self.asked: list[str] = []
        self._data = folder / "data"
        self._find: dict[str, Callable[[Header], Party]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def come(self) -> None:
        """Connect, as a process that was just started."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(self._stop,), daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Let go of the connection; what it was handed and did not answer is asked again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10.0)

    def _serve(self, stop: threading.Event) -> None:
        instance = secrets.token_hex(8)
        while not stop.is_set():
            try:
                self._hub.attach(self.name, instance)
                break
            except Rejected:
                stop.wait(0.1)
        while not stop.is_set():
            message = self._hub.take(self.name, instance, 0.1)
            if message is not None:
                reply = self.handle(message)
                if not stop.is_set():
                    self._hub.answered(self.name, instance, signed(reply, self.identity))
        self._hub.lost(self.name, instance)

    def handle(self, message: Message) -> Message:
        """The answer to a message, not signed."""
        self.asked.append(message.header.kind)
        try:
            if message.header.kind == PROPOSE:
                proposal, study = proposal_in(message)
                standing = self.decide(self, study, proposal)
                if standing.state == "approved":
                    self._agree(study, proposal)
                return message.reply(PROPOSED, meta=standing.model_dump(mode="json"))
            for find in self._find.values():
                try:
                    return find(message.header).handle(message)
                except Exception:
                    continue
            raise WireError("no study of this hash was approved")
        except Exception as error:
            return refusal(message, error)

    def _agree(self, study: Study, proposal: Proposal) -> None:
        kept = self.folder / "studies" / f"{study_sha256(study)}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        spec = self._spec(study, proposal.compare)
        kept.write_text(json.dumps(spec), encoding="utf-8")
        self._find.setdefault(study_sha256(study), agent_finder(spec))

    def _spec(self, study: Study, compare: Sequence[str]) -> dict[str, Any]:
        agreed = AgreedStudy(study, self.folder / study_sha256(study), tuple(compare))
        spool = self.folder / "spool" / study_sha256(study)
        spool.mkdir(parents=True, exist_ok=True)
        sites = toy_sites(self._data, [self.name])
        # Updates are rounded as on one machine, to be compared with a run there.
        return spec_of(self.name, sites, spool, [agreed], rounding_root=study_root(study.seed), floor=1)

    def remember(self) -> None:
        """Take part in what was approved before: a site that was started again."""
        for kept in sorted((self.folder / "studies").glob("*.json")):
            self._find[kept.stem] = agent_finder(json.loads(kept.read_text(encoding="utf-8")))


class Federated:
    """A coordinator's service with its sites, in this process."""

    def __init__(
        self, folder: Path, names: Sequence[str] = NAMES, decide: Mapping[str, Decide] | None = None, **deadlines: Any
    ) -> None:
        self.folder = folder
        self.place = CoordinatorFolder(folder / "coordinator")
        if not self.place.federation.exists():
            make_federation(folder, names, **deadlines)
        self.federation = load_federation(self.place.federation)
        self.known = KnownSites(self.place, self.federation)
        self.hub = Hub(self.place.spool, self.known.key, self.federation.deadlines, 1 << 30, proof=lambda *_: True)
        self.sites = {
            name: LoopbackSite(name, folder, self.hub, (decide or {}).get(name, approve))
            for name in self.known.now().keys
        }
        for site in self.sites.values():
            site.remember()
        self.service = Service(self.place, self.federation, self.known, self.hub, pause=0.05)
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self.service.run, args=(self.stop, 0.05), daemon=True)

    def start(self, *, away: Sequence[str] = ()) -> None:
        """Begin; some sites are away."""
        for name, site in self.sites.items():
            if name not in away:
                site.come()
        self._thread.start()

    def submit(self, study: Study | None = None, **how: Any) -> str:
        """Submit a toy study."""
        folder = self.folder / "submitted"
        folder.mkdir(exist_ok=True)
        return submit(self.place, write_toy(folder, study), allow_code=True, **how)[0]

    def end(self) -> None:
        """End the coordinator, then the sites."""
        self.stop.set()
        self._thread.join(20.0)
        for site in self.sites.values():
            site.leave()
        self.hub.close()
        assert not self._thread.is_alive()

    def study(self, name: str = "toy") -> StudyStatus | None:
        """What the status says of a study."""
        status = read_status(self.place.status)
        return None if status is None else status.study(name)

    def until(self, true: Callable[[StudyStatus], bool], name: str = "toy", seconds: float = 60.0) -> StudyStatus:
        """Wait until something is true of a study."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.study(name)
            if found is not None and true(found):
                return found
            time.sleep(0.02)
        raise AssertionError(f"it never came true; the last status is {self.study(name)}")


@contextmanager
def federated(folder: Path, *, away: Sequence[str] = (), **how: Any) -> Iterator[Federated]:
    """A service with its sites, at work."""
    made = Federated(folder, **how)
    made.start(away=away)
    try:
        yield made
    finally:
        made.end()


def status_of(folder: Path) -> Status | None:
    """What the coordinator of a folder last said."""
    return read_status(CoordinatorFolder(folder / "coordinator").status)


def be_coordinator(folder: Path, hold: str | None) -> None:
    """The life of a process that is a coordinator with its sites, until SIGTERM; `hold` as in `tests.toys.Hold`."""
    if hold is not None:
        os.environ[Hold.VARIABLE], Hold.steps = hold, 0
    made = Federated(folder)
    signal.signal(signal.SIGTERM, lambda *_: made.stop.set())
    made.start()
    while not made.stop.wait(0.1):
        pass
    made.end()


class Coordinators:
    """Starts coordinators in processes of their own, from one that has torch loaded: each is there in an instant."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.hospitals.loopback"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._pids: set[int] = set()

    def start(self, folder: Path, hold: Path | None = None) -> int:
        """The process id of a coordinator of a folder."""
        pid = self._ask({"folder": str(folder), "hold": None if hold is None else str(hold)})
        self._pids.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The exit code of one that ends; negative is the signal that killed it."""
        code = self._ask({"wait": pid})
        self._pids.discard(pid)
        return code

    def close(self) -> None:
        """Kill what is left."""
        for pid in list(self._pids):
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20.0)
        self._process.stdout.close()

    def _ask(self, job: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def main() -> None:
    """One line of JSON in, one line out, as `Coordinators` asks."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                be_coordinator(Path(job["folder"]), job["hold"])
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
