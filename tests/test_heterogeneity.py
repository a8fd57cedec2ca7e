"""The benchmark of unlike hospitals: its studies are valid, and its gains are those of the same seed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from wardround.study.load import load_study

# Whole runs: `make test-all` has them.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("heterogeneity")


def runs(means: list[float], worst: list[float]) -> list[dict[str, Any]]:
    return [
        {"mean": mean, "worst_site": low, "unseen": 0.5, "bytes": 10, "seconds": 2.0}
        for mean, low in zip(means, worst, strict=True)
    ]


def test_every_setting_of_every_method_is_a_study(benchmark: Any) -> None:
    for data in benchmark.DATA:
        for method in benchmark.METHODS.values():
            for setting in benchmark.settings_of(method, data):
                section = {"kind": method.kind, **method.common, **{k: v for k, v in setting.items() if k != "rate"}}
                study = load_study(data.study(section, 1.0, 1, data.rounds))
                assert study.training_sites == data.training
                assert study.unseen_sites == (data.unseen,)


def test_gains_are_paired_by_seed_and_told_with_their_spread(benchmark: Any) -> None:
    base = runs([0.50, 0.60, 0.70], [0.40, 0.50, 0.60])
    found = benchmark.figures(
        {
            "FedAvg": base,
            # Always 0.02 better, far beyond its spread, though seeds differ by ten times as much.
            "Ditto": runs([0.52, 0.62, 0.72], [0.30, 0.40, 0.50]),
            # Better on the mean of seeds by one seed alone.
            "FedBN": runs([0.50, 0.57, 0.76], [0.41, 0.52, 0.60]),
        },
        {"FedAvg": {}, "Ditto": {}, "FedBN": {}},
    )
    assert found["methods"]["Ditto"]["mean_gain"] == pytest.approx(0.02)
    assert found["methods"]["Ditto"]["mean_gain_sd"] == pytest.approx(0.0, abs=1e-9)
    assert (found["best_method"], found["best_stands_out"]) == ("Ditto", True)
    assert found["best_gain_over_fedavg"] == pytest.approx(0.02)
    assert found["best_worst_site_method"] == "FedBN"
    assert found["best_worst_site_gain"] == pytest.approx(0.01)
    # Its gains are 0.01, 0.02 and 0: the interval reaches 0.025 to each side.
    assert found["best_worst_site_stands_out"] is False


def test_nothing_helps_where_nothing_does(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = runs([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]), runs([0.4, 0.5, 0.6], [0.4, 0.5, 0.6])
    found = benchmark.figures({"FedAvg": base, "Ditto": other}, {"FedAvg": {}, "Ditto": {}})
    assert found["best_gain_over_fedavg"] == pytest.approx(-0.1)
    benchmark.report("tumours", found)
    assert "no method is better than FedAvg" in capsys.readouterr().out
    sets = benchmark.overall({"tumours": found, "skin": found})
    assert sets["best_gain_over_fedavg"] == pytest.approx(-0.1)
    assert sets["methods"]["Ditto"]["seconds"] == 4.0
