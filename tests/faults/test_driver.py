"""The driver of ten thousand faults, in small; and that its oracle can see what it is there to see."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from wardround.federation.exchange import PlainSum
from wardround.wire.message import Message

FOLDER = Path(__file__).parents[2] / "benchmarks"


class Driver:
    """The modules of the benchmark."""

    def __init__(self) -> None:
        names = ("faults_study", "faults_oracle", "faults_messages", "faults_injections", "faults")
        sys.path.insert(0, str(FOLDER))
        try:
            self.study, self.oracle, self.messages, self.injections, _ = map(importlib.import_module, names)
        finally:
            sys.path.remove(str(FOLDER))

    def expect(self, folder: Path) -> None:
        """Run without faults, once in the clear and once as under masks."""
        study = self.study
        clear = study.Setting(study.SECURE.names, study.SECURE.numbers)
        self._expected = study.fault_free(folder / "3"), study.fault_free(folder / "4", clear)

    def verdicts(self) -> Any:
        """Of nothing yet."""
        return self.oracle.Verdicts(*self._expected)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    driver = Driver()
    driver.expect(tmp_path_factory.mktemp("free"))
    return driver


def test_no_message_fault_loses_or_doubles_an_update(driver: Driver, tmp_path: Path) -> None:
    verdicts = driver.verdicts()
    by_class: Counter[str] = Counter()
    for seed in range(2):
        by_class += driver.messages.spoil_messages(tmp_path / f"study-{seed}", 30, Random(seed))
        verdicts.judge(tmp_path / f"study-{seed}")
    assert by_class.total() >= 50
    assert len(by_class) >= 12
    assert (verdicts.equal, verdicts.lost, verdicts.doubled) == (2, 0, 0)
    assert (verdicts.site_state_wrong, verdicts.false_alarms) == (0, 0)


@pytest.mark.slow
def test_under_masks_a_round_holds_each_announced_update_once(driver: Driver, tmp_path: Path) -> None:
    """Spoiled messages and kills; a round that is aborted is no fault, one that counts must be the plain sum."""
    verdicts, secure = driver.verdicts(), driver.study.SECURE
    _, _, acts = driver.injections.life(tmp_path / "whole", 0, secure)
    verdicts.judge(tmp_path / "whole", secure)
    assert (verdicts.secure_whole, verdicts.secure_whole_equal, verdicts.aborted_rounds) == (1, 1, 0)
    by_class: Counter[str] = Counter()
    for seed in range(3):
        by_class += driver.messages.spoil_messages(tmp_path / f"m{seed}", 15, Random(seed), secure, 0.15)
        verdicts.judge(tmp_path / f"m{seed}", secure)
    kills, _ = driver.injections.kill(tmp_path / "killed", 4, acts, Random(2), secure)
    verdicts.judge(tmp_path / "killed", secure)
    assert by_class.total() >= 10
    assert kills
    assert verdicts.aborted_rounds
    assert verdicts.secure_trials == verdicts.secure_sum_equal == 5
    assert (verdicts.lost, verdicts.doubled, verdicts.second_lists, verdicts.site_state_wrong) == (0, 0, 0, 0)
    assert verdicts.false_alarms == 0


@pytest.mark.slow
def test_a_spoiled_ledger_stops_its_site_until_the_newest_is_back(driver: Driver, tmp_path: Path) -> None:
    verdicts = driver.verdicts()
    for seed in range(2):
        faults, refused, trained = driver.injections.roll_back(tmp_path / f"study-{seed}", Random(seed))
        assert (faults, refused, trained) == (3, 3, 0)
        verdicts.judge(tmp_path / f"study-{seed}", driver.study.PRIVATE)
    assert (verdicts.equal, verdicts.lost, verdicts.doubled, verdicts.charges_wrong) == (2, 0, 0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_copies_and_edits_change_nothing(driver: Driver, tmp_path: Path, seed: int) -> None:
    verdicts, chance, inject = driver.verdicts(), Random(seed), driver.injections
    what = ("coordinator", "coordinator/journal.sqlite", "sites/B", "sites/C/store.sqlite")[seed]
    noticed = inject.restore(tmp_path / "restored", what, chance)
    assert noticed or what == "coordinator"
    assert inject.edit_log(tmp_path / "edited", chance)
    assert inject.fill(tmp_path / "full", 2, chance)
    assert inject.jump(tmp_path / "jumped", 2, chance)
    for name in ("restored", "edited", "full", "jumped"):
        verdicts.judge(tmp_path / name)
    assert (verdicts.equal, verdicts.lost, verdicts.doubled, verdicts.false_alarms) == (4, 0, 0, 0)


@pytest.mark.parametrize(("times", "lost", "doubled"), [(0, 4, 0), (2, 0, 4)])
def test_the_oracle_sees_an_update_that_counts_never_or_twice(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, lost: int, doubled: int
) -> None:
    verdicts = driver.verdicts()
    honest = PlainSum.accept

    def accept(self: PlainSum, reply: Message) -> None:
        if reply.header.site != "B":
            return honest(self, reply)
        for _ in range(times):
            honest(self, reply)
            self._receipts.pop("B")
        self._receipts["B"] = reply.header.body_sha256
        return None

    monkeypatch.setattr(PlainSum, "accept", accept)
    assert driver.injections.run_once(tmp_path / "study")
    verdicts.judge(tmp_path / "study")
    assert verdicts.equal == 0
    assert verdicts.lost == lost
    assert verdicts.doubled >= doubled


def test_the_oracle_sees_what_is_wrong_under_masks(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A survivor's update that is not in the sum, and one that is in it and was not announced."""
    verdicts, secure = driver.verdicts(), driver.study.SECURE
    seen = driver.study.announced
    for change, lost, doubled in ((("A", "B", "C"), 0, 4), ((), 0, 16)):
        folder = tmp_path / f"study-{len(change)}"
        assert driver.injections.run_once(folder, setting=secure)
        monkeypatch.setattr(
            driver.oracle, "announced", lambda path, change=change: {number: {change} for number in seen(path)}
        )
        before = verdicts.lost, verdicts.doubled, verdicts.secure_sum_equal
        verdicts.judge(folder, secure)
        assert verdicts.lost - before[0] == lost
        assert verdicts.doubled - before[1] >= doubled
        assert verdicts.secure_sum_equal == before[2]
