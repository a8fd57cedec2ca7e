"""Pictures that a task drew, and charts of classes, in the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from report_runs import write_run

from wardround.results.classes import class_charts
from wardround.results.html import write_report
from wardround.results.pictures import gallery
from wardround.results.run import load_run
from wardround.tasks.charts import Charts, confusion, reliability

SITE = "DU"


def site_folder(out: Path) -> Path:
    folder = out / "sites" / SITE
    folder.mkdir(parents=True)
    return folder


def write_pictures(folder: Path, **changes: np.ndarray) -> None:
    truth = np.zeros((20, 30, 3), np.uint8)
    drawn = truth.copy()
    drawn[4:8, 4:8] = (230, 159, 0)
    parts = {
        "reference/0": truth,
        "federated/0": drawn,
        "title/0": np.array("Worst test patient"),
        "patient/0": np.array(7),
        "legend/marked <b>here</b>": np.array((230, 159, 0), np.uint8),
    }
    np.savez(folder / "pictures.npz", **parts, **changes)


def page_of(out: Path) -> str:
    write_report(out)
    return (out / "report.html").read_text(encoding="utf-8")


def test_a_drawn_picture_has_a_legend_and_the_patient_s_value_and_no_error_map(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    folder = site_folder(out)
    write_pictures(folder)
    with (folder / "patients.csv").open("w", newline="") as file:
        lines = [("patient", "folder", "row", "metric", "value"), (7, "DOE-07", "federated", "psnr", 31.25)]
        csv.writer(file).writerows(lines)
    (example,) = gallery(load_run(out)).sites[SITE]
    assert [panel.label for panel in example.panels] == ["Truth", "Together"]
    assert [panel.error for panel in example.panels] == [None, None]
    assert example.title == "Worst test patient, number 7"
    page = page_of(out)
    assert "Example patients" in page
    assert "PSNR 31.2" in page
    assert "marked &lt;b&gt;here&lt;/b&gt;" in page
    assert "rgb(230, 159, 0)" in page
    assert "amplified" not in page[page.index('id="pictures"') : page.index('id="learning"')]
    assert "DOE-07" not in page


def test_arms_that_differ_in_words_alone_share_a_picture(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    words = {"caption/reference/0": np.array("naevus"), "caption/local/0": np.array("melanoma 0.91")}
    np.savez(site_folder(out) / "pictures.npz", **{"reference/0": image, "local/0": image}, **words)
    (example,) = gallery(load_run(out)).sites[SITE]
    assert example.one_picture
    assert [(panel.label, panel.caption) for panel in example.panels] == [
        ("Truth", "naevus"),
        ("Alone", "melanoma 0.91"),
    ]
    assert "melanoma 0.91" in page_of(out)


def test_an_arm_that_marks_nothing_has_its_picture_beside_one_that_does(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    pictures = {"reference/0": image, "local/0": image, "federated/0": 255 - image}
    np.savez(site_folder(out) / "pictures.npz", **pictures)
    (example,) = gallery(load_run(out)).sites[SITE]
    assert not example.one_picture
    assert all(panel.image for panel in example.panels)
    assert 'src=""' not in page_of(out)


def test_numbers_that_are_no_picture_are_left_out(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    volume, colour = np.zeros((4, 4, 4), np.float32), np.zeros((4, 4, 3), np.float32)
    np.savez(site_folder(out) / "pictures.npz", **{"reference/0": volume, "reference/1": colour})
    assert not gallery(load_run(out)).sites


def charts(called: list[tuple[int, int]], classes: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Any]:
    """Charts of patients, (true class, called class) each, as a site writes them."""
    rows = np.zeros((len(called), 3, 2, 2))
    for number, (true, found) in enumerate(called):
        for k in range(3):
            rows[number, k, int(k == true), int(k == found)] = 1
    counts = np.zeros((1, 2, 200))
    counts[0, 1, 150], counts[0, 0, 150] = 3, 1
    return Charts(confusion=confusion(rows, classes), before=reliability(counts)).model_dump()


def test_classes_are_counted_over_the_training_sites(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    for site, called in (("DU", [(0, 0), (0, 1), (1, 1)]), ("CS", [(0, 1), (2, 2)]), ("EZ", [(2, 0)])):
        folder = out / "sites" / site
        folder.mkdir(parents=True)
        (folder / "charts.json").write_text(json.dumps({"federated": charts(called), f"local/{site}": charts(called)}))
    found = {each.arm.key: each for each in class_charts(load_run(out))}
    assert set(found) == {"local", "federated"}
    together = found["federated"]
    assert together.sites == ("CS", "DU")
    assert [row.patients for row in together.matrix] == [3, 1, 1]
    assert [[count for count, _, _ in row.cells] for row in together.matrix] == [[1, 2, 0], [0, 1, 0], [0, 0, 1]]
    # 8 patients at 0.7525, of whom 6 came true.
    assert together.calibration is not None
    assert together.calibration.before == f"{abs(0.7525 - 0.75):.3f}"
    assert together.calibration.after == ""
    assert "Class by class" in page_of(out)


def test_a_site_that_withholds_its_results_has_no_charts(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    folder = site_folder(out)
    (folder / "charts.json").write_text(json.dumps({"federated": charts([(0, 0)])}))
    result = json.loads((out / "result.json").read_text())
    result["withheld"][SITE] = "egress.per_site_results is false"
    (out / "result.json").write_text(json.dumps(result))
    assert class_charts(load_run(out)) == ()


def test_a_damaged_file_of_charts_is_left_out(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    (site_folder(out) / "charts.json").write_text('{"federated": {"confusion": 3}}')
    assert class_charts(load_run(out)) == ()
