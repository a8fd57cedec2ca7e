"""What a power cut may cost: work that is done again, and nothing that anybody relies on."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.federation.secure import secure_sum
from wardround.protection.identity import Roster
from wardround.protection.ledger import Ledger
from wardround.site.secure import SecureUpload
from wardround.storage.database import Database
from wardround.storage.hash_log import LOG
from wardround.storage.verify import verify

FULL, NORMAL = 2, 1
PRIVATE = {
    "method": {"kind": "fedbn"},
    "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
    "schedule": {"rounds": 4, "min_sites": 3},
}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every statement that writes, with what SQLite says of its syncs while it runs."""
    found: list[tuple[str, int]] = []
    transaction = Database.transaction

    @contextmanager
    def watched(self: Database, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with transaction(self, durable=durable) as connection:
            level = int(connection.execute("PRAGMA synchronous").fetchone()[0])
            connection.set_trace_callback(lambda sql: found.append((sql, level)))
            try:
                yield connection
            finally:
                connection.set_trace_callback(None)

    monkeypatch.setattr(Database, "transaction", watched)
    return found


def levels(written: list[tuple[str, int]], words: str) -> set[int]:
    return {level for sql, level in written if words in sql}


def test_what_others_rely_on_is_synced_and_what_repeats_is_not(tmp_path: Path, written: list[tuple[str, int]]) -> None:
    rig = Rig(toy_study(**PRIVATE), tmp_path)
    rig.train()
    assert levels(written, "INTO memories") == {FULL}
    assert levels(written, "'identity'") == {FULL, NORMAL}  # the site's key; the journal's name of its study
    assert levels(written, "'fingerprint'") == {FULL}
    assert levels(written, "'lint/secret'") == {FULL}
    assert levels(written, "'lint/seen'") == {NORMAL}
    assert levels(written, "INTO states") == levels(written, "INTO receipts") == {FULL}
    replies = {sql.partition('"kind":"')[2].partition('"')[0] for sql, _ in written if "INTO replies" in sql}
    assert replies == {"update"}
    # Each round's update durably, the validation at the end not.
    assert sorted(level for sql, level in written if "INTO replies" in sql) == [NORMAL] * 3 + [FULL] * 12


def test_signatures_of_survivors_and_the_ledger_are_synced(tmp_path: Path, written: list[tuple[str, int]]) -> None:
    rig = Rig(toy_study(), tmp_path)
    roster = Roster({name: site.store.enrol().public for name, site in rig.sites.items()})
    for site in rig.sites.values():
        site._protocol = SecureUpload(3, lambda: roster)
    rig.coordinator._protocol = secure_sum(roster, 3, rig.journal)
    rig.train()
    assert levels(written, "'survivors/train'") == {FULL}
    assert levels(written, "'roster'") == {FULL}
    store = rig.sites["A"].store
    written.clear()
    Ledger(tmp_path / "ledger.jsonl", store)._anchor.set_fact("privacy/ledger", "[1, 2]")
    assert levels(written, "'privacy/ledger'") == {FULL}


@pytest.mark.parametrize("changes", [PRIVATE, {"schedule": {"rounds": 4, "min_sites": 3}}])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_power_cut_costs_no_site_its_place_and_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], rounds: int
) -> None:
    study = toy_study(**changes)
    whole = Rig(study, tmp_path / "whole").train()
    folder, durable = tmp_path / "cut", tmp_path / "durable"
    transaction = Database.transaction

    @contextmanager
    def kept(self: Database, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with transaction(self, durable=durable) as connection:
            yield connection
        if durable:
            on_disk(self._path)

    def on_disk(path: Path) -> None:
        """A sync takes everything before it along."""
        place = durable / path.parent.relative_to(folder)
        place.mkdir(parents=True, exist_ok=True)
        for file in path.parent.glob(path.name + "*"):
            shutil.copy(file, place / file.name)

    synced: dict[Path, int] = {}
    fsync = os.fsync

    def noted(handle: Any) -> None:
        fsync(handle)
        number = handle if isinstance(handle, int) else handle.fileno()
        synced[Path(os.readlink(f"/proc/self/fd/{number}"))] = os.fstat(number).st_size

    monkeypatch.setattr(Database, "transaction", kept)
    monkeypatch.setattr(os, "fsync", noted)
    rig = Rig(study, folder)
    for report in rig.coordinator.rounds(rig.start()):
        if report.round == rounds:
            break
    rig.journal.close()
    for site in rig.sites.values():
        site.close()
    monkeypatch.undo()
    # The lights go out: of databases and logs stands what was synced; updates that were sent have their length alone.
    logs = [*folder.rglob(LOG)]
    assert len(logs) == 4
    lost = 0
    for log in logs:
        lost += log.stat().st_size - synced[log]
        os.truncate(log, synced[log])
    assert lost > 0 or rounds == 1  # A process syncs the first of its records: its log may be a new file.
    for path in [*folder.rglob("*.sqlite*")]:
        path.unlink()
    for path in durable.rglob("*.sqlite*"):
        shutil.copy(path, folder / path.relative_to(durable))
    for path in (folder / "sites").rglob("blobs/*"):
        if not _is_memory(path):
            path.write_bytes(bytes(path.stat().st_size))
    again = Rig(study, folder)
    assert again.train().public_sha256 == whole.public_sha256
    assert all(not report.missing for report in again.journal.reports())
    assert not verify(folder).damages
    assert len([e for e in again.journal.record.entries() if e.event == "committed"]) == 4


def test_a_round_costs_a_site_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state, its answer and the end of its log are one transaction; the log's file is synced once in a while."""
    rig = Rig(toy_study(schedule={"rounds": 6, "validate_every": 0, "release": "last"}), tmp_path)
    found: list[str] = []
    fsync = os.fsync

    def noted(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        found.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    rounds = rig.coordinator.rounds(rig.start())
    next(rounds)
    found.clear()
    assert len(list(rounds)) == 5
    assert not [path for path in found if "/sites/" in path]
    assert [path for path in found if path.endswith(LOG)]


def _is_memory(path: Path) -> bool:
    connection = sqlite3.connect(path.parent.parent / "store.sqlite")
    try:
        return bool(connection.execute("SELECT 1 FROM memories WHERE sha256 = ?", (path.name,)).fetchall())
    finally:
        connection.close()


def test_an_answer_whose_bytes_are_not_what_was_sent_is_made_anew(tmp_path: Path) -> None:
    rig = Rig(toy_study(), tmp_path)
    rig.train()
    sent = [s for s in rig.engine.sent if s.message.header.kind == "update" and s.message.header.site == "A"][-1]
    body = rig.sites["A"].store.blobs.path(sent.message.header.body_sha256)
    body.write_bytes(bytes(len(sent.body)))
    assert rig.sites["A"].store.reply(sent.message.header.reply_to) is None
    assert (tmp_path / "sites" / "A" / LOG).exists()
