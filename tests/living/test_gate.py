"""The gate: a new model is promoted where no site loses, by the interval of the paired difference at each site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.living.test_parent import child_of, parent_of
from tests.living.ward import ward_sites
from wardround.errors import StudyError
from wardround.results.card import card
from wardround.results.gate import default_margin, gate_of, margins_of
from wardround.results.html import render
from wardround.results.metrics import MetricInfo
from wardround.results.run import load_run
from wardround.results.schema import Estimate, Measured
from wardround.results.terminal import gate_lines


def metric(name: str, unit: str = "", negligible: float = 0.005) -> MetricInfo:
    return MetricInfo(
        name=name, label=name, unit=unit, larger_is_better=True, negligible=negligible, resolution=1e-4, definition=""
    )


def value(number: float, n: int = 10, low: float | None = None, high: float | None = None, absent: int = 0) -> Estimate:
    return Estimate(value=number, n=n, ci_low=low, ci_high=high, absent=absent)


def measured(gains: dict[str, Estimate | None], **changes: Any) -> Measured:
    mine = {site: {"dice": value(0.8, 10 if one is None else one.n)} for site, one in gains.items()}
    rows = {"federated": mine, "parent": mine, **changes.pop("rows", {})}
    empty: dict[str, Any] = {"left_out": {}, "withheld": {}, "failed": {}}
    return Measured(
        metric_specs=(metric("dice"), metric("psnr", "dB")),
        metrics=rows,
        gains={"federated": {"parent": {site: {"dice": one} for site, one in gains.items()}}},
        **{**empty, **changes},
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.019, 0.05, "not worse"),
        (-0.02, 0.05, "insufficient evidence"),
        (-0.08, -0.021, "worse"),
        (-0.08, -0.02, "insufficient evidence"),
        (0.01, 0.02, "not worse"),
    ],
)
def test_the_interval_decides_against_the_margin(low: float, high: float, verdict: str) -> None:
    """By hand, margin 0.02: not worse where the lower end lies above -0.02, worse where the upper end lies below."""
    gate = gate_of(measured({"A": value((low + high) / 2, low=low, high=high)}), ("A",), {"dice": 0.02})
    entry = gate.sites["A"]["dice"]
    assert (entry.verdict, entry.ci_low, entry.ci_high, entry.n) == (verdict, low, high, 10)
    assert gate.promoted == (verdict == "not worse")


GOOD = value(0.01, low=-0.01, high=0.03)


@pytest.mark.parametrize(
    ("gains", "changes", "reason"),
    [
        (
            {"A": GOOD, "B": value(-0.05, low=-0.07, high=-0.03)},
            {},
            r"^B \(dice: worse, −0.050, interval −0.070 to −0.0",
        ),
        ({"A": GOOD, "B": value(0.1, n=4, low=0.0, high=0.2)}, {}, "B .*insufficient evidence, fewer than 5 test"),
        ({"A": GOOD, "B": value(0.1)}, {}, "B .*insufficient evidence, the site gave no interval"),
        ({"A": GOOD}, {"withheld": {"B": "a rule"}}, "B .*insufficient evidence, withheld by the site: a rule"),
        ({"A": GOOD}, {"failed": {"B": "gone"}}, "B .*insufficient evidence, could not be measured: gone"),
        ({"A": GOOD, "B": None}, {}, "B .*insufficient evidence, the site gave no value of one of the two"),
        (
            {"A": GOOD, "B": GOOD},
            {"rows": {"parent": {"A": {"dice": value(0.8)}, "B": {"dice": value(0.8, 9)}}}},
            "B .*measured on 10 patients and the release on other patients",
        ),
    ],
)
def test_one_site_that_may_lose_keeps_the_release(
    gains: dict[str, Estimate | None], changes: dict[str, Any], reason: str
) -> None:
    gate = gate_of(measured(gains, **changes), ("A", "B"), {"dice": 0.02})
    assert not gate.promoted
    assert gate.sites["A"]["dice"].verdict == "not worse"
    import re

    assert re.search(reason, gate.reason)
    assert gate_of(measured(gains, **changes), ("A",), {"dice": 0.02}).promoted


def test_the_margins() -> None:
    specs = (metric("dice_core"), metric("ssim", negligible=0.001), metric("auroc"), metric("error", "dB"))
    assert [default_margin(one) for one in specs] == [0.02, 0.002, 0.01, 0.1]
    assert margins_of({}, specs) == {"dice_core": 0.02}
    assert margins_of({"auroc": 0.5, "dice_core": 0.0}, specs) == {"dice_core": 0.0, "auroc": 0.5}


def test_a_run_says_whether_its_model_is_promoted(tmp_path: Path) -> None:
    """Where it stands: result.json, terminal, report with its picture, model card."""
    sites = ward_sites(tmp_path, {"A": 12, "B": 12})
    parent = parent_of(tmp_path, sites)
    for lr, promoted in ((0.1, True), (4.0, False)):
        local = {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": lr}
        section = {"margins": {"r": 0.0, "mse": 50.0}, "train_on": "all"}
        child = child_of(tmp_path, parent, sites, f"by{lr}", update=section, local=local)
        assert child.gate is not None
        assert child.gate.promoted == promoted
        assert child.values["gate"]["sites"]["A"]["mse"]["margin"] == 50.0
        entry, gain = child.gate.sites["B"]["r"], child.gain("federated", "parent", "B", "r")
        assert gain is not None
        assert (entry.gain, entry.ci_low, entry.ci_high, entry.n) == (gain.value, gain.ci_low, gain.ci_high, gain.n)
        run = load_run(child.out)
        words = "takes the place of the release" if promoted else "Not promoted: the release stays"
        assert words in gate_lines(child)[0]
        assert ("NOT PROMOTED" in card(run)) != promoted
        page = render(run)
        assert 'id="gate"' in page
        assert page.count('class="margin"') == 4
        assert parent.model_sha256[:12] in page
    assert parent.gate is None
    assert "gate" not in parent.values
    assert 'id="gate"' not in render(load_run(parent.out))


def test_a_margin_of_a_metric_that_the_task_lacks(tmp_path: Path) -> None:
    sites = ward_sites(tmp_path, {"A": 12, "B": 12})
    parent = parent_of(tmp_path, sites)
    with pytest.raises(StudyError, match=r"update.margins: the task has no metric 'dice'; choose from r, mse"):
        child_of(tmp_path, parent, sites, update={"margins": {"dice": 0.1}})
    assert not (tmp_path / "child").exists()
