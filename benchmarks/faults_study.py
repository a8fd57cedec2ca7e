"""The short studies that the fault benchmark spoils: what a site learns in them is a number known beforehand.

In round r, site s changes entry (r, s) of the model, and no other. Everything else is the product: coordinator, sites,
stores, journal, logs, secure sum, ledger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.engines.local import LocalEngine
from wardround.federation.coordinator import Coordinator, Plan
from wardround.federation.exchange import ExchangeFactory, PlainSum
from wardround.federation.parts import Lasting
from wardround.federation.secure import SIGN, secure_sum
from wardround.learning.methods.method import MODEL, Method
from wardround.learning.training import Trained
from wardround.plan.sums import round_metrics
from wardround.protection.identity import Roster
from wardround.protection.ledger import Charge, Ledger
from wardround.protection.privacy import PrivacyBudget, Terms
from wardround.protection.rounding import study_root
from wardround.protection.secret import SecretRoot
from wardround.site.rules import Rules
from wardround.site.secure import SecureUpload
from wardround.site.site import Site
from wardround.storage.journal import Journal, State
from wardround.storage.store import SiteStore
from wardround.wire.message import Message
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Group, Layout

ROUNDS = 4
CHANGE = 0.3
STUDY = "faults"
ARM = "federated"
SEED = 7
ROOT = study_root(SEED)
TERMS = Terms(1000.0, 0.01, 1.0, 1.0, 0.25, 2.0, 1, "exact", "pld")
# Kept before anything watches it: what the witness writes is no act of the study's.
_write = os.write


@dataclass(frozen=True)
class Setting:
    """A study: its sites, the round numbers that its model has entries for, and how it is protected."""

    names: tuple[str, ...]
    numbers: int = ROUNDS
    threshold: int | None = None
    private: bool = False

    @cached_property
    def layout(self) -> Layout:
        """Of an update."""
        tensors = (TensorInfo("weight", "float32", (self.numbers * len(self.names),)),)
        return Layout((Group(MODEL, tensors),), round_metrics(()), len(self.names), 1.0)

    @cached_property
    def rules(self) -> Rules:
        """Of a site."""
        # What is trained here has no network to look at.
        layouts = (self.layout, self.layout, self.layout)
        masked = self.threshold is not None
        lasting = Lasting(Method("equal"), self.layout)
        return Rules(STUDY, *layouts, SEED, lasting, lint=False, initial_scale=1.0, masked=masked, rounding_root=ROOT)

    @cached_property
    def plan(self) -> Plan:
        """Of the coordinator: in the clear every site must answer, under masks as many as the threshold."""
        least = self.threshold or len(self.names)
        return Plan(
            ARM,
            STUDY,
            self.names,
            ROUNDS,
            least,
            self.layout,
            self.layout,
            1.0,
            validate_every=0,
            release="last",
            extends=self.threshold is not None,
        )

    def nothing(self) -> npt.NDArray[np.float32]:
        """A model, or a change, of zeros."""
        return np.zeros(self.numbers * len(self.names), np.float32)

    def change(self, number: int, name: str) -> npt.NDArray[np.float32]:
        """What a site learns in a round."""
        change = self.nothing()
        change[(number - 1) * len(self.names) + self.names.index(name)] = CHANGE
        return change


PLAIN = Setting(("A", "B", "C"))
PRIVATE = Setting(("A", "B", "C"), private=True)
# The number of an aborted round is used up, so there have to be more of them than rounds.
SECURE = Setting(("A", "B", "C", "D"), numbers=40, threshold=3)


class Known:
    """A learner whose update is known. `spoil` spoils what it learns next; `trained` are the rounds it worked in."""

    measures_validation = False

    class dataset:
        @staticmethod
        def fingerprint() -> str:
            return "known"

    def __init__(self, setting: Setting, name: str, budget: PrivacyBudget | None) -> None:
        self._setting = setting
        self._name = name
        self._budget = budget
        self.spoil: Callable[[Any], Any] | None = None
        self.trained: list[int] = []

    def load(self, public: Any, memory: Any) -> None:
        public["model/weight"]

    def kept(self, trained: Trained, limits: Any) -> Any:
        return trained.memory

    def train(self, number: int, public: Any, memory: Any, heard: int | None = None) -> Trained:
        if self._budget is not None:
            self._budget.pay(STUDY, ARM, number, 1, "known", (number,))
        self.trained.append(number)
        change = self._setting.change(number, self._name)
        spoil, self.spoil = self.spoil, None
        # What stays at the site must be of every round once, too.
        kept = np.full(1, 2.0 ** (number - 1))
        if "kept" in memory.tensors:
            kept += memory.tensors["kept"]
        learned = change if spoil is None else spoil(change)
        return Trained({MODEL: {"weight": learned}}, {MODEL: 1.0}, {"kept": kept}, 0.0, 0.0)


class Witness:
    """Notes, outside of the study's own records, which survivor lists a coordinator announces."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine = engine
        self._path = folder.with_suffix(".witness")

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Note, then carry."""
        sent = list(messages)
        for header in (message.header for message in sent if message.header.kind == SIGN):
            line = json.dumps([header.round, sorted(header.meta["survivors"])]).encode() + b"\n"
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            _write(handle, line)
            os.close(handle)
        return self._engine.exchange(sent)

    def close(self) -> None:
        """Nothing is open."""


def announced(folder: Path) -> dict[int, set[tuple[str, ...]]]:
    """The survivor lists that a witness saw, of every round."""
    path, found = folder.with_suffix(".witness"), dict[int, set[tuple[str, ...]]]()
    for line in path.read_text().splitlines() if path.exists() else ():
        number, names = json.loads(line)
        found.setdefault(number, set()).add(tuple(names))
    return found


class Federation:
    """Everything of one study in one process, on what lies in the folder."""

    def __init__(self, folder: Path, setting: Setting = PLAIN) -> None:
        self.setting = setting
        self._folder = folder
        self._stores = {name: SiteStore(folder / "sites" / name) for name in setting.names}
        self._budgets = {name: _budget(folder, name) for name in setting.names} if setting.private else {}
        self.learners = {n: Known(setting, n, self._budgets[n][0] if setting.private else None) for n in setting.names}
        self._roster = None if setting.threshold is None else _enrolled(folder, self._stores)
        self.sites: dict[str, Site] = {}
        for name in setting.names:
            self.restart(name)
        self.engine: Any = LocalEngine(lambda header: self.sites[header.site])
        self.journal = Journal(folder / "coordinator", STUDY)

    def restart(self, name: str) -> None:
        """Let a site forget what it holds in memory."""
        setting, roster, protocol = self.setting, self._roster, None
        if setting.threshold is not None and roster is not None:
            protocol = SecureUpload(setting.threshold, lambda: roster)
        learner: Any = self.learners[name]
        self.sites[name] = Site(name, setting.rules, lambda: learner, self._stores[name], protocol=protocol)

    def rounds(self) -> Iterator[int]:
        """Run on; the number of every round that is committed."""
        protocol: ExchangeFactory = PlainSum
        engine = self.engine
        if self.setting.threshold is not None and self._roster is not None:
            protocol = secure_sum(self._roster, self.setting.threshold, self.journal)
            engine = Witness(engine, self._folder)
        coordinator = Coordinator(self.setting.plan, Method("equal"), engine, self.journal, protocol)
        state = coordinator.start(lambda: ({"model/weight": self.setting.nothing()}, {}))
        for report in coordinator.rounds(state):
            yield report.round

    def last(self) -> State:
        """The state after the last committed round."""
        state = self.journal.latest()
        assert state is not None
        return state

    def charged(self, name: str) -> tuple[Charge, ...]:
        """What a site's ledger says; raises `JournalError` for one that is not the newest."""
        return self._budgets[name][0].ledger.entries()

    def close(self) -> None:
        """Close every database."""
        self.journal.close()
        for site in self.sites.values():
            site.close()
        for _, store in self._budgets.values():
            store.close()


def _enrolled(folder: Path, stores: Mapping[str, SiteStore]) -> Roster:
    """The roster, also written where whoever verifies the logs looks for it."""
    roster, path = Roster({name: store.enrol().public for name, store in stores.items()}), folder / "coordinator"
    path.mkdir(exist_ok=True)
    (path / "roster.draft").write_text(json.dumps(roster.to_json()))
    (path / "roster.draft").rename(path / "roster.json")
    return roster


def _budget(folder: Path, name: str) -> tuple[PrivacyBudget, SiteStore]:
    store = SiteStore(folder / "sites" / name / "privacy")
    return PrivacyBudget(name, TERMS, Ledger(ledger_of(folder, name), store), SecretRoot.of(store)), store


def ledger_of(folder: Path, name: str) -> Path:
    """Where a site's ledger lies: outside of its store."""
    return folder / "sites" / name / "ledger.jsonl"


@contextmanager
def opened(folder: Path, setting: Setting = PLAIN) -> Iterator[Federation]:
    """A federation, closed however it ends."""
    federation = Federation(folder, setting)
    try:
        yield federation
    finally:
        federation.close()


def fault_free(folder: Path, setting: Setting = PLAIN) -> str:
    """The hash of the model that every study of a setting must end with."""
    with opened(folder, setting) as federation:
        assert list(federation.rounds()) == list(range(1, ROUNDS + 1))
        return federation.last().public_sha256
