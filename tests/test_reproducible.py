"""The benchmark of reproducible models takes its phantoms from the demo, whatever else the demo has."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from wardround.imaging import phantoms
from wardround.study.load import load_study

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("reproducible")


def test_each_hospital_of_the_study_gets_its_own_phantoms(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(phantoms, "DEMO_SITES", phantoms.DEMO_SITES[::-1])
    monkeypatch.setattr(phantoms, "make_site", lambda data, site, patients, seed: made.append(site.name))
    benchmark.make_data(tmp_path)
    assert made == list(load_study(benchmark.STUDY).training_sites)
