"""The worker processes of a hospital: one a study, few at once; ended when they idle, killed when all work stops."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.engines.process import KeptProcess
from wardround.engines.process import Progress as Steps
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
FACTORY = "wardround.hospitals.site.worker:agent_finder"
Progress = Callable[[Header], None]
Start = Callable[[Path, Steps], KeptProcess]


class _Worker:
    """A study's process, and what it was started for (`stamp`)."""

    def __init__(self, study: str, stamp: Hashable, spec: Path, start: Start) -> None:
        self.study, self.stamp = study, stamp
        self.used = time.monotonic()
        self.message: Header | None = None
        self.progress: Progress | None = None
        self.process = start(spec, self._step)

    def _step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        if self.progress is not None:
            self.progress(Header(PROGRESS, arm, site, round=number, meta={"step": step, "steps": steps}))


def kept_process(spec: Path, progress: Steps) -> KeptProcess:
    """A process that is a site's agent in the study of `spec`; bodies stay in files that both can read."""
    return KeptProcess(FACTORY, spec, SharedBodies(), progress)


class Workers:
    """At most `most` processes at once; one that idles for `idle` seconds is ended, so that its memory is free."""

    def __init__(self, most: int, idle: float, start: Start = kept_process) -> None:
        self._most, self._idle, self._start = most, idle, start
        self._changed = threading.Condition()
        self._workers: dict[str, _Worker] = {}
        self._halted = False

    def ask(
        self, study: str, stamp: Hashable, spec: Callable[[], Path], message: Message, progress: Progress
    ) -> Message | None:
        """The reply of a study's worker; nothing where work was halted before there was one.

        The messages of a study are answered one at a time. A worker that was started with another `stamp` (another
        version of its specification, say) is ended first; `spec` writes the specification of a new one.
        """
        worker = self._enter(study, stamp, spec, message.header)
        if worker is None:
            return None
        worker.progress = progress
        try:
            return worker.process.ask(message)
        finally:
            worker.progress = None
            with self._changed:
                worker.message, worker.used = None, time.monotonic()
                self._changed.notify_all()

    def _enter(self, study: str, stamp: Hashable, spec: Callable[[], Path], header: Header) -> _Worker | None:
        """The study's worker, which nothing else uses until `ask` is done with it."""
        with self._changed:
            while not self._halted:
                worker = self._workers.get(study)
                if worker is not None and worker.message is None and worker.stamp != stamp:
                    self._end(worker)
                    worker = None
                if worker is None and self._has_room():
                    worker = self._workers[study] = _Worker(study, stamp, spec(), self._start)
                if worker is not None and worker.message is None:
                    worker.message = header
                    return worker
                self._changed.wait()
        return None

    def _has_room(self) -> bool:
        """Whether one more may start; ends the one that has idled longest where that makes room."""
        if len(self._workers) < self._most:
            return True
        idle = [worker for worker in self._workers.values() if worker.message is None]
        if not idle:
            return False
        self._end(min(idle, key=lambda worker: worker.used))
        return True

    def _end(self, worker: _Worker) -> None:
        worker.process.close()
        del self._workers[worker.study]

    def end_idle(self) -> None:
        """End the workers that were not used for a while."""
        with self._changed:
            now = time.monotonic()
            for worker in [each for each in self._workers.values() if each.message is None]:
                if now - worker.used > self._idle:
                    log.info("the worker of study %s ends, for nothing is asked of it", worker.study[:12])
                    self._end(worker)
            self._changed.notify_all()

    def halt(self) -> None:
        """Kill all workers at once, and start no other until `go_on`; what waits for a reply gets none."""
        with self._changed:
            self._halted = True
            workers = list(self._workers.values())
            self._workers.clear()
            for worker in workers:
                worker.process.kill()
            self._changed.notify_all()
        for worker in workers:
            worker.process.close()

    def go_on(self) -> None:
        """Let workers start again."""
        with self._changed:
            self._halted = False

    def at_work(self) -> list[dict[str, object]]:
        """Of each worker its study, its process id while it lives, and what it was asked, if it is at work."""
        with self._changed:
            return [
                {
                    "study": worker.study,
                    "pid": worker.process.pid,
                    "kind": None if worker.message is None else worker.message.kind[:40],
                    "round": None if worker.message is None else worker.message.round,
                }
                for worker in self._workers.values()
            ]
