"""Files named by the hash of their bytes: written beside, then renamed, so that a file that exists is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wardround.errors import JournalError
from wardround.wire.files import sync_folder


@dataclass
class Draft:
    """A file being written; `name`, set before it is left, is the hash of its bytes. Without one it is dropped."""

    file: BinaryIO
    name: str = ""


class Blobs:
    """A folder of content-addressed files."""

    def __init__(self, root: Path, *, tidy: bool = True) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        # A killed process leaves its drafts behind; nothing refers to them.
        for draft in root.glob("*.draft") if tidy else ():
            draft.unlink(missing_ok=True)

    @contextmanager
    def draft(self, *, durable: bool) -> Iterator[Draft]:
        """Write a new file; on leaving it is renamed to its hash, and with `durable` survives a power cut.

        Raises `JournalError` when the disk is full; nothing half written remains.
        """
        handle, name = tempfile.mkstemp(suffix=".draft", dir=self.root)
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                draft = Draft(file)
                yield draft
                file.flush()
                if durable and draft.name:
                    os.fsync(file.fileno())
            if not draft.name:
                path.unlink()
                return
            path.rename(self.root / draft.name)
            if durable:
                sync_folder(self.root)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def path(self, name: str) -> Path:
        """Where the file of that hash lies."""
        return self.root / name

    def holds(self, name: str, nbytes: int) -> bool:
        """Whether the file is there, with that many bytes; nothing at all is always there."""
        path = self.path(name)
        return nbytes == 0 or (path.is_file() and path.stat().st_size == nbytes)

    def sound(self, name: str, nbytes: int) -> bool:
        """Whether the file is there and still holds the bytes that it is named by; it is read for that."""
        if nbytes == 0 or not self.holds(name, nbytes):
            return nbytes == 0
        with self.path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == name

    def drop(self, name: str) -> None:
        """Delete one file, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def keep(self, names: Set[str]) -> None:
        """Delete every other file."""
        for path in self.root.iterdir():
            if path.name not in names and path.suffix != ".draft":
                path.unlink(missing_ok=True)


def disk_error(error: OSError) -> JournalError:
    """What to tell a person when a record cannot be written, or a file of the run not be read."""
    cause = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, fix = "written", "free some space and resume"
    else:
        what, fix = "read or written", "check the run's folder and its rights, then resume"
    return JournalError(
        f"the record of the run could not be {what} ({cause}); {fix}: everything up to the last finished round is safe",
        detail=str(error.filename or error),
    )
