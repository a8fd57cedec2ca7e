"""The engine of parties that share nothing but messages: each site in a process of its own, to which bodies are sent.

It is what the law of parties apart is tested with, on one machine; across hospitals another engine carries the same
messages. A process that dies is started again and its message sent once more: a site answers a message that it has
finished from its store, and does an unfinished one again.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from wardround.engines.frames import PROGRESS, CopiedBodies
from wardround.engines.local import STOPPED
from wardround.errors import Interrupted, WardroundError, WireError
from wardround.federation.refusals import refusal
from wardround.wire.message import Message

log = logging.getLogger(__name__)
ATTEMPTS = 3
Progress = Callable[[str, str, int, int, int], None]


class ApartEngine:
    """One process for each site of `specs`, which holds the path of what the site's process may know.

    `factory` ("module:callable") builds the site from it. Bodies of replies are spooled into `spool`, in a folder for
    each site; they are there until the site answers in the same arm again.
    """

    def __init__(self, factory: str, specs: Mapping[str, Path], spool: Path, progress: Progress | None = None) -> None:
        level = str(logging.getLogger("wardround").getEffectiveLevel())
        command = [sys.executable, "-m", "wardround.engines.worker", factory]
        self._sites = {
            site: _Process([*command, str(spec), level], CopiedBodies(spool / site), progress)
            for site, spec in specs.items()
        }
        self._latest: dict[tuple[str, str], Message] = {}
        self._lock = threading.Lock()

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, as they come; raises `Interrupted` once the engine is closed."""
        replies: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        asked = list(messages)
        threads = [threading.Thread(target=self._ask, args=(message, replies), daemon=True) for message in asked]
        for thread in threads:
            thread.start()
        for _ in asked:
            reply = replies.get()
            if reply is None:
                raise Interrupted(STOPPED)
            yield reply

    def _ask(self, message: Message, replies: queue.SimpleQueue[Message | None]) -> None:
        site = self._sites.get(message.header.site)
        if site is None:
            replies.put(refusal(message, WardroundError("this run reaches no such site")))
            return
        reply = site.ask(message)
        if reply is not None:
            # An arm asks a site one thing after the other: its earlier answer was used.
            with self._lock:
                earlier = self._latest.pop((message.header.study, message.header.site), None)
                self._latest[message.header.study, message.header.site] = reply
            if earlier is not None:
                site.frames.drop(earlier)
        replies.put(reply)

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the living sites."""
        return {name: pid for name, site in self._sites.items() if (pid := site.pid) is not None}

    def close(self) -> None:
        """Kill all processes; exchanges under way raise `Interrupted`."""
        for site in self._sites.values():
            site.close()


class _Process:
    """The process of one site, started when it is first asked; it answers one message at a time."""

    def __init__(self, command: list[str], frames: CopiedBodies, progress: Progress | None) -> None:
        self._command, self.frames, self._progress = command, frames, progress
        self._turn, self._state = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def ask(self, message: Message) -> Message | None:
        """The reply; nothing once the engine is closed, an `error` reply where the process dies again and again."""
        with self._turn:
            for _ in range(ATTEMPTS):
                process = self._living()
                if process is None:
                    return None
                reply = self._try(process, message)
                if reply is not None:
                    return reply
                self._forget(process)
            return None if self._closed else refusal(message, WardroundError(f"its process died {ATTEMPTS} times"))

    def _try(self, process: subprocess.Popen[bytes], message: Message) -> Message | None:
        with suppress(OSError, WireError):
            self.frames.write(cast("BinaryIO", process.stdin), message)
            while (reply := self.frames.read(cast("BinaryIO", process.stdout))) is not None:
                header = reply.header
                if header.kind != PROGRESS:
                    return reply
                if self._progress is not None:
                    meta = header.meta
                    self._progress(header.study, header.site, header.round, meta["step"], meta["steps"])
        return None

    @property
    def pid(self) -> int | None:
        """The process id while it lives."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def _living(self) -> subprocess.Popen[bytes] | None:
        with self._state:
            if self._closed:
                return None
            if self._process is None or self._process.poll() is not None:
                environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            return self._process

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def close(self) -> None:
        """Kill the process, and start no other."""
        with self._state:
            self._closed, process = True, self._process
        if process is not None:
            self._forget(process)
