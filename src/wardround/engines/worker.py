"""A worker process: builds sites from a specification and answers messages on its standard streams."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from wardround.deidentify import describe_error
from wardround.engines.frames import PROGRESS, CopiedBodies, Frames, SharedBodies
from wardround.engines.local import answer
from wardround.logs import log_to_stderr
from wardround.study.base import at
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
INTERVAL = 0.25


def main(factory: str, spec: str, level: str) -> None:
    """Answer until the input ends. `factory` is `module:callable`; it turns the specification into a site finder.

    Where the specification names a `spool`, a folder, bodies travel with the messages; else they lie in shared files.

    `level` is the parent's for its own log: the worker says on stderr what the parent would say.
    """
    log_to_stderr(int(level))
    try:
        _serve(factory, spec)
    except Exception as error:
        # A traceback of Python's own would quote what failed.
        log.error("a worker process ends: %s", describe_error(error))
        log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
        sys.exit(1)


def _serve(factory: str, spec: str) -> None:
    # Ctrl-C in a terminal and a service that is stopped reach the whole group; only the coordinator decides to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not end up between two frames.
    os.dup2(2, 1)
    about = json.loads(Path(spec).read_text(encoding="utf-8"))
    frames: Frames = CopiedBodies(Path(about["spool"])) if "spool" in about else SharedBodies()
    find = at(factory)(about, Reporter(replies, frames))
    while (message := frames.read(sys.stdin.buffer)) is not None:
        frames.write(replies, answer(find, message))
        frames.drop(message)


def _end_with(parent: int) -> None:
    # A coordinator that was killed cannot stop its workers, and one that is started again has workers of its own:
    # the old ones must not go on writing into the same stores.
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os._exit(1)


class Reporter:
    """Sends steps to the parent as frames of their own, at most a few a second."""

    def __init__(self, stream: BinaryIO, frames: Frames) -> None:
        self._stream = stream
        self._frames = frames
        self._next = 0.0

    def __call__(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """Report step `step` of `steps`."""
        now = time.monotonic()
        if now >= self._next or step == steps:
            self._next = now + INTERVAL
            header = Header(PROGRESS, arm, site, round=number, meta={"step": step, "steps": steps})
            self._frames.write(self._stream, Message(header))


if __name__ == "__main__":
    main(*sys.argv[1:])
