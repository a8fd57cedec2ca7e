"""Runs that are killed and started again: what they are, and what must hold of them afterwards."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.victims import ForkServer, Victim
from tests.scanners import PROTOCOLS
from wardround.federation.exchange import UPDATE
from wardround.federation.release import shared_sha256
from wardround.protection.ledger import Charge, Ledger
from wardround.protection.secret import SecretRoot
from wardround.runs.folder import reserve
from wardround.storage.store import SiteStore
from wardround.storage.verify import verify
from wardround.wire.message import Header

ROUNDS, STEPS = 3, 2
SITES = ("A", "B", "C")
ARMS = {site: ("federated", f"local/{site}") for site in SITES}
ALL_SITES = {"rounds": ROUNDS, "min_sites": 3}
KEEPING_ADAM = {"steps": STEPS, "batch": 2, "optimizer": "adam", "lr": 0.02, "optimizer_state": "keep"}


def _toy(**options: Any) -> dict[str, Any]:
    return {"kind": "custom", "factory": "tests.toys:make_task", "options": options}


def _as_it_is(out: Path) -> Path:
    return out


def _nothing(out: Path) -> None:
    """No more than what is asked of every run."""


def rounds(out: Path) -> list[dict[str, Any]]:
    """rounds.jsonl without what is timed."""
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    timed = ("seconds", "coordinator_seconds", "training_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


# Privacy: a ledger, and secrets that are the same in every folder -----------------------------------------------------


def with_secrets(out: Path, first: int = 0) -> Path:
    """A folder whose sites have their secret roots already: the same in every folder."""
    reserve(out)
    for number, site in enumerate(SITES, first):
        store = SiteStore(site_folder(out, site) / "privacy")
        store.write_once("privacy/root", 0, bytes([number] * 32).hex())
        assert SecretRoot.of(store).key() == SecretRoot(bytes([number] * 32)).key()
        store.close()
    return out


def site_folder(out: Path, site: str) -> Path:
    """Where a site of a run on one machine keeps what is its own."""
    return out / "work" / "sites" / site


def charged(out: Path, site: str) -> tuple[Charge, ...]:
    """What the site's ledger says."""
    store = SiteStore(site_folder(out, site) / "privacy")
    entries = Ledger(site_folder(out, site) / "ledger.jsonl", store).entries()
    store.close()
    return entries


def released(out: Path, site: str) -> set[tuple[str, int]]:
    """Arm and round of every update that the site has let go: written to its store is as good as sent."""
    found = set()
    for arm in ARMS[site]:
        path = site_folder(out, site) / arm.replace("/", "-") / "store.sqlite"
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


def spent(out: Path) -> dict[str, Any]:
    """What each step was charged for, and what the result says of it; every step of every arm once."""
    for site in SITES:
        assert sum(entry.steps for entry in charged(out, site)) == ROUNDS * STEPS * len(ARMS[site])
    ledgers = {site: [entry.inputs for entry in charged(out, site)] for site in SITES}
    return {"ledgers": ledgers, "privacy": json.loads((out / "result.json").read_text())["privacy"]}


# Secure sums: arms that their sites train inside ----------------------------------------------------------------------


def kept_inside(out: Path) -> dict[str, Any]:
    """The models that sites trained alone, and whether every log of the run holds."""
    models = {site: out / "models" / site / f"local-{site}" / "model.safetensors" for site in SITES}
    return {
        "models": {site: shared_sha256(path) for site, path in models.items()},
        "damages": [str(damage) for damage in verify(out).damages],
    }


# The runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run to be killed.

    `prepared` makes its folder, `after_death` is asked of the folder whenever the run has died, and `facts` are, beyond
    the hashes, what a run that was killed must end with as one that was not.
    """

    study: dict[str, Any]
    compare: tuple[str, ...] = ()
    prepared: Callable[[Path], Path] = _as_it_is
    after_death: Callable[[Path], None] = _nothing
    facts: Callable[[Path], dict[str, Any]] = lambda out: {}

    @property
    def job(self) -> dict[str, Any]:
        """What the fork server is asked for."""
        return {"study": self.study, "compare": list(self.compare)}


# Everything that a site or the coordinator must not lose: private layers, optimiser state, server momentum, what waits
# at a site to be sent, and what was paid.
CASES = {
    "personal": Case(
        {
            "method": {"kind": "fedbn"},
            "task": _toy(norm=True),
            "parts": {"frozen": ["0.*"]},
            "local": KEEPING_ADAM,
            "schedule": ALL_SITES,
        },
        ("local",),
    ),
    # The coordinator's mean of private parts, and each site's own.
    "unseen": Case(
        {
            "method": {"kind": "hyperfed", "unseen": "mean"},
            "task": {"kind": "custom", "factory": "tests.scanners:make_scans", "options": {}},
            "sites": {name: {"acquisition": PROTOCOLS[name].model_dump()} for name in ("Alpha", "Beta", "Gamma")},
            "acquisition": {"kind": "ct"},
            "schedule": ALL_SITES,
        }
    ),
    "momentum": Case(
        {
            "method": {"kind": "fedavgm", "momentum": 0.8},
            "task": _toy(features=40),
            "protection": {"compression": {"kind": "top_k", "ratio": 0.1}},
            "schedule": {**ALL_SITES, "release": "last"},
        }
    ),
    # Other stages of the model learn in each round.
    "stages": Case(
        {
            "method": {"kind": "fedbn"},
            "task": {"kind": "custom", "factory": "tests.chain:make_chain", "options": {}},
            "local": KEEPING_ADAM,
            "schedule": {
                **ALL_SITES,
                "phases": [
                    {"rounds": 1, "train": ["reconstruct"]},
                    {"rounds": 1, "train": ["segment"]},
                    {"train": ["reconstruct", "segment"]},
                ],
            },
        }
    ),
    # What earlier rounds folded is kept at the sites and not sent again.
    "folded": Case(
        {
            "method": {"kind": "fedex_lora"},
            "task": _toy(features=200),
            "adapters": {"kind": "lora", "targets": ["0", "2"], "rank": 1, "alpha": 1.0},
            "local": KEEPING_ADAM,
            "schedule": {**ALL_SITES, "release": "last"},
        }
    ),
    # Rounds of all sites, so that it does not depend on which is quick; what is under way is noted as it comes.
    "asynchronous": Case(
        {
            "method": {"kind": "fedbn"},
            "task": _toy(norm=True),
            "local": KEEPING_ADAM,
            "schedule": {**ALL_SITES, "asynchronous": {"buffer": 3, "max_staleness": 1}},
        }
    ),
    "private": Case(
        {
            "task": _toy(patients=12),
            "method": {"kind": "fedavg", "weights": "equal"},
            "local": KEEPING_ADAM,
            "schedule": {**ALL_SITES, "release": "last"},
            "protection": {"privacy": {"patients_per_step": 2}},
        },
        ("local",),
        with_secrets,
        assert_paid,
        spent,
    ),
}
# Not of those above: killed within a masked round, it is made again under another number, and is another model. What
# must come to the same are the arms that a site trains by itself, see `alone_acts`.
INSIDE = Case(
    {"local": KEEPING_ADAM, "schedule": ALL_SITES, "protection": {"secure": True}}, ("local",), facts=kept_inside
)


def alone_acts(heard: list[str]) -> range:
    """The acts of `INSIDE` from the first training of a local arm to the end of the run."""
    trained = [act for act, what in enumerate(heard, 1) if what == "before train"]
    assert len(trained) == 2 * ROUNDS * len(SITES)
    # On one process, arms are trained one after another, the federation first.
    return range(trained[ROUNDS * len(SITES)], len(heard) + 1)


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to, and runs of the same study that are killed."""

    case: Case
    server: ForkServer
    said: dict[str, Any]
    rounds: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def heard(self) -> list[str]:
        """Every act of the run, in order: the n-th is the one that `fatal=n` kills it at."""
        return list(self.said["heard"])

    def start(self, out: Path, **options: Any) -> Victim:
        """The same run in another folder, on its way."""
        return self.server.start(out, **self.case.job, **options)

    def killed(self, out: Path, fatal: int) -> str:
        """Kill a new run at an act and look at what it left; the act."""
        victim = self.start(self.case.prepared(out), fatal=fatal)
        assert victim.wait() == -signal.SIGKILL
        self.case.after_death(out)
        return victim.died_at

    def resume(self, out: Path) -> None:
        """Start a run again: it ends as the one that nothing happened to."""
        self.assert_same(out, self.server.run(out, **self.case.job))

    def assert_same(self, out: Path, said: dict[str, Any]) -> None:
        """Whether a finished run is this one, each round of it once."""
        for key in ("model_sha256", "local_sha256", "metrics"):
            assert said.get(key) == self.said[key], said
        told = rounds(out)
        numbers = [(line["arm"], line["round"]) for line in told]
        assert len(set(numbers)) == len(numbers)
        assert told == self.rounds
        assert self.case.facts(out) == self.facts
        assert not list(out.rglob("*.draft"))


class Undisturbed:
    """The whole run of every case, made when it is first asked for, once for all tests of a process."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._known: dict[str, Whole] = {}

    def __getitem__(self, name: str) -> Whole:
        if name not in self._known:
            case = {**CASES, "inside": INSIDE}[name]
            self._server.ask({"rehearse": case.job})
            out = case.prepared(self._folder / name)
            said = self._server.run(out, listen=True, **case.job)
            assert "model_sha256" in said, said
            self._known[name] = Whole(case, self._server, said, rounds(out), case.facts(out))
        return self._known[name]

    def folder(self, name: str) -> Path:
        """Where a whole run was made."""
        return self._folder / name
