"""The benchmark of a new user's first commands reads what pytest prints."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def reader() -> Any:
    """The module of the benchmark."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("first_run_tests")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("1909 passed in 12.34s", {"passed": 1909}),
        ("1 failed, 1909 passed, 8 skipped in 1954.17s (0:32:34)", {"failed": 1, "passed": 1909, "skipped": 8}),
        ("=== 2 failed, 3 passed, 2 errors in 0.10s ===", {"failed": 2, "passed": 3, "error": 2}),
        ("no tests ran in 0.01s", {}),
        ("make: *** [Makefile:30: test] Error 2", {}),
    ],
)
def test_outcomes_are_those_of_the_summary_line(reader: Any, line: str, counts: dict[str, int]) -> None:
    assert reader.outcome(f"....\n{line}\n") == counts


def test_the_tests_that_only_make_test_all_runs_are_counted(reader: Any) -> None:
    assert reader.moved("tests/a.py::test_b\n\n53/1941 tests collected (1888 deselected) in 39.81s\n") == 53
    assert reader.moved("7 tests collected in 0.10s\n") == 7
    assert reader.moved("no tests collected (9 deselected) in 0.10s\n") == 0
