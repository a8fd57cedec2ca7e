"""SQLite files that several parties open at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from wardround.federation.database import Database

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
