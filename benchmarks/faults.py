"""Ten thousand faults, and whether any update was lost or counted twice.

Short studies of four rounds run through the real coordinator, sites, stores, journal and logs: three sites in the
clear (where every site must answer), or four under masks (`protection.secure`, threshold 3). What a site learns is a
number known beforehand, so the final model tells which updates are in it, and how often (faults_oracle.py). It must
also be, bit for bit, that of a run without faults; under masks, where a round without a site or an aborted round is no
fault, the plain sum of those updates that were announced. Every site must have kept exactly what the rounds leave, and
the logs of every study must verify.

*Messages* are spoiled by an engine between coordinator and site (faults_messages.py), processes are *killed*, *disks*
fill, *clocks* jump, journals, sites and logs are replaced by older *copies* or edited, and privacy *ledgers* are put
back, cut or rewritten (faults_injections.py). Recovery is the time from the start of the process after a kill to its
next committed round (or its end); processes are forked, so what a cold start takes is measured beside it.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from common import arguments, conditions, cpu_seconds, finish, median, table
from faults_injections import edit_log, fill, jump, kill, life, restore, roll_back
from faults_messages import spoil_messages
from faults_oracle import Verdicts
from faults_study import PLAIN, PRIVATE, ROUNDS, SECURE, Setting, fault_free

SEED = 20261123
PER_STUDY = 45
# Under masks a round has twenty messages, and more than one site that drops out of it ends it.
SECURE_PER_STUDY = 15
SECURE_SHARE = 0.15


@dataclass
class Driver:
    """Runs spoiled studies one after another and counts what was injected."""

    root: Path
    random: Random
    verdicts: Verdicts
    by_class: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    secure: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    trained_while_refused: int = 0
    studies: int = 0

    def study(self, spoil: Callable[[Path], None], setting: Setting = PLAIN) -> None:
        """Spoil one study in a folder of its own, judge it, and clear up."""
        self.studies += 1
        folder = self.root / f"study-{self.studies}"
        spoil(folder)
        self.verdicts.judge(folder, setting)
        for path in self.root.glob(f"{folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def kills(self, wanted: int, title: str, setting: Setting) -> None:
        """Kill processes until there were so many kills."""
        acts = 0

        def count(folder: Path) -> None:
            nonlocal acts
            _, _, acts = life(folder, 0, setting)

        def spoil(folder: Path) -> None:
            more, seconds = kill(folder, 8, acts, self.random, setting)
            self.by_class[title] += more
            self.recoveries += seconds

        self.study(count, setting)
        while self.by_class[title] < wanted:
            self.study(spoil, setting)

    def others(self) -> None:
        """One study with each of the faults that are neither kills nor messages."""
        random, by_class, noticed = self.random, self.by_class, self.noticed

        def full(folder: Path) -> None:
            by_class["disk_full"] += fill(folder, 4, random)

        def jumped(folder: Path) -> None:
            by_class["clock_jump"] += jump(folder, 4, random)

        def edited(folder: Path) -> None:
            by_class["log_changed"] += 1
            noticed["log_changed"] += edit_log(folder, random)

        def ledger(folder: Path) -> None:
            faults, refused, trained = roll_back(folder, random)
            by_class["ledger_rolled_back"] += faults
            noticed["ledger_rolled_back"] += refused
            self.trained_while_refused += trained

        for spoil in (full, jumped, edited):
            self.study(spoil)
        self.study(ledger, PRIVATE)
        site = random.choice(PLAIN.names)
        for what, title in (
            ("coordinator", "coordinator_from_older_copy"),
            ("coordinator/journal.sqlite", "journal_from_older_copy"),
            (f"sites/{site}", "site_from_older_copy"),
            (f"sites/{site}/store.sqlite", "store_from_older_copy"),
        ):
            self.study(lambda folder, what=what, title=title: self._restored(folder, what, title))  # type: ignore[misc]

    def _restored(self, folder: Path, what: str, title: str) -> None:
        self.by_class[title] += 1
        self.noticed[title] += restore(folder, what, self.random)

    def secure_messages(self, wanted: int) -> None:
        """Spoil messages of studies under masks until there were so many of them."""

        def spoil(folder: Path) -> None:
            left = min(SECURE_PER_STUDY, wanted - self.secure.total())
            self.secure.update(spoil_messages(folder, left, self.random, SECURE, SECURE_SHARE))

        while self.secure.total() < wanted:
            self.study(spoil, SECURE)

    def messages(self, wanted: int) -> None:
        """Spoil messages of studies in the clear until there were so many faults of all kinds."""

        def spoil(folder: Path) -> None:
            left = min(PER_STUDY, wanted - self.injected)
            self.by_class.update(spoil_messages(folder, left, self.random))

        while self.injected < wanted:
            self.study(spoil)

    @property
    def injected(self) -> int:
        """Faults so far."""
        return self.by_class.total() + self.secure.total()


def cold_start() -> float:
    """Seconds from nothing to a process that could go on with a run."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import wardround.runs.session, torch"], check=True)
        times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    """Inject, judge, print."""
    options = arguments(__doc__ or "").parse_args()
    kills, secure_kills, secure_faults, others, wanted = (
        (40, 20, 100, 6, 1000) if options.quick else (500, 200, 1000, 100, 10_000)
    )
    logging.disable(logging.CRITICAL)
    said = conditions(
        sites=len(PLAIN.names),
        secure_sites=len(SECURE.names),
        threshold=SECURE.threshold,
        rounds=ROUNDS,
        seed=SEED,
        faults_a_study=PER_STUDY,
    )
    began, cpu = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        # Without faults the masks cancel to the very bits: what is expected under them comes from a clear run.
        clear = Setting(SECURE.names, SECURE.numbers)
        verdicts = Verdicts(fault_free(root / "fault-free"), fault_free(root / "fault-free-4", clear))
        driver = Driver(root, Random(SEED), verdicts)
        driver.kills(kills, "kill", PLAIN)
        driver.kills(secure_kills, "secure_kill", SECURE)
        for _ in range(others):
            driver.others()
        driver.secure_messages(secure_faults)
        driver.messages(wanted)
    by_class = driver.by_class + Counter({f"secure_{fault}": n for fault, n in driver.secure.items()})
    table(("fault", "injected", "noticed"), [(k, n, driver.noticed.get(k, "")) for k, n in sorted(by_class.items())])
    finish(
        {
            "injected": driver.injected,
            "kills": by_class["kill"] + by_class["secure_kill"],
            "by_class": dict(sorted(by_class.items())),
            "noticed": dict(driver.noticed),
            "lost": verdicts.lost,
            "doubled": verdicts.doubled,
            "site_state_wrong": verdicts.site_state_wrong,
            "log_false_alarms": verdicts.false_alarms,
            "charges_wrong": verdicts.charges_wrong,
            "trained_with_spoiled_ledger": driver.trained_while_refused,
            "recovery_p99_s": round(float(np.quantile(driver.recoveries, 0.99)), 3),
            "recovery_max_s": round(max(driver.recoveries), 3),
            "recoveries": len(driver.recoveries),
            "cold_start_s": round(cold_start(), 2),
            "hash_equal": int(
                (verdicts.equal, verdicts.secure_whole_equal) == (verdicts.trials, verdicts.secure_whole)
            ),
            "trials": verdicts.trials + verdicts.secure_trials,
            "secure_trials": verdicts.secure_trials,
            "secure_sum_equal": int(verdicts.secure_sum_equal == verdicts.secure_trials),
            "secure_hashes_compared": verdicts.secure_whole,
            "void_rounds": verdicts.aborted_rounds,
            "second_survivor_lists": verdicts.second_lists,
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(cpu_seconds() - cpu, 1),
            "conditions": said,
        }
    )


if __name__ == "__main__":
    main()
