"""Results by group in the report, the model card and the table of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import estimate, write_run
from test_report import Page, page_of

from wardround.results.card import write_card
from wardround.results.files import read_result
from wardround.results.groups import grouped_columns
from wardround.results.run import load_run
from wardround.results.tables import csv_of, numbers_of

GROUPS: list[dict[str, Any]] = [
    {
        "column": "sex",
        "group": group,
        "metrics": {
            "local": {site: {"psnr": estimate(value - 2, n, 2.0)} for site, n in sites.items()},
            "federated": {
                **{site: {"psnr": estimate(value, n, 2.0), "ssim": None} for site, n in sites.items()},
                "EZ": None,
            },
        },
    }
    for group, value, sites in (("female", 33.21, {"DU": 7, "HT": 4}), ("<b>x</b>", 31.43, {"DU": 5}))
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = {"groups": GROUPS, "groups_missing": {"CS": "sex: its test patients make no two groups of 5 or more"}}
    return write_run(tmp_path_factory.mktemp("run"), said, with_pictures=False)


def test_a_column_has_a_table_with_every_arm_and_group(out: Path) -> None:
    (column,) = grouped_columns(load_run(out))
    (table,) = column.tables
    assert [arm.key for arm in table.arms] == ["local", "federated"]
    assert [(row.site, row.span, row.group, row.n) for row in table.rows] == [
        ("DU", 2, "female", "7"),
        ("DU", 0, "<b>x</b>", "5"),
        ("HT", 1, "female", "4"),
    ]
    assert [[cell.text for cell in row.cells] for row in table.rows][:2] == [["31.21", "33.21"], ["29.43", "31.43"]]
    assert [cell.best for cell in table.rows[0].cells] == [False, True]
    # Fewer than 5 have no interval.
    assert [bool(row.cells[0].interval) for row in table.rows] == [True, True, False]


def test_the_page_shows_groups_and_why_they_stay(out: Path) -> None:
    page = page_of(out)
    assert "groups" in page.ids
    assert "#groups" in {attributes["href"] for attributes in page.all("a")}
    for text in ("By sex", "33.21", "<b>x</b>", "CS keeps what it declares: sex: its test patients make no two groups"):
        assert text in page.text


def test_a_run_without_groups_has_no_such_section(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, with_pictures=False))
    assert isinstance(page, Page)
    assert "groups" not in page.ids


def test_the_card_holds_them_and_names_what_is_not_measured(out: Path, tmp_path: Path) -> None:
    text = write_card(out).read_text()
    assert "### By sex" in text
    assert "| DU | &lt;b&gt;x&lt;/b&gt; | 5 | 29.43" in text
    assert "Not given by group at CS: sex: its test patients make no two groups of 5 or more." in text
    assert "results by anything but sex are not measured here" in text
    without = write_card(write_run(tmp_path, with_pictures=False)).read_text()
    assert "results by age, sex, field strength or disease are not measured here" in without


def test_every_number_by_group_is_in_the_table_and_is_measured_again(out: Path) -> None:
    found = read_result(out)
    lines = csv_of(found).splitlines()
    assert lines[0].endswith("n,absent,column,group")
    assert sum(line.endswith(",sex,female") for line in lines) == 4
    assert numbers_of(found)["sex.female.federated.DU.psnr.value"] == 33.21
