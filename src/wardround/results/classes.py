"""Confusion matrices and reliability diagrams of a classification, where a run on one machine wrote their sums.

Each site's lie in its own folder, `sites/SITE/charts.json`; here they are added over the sites that train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from wardround.results.figures import reliability_plot
from wardround.results.run import Run, ShownArm
from wardround.tasks.charts import Charts, Confusion, Reliability

_FILE = TypeAdapter(dict[str, Charts])


@dataclass(frozen=True)
class MatrixRow:
    """A class: its name, how many patients have it, and of every class how many of them were called it."""

    name: str
    patients: int
    cells: tuple[tuple[int, float, bool], ...]
    """Number of patients, their share of the row, and whether the call was right."""


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram and what it says in words and numbers."""

    plot: Markup
    summary: str
    before: str
    after: str


@dataclass(frozen=True)
class ArmCharts:
    """What an arm's models said of the test patients of the sites that means are over."""

    arm: ShownArm
    sites: tuple[str, ...]
    classes: tuple[str, ...]
    matrix: tuple[MatrixRow, ...]
    calibration: Calibration | None


def class_charts(run: Run) -> tuple[ArmCharts, ...]:
    """Of every arm that has charts at such a site, in reading order."""
    found = {site: _charts_of(run, site) for site in run.averaged if site not in run.hidden}
    return tuple(_arms(run, found))


def _arms(run: Run, found: dict[str, dict[str, Charts]]) -> Iterator[ArmCharts]:
    for arm in run.arms:
        parts = {
            site: charts
            for site, rows in found.items()
            if (charts := rows.get(f"local/{site}" if arm.kind == "local" else arm.key)) is not None
        }
        if not parts:
            continue
        first, *others = parts.values()
        total = sum(others, start=first)
        matrix = total.confusion
        yield ArmCharts(
            arm,
            tuple(parts),
            matrix.classes if matrix else (),
            tuple(_rows(matrix)) if matrix else (),
            _calibration(total.before, total.after),
        )


def _charts_of(run: Run, site: str) -> dict[str, Charts]:
    try:
        return _FILE.validate_json((run.folder / "sites" / site / "charts.json").read_bytes())
    except (OSError, ValidationError):
        return {}


def _rows(matrix: Confusion) -> Iterator[MatrixRow]:
    for number, (name, counts) in enumerate(zip(matrix.classes, matrix.counts, strict=True)):
        patients = sum(counts)
        cells = tuple((n, n / patients if patients else 0.0, k == number) for k, n in enumerate(counts))
        yield MatrixRow(name, patients, cells)


def _calibration(before: Reliability | None, after: Reliability | None) -> Calibration | None:
    if before is None:
        return None
    errors = [_number(part) for part in (before, after)]
    told = f"Calibration error {errors[0]}" + (f", {errors[1]} after scaling" if errors[1] else "")
    return Calibration(reliability_plot(_points(before), _points(after)), told, *errors)


def _number(part: Reliability | None) -> str:
    return "" if part is None or part.error is None else f"{part.error:.3f}"


def _points(part: Reliability | None) -> Sequence[tuple[float, float, float]]:
    """(mean probability, share that came true, number of patients) of every group that has some."""
    if part is None:
        return ()
    groups = zip(part.expected, part.true, part.examples, strict=True)
    return [(expected / count, true / count, count) for expected, true, count in groups if count]
