"""How a hospital's commands act on its resident process: start, stop, and the switch that stops all work."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from wardround.errors import WardroundError
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.site.running import holder
from wardround.wire.files import reason as reason_of
from wardround.wire.files import write_text

# Seconds for a process to end by itself before it is killed.
_PATIENCE = 30.0


def stop_all_work(folder: SiteFolder, why: str = "") -> list[int]:
    """The kill switch: nothing is answered and nothing leaves until `resume`; the workers that were killed.

    It needs no network and no resident process: the file alone is enough. A resident process sees it within a second
    and kills its workers; here they are killed at once, for that process may hang. Raises `WardroundError` where the
    disk refuses.
    """
    try:
        write_text(folder.stopped, f"{why}\n", durable=True)
    except OSError as error:
        # Without the file a process that is started again would go on.
        raise WardroundError(
            f"the switch cannot be written ({reason_of(error)}), so nothing was stopped for good; stop the service and "
            "unplug the network",
            detail=str(folder.stopped),
        ) from error
    killed = []
    for pid in _workers(folder):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    return killed


def resume(folder: SiteFolder) -> bool:
    """Let work go on; whether it was stopped."""
    try:
        folder.stopped.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise WardroundError(f"the switch cannot be removed: {reason_of(error)}", detail=str(folder.stopped)) from error
    return True


def stop_process(folder: SiteFolder) -> bool:
    """End the resident process, and nothing else; whether there was one. One that hangs is killed."""
    pid = holder(folder.lock)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    ends, tick = time.monotonic() + _PATIENCE, threading.Event()
    while holder(folder.lock) == pid:
        if time.monotonic() > ends:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            ends += _PATIENCE
        tick.wait(0.05)
    return True


def status_of(folder: SiteFolder) -> dict[str, Any]:
    """What the resident process last said of itself; empty where it never ran."""
    try:
        found = json.loads(folder.status.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _workers(folder: SiteFolder) -> list[int]:
    """The living workers of a folder, by what the system says of each process: a number alone may be another's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"wardround.engines.worker" in words and any(_is_spec(folder, word) for word in words):
                    found.append(int(entry.name))
    return found


def _is_spec(folder: SiteFolder, word: bytes) -> bool:
    path = os.fsdecode(word)
    return path.endswith("/worker.json") and Path(path).is_relative_to(folder.studies.absolute())
