"""A submitted study at its coordinator, from the proposal to the last delivery; all of its state is on the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from wardround.deidentify import describe_error
from wardround.engines.process import Progress
from wardround.errors import DataError, Interrupted, JournalError, StudyError, WardroundError
from wardround.federation.asking import Patience
from wardround.federation.exchange import Engine
from wardround.hospitals.coordinator.delivering import Delivering, deliver_all
from wardround.hospitals.coordinator.onlooker import Onlooker, RunFiles
from wardround.hospitals.coordinator.proposing import ASK_AGAIN_SECONDS, Approvals, Refused
from wardround.hospitals.coordinator.status import PresenceState, Record, Said, StudyStatus, read_record, write_record
from wardround.hospitals.coordinator.submission import Submission, read_submission
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.folders import StudyFolder
from wardround.hospitals.roster import SignedRoster
from wardround.runs.conduct import coordinate
from wardround.runs.context import Context
from wardround.storage.blobs import disk_error
from wardround.study.load import UNREAD, load_study
from wardround.wire.files import reason

log = logging.getLogger(__name__)


class Seen(Protocol):
    """What is known of a site's presence."""

    @property
    def state(self) -> PresenceState:
        """Whether it is there."""
        ...

    @property
    def seen(self) -> float | None:
        """When it was last heard, in unix time."""
        ...

    @property
    def waiting(self) -> int:
        """Messages that wait for it."""
        ...


class Noted(Protocol):
    """Something about a site that a person should look at."""

    @property
    def site(self) -> str:
        """Whose connection it was."""
        ...

    @property
    def text(self) -> str:
        """What it was."""
        ...

    @property
    def count(self) -> int:
        """How often it happened."""
        ...


class Reaches(Protocol):
    """What carries messages to the sites of a federation; the hub does."""

    def engine(self, progress: Progress | None = None) -> Engine:
        """An engine for one study."""
        ...

    def presence(self) -> Mapping[str, Seen]:
        """Who is there."""
        ...

    @property
    def events(self) -> Sequence[Noted]:
        """What a person should look at."""
        ...


class StudyRun:
    """One submitted study. `attend` is called again and again and begins, ends and repeats what is due."""

    def __init__(
        self,
        name: str,
        folder: StudyFolder,
        hub: Reaches,
        roster: Callable[[], SignedRoster],
        deadlines: Deadlines,
        tell: Callable[[str], None] = lambda text: None,
        pause: float = ASK_AGAIN_SECONDS,
    ) -> None:
        self.name, self._folder, self._hub, self._roster = name, folder, hub, roster
        self._deadlines, self._tell, self._pause = deadlines, tell, pause
        self.record = read_record(folder.record)
        self._submission = read_submission(folder)
        self._stop = threading.Event()
        self._ending = False
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._lock = threading.RLock()
        self._files = RunFiles(folder.out)
        self._study = study = load_study(folder.study, reading=UNREAD, near=self._submission.near)
        rules = study.protection
        self._about: dict[str, Any] = {
            "description": study.description,
            "rounds": study.schedule.rounds,
            "training_sites": study.training_sites,
            "budget": None if rules.privacy is None else rules.privacy.epsilon,
            "secure": rules.secure,
        }
        self._onlooker: Onlooker | None = None

    def attend(self) -> None:
        """Look what people want, and begin or end what follows from it. Raises `JournalError` for damaged files."""
        self._submission = wanted = read_submission(self._folder)
        at_work = self._thread is not None and self._thread.is_alive()
        if wanted.withdrawn:
            if at_work:
                self._halt()
            elif self.record.state not in ("withdrawn", "finished"):
                self._set("withdrawn", "withdrawn by the coordinator")
        elif not at_work and not self._ending and self._due(wanted):
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, args=(wanted,), name=f"study {self.name}", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Stop working, to go on in another process. The study's state stays what it is."""
        self._ending = True
        self._halt()

    def join(self, until: float) -> bool:
        """Wait for the work to end, until a time of the monotonic clock; whether it did."""
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
        return self._thread is None or not self._thread.is_alive()

    def status(self) -> StudyStatus:
        """What there is to see of it now."""
        record, wanted = self.record, self._submission
        at_work = record.state == "running" and self._onlooker is not None
        return StudyStatus(
            name=self.name,
            submitted=wanted.submitted,
            study_sha256=wanted.study_sha256,
            plan_sha256=wanted.plan_sha256,
            state=record.state,
            reason=record.reason,
            phase=self._onlooker.doing if at_work and self._onlooker else "",
            working=self._onlooker.working if at_work and self._onlooker else {},
            sites={site: record.said.get(site, Said()) for site in self._study.sites},
            undelivered=record.undelivered,
            waits_for=record.waits_for,
            **(self._about | self._files.numbers()),
        )

    # ------------------------------------------------------------------------------------------------------------------

    def _due(self, wanted: Submission) -> bool:
        """Whether there is something to do."""
        record = self.record
        if record.state == "finished":
            return bool(record.undelivered) and time.time() < self._deadline()
        if wanted.resumed > record.resumed:
            self._set("asking", "", resumed=wanted.resumed, waits_for=())
            return True
        if record.state in ("asking", "running"):
            return True
        if record.state == "stopped" and self._is_back(record.waits_for):
            self._tell(f"{self.name}: goes on, for of those it waits for ({', '.join(record.waits_for)}) one is back")
            self._set("asking", "", waits_for=())
            return True
        return False

    def _is_back(self, missing: tuple[str, ...]) -> bool:
        """Whether one of the sites that a study stopped without is back, and enough others are there with it."""
        if not any(self._present(site) for site in missing):
            return False
        if not self._study.trains:
            return True
        return sum(self._present(site) for site in self._study.training_sites) >= self._study.schedule.min_sites

    def _halt(self) -> None:
        self._stop.set()
        with self._lock:
            engine = self._engine
        if engine is not None:
            engine.close()

    def _connect(self, progress: Progress | None = None) -> Engine:
        """An engine, which ends when the work is to end."""
        engine = self._hub.engine(progress)
        with self._lock:
            self._engine = engine
        if self._stop.is_set():
            engine.close()
        return engine

    def _present(self, site: str) -> bool:
        found = self._hub.presence().get(site)
        return found is not None and found.state == "present"

    def _set(self, state: str | None = None, reason: str | None = None, **values: object) -> None:
        """Keep how far it is, then say it."""
        with self._lock:
            values |= {} if state is None else {"state": state}
            values |= {} if reason is None else {"reason": reason}
            after = Record.model_validate({**self.record.model_dump(), **values})
            changed = (after.state, after.reason) != (self.record.state, self.record.reason)
            if after != self.record:
                self._keep(after)
                self.record = after
        if changed:
            self._tell(f"{self.name}: {after.state}{f' ({after.reason})' if after.reason else ''}")

    def _keep(self, record: Record) -> None:
        """Write it down. What a full disk stopped is said all the same: a process that is started again goes on."""
        try:
            write_record(self._folder.record, record)
        except OSError as error:
            if record.state != "stopped":
                raise
            log.warning("study %s: how far it is cannot be written: %s", self.name, reason(error))

    # In a thread of its own -------------------------------------------------------------------------------------------

    def _work(self, wanted: Submission) -> None:
        try:
            context = wanted.context(self._folder)
            if self.record.state != "finished":
                self._train(context, wanted)
            self._deliver(context)
        except Interrupted:
            # What to make of it is decided where people's wishes are read.
            log.info("study %s was stopped", self.name)
        except Refused as refused:
            self._set("refused", str(refused))
        except WardroundError as error:
            # Who is back does not mend what is wrong with a study, its data or its folder.
            other = isinstance(error, StudyError | DataError | JournalError)
            self._set("stopped", str(error), waits_for=() if other else self._away())
            log.warning("study %s stopped: %s", self.name, error)
            log.debug("detail: %s", error.detail, exc_info=True)
        except OSError as error:
            self._set("stopped", str(disk_error(error)), waits_for=())
            log.warning("study %s stopped: %s", self.name, disk_error(error))
            log.debug("details", exc_info=True)
        except Exception as error:
            self._set("stopped", f"an unexpected error: {describe_error(error)}", waits_for=self._away())
            log.warning("study %s stopped: %s", self.name, describe_error(error))
            log.debug("details", exc_info=True)
        finally:
            self._onlooker = None

    def _train(self, context: Context, wanted: Submission) -> None:
        approvals = Approvals(context, self._folder, self._roster(), self._decided)
        self._set(said=dict(approvals.said))
        approvals.run(self._connect(), self._stop, self._pause)
        self._set("running", "")
        self._about = self._about | {"metrics": tuple(metric.name for metric in context.task.metrics)}
        arms = {arm.identity(context.study_sha256, context.plan_sha256): name for name, arm in context.arms.items()}
        self._onlooker = onlooker = Onlooker(arms, self._stop)
        with closing(Delivering(self._connect(onlooker.progress))) as engine:
            coordinate(
                context.study,
                self._folder.out,
                engine,
                compare=wanted.compare,
                without=wanted.without,
                watcher=onlooker,
                plugins=wanted.plugins,
                allow_code=wanted.allow_code,
                near=wanted.near,
                patience=Patience(self._deadlines.attempts, self._deadlines.pause),
            )
            self._set("finished", "", undelivered=engine.owed, released=time.time())

    def _deliver(self, context: Context) -> None:
        if not self.record.undelivered:
            return

        def reached(site: str) -> None:
            self._tell(f"{self.name}: {site} got the released model")
            self._set(undelivered=tuple(name for name in self.record.undelivered if name != site))

        deliver_all(
            context,
            self._connect(),
            self.record.undelivered,
            until=self._deadline(),
            stop=self._stop,
            reached=reached,
        )

    def _deadline(self) -> float:
        """Until when a released model is delivered, in unix time."""
        return (self.record.released or 0.0) + self._deadlines.delivery

    def _away(self) -> tuple[str, ...]:
        """The study's sites that are not there now."""
        return tuple(site for site in self._study.sites if not self._present(site))

    def _decided(self, site: str, said: Said) -> None:
        with self._lock:
            self._set(said={**self.record.said, site: said})
        if said.state != "asked":
            self._tell(f"{self.name}: {site} {said.state}{f' ({said.reason})' if said.reason else ''}")
