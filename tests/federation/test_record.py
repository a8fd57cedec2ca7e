"""The logs: a chain that a crash does not fork, and that no change passes unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.federation.rig import Rig
from tests.toys import toy_sites, toy_study
from wardround.cli import app
from wardround.errors import JournalError
from wardround.federation.logs import ANCHOR, head_of
from wardround.protection.identity import Identity
from wardround.runs.session import run
from wardround.storage.hash_log import LOG, MAX_TAIL, PURPOSE, Entry, HashLog, begun_by
from wardround.storage.journal import Journal
from wardround.storage.verify import verify
from wardround.wire.canonical import digest

THREE = {"schedule": {"rounds": 3, "min_sites": 3}}


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def chain_anew(path: Path, start: int) -> None:
    """What somebody with a program and no key does: every hash from a record on is made to fit."""
    entries = [json.loads(line) for line in lines_of(path)]
    out = []
    for index, value in enumerate(entries):
        if index >= start:
            value["seq"], value["prev"] = index, out[-1].hash if out else "0" * 64
            value["payload_sha256"] = digest(value["payload"])
            value["hash"] = Entry(**{**value, "hash": ""}).expected
        out.append(Entry(**value))
    path.write_bytes(b"".join(entry.line() for entry in out))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's logs after three rounds."""
    folder = tmp_path_factory.mktemp("whole")
    Rig(toy_study(**THREE), folder).train()
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# One log ---------------------------------------------------------------------------------------------------------


def test_a_fact_is_on_record_once_whoever_notes_it_again(tmp_path: Path) -> None:
    first = HashLog(tmp_path / LOG, "site A", {"study": "s", "site": "A"})
    heads = [first.note("sent", {"round": r}) for r in (1, 2, 1)]
    assert heads[0] == heads[2] != heads[1]
    again = HashLog(tmp_path / LOG, "site A", {"study": "s", "site": "A"})
    assert again.note("sent", {"round": 2}, sync=True) == heads[1]
    assert again.round_of(heads[1]) == 2
    assert again.round_of("f" * 64) is None
    # The one that has read less goes on where the other wrote.
    third = again.note("sent", {"round": 3})
    assert first.note("failed", {"round": 3}) != third
    entries = list(first.entries())
    assert [e.event for e in entries] == ["begun", "sent", "sent", "sent", "failed"]
    assert [e.seq for e in entries] == list(range(5))
    assert first.head == entries[-1].hash
    assert not verify(tmp_path).damages


def test_a_line_that_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    record = HashLog(tmp_path / LOG, "coordinator", {"study": "s"})
    record.note("opened", {"round": 1})
    whole = (tmp_path / LOG).read_bytes()
    with (tmp_path / LOG).open("ab") as file:
        file.write(whole.splitlines()[-1][:40])
    found = verify(tmp_path)
    assert not found.damages
    assert "unfinished" in found.logs[0].note
    assert HashLog(tmp_path / LOG, "coordinator", {"study": "s"}).note("opened", {"round": 1}) == record.head
    assert (tmp_path / LOG).read_bytes() == whole


def test_what_a_power_cut_took_from_a_log_is_written_again_from_what_was_kept(tmp_path: Path) -> None:
    path, begun = tmp_path / LOG, {"study": "s"}
    record = HashLog(path, "site A", begun)
    record.note("sent", {"round": 1}, sync=True)
    assert record.tail().lines == b""
    synced = path.stat().st_size
    record.note("sent", {"round": 2})
    record.note("sent", {"round": 3})
    kept, whole = record.tail(), path.read_bytes()
    assert (kept.offset, kept.lines) == (synced, whole[synced:])
    lost = [whole[:synced], whole[: synced + 50], whole[:-1], whole[:synced] + bytes(len(whole)), whole]
    for left in lost:
        path.write_bytes(left)
        assert HashLog(path, "site A", begun, tail=kept).round_of(record.head) == 3
        assert path.read_bytes() == whole
    # What was synced is not made up for, and what somebody wrote is not written over.
    path.write_bytes(whole[: synced - 1])
    assert HashLog(path, "site A", begun, tail=kept).round_of(record.head) is None
    path.write_bytes(whole[:-30] + b"?" + whole[-29:])
    with pytest.raises(JournalError, match=r"was edited|is not"):
        HashLog(path, "site A", begun, tail=kept).round_of(record.head)


def test_the_end_of_a_log_that_waits_for_a_sync_stays_short(tmp_path: Path) -> None:
    record = HashLog(tmp_path / LOG, "site A", {"study": "s"})
    record.note("sent", {"round": 0})
    # The file's own name may be lost as well.
    assert record.tail().lines == b""
    longest = 0
    for number in range(1, 200):
        record.note("sent", {"round": number})
        longest = max(longest, len(record.tail().lines))
    assert 0 < longest <= MAX_TAIL < (tmp_path / LOG).stat().st_size


def test_many_writers_make_one_chain(tmp_path: Path) -> None:
    records = [HashLog(tmp_path / LOG, "site A", {"study": "s", "site": "A"}) for _ in range(4)]

    def write(number: int) -> None:
        for index in range(20):
            records[number].note("sent", {"round": index, "by": number})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(records[0].entries())) == 81
    assert not verify(tmp_path).damages


def test_a_changed_log_is_not_gone_on_with(tmp_path: Path) -> None:
    record = HashLog(tmp_path / LOG, "coordinator", {"study": "s"})
    for number in range(3):
        record.note("opened", {"round": number})
    lines = lines_of(tmp_path / LOG)
    (tmp_path / LOG).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(JournalError, match="became shorter"):
        record.note("opened", {"round": 9})
    (tmp_path / LOG).write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(JournalError, match="does not go on at record 1"):
        HashLog(tmp_path / LOG, "coordinator", {"study": "s"}).note("opened", {"round": 9})
    (tmp_path / LOG).write_bytes(b"".join(lines).replace(b'"round":1', b'"round":7'))
    with pytest.raises(JournalError, match="was edited in record 2"):
        HashLog(tmp_path / LOG, "coordinator", {"study": "s"}).note("opened", {"round": 9})


def test_reading_a_changed_log_says_where(tmp_path: Path) -> None:
    record = HashLog(tmp_path / LOG, "site A", {"study": "s"})
    record.note("sent", {"round": 1})
    record.note("sent", {"round": 2})
    record.path.write_bytes(record.path.read_bytes().replace(b'"round":2', b'"round":9', 1))
    with pytest.raises(JournalError, match="was edited in record 2"):
        list(record.entries())


def test_every_hundredth_record_is_signed_and_cannot_be_made_without_the_key(tmp_path: Path) -> None:
    key = Identity.generate()
    record = HashLog(tmp_path / LOG, "site A", begun_by(key, (), study="s", site="A"), lambda: key)
    for number in range(250):
        record.note("sent", {"round": number})
    entries = list(record.entries())
    assert [e.seq for e in entries if e.event == "checkpoint"] == [100, 200]
    assert not verify(tmp_path).damages
    text = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(text.replace(b'"round":150', b'"round":151'))
    chain_anew(tmp_path / LOG, 151)
    assert verify(tmp_path).damages == [f"{LOG}: record 200 is not signed with the key of its log"]


@pytest.mark.slow
def test_a_round_ends_with_a_signature_and_a_restart_keeps_the_key(tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    first = verify(tmp_path).logs
    stopped_after(tmp_path, 4)
    found = verify(tmp_path)
    assert not found.damages
    assert [log.key for log in found.logs] == [log.key for log in first]
    assert len({log.key for log in found.logs}) == 4
    assert found.logs[0].signatures == 4
    result = CliRunner().invoke(app, ["log", "verify", str(tmp_path)])
    assert f"4 signatures, key {found.logs[0].key}" in result.stdout


def test_forged_and_stripped_signatures_are_found_in_one_log_alone(folder: Path) -> None:
    path = folder / "coordinator" / LOG
    lines = lines_of(path)
    at = [i for i, line in enumerate(lines) if b'"event":"checkpoint"' in line]
    path.write_bytes(b"".join(line for i, line in enumerate(lines) if i != at[1]))
    chain_anew(path, at[1])
    assert any(f"record {at[1]} is not signed" in damage for damage in verify(path).damages)
    # Stripped all, and the tail written anew: no signature is left that could be wrong.
    path.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in at))
    chain_anew(path, 1)
    assert len(verify(path).damages) == 3
    # Signed with another key: the first record names the right one.
    other = Identity.generate()
    values = [json.loads(line) for line in lines]
    signature = other.sign(PURPOSE, "coordinator", values[at[0]]["seq"], values[at[0]]["prev"]).hex()
    values[at[0]]["payload"] = {"signature": signature, "key": other.public.hex()}
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values))
    chain_anew(path, at[0])
    assert f"{LOG}: record {at[0]} is not signed with the key of its log" in verify(path).damages
    # A signature in a log that has no key at all.
    values[0]["payload"] = {"study": values[0]["payload"]["study"]}
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values))
    chain_anew(path, 0)
    assert len(verify(path).damages) == 3


def test_a_crash_before_the_signature_is_made_up_for(tmp_path: Path) -> None:
    key = Identity.generate()
    begun = begun_by(key, ("committed",), study="s")
    HashLog(tmp_path / LOG, "coordinator", begun, lambda: key).note("committed", {"round": 1})
    lines = lines_of(tmp_path / LOG)
    assert [json.loads(line)["event"] for line in lines] == ["begun", "committed", "checkpoint"]
    (tmp_path / LOG).write_bytes(b"".join(lines[:-1]))
    assert not verify(tmp_path).damages
    again = HashLog(tmp_path / LOG, "coordinator", begun, lambda: key)
    again.note("opened", {"round": 2})
    assert [e.event for e in again.entries()] == ["begun", "committed", "checkpoint", "opened"]
    assert not verify(tmp_path).damages
    other = Identity.generate()
    with pytest.raises(JournalError, match="begun with another key"):
        HashLog(tmp_path / LOG, "coordinator", begun, lambda: other).note("committed", {"round": 2})


def test_a_log_from_before_signatures_goes_on_and_says_that_it_has_none(tmp_path: Path) -> None:
    HashLog(tmp_path / "coordinator" / LOG, "coordinator", {"study": "s"}).note("opened", {"round": 1})
    journal = Journal(tmp_path / "coordinator", "s")
    journal.record.note("committed", {"round": 1})
    assert [e.event for e in journal.record.entries()] == ["begun", "opened", "committed"]
    result = CliRunner().invoke(app, ["log", "verify", str(tmp_path)])
    assert result.exit_code == 0
    assert "3 records, no signatures" in result.stdout


def test_no_private_key_is_in_a_message_or_readable_by_others(tmp_path: Path) -> None:
    rig = Rig(toy_study(**THREE), tmp_path)
    rig.train()
    keys = [rig.journal._signing_key(), *(site.store.enrol() for site in rig.sites.values())]
    for key in keys:
        assert all(key.private not in sent.data and key.private.hex().encode() not in sent.data
                   for sent in rig.engine.sent)  # fmt: skip
        assert all(key.private.hex().encode() not in path.read_bytes() for path in tmp_path.rglob(LOG))
    for path in (*tmp_path.rglob("*.sqlite*"), *tmp_path.rglob(LOG)):
        assert not path.stat().st_mode & 0o077, path.name


def test_the_clock_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = Rig(toy_study(**THREE), tmp_path / "steady").train()
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 86400.0 * next(jumps))
    jumping = Rig(toy_study(**THREE), tmp_path / "jumping").train()
    assert jumping.public_sha256 == steady.public_sha256
    assert not verify(tmp_path / "jumping").damages


# All logs --------------------------------------------------------------------------------------------------------


def test_every_party_tells_the_round_and_holds_the_others_heads(folder: Path) -> None:
    found = verify(folder)
    assert not found.damages
    assert [log.name for log in found.logs] == ["coordinator/log.jsonl", *(f"sites/{s}/log.jsonl" for s in "ABC")]
    # Three updates and one validation of three sites; two requests with an anchor to three sites.
    assert found.anchors == 4 * 3 + 2 * 3
    coordinator, site = found.logs[0], found.logs[1]
    assert [e.event for e in coordinator.entries] == [
        "begun", *["opened", "accepted", "accepted", "accepted", "committed", "checkpoint"] * 3,
        "opened", *["accepted"] * 3,
    ]  # fmt: skip
    sent = ["sent", "checkpoint"]
    assert [e.event for e in site.entries] == ["begun", *sent, "anchored", *sent, "anchored", *sent, *sent]


def spoil_edit(path: Path) -> str:
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":9', 1))
    return "was edited"


def spoil_time(path: Path) -> str:
    lines = lines_of(path)
    lines[3] = lines[3].replace(b'"time":"2', b'"time":"1')
    path.write_bytes(b"".join(lines))
    return "record 3 was edited"


def spoil_deletion(path: Path) -> str:
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[:2] + lines[4:]))
    return "records 2 to 3 are missing"


def spoil_order(path: Path) -> str:
    lines = lines_of(path)
    lines[2], lines[3] = lines[3], lines[2]
    path.write_bytes(b"".join(lines))
    return "stands out of order"


def spoil_end(path: Path) -> str:
    path.write_bytes(b"".join(lines_of(path)[:4]))
    return "cut off or written anew"


def spoil_chain(path: Path) -> str:
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":9', 1))
    chain_anew(path, 1)
    return "cut off or written anew"


def spoil_form(path: Path) -> str:
    path.write_bytes(path.read_bytes().replace(b'"seq":1', b'"seq": 1', 1))
    return "was edited"


def spoil_types(path: Path) -> str:
    """A chain that fits, of records that no program wrote."""
    values = [json.loads(line) for line in lines_of(path)]
    for value in values[1:]:
        value["payload"] = {"round": "two", "site": [], "head": {}, "anchor": 3, "heads": None}
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values))
    chain_anew(path, 1)
    return "cut off or written anew"


def spoil_start(path: Path) -> str:
    """A first record of odd types, and a roster that is none."""
    values = [json.loads(line) for line in lines_of(path)]
    values[0]["payload"] |= {"signs": [["committed"], 3], "key": 5}
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values))
    chain_anew(path, 0)
    (path.parent / "roster.json").write_text("[1]")
    return "is not signed with the key of its log"


def spoil_depth(path: Path) -> str:
    path.write_bytes(path.read_bytes() + b"[" * 200_000 + b"\n")
    return "is not JSON"


def spoil_copy(path: Path) -> str:
    """The log is spoilt, and a whole copy lies beside it to answer for it."""
    (path.parent / "zz").mkdir()
    shutil.copy(path, path.parent / "zz" / LOG)
    path.write_bytes(b"".join(lines_of(path)[:2]))
    return "only one of them can be its log"


def spoil_whole(path: Path) -> str:
    path.unlink()
    return "is missing"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_edit,
        spoil_time,
        spoil_deletion,
        spoil_order,
        spoil_end,
        spoil_chain,
        spoil_form,
        spoil_types,
        spoil_start,
        spoil_depth,
        spoil_copy,
        spoil_whole,
    ],
)
@pytest.mark.parametrize("log", ["coordinator/log.jsonl", "sites/B/log.jsonl"])
def test_no_change_passes_unnoticed(folder: Path, log: str, spoil: Callable[[Path], str]) -> None:
    words = spoil(folder / log)
    result = CliRunner().invoke(app, ["log", "verify", str(folder)])
    assert result.exit_code == 1
    assert words in result.stderr
    assert log in result.stderr or words == "is missing"


def test_a_whole_folder_passes_and_an_empty_one_says_so(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["log", "verify", str(folder)])
    assert result.exit_code == 0
    assert "Whole: 18 anchors" in result.stdout
    alone = CliRunner().invoke(app, ["log", "verify", str(folder / "coordinator" / LOG)])
    assert alone.exit_code == 0
    assert "records cut off its end would not show" in alone.stdout
    assert "agree" not in alone.stdout
    (tmp_path / "empty").mkdir()
    empty = CliRunner().invoke(app, ["log", "verify", str(tmp_path / "empty")])
    assert empty.exit_code == 2
    assert "holds no log" in empty.stderr


@given(data=st.data())
def test_no_bit_flips_unnoticed(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / LOG
    source = (whole / "sites" / "A" / LOG).read_bytes()
    # The last line break may go: it leaves an unfinished record, and the anchors miss it.
    place = data.draw(st.integers(0, len(source) - 2))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(source[:place] + bytes([source[place] ^ 1 << bit]) + source[place + 1 :])
    assert verify(path).damages


# What restored copies come to ------------------------------------------------------------------------------------


def test_a_crash_between_journal_and_log_is_made_up_for(whole: Path, folder: Path) -> None:
    path = folder / "coordinator" / LOG
    lines = lines_of(path)
    last = max(i for i, line in enumerate(lines) if b'"event":"committed"' in line)
    path.write_bytes(b"".join(lines[:last]))
    rig = Rig(toy_study(**THREE), folder)
    rig.train()
    made_up, was = rig.journal.record.last("committed"), json.loads(lines[last])
    assert made_up is not None
    assert made_up.payload == was["payload"]
    assert not verify(folder).damages


@pytest.mark.parametrize("kept", [0, 1])
def test_a_log_that_lost_rounds_stops_the_coordinator(folder: Path, kept: int) -> None:
    path = folder / "coordinator" / LOG
    lines = lines_of(path)
    committed = [i for i, line in enumerate(lines) if b'"event":"committed"' in line]
    path.write_bytes(b"".join(lines[: committed[kept]]))
    with pytest.raises(JournalError, match="the log was shortened or restored"):
        Rig(toy_study(**THREE), folder).train()


def longer(rounds: int) -> Any:
    return toy_study(schedule={"rounds": rounds, "min_sites": 2}, method={"kind": "fedavgm"})


def stopped_after(folder: Path, rounds: int) -> Rig:
    """A federation of five rounds that was stopped after some."""
    rig = Rig(longer(5), folder)
    for report in rig.coordinator.rounds(rig.start()):
        if report.round == rounds:
            break
    return rig


def test_a_journal_restored_without_its_log_stops_the_coordinator(tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    shutil.copytree(tmp_path / "coordinator", tmp_path / "backup")
    stopped_after(tmp_path, 4)
    newest = (tmp_path / "coordinator" / LOG).read_bytes()
    shutil.rmtree(tmp_path / "coordinator")
    shutil.copytree(tmp_path / "backup", tmp_path / "coordinator")
    (tmp_path / "coordinator" / LOG).write_bytes(newest)
    with pytest.raises(JournalError, match="the journal was restored from an older copy"):
        Rig(longer(5), tmp_path).train()


def test_sites_do_not_go_back_with_a_coordinator_from_an_older_copy(tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    shutil.copytree(tmp_path / "coordinator", tmp_path / "backup")
    stopped_after(tmp_path, 4)
    shutil.rmtree(tmp_path / "coordinator")
    shutil.copytree(tmp_path / "backup", tmp_path / "coordinator")
    with pytest.raises(Exception, match="has gone on to round 4 and is asked for round 3"):
        Rig(longer(5), tmp_path).train()


def test_a_site_from_an_older_copy_is_told_by_the_head_that_others_saw(tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    shutil.copytree(tmp_path / "sites" / "B", tmp_path / "backup")
    stopped_after(tmp_path, 4)
    shutil.rmtree(tmp_path / "sites" / "B")
    shutil.copytree(tmp_path / "backup", tmp_path / "sites" / "B")
    rig = Rig(longer(5), tmp_path)
    (report,) = (r for r in rig.coordinator.rounds(rig.start()) if r.validation is None)
    assert report.participants == ("A", "C")
    assert "older than what the coordinator has seen of it" in report.missing["B"]
    assert any("sites/B" in damage for damage in verify(tmp_path).damages)


def test_an_update_shows_the_head_of_its_log_and_is_refused_without(tmp_path: Path) -> None:
    rig = Rig(toy_study(**THREE), tmp_path)
    rig.train()
    updates = [s.message.header for s in rig.engine.sent if s.message.header.kind == "update"]
    known = {e.hash for log in verify(tmp_path).logs for e in log.entries}
    assert all(head_of(header) in known for header in updates)
    requests = [s.message.header for s in rig.engine.sent if s.message.header.kind == "train"]
    assert [ANCHOR in header.meta for header in requests] == [False] * 3 + [True] * 6


def test_a_laptop_run_leaves_whole_logs_for_every_arm_masked_or_not(tmp_path: Path) -> None:
    study = toy_study(protection={"secure": True})
    run(study, toy_sites(tmp_path / "data"), tmp_path / "out", compare=["local"], engine="local")
    found = verify(tmp_path / "out")
    assert not found.damages
    # The federation, in each site its own arm with the coordinator within, and each site's agent.
    assert len(found.logs) == 4 + 3 * 2 + 3
    events = {entry.event for log in found.logs for entry in log.entries}
    assert {"opened", "accepted", "committed", "released", "survivors", "signed", "sent", "anchored"} <= events
    assert all(log.entries[0].payload["key"] for log in found.logs if "sites" in log.name and "federated" in log.name)


def test_a_record_of_a_process_that_died_is_synced_before_anybody_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LOG
    # What a process wrote and was killed before it could sync.
    HashLog(path, "site A", {"study": "s"}).note("sent", {"round": 1})
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or sync(file))
    again = HashLog(path, "site A", {"study": "s"})
    again.note("sent", {"round": 1}, sync=True)
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    again.note("sent", {"round": 1}, sync=True)
    assert len(synced) == 2
