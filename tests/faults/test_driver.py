"""The driver of ten thousand faults, in small; and that its oracle can see what it is there to see."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from wardround.federation.exchange import PlainSum
from wardround.wire.message import Message

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("faults")
    finally:
        sys.path.remove(str(FOLDER))


def test_no_message_fault_loses_or_doubles_an_update(driver: ModuleType, tmp_path: Path) -> None:
    verdicts = driver.Verdicts(driver.fault_free(tmp_path / "free"))
    by_class: Counter[str] = Counter()
    for seed in range(2):
        driver.spoil_messages(tmp_path / f"study-{seed}", 30, Random(seed), by_class)
        verdicts.judge(tmp_path / f"study-{seed}")
    assert by_class.total() >= 50
    assert len(by_class) >= 12
    assert (verdicts.equal, verdicts.lost, verdicts.doubled) == (2, 0, 0)
    assert (verdicts.site_state_wrong, verdicts.false_alarms) == (0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_copies_and_edits_change_nothing(driver: ModuleType, tmp_path: Path, seed: int) -> None:
    verdicts, chance = driver.Verdicts(driver.fault_free(tmp_path / "free")), Random(seed)
    what = ("coordinator", "coordinator/journal.sqlite", "sites/B", "sites/C/store.sqlite")[seed]
    noticed = driver.restore(tmp_path / "restored", what, chance)
    assert noticed or what == "coordinator"
    assert driver.edit_log(tmp_path / "edited", chance)
    assert driver.fill(tmp_path / "full", 2, chance)
    assert driver.jump(tmp_path / "jumped", 2, chance)
    for name in ("restored", "edited", "full", "jumped"):
        verdicts.judge(tmp_path / name)
    assert (verdicts.equal, verdicts.lost, verdicts.doubled, verdicts.false_alarms) == (4, 0, 0, 0)


@pytest.mark.parametrize(("times", "lost", "doubled"), [(0, 4, 0), (2, 0, 4)])
def test_the_oracle_sees_an_update_that_counts_never_or_twice(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, lost: int, doubled: int
) -> None:
    verdicts = driver.Verdicts(driver.fault_free(tmp_path / "free"))
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
    assert driver.run_once(tmp_path / "study")
    verdicts.judge(tmp_path / "study")
    assert verdicts.equal == 0
    assert verdicts.lost == lost
    assert verdicts.doubled >= doubled
