"""The benchmark of MRI methods: its studies are valid, finished runs are read and not made again."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from wardround.study.hashes import study_sha256
from wardround.study.load import load_study
from wardround.study.registry import BUILTIN

# With the other benchmarks' tests, in `make test-all`.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("mri_methods")


def test_every_setting_of_every_method_is_a_study(benchmark: Any) -> None:
    known = {name: method for name, method in benchmark.METHODS.items() if method.kind in BUILTIN["method"]}
    assert {"FedAvg", "FedProx", "SCAFFOLD", "FedPer"} <= known.keys()
    budgets = set()
    for which in benchmark.SETS:
        for method in known.values():
            for setting in method.settings:
                study = load_study(benchmark.study(which, method.section(setting), 1.0, 1, quick=False))
                assert study.training_sites == benchmark.TRAINING
                assert study.unseen_sites == (benchmark.UNSEEN,)
                local = study.local
                budgets.add((study.schedule.rounds, local.steps, local.batch, study.model.model_dump_json()))
    assert len(budgets) == 1


def test_a_finished_run_is_read_and_not_made_again(benchmark: Any, tmp_path: Path) -> None:
    written = benchmark.study("4x", {"kind": "fedavg"}, 1.0, 1, quick=True)
    over = time.monotonic() - 1.0
    runs = benchmark.Runs(tmp_path, None, benchmark.TRAINING, benchmark.UNSEEN, over)
    with pytest.raises(TimeoutError):
        runs.finished("FedAvg", written, {})
    file = tmp_path / f"FedAvg-{study_sha256(load_study(written))[:12]}.json"
    file.write_text(json.dumps({"mean": 30.0}), encoding="utf-8")
    assert runs.finished("FedAvg", written, {}) == {"mean": 30.0}


def test_settings_are_tuned_on_one_seed_and_begin_at_the_rate_of_fedavg(benchmark: Any) -> None:
    asked: list[tuple[str, dict[str, Any], float, int]] = []

    def run(name: str, setting: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
        asked.append((name, setting, rate, seed))
        # A rate of a half, and the larger mu, validate better.
        return {"validation": -setting.get("rate", 1.0) + setting.get("mu", 0.0)}

    settings = {"FedAvg": ({"rate": 1.0}, {"rate": 0.5}), "FedProx": ({"mu": 0.001}, {"mu": 0.01})}
    tuned = importlib.import_module("method_runs").tuned
    assert list(tuned(run, settings, quick=False)) == [
        ("FedAvg", {"rate": 0.5}, 1.0),
        ("FedProx", {"mu": 0.01}, 0.5),
    ]
    assert {seed for *_, seed in asked} == {1}
    assert [rate for name, _, rate, _ in asked if name == "FedProx"] == [0.5, 0.5]
    asked.clear()
    assert [name for name, *_ in tuned(run, settings, quick=True)] == ["FedAvg", "FedProx"]
    assert len(asked) == 2
