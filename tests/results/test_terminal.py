"""The table of a run's results on a terminal: 80 columns, every number and every name whole."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from report_runs import spec
from rich.cells import cell_len
from rich.console import Console

from wardround.cli import shared
from wardround.results.schema import Measured

EIGHT = ("zero_filled", "cg_sense", "tv", "tv_real", "weighted_tv", "local", "federated", "pooled")


def _result(sites: list[str], arms: tuple[str, ...]) -> dict[str, Any]:
    """Another number in every cell."""
    names = [*sites, "mean", "unseen"]
    value = {key: 20.0 + 0.011 * n for n, key in enumerate((arm, name) for arm in arms for name in names)}
    metrics = {arm: {name: {"psnr": {"value": value[arm, name], "n": 3}} for name in names} for arm in arms}
    nothing: dict[str, Any] = {"gains": {}, "left_out": {}, "withheld": {}, "failed": {}}
    return {"metric_specs": [spec("psnr", negligible=0.001)], "metrics": metrics, **nothing}


def _printed(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, width: int = 80) -> str:
    monkeypatch.setattr(shared, "console", Console(file=io.StringIO(), width=width))
    shared.results(Measured.model_validate(result))
    return shared.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("letter", ["N", "病", "é"])
@pytest.mark.parametrize("arms", [EIGHT[2:], EIGHT, ("local", "federated", "without/" + "M" * 32)])
def test_no_number_is_cut_however_long_the_names(
    letter: str, arms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [letter * 29 + last for last in "ABCDEF"]
    result = _result(sites, arms)
    printed = _printed(result, monkeypatch)
    assert max(map(cell_len, printed.splitlines())) <= 80
    assert "…" not in printed
    for row in result["metrics"].values():
        for cell in row.values():
            assert f" {cell['psnr']['value']:.3f} " in printed
    # Every name is whole where the first column is read downwards.
    first = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert all(first.count(site) == first.count("training") for site in sites)


def test_what_fits_is_one_table_with_labels_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = _printed(_result(["Northfield", "Harbour"], EIGHT[3:5] + EIGHT[6:]), monkeypatch)
    assert printed.count("Northfield") == 1
    assert all(label in printed for label in ("TV, real image", "Weighted TV", "Together", "Pooled"))
    # The words of the report: the mean leaves out sites that did not train.
    assert "Mean of training sites" in printed
    assert "Left-out institutions" in printed
    assert _printed(_result(["Northfield"], EIGHT), monkeypatch).count("Northfield") == 2
    assert _printed(_result(["Northfield"], EIGHT), monkeypatch, 120).count("Northfield") == 1


def test_where_no_baseline_has_the_first_metric_the_first_that_they_have_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no Dice of a classical image: no column of dashes, and a table of the images."""
    result = _result(["North"], ("tv", "local", "federated"))
    result["metric_specs"] = [spec("dice"), *result["metric_specs"]]
    for arm in ("local", "federated"):
        for cell in result["metrics"][arm].values():
            cell["dice"] = {"value": 0.5, "n": 3}
    first, second = _printed(result, monkeypatch).split("psnr")
    assert "dice" in first
    assert "Together" in first
    assert "TV" not in first
    assert all(label in second for label in ("TV", "Alone", "Together"))


def test_groups_of_a_column_follow_with_a_row_for_each_group_of_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _result(["North", "South"], ("local", "federated"))
    number = {"n": 4, "value": 31.25}
    result["groups"] = [
        {
            "column": "sex",
            "group": "F",
            "metrics": {"federated": {"North": {"psnr": number}, "mean": {"psnr": number}}},
        },
        {"column": "sex", "group": "M", "metrics": {"federated": {"North": {"psnr": number | {"value": 30.5}}}}},
    ]
    # A title is as wide as its table, and goes on in the next line.
    _, by_sex = re.split(r"by\s+sex", _printed(result, monkeypatch))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in by_sex.splitlines() if line.startswith("│")]
    assert rows == [["North, F", "31.250"], ["North, M", "30.500"], ["Mean of training sites, F", "31.250"]]
    assert "Alone" not in by_sex
