"""The ledger of a private run that is killed: every step charged once, before anything of it is released."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.faults.victims import ForkServer
from wardround.federation.exchange import UPDATE
from wardround.federation.store import SiteStore
from wardround.protection.ledger import Entry, Ledger
from wardround.protection.secret import SecretRoot
from wardround.wire.message import Header

ROUNDS, STEPS = 3, 2
SITES = ("A", "B", "C")
STUDY: dict[str, Any] = {
    "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"patients": 12}},
    "method": {"kind": "fedavg", "weights": "equal"},
    "local": {"steps": STEPS, "batch": 2, "optimizer": "adam", "lr": 0.02, "optimizer_state": "keep"},
    "schedule": {"rounds": ROUNDS, "min_sites": 3, "release": "last"},
    "protection": {"privacy": {"patients_per_step": 2}},
}
ARMS = {site: ("federated", f"local/{site}") for site in SITES}
JOB: dict[str, Any] = {"study": STUDY, "compare": ["local"]}


def with_secrets(out: Path, first: int = 0) -> Path:
    """A folder whose sites have their secret roots already: the same in every folder."""
    for number, site in enumerate(SITES, first):
        store = SiteStore(_site(out, site) / "privacy")
        store.promise("privacy/root", 0, bytes([number] * 32).hex())
        assert SecretRoot.of(store).key() == SecretRoot(bytes([number] * 32)).key()
        store.close()
    return out


def _site(out: Path, site: str) -> Path:
    return out / "work" / "sites" / site


def charged(out: Path, site: str) -> tuple[Entry, ...]:
    """What the site's ledger says."""
    store = SiteStore(_site(out, site) / "privacy")
    entries = Ledger(_site(out, site) / "ledger.jsonl", store).entries()
    store.close()
    return entries


def released(out: Path, site: str) -> set[tuple[str, int]]:
    """Arm and round of every update that the site has let go: written to its store is as good as sent."""
    found = set()
    for arm in ARMS[site]:
        path = _site(out, site) / arm.replace("/", "-") / "store.sqlite"
        if not path.exists():
            continue
        connection = sqlite3.connect(path)
        try:
            known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'replies'").fetchone()
            rows = connection.execute("SELECT header FROM replies").fetchall() if known else []
        finally:
            connection.close()
        headers = [Header.from_bytes(str(text).encode()) for (text,) in rows]
        # Old replies are dropped: who has answered round 3 has answered those before it.
        last = max((header.round for header in headers if header.kind == UPDATE), default=0)
        found |= {(arm, number) for number in range(1, last + 1)}
    return found


def assert_paid(out: Path) -> None:
    """Nothing released that was not charged, nothing charged twice."""
    for site in SITES:
        paid = [(entry.arm, entry.round) for entry in charged(out, site)]
        assert len(set(paid)) == len(paid)
        assert released(out, site) <= set(paid)


def assert_same(out: Path, said: dict[str, Any], whole: dict[str, Any]) -> None:
    """The same model, and a ledger like that of a run that nothing happened to."""
    assert said.get("model_sha256") == whole["said"]["model_sha256"], said
    for site in SITES:
        assert [entry.inputs for entry in charged(out, site)] == whole["ledgers"][site]
        assert sum(entry.steps for entry in charged(out, site)) == ROUNDS * STEPS * len(ARMS[site])
    assert json.loads((out / "result.json").read_text())["privacy"] == whole["privacy"]


@pytest.fixture(scope="module")
def whole(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run."""
    fork_server.ask({"rehearse": JOB})
    out = with_secrets(tmp_path_factory.mktemp("whole") / "out")
    said = fork_server.run(out, listen=True, **JOB)
    assert "model_sha256" in said, said
    ledgers = {site: [entry.inputs for entry in charged(out, site)] for site in SITES}
    for site in SITES:
        assert {(arm, number) for arm in ARMS[site] for number in range(1, ROUNDS + 1)} == released(out, site)
        assert len(ledgers[site]) == ROUNDS * len(ARMS[site])
    privacy = json.loads((out / "result.json").read_text())["privacy"]
    assert 0.9 * 8.0 < privacy["epsilon"] <= 8.0
    return {"said": said, "ledgers": ledgers, "privacy": privacy}


@pytest.mark.slow
def test_killed_at_any_act_a_step_is_charged_once(
    fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path
) -> None:
    acts, parts, chance = whole["said"]["acts"], 8, random.Random(5)
    killed_at = set()
    for part in range(parts):
        fatal = chance.randint(part * acts // parts + 1, (part + 1) * acts // parts)
        out = with_secrets(tmp_path / f"killed-at-{fatal}")
        victim = fork_server.start(out, fatal=fatal, **JOB)
        assert victim.wait() == -signal.SIGKILL
        killed_at.add(victim.died_at)
        assert_paid(out)
        assert_same(out, fork_server.run(out, **JOB), whole)
    assert len(killed_at) >= 3


@pytest.mark.slow
def test_killed_around_every_write_of_a_charge(fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path) -> None:
    """Between the ledger's line and its anchor, and between the anchor and the first gradient."""
    heard = whole["said"]["heard"]
    first, last = heard.index("before spend") + 1, heard.index("after spend") + 1
    assert "after fsync" in heard[first:last]
    assert "before commit" in heard[first:last]
    for fatal in range(first, last + 1):
        out = with_secrets(tmp_path / f"killed-at-{fatal}")
        assert fork_server.start(out, fatal=fatal, **JOB).wait() == -signal.SIGKILL
        assert_paid(out)
        assert_same(out, fork_server.run(out, **JOB), whole)


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_paid_twice(
    fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path
) -> None:
    out, lives = with_secrets(tmp_path / "out"), 0
    while (victim := fork_server.start(out, fatal=whole["said"]["acts"] // 5, **JOB)).wait():
        lives += 1
        assert lives < 20
        assert_paid(out)
    assert lives >= 3
    assert_same(out, victim.said, whole)


@pytest.mark.slow
def test_a_ledger_that_is_not_the_newest_stops_its_site(
    fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing is trained without it; with the newest copy back the run ends as if nothing had been."""
    out = with_secrets(tmp_path / "out")
    # In the middle of the training: every site has paid before, and has to pay again.
    charges = [act for act, what in enumerate(whole["said"]["heard"], 1) if what == "before spend"]
    assert fork_server.start(out, fatal=charges[len(charges) // 2], **JOB).wait() == -signal.SIGKILL
    path = _site(out, "B") / "ledger.jsonl"
    newest, before = path.read_bytes(), released(out, "B")
    lines = newest.splitlines(keepends=True)
    assert len(lines) >= 2
    edited = newest.replace(b'"steps": 2', b'"steps": 1', 1)
    for spoiled in (None, lines[0], newest[:-5], edited):
        path.unlink() if spoiled is None else path.write_bytes(spoiled)
        said = fork_server.run(out, **JOB)
        assert said["error"] == "NotEnoughSites", said
        assert "does not train with privacy" in said["text"]
        assert released(out, "B") == before
    path.write_bytes(newest)
    assert_same(out, fork_server.run(out, **JOB), whole)


def test_another_secret_is_another_model_and_as_many_charges(
    fork_server: ForkServer, whole: dict[str, Any], tmp_path: Path
) -> None:
    out = with_secrets(tmp_path / "out", first=100)
    assert fork_server.run(out, **JOB)["model_sha256"] != whole["said"]["model_sha256"]
    for site in SITES:
        inputs = {entry.inputs for entry in charged(out, site)}
        assert len(inputs) == len(whole["ledgers"][site])
        assert not inputs & set(whole["ledgers"][site])
