"""Single test patients as points of a chart, where a run on one machine wrote them into a site's own folder.

Names of patients stay in that file: nothing here reads them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping

from wardround.results.run import Run

# (arm, metric) -> a value for each patient.
Points = Mapping[tuple[str, str], tuple[float, ...]]
# The same, each value with its patient's number in the site's table: the place among the test patients.
NumberedPoints = Mapping[tuple[str, str], Mapping[int, float]]


def points_of(run: Run, site: str) -> Points:
    """The patients of a site by arm and metric; none where its numbers are withheld, or there is no usable table."""
    return {key: tuple(values.values()) for key, values in numbered_points_of(run, site).items()}


def numbered_points_of(run: Run, site: str) -> NumberedPoints:
    """The same by patient number."""
    if site in run.hidden:
        return {}
    found: dict[tuple[str, str], dict[int, float]] = {}
    try:
        with (run.folder / "sites" / site / "patients.csv").open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                arm, value = _arm(line["row"], site), float(line["value"])
                if arm is not None and math.isfinite(value):
                    found.setdefault((arm, line["metric"]), {})[int(line["patient"])] = value
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}
    return found


def _arm(row: str, site: str) -> str | None:
    """The arm that a row belongs to at a site: of the models trained alone its own."""
    return "local" if row == f"local/{site}" else None if "/" in row else row
