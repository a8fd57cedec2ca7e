"""How Wardround opens SQLite: write-ahead log, explicit transactions, clear errors."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wardround.errors import JournalError
from wardround.storage.blobs import disk_error
from wardround.wire.files import refuse_links, sync_folder

_PATIENCE = 30.0  # seconds that a process waits for another one's lock
_LOG_PAGES = 64  # of the write-ahead log, before they are carried into the database
_CREATING = threading.Lock()
#: The form of what is kept. A change of a schema raises it and says here how files of the form before are taken over;
#: files of before there was a number have 0, and are of form 1.
FORM = 1


class Database:
    """A SQLite file with short transactions.

    A transaction always survives the death of the process; with `durable` also a power cut (one fsync). Raises
    `JournalError` for a file of a newer form than this version knows: an older version was installed again.
    """

    def __init__(self, path: Path, schema: str) -> None:
        try:
            refuse_links(path.parent, *(path.with_name(path.name + end) for end in ("", "-wal", "-shm", "-journal")))
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path)
            _close_to_others(path)
            # Autocommit mode: transactions begin and end where the code says so.
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE, check_same_thread=False)
            _use_write_ahead_log(self._connection)
            self._connection.execute("PRAGMA synchronous=NORMAL")
            # A short log is soon written over; a sync of what lies on the disk already takes half the time.
            self._connection.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
            form = _form(self._connection)
            self._connection.executescript(schema)
            if form == 0:
                self._connection.execute(f"PRAGMA user_version={FORM}")
        except sqlite3.Error as error:
            raise database_error(error, path) from error
        except OSError as error:
            raise disk_error(error) from error
        self._path = path

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """Begin, then commit, or roll back on any error."""
        connection = self._connection
        try:
            if durable:
                connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise database_error(error, self._path) from error
        finally:
            if durable:
                connection.execute("PRAGMA synchronous=NORMAL")

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """All rows of a query."""
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise database_error(error, self._path) from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _form(connection: sqlite3.Connection) -> int:
    """The form of a file, 0 of a new one; raises `JournalError` for one that a newer version wrote."""
    form = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if form > FORM:
        connection.close()
        raise JournalError(
            f"a newer version of Wardround wrote this store (form {form}, and this version knows {FORM}): install that "
            "version again"
        )
    return form


def _create(path: Path) -> None:
    """Make a new file that nobody else on the machine reads, as it may hold keys; SQLite gives its mode to the files
    that it puts beside it.

    An existing file is never opened here: POSIX takes all locks of a process from a file once any of its descriptors is
    closed, those of SQLite's own connections too.
    """
    with _CREATING, suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        sync_folder(path.parent)


def _close_to_others(path: Path) -> None:
    """Take from others the right to read files that a copy, or an earlier version, left open to them.

    What the user does not own, and file systems without modes, stay as they are.
    """
    for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        with suppress(FileNotFoundError, PermissionError):
            if file.stat().st_mode & 0o077:
                file.chmod(0o600)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log, also while other processes open the same new file.

    SQLite gives up on this one statement at once where it would deadlock, whatever the timeout: who loses asks again.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def database_error(error: sqlite3.Error, path: Path) -> JournalError:
    """What to tell a person when the record of a run cannot be read or written."""
    return JournalError(
        f"the record of the run could not be read or written ({error}); check the disk, then resume",
        detail=str(path),
    )
