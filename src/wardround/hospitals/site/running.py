"""Which process serves a folder: it holds a lock for as long as it lives, and its process id stands in the lock."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wardround.errors import WardroundError


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold the lock of a folder; the process id of this process stands in it. Raises `WardroundError` where it is held.

    The system lets go of it when the process ends, however it ends.
    """
    with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WardroundError(
                "another process serves this folder already; stop it first", detail=str(lock.parent)
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock now."""
    try:
        file = lock.open("rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def holder(lock: Path) -> int | None:
    """The process id of what holds a lock; nothing where it is free."""
    if not is_held(lock):
        return None
    text = lock.read_text(encoding="ascii")[:32].strip()
    return int(text) if text.isdecimal() else None
