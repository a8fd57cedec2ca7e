"""From what sites measured to the tables of result.json."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from wardround.plan.sums import PairedMean
from wardround.results.schema import Measured
from wardround.runs.evaluation import SiteMeasurement, tables
from wardround.tasks.estimates import Mean
from wardround.tasks.task import MetricSpec

SPECS = (MetricSpec("mse", 0.0, 10.0, 1e-6, False), MetricSpec("dice", 0.0, 1.0, 1e-6, True))


def measured(*measurements: SiteMeasurement) -> Measured:
    study = SimpleNamespace(
        sites={"A": {}, "B": {}}, baselines=(), compared_rows=(), averaged_sites=("A", "B"), update=None
    )
    host: Any = SimpleNamespace(
        task=SimpleNamespace(metrics=SPECS),
        study=study,
        arms={"federated": None, "pooled": None},
        without=frozenset(),
        remaining=tuple,
    )
    return tables(host, measurements)


def results(mse: float, dice: float | None) -> dict[str, PairedMean]:
    found = Mean(math.nan, None, 0) if dice is None else Mean(dice, 0.01, 6)
    return {"mse": PairedMean(Mean(mse, 0.1, 6), 0.05), "dice": PairedMean(found, None if dice is None else 0.005)}


def test_a_metric_that_no_patient_of_a_site_has_is_null_there_and_in_no_mean() -> None:
    found = measured(
        SiteMeasurement("federated", "A", results(1.0, None)),
        SiteMeasurement("federated", "B", results(2.0, 0.75)),
        SiteMeasurement("pooled", "A", results(0.5, None)),
        SiteMeasurement("pooled", "B", results(2.5, 0.5)),
    )
    at_a = found.metrics["federated"]["A"]
    assert at_a is not None
    assert at_a["dice"] is None
    assert found.estimate("federated", "A", "mse") is not None
    mean, gain = found.estimate("federated", "mean", "dice"), found.gain("federated", "pooled", "mean", "dice")
    assert mean is not None
    assert gain is not None
    assert (mean.value, mean.n, gain.value, gain.n) == (0.75, 6, 0.25, 6)
    assert found.gain("federated", "pooled", "A", "dice") is None
    errors = found.gain("federated", "pooled", "mean", "mse")
    assert errors is not None
    assert errors.value == 0.0, "0.5 worse at A, 0.5 better at B"


def test_a_site_without_numbers_is_null_with_its_reason_and_so_is_the_mean() -> None:
    found = measured(
        SiteMeasurement("federated", "A", results(1.0, 0.5)),
        SiteMeasurement("federated", "B", None, "its rules", withheld=True),
        SiteMeasurement("pooled", "A", None, "its disk"),
        SiteMeasurement("pooled", "B", None, "its rules", withheld=True),
    )
    assert found.metrics["federated"]["B"] is None
    assert found.metrics["federated"]["mean"] is None
    assert (found.withheld, found.failed) == ({"B": "its rules"}, {"A": "its disk"})
    assert found.arms == ("federated", "pooled")
    assert [metric.name for metric in found.measured] == ["mse", "dice"]
