"""SQLite files that several parties open at once."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from wardround.errors import JournalError
from wardround.storage.database import FORM, Database

PARTIES = 8
SCHEMA = "CREATE TABLE IF NOT EXISTS counts (party INTEGER, number INTEGER);"


def test_a_new_file_opened_by_many_at_once(tmp_path: Path) -> None:
    """SQLite lets the switch to the write-ahead log fail at once where several ask for it: they ask again."""

    def use(file: Path, party: int, start: Barrier) -> None:
        start.wait()
        database = Database(file, SCHEMA)
        with database.transaction() as rows:
            rows.execute("INSERT INTO counts VALUES (?, 1)", (party,))
        database.close()

    with ThreadPoolExecutor(PARTIES) as pool:
        for attempt in range(10):
            file, start = tmp_path / f"{attempt}.sqlite", Barrier(PARTIES)
            list(pool.map(lambda party, f=file, s=start: use(f, party, s), range(PARTIES)))  # type: ignore[misc]
            database = Database(file, SCHEMA)
            assert database.rows("SELECT count(*) FROM counts") == [(PARTIES,)]
            database.close()


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not tell of its locks")
def test_opening_a_file_again_leaves_the_locks_of_its_other_connections(tmp_path: Path) -> None:
    """Closing any descriptor of a file takes all POSIX locks of the process from it, SQLite's too."""
    file = tmp_path / "a.sqlite"
    first = Database(file, SCHEMA)
    first.rows("SELECT * FROM counts")

    def held() -> set[str]:
        inode = f":{file.stat().st_ino}"
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return {" ".join(line[1:]) for line in lines if any(part.endswith(inode) for part in line)}

    before = held()
    assert before
    again = Database(file, SCHEMA)
    assert before <= held()
    again.close()
    first.close()


def test_files_that_others_could_read_are_closed_to_them_when_they_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    first = Database(file, SCHEMA)
    files = [file, tmp_path / "a.sqlite-wal", tmp_path / "a.sqlite-shm"]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 3
    for path in files:
        path.chmod(0o644)
    Database(file, SCHEMA).close()
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 3
    first.close()


def test_a_store_of_before_there_was_a_number_is_taken_over_and_one_of_a_newer_version_is_refused(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.sqlite"
    Database(file, SCHEMA).close()
    for written in (0, FORM):
        _set_form(file, written)
        found = Database(file, SCHEMA)
        assert found.rows("PRAGMA user_version") == [(FORM,)]
        found.close()
    _set_form(file, FORM + 1)
    before = file.read_bytes()
    with pytest.raises(JournalError, match=f"newer version of Wardround .*form {FORM + 1}.* install that"):
        Database(file, "CREATE TABLE IF NOT EXISTS others (party INTEGER);")
    assert file.read_bytes() == before


def _set_form(file: Path, form: int) -> None:
    connection = sqlite3.connect(file)
    connection.execute(f"PRAGMA user_version={form}")
    connection.close()
