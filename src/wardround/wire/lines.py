"""Files of lines that are only added to, by several processes: each line is there whole or not at all."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wardround.wire.files import refuse_links, sync_folder


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made where it is missing, and this process's alone until it is left.

    Raises `OSError`, and `JournalError` for a symbolic link.
    """
    refuse_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if new:
            sync_folder(path.parent)
        yield file


def whole_lines(file: BinaryIO) -> bytes:
    """All whole lines of a locked file. A last one that a process died in is cut off: nothing was made of it."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return content[:whole]
