"""The engine with worker processes: one a core, one torch thread each.

Workers take messages from one queue, whichever arm they come from. A worker that dies is started again and its message
is sent once more: a site answers a message that it has finished from its store, and does an unfinished one again.
Every message gets a reply, whatever happens to its worker.

Messages of an exchange with several phases all go to the worker that got the site's first one: the keys of a secure sum
live in one process and are never written down.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wardround.engines.frames import SharedBodies
from wardround.engines.local import STOPPED
from wardround.engines.process import KeptProcess, Progress
from wardround.engines.registry import Carried, Sites
from wardround.errors import Interrupted
from wardround.wire.message import Message


@dataclass(frozen=True)
class _Job:
    message: Message
    replies: queue.SimpleQueue[Message | None]


class WorkersEngine:
    """`processes` workers, each building its sites with `factory` ("module:callable") from the file `spec`."""

    def __init__(self, processes: int, factory: str, spec: Path, progress: Progress | None = None) -> None:
        self._shared: deque[_Job] = deque()
        self._own: list[deque[_Job]] = [deque() for _ in range(processes)]
        self._owners: dict[tuple[str, str], deque[_Job]] = {}
        self._workers = [KeptProcess(factory, spec, SharedBodies(), progress) for _ in range(processes)]
        self._threads = [
            threading.Thread(target=self._serve, args=pair, daemon=True)
            for pair in zip(self._workers, self._own, strict=True)
        ]
        self._ready = threading.Condition()
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
        if self._closed:
            raise Interrupted(STOPPED)
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
        return tuple(pid for worker in self._workers if (pid := worker.pid) is not None)

    def close(self) -> None:
        """Kill all workers; exchanges under way raise `Interrupted`."""
        with self._ready:
            self._closed = True
            for waiting in (self._shared, *self._own):
                while waiting:
                    waiting.popleft().replies.put(None)
            self._ready.notify_all()
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join(timeout=10)

    def _serve(self, worker: KeptProcess, own: deque[_Job]) -> None:
        while (job := self._take(own)) is not None:
            job.replies.put(worker.ask(job.message))
        worker.close()


def carried(sites: Sites) -> Carried:
    """`--engine workers`: one arm more than there are processes, so that none of them waits."""
    engine = WorkersEngine(sites.processes, sites.factory, sites.spec(), sites.progress)
    return Carried(engine, sites.processes + 1)
