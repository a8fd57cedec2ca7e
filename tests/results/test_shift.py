"""Distances between sites, what unlike sites cost, and the pages and tables that show both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import estimate, metrics, result, write_run
from scipy.spatial.distance import jensenshannon
from test_report import Page, page_of
from tests.cohorts import cohort_study
from tests.federation.test_own_results import ruled
from typer.testing import CliRunner

from wardround.cli import app
from wardround.errors import DataError
from wardround.results.cost import TOGETHER, costs_of, crossings, matrix_table
from wardround.results.files import read_result
from wardround.results.shift import Channel, Drawn, Shift, SiteProfile, Spread, distances, jensen_shannon, log_distance
from wardround.results.shift_page import class_table, number_table, render
from wardround.results.tables import csv_of, numbers_of
from wardround.runs.session import evaluate, run

# Whole runs: `make test-all` has them.
pytestmark = pytest.mark.slow

# Distances ------------------------------------------------------------------------------------------------------------


def test_the_divergence_of_histograms_is_scipy_s_and_between_0_and_1() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        p, q = random.dirichlet(np.full(12, 0.3), 2)
        p[:3] = 0.0
        assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-12)
    assert jensen_shannon([1, 0], [0, 1]) == 1.0
    assert jensen_shannon([0.2, 0.8], [0.2, 0.8]) == 0.0
    # By hand: m = (3/4, 1/4), (log2(4/3) + (log2(2/3) + log2 2) / 2) / 2.
    assert jensen_shannon([1, 0], [0.5, 0.5]) == pytest.approx((np.log2(4 / 3) + np.log2(4 / 3) / 2) / 2)


def test_the_distance_of_spectra_is_a_root_mean_square() -> None:
    assert log_distance([1.0, 2.0], [1.3, 1.6]) == pytest.approx(np.sqrt((0.09 + 0.16) / 2))


def profile(seed: int, **changes: Any) -> SiteProfile:
    random = np.random.default_rng(seed)
    channels = tuple(
        Channel(
            histogram=tuple(random.dirichlet(np.ones(10))),
            mean=0.0,
            std=1.0,
            percentiles={"p5": -1.2, "p50": 0.1, "p95": 2.0},
            spectrum=tuple(random.normal(size=6)),
            noise=Spread(mean=0.1, std=0.02),
        )
        for _ in range(2)
    )
    drawn = {"tumour": Drawn(share=Spread(mean=0.0107, std=0.0085), slices=Spread(mean=0.32, std=0.0))}
    size = (Spread(mean=128, std=0), Spread(mean=128, std=0), Spread(mean=22, std=3))
    found = SiteProfile(split="train", patients=12, channels=channels, matrix=size, structures=drawn)
    return found.model_copy(update=changes)


@pytest.fixture
def shift() -> Shift:
    sites = {
        "A": profile(1, classes={"nv": 9, "mel": 3}),
        "B<b>": profile(2, classes={"nv": 12}),
        "C": SiteProfile(withheld={"all": "egress.per_site_results is false"}),
    }
    return Shift(
        study="unlike",
        images=("flair", "t1ce"),
        normalised="as it is",
        low=-5.0,
        high=5.0,
        sites=sites,
        distances=distances(sites),
        failed={"D": "away"},
    )


def test_distances_are_means_over_channels_of_sites_that_say_something(shift: Shift) -> None:
    a, b = shift.sites["A"].channels, shift.sites["B<b>"].channels
    wanted = np.mean([jensen_shannon(p.histogram, q.histogram) for p, q in zip(a, b, strict=True)])
    found = shift.distances["intensity"]
    assert found["A"]["B<b>"] == found["B<b>"]["A"] == pytest.approx(wanted, abs=1e-6)
    assert found.keys() == {"A", "B<b>"}
    wanted = np.mean([log_distance(p.spectrum, q.spectrum) for p, q in zip(a, b, strict=True)])
    assert shift.distances["spectrum"]["A"]["B<b>"] == pytest.approx(wanted, abs=1e-6)


def test_the_page_shows_every_site_and_why_one_is_missing(shift: Shift) -> None:
    markup = render(shift)
    page = Page(markup)
    assert page.open == []
    assert "B<b>" not in markup
    assert "B&lt;b&gt;" in markup
    assert "C, all: egress.per_site_results is false" in page.text
    assert "D gave no answer: away" in page.text
    assert f"{shift.distances['intensity']['A']['B<b>']:.3f}" in page.text
    # Two channels, a histogram and a spectrum each, at the two sites that say something: a line over the grey one.
    assert len([line for line in page.all("polyline") if line["class"].startswith("curve")]) == 8
    assert len(page.all("polyline")) == 16
    assert not re.search(r"https?://", markup)
    assert "script" not in {tag for tag, _ in page.elements}


def test_numbers_stand_by_site(shift: Shift) -> None:
    head, rows = number_table(shift)
    table = {row[0]: row[1:] for row in rows}
    assert head == ("Site", "A", "B<b>", "C")
    assert table["Patients"] == ("12 (train)", "12 (train)", "–")
    assert table["Matrix"][0] == "128 x 128 x 22 ± 3"
    assert table["tumour: share of voxels"][0] == "1.07 ± 0.85 %"
    assert table["tumour: slices with it"][0] == "32 %"
    assert "Voxel, mm" not in table
    classes = class_table(shift)
    assert classes is not None
    assert [cell.text for cell in classes.rows[0][1]] == ["75.0 %", "25.0 %"]
    assert [cell.text for cell in classes.rows[1][1]] == ["100.0 %", "–"]


def test_a_shift_is_read_as_it_was_written(shift: Shift) -> None:
    assert Shift.model_validate_json(shift.values) == shift


# What it costs --------------------------------------------------------------------------------------------------------


def crossed(value: dict[tuple[str, str], float]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for (trained, tested), psnr in value.items():
        tables.setdefault(trained, {})[tested] = {"psnr": estimate(psnr, 5, 1.0)}
    return tables


@pytest.mark.slow
def test_what_a_site_loses_is_against_its_own_model(tmp_path: Path) -> None:
    table = metrics()
    values = {("CS", "CS"): 33.0, ("CS", "DU"): 30.0, ("DU", "CS"): 31.5, ("DU", "DU"): 32.0, ("CS", "EZ"): 29.0}
    out = write_run(tmp_path, {**result(), "elsewhere": crossed(values)})
    found = read_result(out)
    (psnr, *_) = crossings(found)
    assert psnr.lost["CS"] == {"CS": 0.0, "DU": 2.0}
    assert psnr.lost["DU"] == {"CS": 1.5, "DU": 0.0}
    assert psnr.mean_lost == 1.75
    together = psnr.lost[TOGETHER]
    assert together["CS"] == pytest.approx(33.0 - table["federated"]["CS"]["psnr"]["value"], abs=1e-6)
    cells = {name: [cell.text for cell in row] for name, row in matrix_table(psnr).rows}
    assert matrix_table(psnr).columns == ("CS", "DU", "EZ")
    assert cells["CS"] == ["33.00", "30.00", "29.00"]
    assert cells["DU"][2] == "–"
    shares = {name: [cell.share for cell in row] for name, row in matrix_table(psnr).rows}
    assert shares["CS"] == [0.0, 1.0, 0.0]
    assert shares["DU"] == [0.75, 0.0, 0.0]
    page = page_of(out)
    assert "crossing" in page.ids
    assert "1.75" in page.text
    answer = CliRunner().invoke(app, ["inspect", str(out), "--matrix", "--json"])
    assert json.loads(answer.stdout)[0]["lost"]["CS"]["DU"] == 2.0
    assert "elsewhere.CS.DU.psnr.value" in numbers_of(found)
    assert "local/CS,DU,psnr,30.0" in csv_of(found)


def test_a_run_without_it_says_why(tmp_path: Path) -> None:
    out = write_run(tmp_path)
    assert "elsewhere" not in read_result(out).values
    with pytest.raises(DataError, match="run with --compare local"):
        costs_of(read_result(out))
    assert "crossing" not in page_of(out).ids


def test_a_run_tests_each_site_s_own_model_at_every_site(tmp_path: Path) -> None:
    study = cohort_study(sites={"A": {}, "B": {}, "C": {"role": "unseen"}}, schedule={"rounds": 1})
    sites = ruled(tmp_path)
    found = run(study, sites, tmp_path / "out", compare=["local"], engine="local", quiet=True, allow_code=True)
    assert {trained: set(table) for trained, table in found.elsewhere.items()} == {
        "A": {"A", "B", "C"},
        "B": {"A", "B", "C"},
    }
    for site in ("A", "B"):
        assert found.elsewhere[site][site] == found.metrics["local"][site]
    assert found.elsewhere["A"]["B"] != found.elsewhere["B"]["B"]
    again = evaluate(tmp_path / "out", sites, engine="local", quiet=True, allow_code=True)
    assert again.elsewhere == found.elsewhere
    secure = cohort_study(sites={"A": {}, "B": {}, "C": {}}, protection={"secure": True}, schedule={"rounds": 1})
    masked = run(secure, sites, tmp_path / "masked", compare=["local"], engine="local", quiet=True, allow_code=True)
    assert masked.elsewhere == {}
    with pytest.raises(DataError, match="a site's own model never leaves it"):
        costs_of(masked)
