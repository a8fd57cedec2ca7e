"""Files named by the hash of their bytes: written beside, then renamed, so that a file that exists is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wardround.errors import JournalError
from wardround.wire.files import link_error, refuse_links, sync_folder

# The names that are made here; any other file in the folder is somebody else's, and stays.
_BLOB = re.compile(r"[0-9a-f]{64}")
_DRAFT = re.compile(r"tmp[a-z0-9_]{8}\.draft")
# A file up to this size that is no longer needed is written over, not deleted: its blocks are there already.
_MOST_SPARE = 16 << 20


@dataclass
class Draft:
    """A file being written; `name`, set before it is left, is the hash of its bytes. Without one it is dropped."""

    file: BinaryIO
    name: str = ""


class Blobs:
    """A folder of content-addressed files.

    With `tidy` what a killed process left unfinished is deleted. Raises `JournalError` for symbolic links.
    """

    def __init__(self, root: Path, *, tidy: bool = True) -> None:
        self.root = root
        self._spare: str | None = None
        refuse_links(root)
        root.mkdir(parents=True, exist_ok=True)
        refuse_links(*root.iterdir())
        for path in root.iterdir() if tidy else ():
            if _DRAFT.fullmatch(path.name):
                path.unlink(missing_ok=True)

    @contextmanager
    def draft(self, *, durable: bool) -> Iterator[Draft]:
        """Write a new file; on leaving it is renamed to its hash, and with `durable` survives a power cut.

        Raises `JournalError` when the disk is full; nothing half written remains.
        """
        handle, name = self._opened()
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                draft = Draft(file)
                yield draft
                # A spare file may have been longer.
                file.truncate()
                if durable and draft.name:
                    os.fsync(file.fileno())
            if not draft.name:
                path.unlink()
                return
            path.rename(self.root / draft.name)
            if draft.name == self._spare:
                self._spare = None
            if durable:
                sync_folder(self.root)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _opened(self) -> tuple[int, str]:
        """A file to write from its start on, and its name: the spare one where there is one."""
        if self._spare is not None:
            spare, self._spare = self.root / self._spare, None
            draft = self.root / f"tmp{secrets.token_hex(4)}.draft"
            with suppress(OSError):
                spare.rename(draft)
                handle = os.open(draft, os.O_WRONLY | os.O_NOFOLLOW)
                found = os.fstat(handle)
                # What has another name as well is not this folder's to write over.
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                    return handle, str(draft)
                os.close(handle)
                draft.unlink()
        return tempfile.mkstemp(suffix=".draft", dir=self.root)

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

    def drop(self, name: str, *, reuse: bool = False) -> None:
        """Delete one file, if it is there; with `reuse`, the next one is written over it where it is small."""
        path = self.root / name
        with suppress(FileNotFoundError):
            if reuse and self._spare in (None, name) and path.lstat().st_size <= _MOST_SPARE:
                self._spare = name
            else:
                path.unlink()

    def keep(self, names: Set[str], *, reuse: bool = False) -> None:
        """Drop every other file that was finished here."""
        for name in os.listdir(self.root):
            if name not in names and _BLOB.fullmatch(name):
                self.drop(name, reuse=reuse)

    def close(self) -> None:
        """Delete the file that waits to be written over."""
        if self._spare is not None:
            self.path(self._spare).unlink(missing_ok=True)
            self._spare = None


def disk_error(error: OSError) -> JournalError:
    """What to tell a person when a record cannot be written, or a file of the run not be read."""
    if error.errno == errno.ELOOP:
        return link_error(str(error.filename or error))
    cause = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, fix = "written", "free some space and resume"
    else:
        what, fix = "read or written", "check the run's folder and its rights, then resume"
    return JournalError(
        f"the record of the run could not be {what} ({cause}); {fix}: everything up to the last finished round is safe",
        detail=str(error.filename or error),
    )
