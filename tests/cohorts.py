"""The toy task with as many test patients as a test wants, each with a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.toys import Points, Regression, toy_study
from wardround.study.schema import Study
from wardround.tasks.task import Source, Split


@dataclass(frozen=True)
class Cohort(Points):
    """Points whose patients have names."""

    def names(self, split: Split) -> list[str]:
        return [f"Doe-{number}" for number in self.splits[split]]


@dataclass(frozen=True)
class CohortTask(Regression):
    """Patients 0 to 3 train, 4 to 8 validate; a file `tested` in a site's folder names those who test."""

    patients: int = 40

    def dataset(self, site: str, source: Source) -> Points:
        points = super().dataset(site, source)
        file = source[0] / "tested"
        tested = [int(n) for n in file.read_text().split()] if file.exists() else list(range(9, 16))
        splits = {"train": [0, 1, 2, 3], "validation": [4, 5, 6, 7, 8], "test": tested}
        return Cohort(points.x, points.y, splits, site)


@dataclass(frozen=True)
class Nameless(CohortTask):
    """The same without names."""

    def dataset(self, site: str, source: Source) -> Points:
        points = super().dataset(site, source)
        return Points(points.x, points.y, points.splits, site)


def make_task(*, named: bool = True, **options: Any) -> Regression:
    """The factory that these studies name."""
    return CohortTask(**options) if named else Nameless(**options)


def cohort_study(**changes: Any) -> Study:
    """A study of two rounds at three sites of 7 test patients."""
    options = changes.pop("options", {})
    task = {"kind": "custom", "factory": "tests.cohorts:make_task", "options": options}
    return toy_study(**{"task": task, "schedule": {"rounds": 2}, **changes})


def let_test(folder: Path, patients: Iterable[int]) -> None:
    """Let these patients test at the site of a folder."""
    (folder / "tested").write_text(" ".join(map(str, patients)), encoding="utf-8")
