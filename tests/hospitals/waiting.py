"""A worker of a hospital that does nothing but wait; it needs no torch, so that it starts at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wardround.engines.frames import SharedBodies
from wardround.engines.process import KeptProcess
from wardround.wire.message import Header, Message

# Names a file: while it is there, a message waits.
VARIABLE = "WARDROUND_TEST_WAIT"


class Waiting:
    """A site that says which process it lives in, once it has waited."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def handle(self, request: Message) -> Message:
        header, file = request.header, Path(os.environ[VARIABLE])
        self._progress(header.study, header.site, header.round, 1, 1)
        while file.exists():
            file.with_suffix(".reached").touch()
            time.sleep(0.01)
        return request.reply("waited", meta={"pid": os.getpid()})


def finder(spec: dict[str, Any], progress: Any) -> Callable[[Header], Waiting]:
    """The factory of these workers."""
    if Path(os.environ[VARIABLE]).with_suffix(".broken").exists():
        raise ValueError("/data/DOE^JANE.nii is no specification")
    return lambda _: Waiting(progress)


def start(spec: Path, progress: Any) -> KeptProcess:
    """In place of `workers.kept_process`."""
    return KeptProcess("tests.hospitals.waiting:finder", spec, SharedBodies(), progress)
