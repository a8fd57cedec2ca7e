"""The engine with worker processes: one a core, one torch thread each.

Workers take messages from one queue, whichever arm they come from. A worker that dies is started again and its message
is sent once more: a site answers a message that it has finished from its store, and does an unfinished one again.
Every message gets a reply, whatever happens to its worker.

Messages of an exchange with several phases all go to the worker that got the site's first one: the keys of a secure sum
live in one process and are never written down.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from wardround.deidentify import describe_error
from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.engines.local import STOPPED
from wardround.engines.registry import Carried, Sites
from wardround.errors import Interrupted, WardroundError, WireError
from wardround.federation.refusals import refusal
from wardround.wire.message import Message

log = logging.getLogger(__name__)
ATTEMPTS = 3
_FRAMES = SharedBodies()
Progress = Callable[[str, str, int, int, int], None]


@dataclass(frozen=True)
class _Job:
    message: Message
    replies: queue.SimpleQueue[Message | None]


class WorkersEngine:
    """`processes` workers, each building its sites with `factory` ("module:callable") from the file `spec`."""

    def __init__(self, processes: int, factory: str, spec: Path, progress: Progress | None = None) -> None:
        self._progress = progress
        level = str(logging.getLogger("wardround").getEffectiveLevel())
        self._command = [sys.executable, "-m", "wardround.engines.worker", factory, str(spec), level]
        self._shared: deque[_Job] = deque()
        self._own: list[deque[_Job]] = [deque() for _ in range(processes)]
        self._owners: dict[tuple[str, str], deque[_Job]] = {}
        self._threads = [threading.Thread(target=self._serve, args=(own,), daemon=True) for own in self._own]
        self._workers: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._closed = False
        for thread in self._threads:
            thread.start()

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, as they come; may be called from several threads at once.

        Raises `Interrupted` once the engine is closed.
        """
        replies: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        count = 0
        for message in messages:
            self._put(_Job(message, replies))
            count += 1
        for _ in range(count):
            reply = replies.get()
            if reply is None:
                raise Interrupted(STOPPED)
            yield reply

    def _put(self, job: _Job) -> None:
        header = job.message.header
        with self._ready:
            if not self._closed:
                waiting = self._shared
                if header.phase:
                    next_own = self._own[len(self._owners) % len(self._own)]
                    waiting = self._owners.setdefault((header.study, header.site), next_own)
                waiting.append(job)
                self._ready.notify_all()
                return
        job.replies.put(None)

    def _take(self, own: deque[_Job]) -> _Job | None:
        """The next job of a worker, or nothing once the engine is closed."""
        with self._ready:
            while not self._closed:
                for waiting in (own, self._shared):
                    if waiting:
                        return waiting.popleft()
                self._ready.wait()
        return None

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the living workers."""
        with self._lock:
            return tuple(w.pid for w in self._workers if w.poll() is None)

    def close(self) -> None:
        """Kill all workers; exchanges under way raise `Interrupted`."""
        with self._ready:
            self._closed = True
            workers = list(self._workers)
            for waiting in (self._shared, *self._own):
                while waiting:
                    waiting.popleft().replies.put(None)
            self._ready.notify_all()
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join(timeout=10)

    def _serve(self, own: deque[_Job]) -> None:
        worker: subprocess.Popen[bytes] | None = None
        while (job := self._take(own)) is not None:
            reply, lost = None, WardroundError(f"its process died {ATTEMPTS} times (out of memory?)")
            try:
                for _ in range(ATTEMPTS):
                    worker = self._living(worker)
                    if worker is None:
                        break
                    reply = self._ask(worker, job.message)
                    if reply is not None:
                        break
                    self._forget(worker)
            except BaseException as error:
                # Whatever went wrong on this side of the pipe, whoever asked waits for a reply.
                lost = WardroundError(f"its process could not be asked ({describe_error(error)})")
                log.warning("site %s: %s", job.message.header.site, lost)
                log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
                # It may still be at work, and would then answer the next message with this one's reply.
                if worker is not None:
                    self._forget(worker)
            job.replies.put(reply or (None if self._closed else refusal(job.message, lost)))
        if worker is not None:
            self._forget(worker)

    def _living(self, worker: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes] | None:
        """The worker, or a new one in its place when it died; nothing once the engine is closed."""
        if worker is not None:
            if worker.poll() is None:
                return worker
            self._forget(worker)
        with self._lock:
            if self._closed:
                return None
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
            try:
                worker = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            except OSError as error:
                raise WardroundError(f"no process could be started: {error.strerror}") from error
            self._workers.add(worker)
            return worker

    def _ask(self, worker: subprocess.Popen[bytes], message: Message) -> Message | None:
        try:
            _FRAMES.write(cast("BinaryIO", worker.stdin), message)
            while (reply := _FRAMES.read(cast("BinaryIO", worker.stdout))) is not None:
                header = reply.header
                if header.kind != PROGRESS:
                    return reply
                if self._progress is not None:
                    meta = header.meta
                    self._progress(header.study, header.site, header.round, meta["step"], meta["steps"])
        except (OSError, WireError):
            pass
        return None

    def _forget(self, worker: subprocess.Popen[bytes]) -> None:
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                # What it had not read is still to be written, to nobody.
                with suppress(OSError):
                    stream.close()
        with self._lock:
            self._workers.discard(worker)


def carried(sites: Sites) -> Carried:
    """`--engine workers`: one arm more than there are processes, so that none of them waits."""
    engine = WorkersEngine(sites.processes, sites.factory, sites.spec(), sites.progress)
    return Carried(engine, sites.processes + 1)
