"""Files of lines that are only added to, by several processes: each line is there whole or not at all."""

from __future__ import annotations

import fcntl
import os
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
    while True:
        new = not path.exists()
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _stands(file, path):
                # Another process put a new file in its place while this one waited: that is the record now.
                continue
            if new:
                sync_folder(path.parent)
            yield file
            return


def _stands(file: BinaryIO, path: Path) -> bool:
    """Whether a file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def replace_lines(path: Path, content: bytes) -> None:
    """Put other lines in the place of a locked file's, all at once; who waits for the lock gets the new file.

    The lock of the old file must be held, and nothing may be written to that any more. Raises `OSError`.
    """
    draft = path.with_name(path.name + ".draft")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def whole_lines(file: BinaryIO) -> bytes:
    """All whole lines of a locked file. A last one that a process died in is cut off: nothing was made of it."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return content[:whole]
