"""A worker process as the engine that started it sees it: kept alive, asked one message at a time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from wardround.deidentify import describe_error
from wardround.engines.frames import PROGRESS, Frames
from wardround.errors import WardroundError, WireError
from wardround.federation.refusals import refusal
from wardround.wire.message import Message

log = logging.getLogger(__name__)
ATTEMPTS = 3
Progress = Callable[[str, str, int, int, int], None]


class KeptProcess:
    """A process of `engines.worker`, started when it is first asked, and again when it died.

    It builds its sites with `factory` ("module:callable") from the file `spec`. `frames` carry messages to it and back,
    `progress` is called with its steps. A message whose process died is sent once more: a site answers a message that
    it has finished from its store, and does an unfinished one again.
    """

    def __init__(self, factory: str, spec: Path, frames: Frames, progress: Progress | None) -> None:
        level = str(logging.getLogger("wardround").getEffectiveLevel())
        self._command = [sys.executable, "-m", "wardround.engines.worker", factory, str(spec), level]
        self.frames = frames
        self._progress = progress
        self._turn, self._state = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def ask(self, message: Message) -> Message | None:
        """The reply to a message, an `error` reply where no process gives one; nothing once this is closed."""
        with self._turn:
            lost = WardroundError(f"its process died {ATTEMPTS} times (out of memory?)")
            try:
                for _ in range(ATTEMPTS):
                    process = self._living()
                    if process is None:
                        break
                    reply = self._try(process, message)
                    if reply is not None:
                        return reply
                    self._forget()
            except BaseException as error:
                # Whatever went wrong on this side of the pipe, the engine waits for a reply.
                lost = WardroundError(f"its process could not be asked ({describe_error(error)})")
                log.warning("site %s: %s", message.header.site, lost)
                log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
                # It may still be at work, and would then answer the next message with this one's reply.
                self._forget()
            return None if self._closed else refusal(message, lost)

    @property
    def pid(self) -> int | None:
        """The process id while it lives."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def kill(self) -> None:
        """End the process, and start no other; what waits for a reply gets none."""
        with self._state:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Let go of the process that was killed, once nothing waits for it any more."""
        self.kill()
        with self._turn:
            self._forget()

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

    def _living(self) -> subprocess.Popen[bytes] | None:
        """The process, or a new one in its place when it died; nothing once this is closed."""
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        with self._state:
            if self._closed:
                return None
            if self._process is None:
                environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
                pipe = subprocess.PIPE
                try:
                    self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=environment)
                except OSError as error:
                    raise WardroundError(f"no process could be started: {error.strerror}") from error
            return self._process

    def _forget(self) -> None:
        with self._state:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                # What it had not read is still to be written, and has no reader.
                with suppress(OSError):
                    stream.close()
