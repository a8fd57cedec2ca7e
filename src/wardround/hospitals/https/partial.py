"""A body that arrives piece by piece, over as many connections as it takes."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from wardround.errors import WardroundError, WireError
from wardround.hospitals.https.protocol import FORGOTTEN, RESERVE
from wardround.wire.files import reason
from wardround.wire.message import FileBody

PARTIAL, WHOLE = ".part", ".body"


class NoSpace(WardroundError):
    """The disk does not take a body: there is no room, or something else is wrong with it."""


class Partial:
    """A file that grows until it has `nbytes`: what an earlier process got of it counts. One thread at a time.

    `sha256` is that of the bytes that are there. Raises `NoSpace` where the file cannot be made or read.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self.have = 0
        self._hash = hashlib.sha256()
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _disk_error(error) from error
        self._file = os.fdopen(handle, "r+b", buffering=0)
        try:
            self._take_over()
        except (OSError, WireError) as error:
            self._file.close()
            raise _disk_error(error) from error

    def _take_over(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size > self.nbytes:
            self.restart()
        elif size:
            for chunk in FileBody(self.path, size).chunks():
                self._hash.update(chunk)
            self.have = size
            self._file.seek(size)

    @property
    def sha256(self) -> str:
        """SHA-256 of what is there, in hex."""
        return self._hash.hexdigest()

    @property
    def whole(self) -> bool:
        """Whether all is there."""
        return self.have == self.nbytes

    def write(self, chunk: bytes | memoryview) -> None:
        """Add bytes at the end; raises `NoSpace`, and nothing was added then."""
        written = 0
        view = memoryview(chunk)
        try:
            while written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self._file.truncate(self.have)
            self._file.seek(self.have)
            raise _disk_error(error) from error
        self._hash.update(view)
        self.have += len(view)

    def restart(self) -> None:
        """Forget all that is there."""
        self._file.truncate(0)
        self._file.seek(0)
        self.have = 0
        self._hash = hashlib.sha256()

    def close(self) -> None:
        """Let go of the file, which another `Partial` may go on with."""
        self._file.close()

    def moved(self, path: Path) -> FileBody:
        """The whole body under another name."""
        self.close()
        self.path.rename(path)
        return FileBody(path, self.nbytes)

    def drop(self) -> None:
        """Delete it."""
        self.close()
        self.path.unlink(missing_ok=True)


def check_space(folder: Path, nbytes: int) -> None:
    """Raise `NoSpace` where so much does not fit onto the folder's disk."""
    free = shutil.disk_usage(folder).free
    if nbytes + RESERVE > free:
        raise NoSpace(
            f"a body of {nbytes / 1e6:.3g} MB does not fit on the disk, which has {free / 1e6:.0f} MB left and keeps "
            f"{RESERVE / 1e6:.0f} MB for what is at work; make room: the transfer goes on by itself"
        )


def _disk_error(error: OSError | WireError) -> NoSpace:
    why = reason(error) if isinstance(error, OSError) else "a file changed while it was read"
    return NoSpace(f"the disk does not take a body ({why}); look at its folder: the transfer goes on by itself")


def tidy(folder: Path) -> None:
    """Make the folder; delete parts that are older than a week, and whole bodies, which an earlier process used."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = time.time()
    for path in folder.iterdir():
        longest = {PARTIAL: FORGOTTEN, WHOLE: 0.0}.get(path.suffix)
        with suppress(OSError):
            if longest is not None and now - path.stat().st_mtime >= longest:
                path.unlink()
