"""Files that are there whole or not at all: written beside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from wardround.errors import JournalError


def refuse_links(*paths: Path) -> None:
    """Refuse symbolic links where a run keeps its files: what it writes or deletes there would lie elsewhere.

    Raises `JournalError`.
    """
    for path in paths:
        if path.is_symlink():
            raise link_error(path)


def link_error(path: Path | str) -> JournalError:
    """What to say of a symbolic link in the way."""
    return JournalError(
        "a symbolic link lies where the run keeps files of its own, and is not followed; put the real file or folder "
        "in its place, or choose another folder",
        detail=str(path),
    )


@contextmanager
def written(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Write a file, in a folder that is made where it is missing: on leaving, a draft takes the name of `path`.

    After any error the draft is gone, and what was at `path` is still there. With `durable` the file survives a power
    cut. One process at a time may write a path. A symbolic link at `path` is replaced; one in the draft's place is not
    followed. Raises `OSError`, where the disk is full too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.rename(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text as UTF-8, like `written`."""
    with written(path, durable=durable) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make the names of new files survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: OSError) -> str:
    """Why the disk refuses, in the system's words, which name no file: `Permission denied`."""
    return error.strerror or type(error).__name__
