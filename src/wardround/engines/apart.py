"""The engine of parties that share nothing but messages: each site in a process of its own, to which bodies are sent.

It is what the law of parties apart is tested with, on one machine; across hospitals another engine carries the same
messages.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wardround.engines.frames import CopiedBodies
from wardround.engines.local import STOPPED
from wardround.engines.process import KeptProcess, Progress
from wardround.errors import Interrupted, WardroundError
from wardround.federation.refusals import refusal
from wardround.wire.message import Message


class ApartEngine:
    """One process for each site of `specs`, which holds the path of what the site's process may know.

    `factory` ("module:callable") builds the site from it. Bodies of replies are spooled into `spool`, in a folder for
    each site; they are there until the site answers in the same arm again.
    """

    def __init__(self, factory: str, specs: Mapping[str, Path], spool: Path, progress: Progress | None = None) -> None:
        self._sites = {
            site: KeptProcess(factory, spec, CopiedBodies(spool / site), progress) for site, spec in specs.items()
        }
        self._latest: dict[tuple[str, str], Message] = {}
        self._lock = threading.Lock()
        self._closed = False

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, as they come; raises `Interrupted` once the engine is closed."""
        replies: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        asked = list(messages)
        if self._closed:
            raise Interrupted(STOPPED)
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
        self._closed = True
        for site in self._sites.values():
            site.kill()
        for site in self._sites.values():
            site.close()
