"""The page as a reader gets it: complete, equal to result.json, safe, and without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import PATIENTS, STUDY, TRAINING, UNSEEN, estimate, metrics, result, rounds, spec, write_run

from wardround.errors import JournalError, StudyError
from wardround.results.answer import answer
from wardround.results.card import write_card
from wardround.results.html import write_report
from wardround.results.metrics import MINUS, NO_BREAK, MetricInfo
from wardround.results.paired import pairs_of
from wardround.results.pictures import gallery
from wardround.results.run import load_run
from wardround.results.schema import RoundLine
from wardround.results.terminal import tables_of
from wardround.results.views import comparison
from wardround.runs.notes import left_out, notes_of
from wardround.tasks.ct_metrics import CT_METRICS

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what a browser would: elements, text, ids, and whether tags are balanced."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def page_of(out: Path) -> Page:
    page = Page(write_report(out).read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    out = write_run(tmp_path_factory.mktemp("run"))
    return out, page_of(out)


def test_sections_are_there_and_linked(whole: tuple[Path, Page]) -> None:
    page = whole[1]
    wanted = [
        *("answer", "sites", "gain", "left-out", "pictures", "learning"),
        *("rounds", "cost", "limits", "reproduce", "study"),
    ]
    assert [name for name in page.ids if name in wanted] == wanted
    assert len(set(page.ids)) == len(page.ids)
    links = [attributes["href"] for attributes in page.all("a")]
    assert [link for link in links if not link.startswith("#picture-")] == [f"#{name}" for name in wanted[1:]]
    assert {link.removeprefix("#") for link in links} <= set(page.ids)


def test_every_number_equals_result_json(whole: tuple[Path, Page]) -> None:
    text = whole[1].text
    specs = {metric.name: metric for metric in load_run(whole[0]).result.measured}
    for arm, table in metrics().items():
        for site, entry in table.items():
            for name, found in entry.items():
                metric = specs[name]
                assert metric.show(found["value"]) in text, (arm, site, name)
                interval = f"{metric.show(found['ci_low'])} to {metric.show(found['ci_high'])}"
                assert (interval in text) == (found["n"] >= 5), (arm, site, name)


def test_headline_states_gain_worst_site_distance_to_pooling_and_unseen(whole: tuple[Path, Page]) -> None:
    text = whole[1].text
    assert (
        "Training together gained +1.20 dB over training alone on average "
        "(4 of 4 hospitals gained; worst site +0.30 dB) and is 0.20 dB short of pooling the data; "
        "at institutions that did not take part, "
        "it reaches 32.10 dB, 0.73 dB better than the best model of a single site."
    ) in text
    assert "That is 86% of what pooling all data would have gained" in text
    assert "3.80 dB better than the best method without learning, TV (29.32 dB)" in text


def test_baselines_without_the_first_metric_are_shown_with_the_one_they_have(tmp_path: Path) -> None:
    """There is no Dice of a classical image: its table has no column for it, and the answer compares the images."""
    drawn = result()
    drawn["metric_specs"].insert(0, spec("dice", label="Dice"))
    dice = {"local": 0.5, "federated": 0.625, "pooled": 0.75}
    for arm, value in dice.items():
        for site, cell in drawn["metrics"][arm].items():
            cell["dice"] = estimate(value, PATIENTS.get(site, 30), 0.1)
    out = write_run(tmp_path, drawn)
    text = page_of(out).text
    assert "Training together gained +0.125 Dice over training alone on average" in text
    gains = "+1.20 dB against training alone, +3.80 dB against the best method without learning, TV."
    assert f"PSNR: 33.12 dB together, {gains}" in text
    run = load_run(out)
    heads = {metric.name: [arm.label for arm in run.arms_in(metric)] for metric in run.result.measured[:2]}
    assert heads["dice"] == ["Alone", "Together", "Pooled"]
    assert heads["psnr"] == [arm.label for arm in run.arms]
    assert "| site | n | Alone | Together | Pooled |" in write_card(out).read_text(encoding="utf-8")


def test_nothing_is_fetched(whole: tuple[Path, Page]) -> None:
    markup = (whole[0] / "report.html").read_text(encoding="utf-8")
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", markup)
    assert re.findall(r"https?:|//[a-z]|@import|url\(", outside) == []
    page = whole[1]
    assert not [tag for tag, _ in page.elements if tag in {"script", "link", "iframe", "object", "embed"}]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    policy = [meta["content"] for meta in page.all("meta") if "content" in meta]
    assert any(content.startswith("default-src 'none'") for content in policy)


def test_pictures_of_every_site_with_errors_and_alternative_text(whole: tuple[Path, Page]) -> None:
    images = whole[1].all("img")
    sites = len(TRAINING) + len(UNSEEN)
    assert len(images) == sites * 2 * (6 + 5)
    assert all(image["alt"] for image in images)
    assert sum("class" in image for image in images) == sites * 2 * 5
    assert "amplified ×5" in whole[1].text


def test_large_pictures_keep_the_page_small(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    noise = np.random.default_rng(0)
    for site in TRAINING:
        folder = out / "sites" / site
        folder.mkdir(parents=True)
        arms = {f"{arm}/0": noise.random((256, 256), dtype=np.float32) for arm in ("reference", "tv", "local")}
        np.savez(folder / "pictures.npz", **arms)  # type: ignore[arg-type]
    path = write_report(out)
    assert path.stat().st_size < 4_000_000
    assert "data:image/png" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["absent", "not an archive", "another shape", "no reference"])
def test_unusable_pictures_are_said_to_be_missing(tmp_path: Path, damage: str) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    folder = out / "sites" / "CS"
    folder.mkdir(parents=True)
    image = np.ones((8, 8), np.float32)
    if damage == "not an archive":
        (folder / "pictures.npz").write_bytes(b"PK nonsense")
    elif damage == "another shape":
        np.savez(folder / "pictures.npz", **{"reference/0": np.ones(8, np.float32), "local/0": image})
    elif damage == "no reference":
        np.savez(folder / "pictures.npz", **{"local/0": image})
    page = page_of(out)
    assert page.all("img") == []
    assert "No pictures in this report" in page.text


def test_small_n_saturation_notes_absences_and_last_round_are_warned_about(whole: tuple[Path, Page]) -> None:
    text = whole[1].text
    assert "CS (3), FG (4), EZ (1)" in text
    assert "clipped to the fixed-point range in round 1 (at worst 0.03% of the values)" in text
    assert "Coil maps were estimated" in text
    assert "Released in the very last round: Pooled" in text
    assert "HT 6–8 no reply within 600 s" in text
    assert "CS 15 update rejected: norm gate" in text
    assert "17 of 20" in text


def test_cost_and_identity(whole: tuple[Path, Page]) -> None:
    text = whole[1].text
    assert "34.4 MB" in text
    assert "452 kB per round and site" in text
    assert "30 min 43 s" in text
    assert "5f" * 32 in text
    assert "2.13.0" in text
    assert "Simulated acquisitions, not raw data measured by a scanner" in text
    assert "The peak of PSNR is the volume's maximum" in text
    assert "95% intervals of a mean over patients (Student's t)" in text


def test_a_federation_that_did_not_help_is_said_so(tmp_path: Path) -> None:
    table = metrics()
    for site in (*TRAINING, "mean"):
        table["federated"][site]["psnr"]["value"] = table["local"][site]["psnr"]["value"] - 0.8
    text = page_of(write_run(tmp_path / "run", {"metrics": table, "left_out": ...})).text
    assert "Training together did not help: it lost 0.80 dB against training alone on average" in text
    assert "0 of 4 hospitals gained, 4 lost; worst site −0.80 dB" in text


def test_a_paired_interval_over_zero_makes_no_claim(tmp_path: Path) -> None:
    gains = {"federated": {"local": {"mean": {"psnr": {"value": 1.2, "ci_low": -0.3, "ci_high": 2.1, "n": 30}}}}}
    text = page_of(write_run(tmp_path / "run", {"gains": gains})).text
    assert "Training together made no clear difference to training alone: +1.20 dB on average" in text
    assert "(95% interval −0.30 to +2.10)" in text


def test_smaller_is_better_is_not_turned_around(tmp_path: Path) -> None:
    def entry(value: float) -> dict[str, Any]:
        return {"hd95": {"value": value, "ci_low": value - 1, "ci_high": value + 1, "n": 12}}

    arms = {"local": 8.0, "federated": 6.0, "pooled": 5.5}
    table = {arm: {site: entry(v) for site in (*TRAINING, "mean")} for arm, v in arms.items()}
    gains = {"federated": {"local": {"mean": {"hd95": {"value": 2, "ci_low": 1.5, "ci_high": 2.25, "n": 48}}}}}
    changed = {"metrics": table, "left_out": ..., "gains": gains}
    changed["metric_specs"] = [spec("hd95", larger_is_better=False)]
    text = page_of(write_run(tmp_path / "run", changed)).text
    assert "(95% interval −2.250 to −1.500)" in text
    assert "Training together improved on (−2.000 hd95) training alone" in text
    assert "0.500 hd95 short of pooling" in text


def everywhere(name: str, arms: dict[str, float], n: int = 12) -> dict[str, Any]:
    """The tables of one metric, the same at every training site."""

    def entry(value: float) -> dict[str, Any]:
        return {name: {"value": value, "ci_low": value - 1, "ci_high": value + 1, "n": n}}

    return {arm: {site: entry(v) for site in (*TRAINING, "mean")} for arm, v in arms.items()}


def test_direction_unit_and_label_come_from_the_metric_and_not_from_its_name(tmp_path: Path) -> None:
    """Smaller is better, under a name that says nothing; and psnr is not the task's first metric."""
    specs = [spec("quirk", larger_is_better=False, label="Surface distance", unit="mm", negligible=0.1), spec("psnr")]
    table = everywhere("quirk", {"local": 8.0, "federated": 6.0, "pooled": 6.05})
    for arm, worse in (("local", 30.0), ("federated", 20.0), ("pooled", 30.0)):
        for entry in table[arm].values():
            entry["psnr"] = estimate(worse, 12, 0.1)
    changed = {"metrics": table, "left_out": ..., "metric_specs": specs}
    out = write_run(tmp_path / "run", changed)
    text, card = page_of(out).text, write_card(out).read_text(encoding="utf-8")
    assert [metric.name for metric in load_run(out).result.measured] == ["quirk", "psnr"]
    assert "Training together improved on (−2.0 mm) training alone on average (4 of 4 hospitals gained" in text
    assert "is level with pooling the data" in text
    assert "### Surface distance (mm), lower is better" in card
    (shown,) = tables_of(load_run(out).result, 80)
    assert shown.title == "Surface distance in mm on test patients, lower is better"


def test_what_a_model_leaves_to_its_preset_is_not_none_in_the_card(tmp_path: Path) -> None:
    study = {**STUDY, "model": {"kind": "modl", "preset": "small", "unrolls": None, "norm": None}}
    study["protection"] = {"robust": None}
    out = write_run(tmp_path / "run", study=study, with_pictures=False)
    lines = write_card(out).read_text(encoding="utf-8").splitlines()
    assert "- Model: kind modl, preset small" in lines
    assert any(line.startswith("- Protection: ") and "robust none" in line for line in lines)


def test_a_run_that_does_not_say_how_its_metrics_are_read_is_refused(tmp_path: Path) -> None:
    for specs in (..., [{"name": "psnr"}], "psnr"):
        with pytest.raises(JournalError, match=r"result\.json is damaged: metric_specs"):
            load_run(write_run(tmp_path / "run", {"metric_specs": specs}, with_pictures=False))


@pytest.mark.parametrize(
    ("negligible", "decimals"), [(0.05, 2), (0.001, 3), (0.0002, 4), (0.5, 1), (0.1, 1), (2.0, 0), (0.0, 4), (1e-9, 4)]
)
def test_as_many_decimals_as_show_a_difference(negligible: float, decimals: int) -> None:
    assert MetricInfo(**spec("any", negligible=negligible)).decimals == decimals


def test_one_patient_shows_a_value_and_no_interval(tmp_path: Path) -> None:
    table = everywhere("psnr", {"local": 30.0, "federated": 30.21}, n=1)
    gain = {"value": 0.21, "ci_low": 0.21, "ci_high": 0.21, "n": 1}
    gains = {"federated": {"local": {site: {"psnr": gain} for site in (*TRAINING, "mean")}}}
    out = write_run(tmp_path / "run", {"metrics": table, "gains": gains, "left_out": ...})
    page, card = page_of(out), write_card(out).read_text(encoding="utf-8")
    assert "gained +0.21 dB" in page.text
    assert "30.21" in card
    for text in (page.text, card):
        for ends in ("29.00 to 31.00", "29.21 to 31.21", "+0.21 to +0.21"):
            assert ends not in text
    assert not [e for tag, e in page.elements if tag == "line" and e.get("class", "").startswith("interval")]


def test_patients_without_a_value_are_counted_by_metric_and_site(tmp_path: Path) -> None:
    table = metrics()
    for arm in ("local", "federated"):
        table[arm]["DU"]["ssim"]["absent"] = 2
    out = write_run(tmp_path / "run", {"metrics": table}, with_pictures=False)
    said = "Patients without a value of SSIM, who count in none of its means: DU (2)."
    assert said in page_of(out).text
    assert said in write_card(out).read_text(encoding="utf-8")
    assert "without a value" not in page_of(write_run(tmp_path / "run", with_pictures=False)).text


def test_the_headline_counts_hospitals_that_gained(tmp_path: Path) -> None:
    table = metrics()
    table["federated"]["DU"]["psnr"]["value"] = table["local"]["DU"]["psnr"]["value"] - 0.2
    table["federated"]["HT"]["psnr"]["value"] = table["local"]["HT"]["psnr"]["value"] + 0.01
    text = page_of(write_run(tmp_path / "run", {"metrics": table})).text
    assert "(2 of 4 hospitals gained, 1 lost; worst site −0.20 dB)" in text


@pytest.mark.parametrize("ahead", [0.8, 0.01])
def test_the_headline_names_a_classical_method_that_is_ahead(tmp_path: Path, ahead: float) -> None:
    table = metrics()
    for site in (*TRAINING, "mean"):
        table["tv"][site]["psnr"]["value"] = table["federated"][site]["psnr"]["value"] + ahead
    headline = answer(load_run(write_run(tmp_path / "run", {"metrics": table}))).headline.replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert ("but TV, which learns nothing, is 0.80 dB ahead of the network" in headline) == (ahead > 0.05)


def test_the_headline_names_arms_whose_updates_were_cut_off(tmp_path: Path) -> None:
    lines = rounds(3)
    for line in lines:
        line["saturated"] = 0.0
    assert "cut off" not in answer(load_run(write_run(tmp_path / "none", lines=lines))).headline
    # One tensor of many: all its values, and next to none of the model's.
    for line in lines:
        if line["arm"] == "local/HT" and line["round"] > 1:
            line |= {"saturated": 1.0}
    headline = answer(load_run(write_run(tmp_path / "run", lines=lines))).headline
    assert "values of updates were cut off in Alone at HT (rounds 2–3), at worst 100.00%" in headline
    lines[0] |= {"saturated": 2e-3}
    headline = answer(load_run(write_run(tmp_path / "both", lines=lines))).headline
    assert "Together (round 1), Alone at HT (rounds 2–3)" in headline


def test_a_repeated_note_is_said_once_with_a_count(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", {"notes": ["The same."] * 27 + ["Another."]})).text
    assert text.count("The same.") == 1
    assert "Note of the run: The same. (27 times)" in text
    assert "Note of the run: Another." in text
    cut = [
        f"pooled, round 1: buffers/{n}.running_var: {n}.50% of values saturated; its scale grows 8-fold"
        for n in range(9)
    ]
    lines = [line | {"saturated": 0.5} for line in rounds(3)]
    text = page_of(write_run(tmp_path / "cut", {"notes": [*cut, "Another."]}, lines=lines)).text
    assert "at worst 50.00% of a tensor, in 9 of them" in text
    assert "running_var" not in text
    assert "buffers/2.running_var" in page_of(write_run(tmp_path / "few", {"notes": cut[:3]})).text
    lines = [
        RoundLine(**line | {"missing": {"B": "no data"}, "notes": ["slow"] if line["round"] == 2 else []})
        for line in rounds(3)
        if line["arm"] in ("federated", "pooled")
    ]
    assert notes_of(lines) == [
        "federated, rounds 1–3; pooled, rounds 1–3: without B (no data) (6 times)",
        "federated, round 2; pooled, round 2: slow (2 times)",
    ]
    assert notes_of(lines[1:2]) == ["federated, round 2: without B (no data)", "federated, round 2: slow"]


@pytest.mark.parametrize(
    ("training", "holds"),
    [
        ({"A": 6, "B": 2, "C": 0}, "it holds 25% of the 8 training patients"),
        ({"A": 600, "B": 2, "C": 3}, "it holds less than 1% of the 605 training patients"),
        ({"A": None, "B": 2, "C": 0}, "it holds 2 of the training patients, and not every site gave their number"),
        (
            {"A": 6, "B": None, "C": 0},
            "what share of the training patients it holds is not known: it did not give their number",
        ),
    ],
)
def test_a_site_that_was_left_out_is_named_with_its_share(training: dict[str, int | None], holds: str) -> None:
    took_part = [("A", "B", "C"), ("A", "C"), ("A", "C"), ("A", "B", "C"), ("A", "C")]
    template = next(line for line in rounds(1) if line["arm"] == "federated")
    lines = [
        RoundLine(**template | {"round": number, "participants": sites}) for number, sites in enumerate(took_part, 1)
    ]
    assert left_out(lines, training) == [f"federated: B was left out of 3 of 5 rounds (rounds 2–3, 5); {holds}"]
    assert left_out(lines[:1], training) == left_out([], training) == []
    # It is said of those that train: others are in no round.
    assert left_out(lines, {"A": 6, "C": 0}) == []


def test_patients_are_points_and_have_no_names(tmp_path: Path) -> None:
    def points(out: Path) -> int:
        page = page_of(out)
        assert "Doe-" not in (out / "report.html").read_text(encoding="utf-8")
        return sum(attributes.get("class") == "patient" for attributes in page.all("circle"))

    out = write_run(tmp_path / "run")
    assert points(out) == 0
    lines = ["patient,folder,row,metric,value"]
    lines += [f"{n},Doe-{n},{row},psnr,{30 + n}" for row in ("federated", "local/CS", "local/DU") for n in range(3)]
    table = out / "sites" / "CS" / "patients.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    # Of the models trained alone the site's own.
    assert points(out) == 6
    table.write_text("\n".join([*lines, "nonsense,,,,"]), encoding="utf-8")
    assert points(out) == 0
    table.write_text("\n".join(lines), encoding="utf-8")
    write_run(out, {"withheld": {"CS": "its rules"}})
    assert points(out) == 0


def test_a_task_of_ones_own_has_no_scanner_and_no_model_of_the_study(tmp_path: Path) -> None:
    study = STUDY | {"task": {"kind": "custom", "factory": "my.task:make"}}
    changed = {"metrics": everywhere("quirk", {"local": 1.0, "federated": 2.0}), "metric_specs": [spec("quirk")]}
    out = write_run(tmp_path / "run", changed, study=study, with_pictures=False)
    page, card = page_of(out).text.partition("study.yaml")[0], write_card(out).read_text(encoding="utf-8")
    for text in (page, card):
        for invented in ("coils", "random", "modl", "imulated"):
            assert invented not in text
    assert "factory my.task:make" in card


def test_withheld_sites_say_so_and_why(tmp_path: Path) -> None:
    table = metrics()
    for arm in table.values():
        arm["HT"] = None
    changed = {"metrics": table, "withheld": {"HT": "egress policy: fewer than 20 patients"}}
    out = write_run(tmp_path / "run", changed)
    text = page_of(out).text
    assert "withheld by the site" in text
    assert "egress policy: fewer than 20 patients" in text
    assert "Over the 3 of 4 training sites that publish both arms." in text
    assert "withheld by the site" in write_card(out).read_text(encoding="utf-8")
    # The fixture has pictures of every site: where numbers stay, pictures stay.
    assert set(gallery(load_run(out)).sites) == {*TRAINING, *UNSEEN} - {"HT"}


def test_a_site_that_failed_is_not_said_to_withhold(tmp_path: Path) -> None:
    table = metrics()
    for arm in table.values():
        arm["HT"] = None
    out = write_run(tmp_path / "run", {"metrics": table, "failed": {"HT": "its process died 3 times [path]"}})
    text = page_of(out).text
    assert "could not be measured: its process died 3 times [path]" in text
    assert "Could not be measured: HT." in text
    card = write_card(out).read_text(encoding="utf-8")
    assert "could not be measured" in card
    for page in (text, card):
        assert "withheld by the site" not in page.lower()
    assert set(gallery(load_run(out)).sites) == {*TRAINING, *UNSEEN} - {"HT"}


def test_a_ct_run_says_how_its_projections_were_made(tmp_path: Path) -> None:
    names = ("psnr", "rmse_hu", "rmse_hu_body", "psnr_lung", "psnr_soft")
    table = {
        arm: {site: {name: estimate(40.0, 12, 1.0) for name in names} for site in (*TRAINING, "mean")}
        for arm in ("local", "federated")
    }
    study = {key: value for key, value in STUDY.items() if key != "acquisition"}
    lengths = {"source_distance": 595.0, "detector_distance": 490.6}
    ct = {"kind": "ct", "photons": 1e5, "geometry": {"kind": "fan_arc", "views": 96, "size": [128, 128], **lengths}}
    study["sites"] = {site: {"role": "train", "acquisition": ct} for site in TRAINING}
    study["model"] = {"kind": "lpd"}
    changed = {"metrics": table, "left_out": ..., "metric_specs": [metric.to_json() for metric in CT_METRICS]}
    out = write_run(tmp_path / "run", changed, study=study, with_pictures=False)
    text, model_card = page_of(out).text, write_card(out).read_text(encoding="utf-8")
    assert "images in Hounsfield units were turned into projections by a model of its scanner" in text
    assert "The range of PSNR is 4096 HU" in text
    for false in ("coils", "8 bits", "volume's maximum", "real anatomy"):
        assert false not in text
        assert false not in model_card
    assert "RMSE in the body: root of the mean squared error inside the body, lower is better" in text
    assert "lung window (−1350 to 150 HU, range 1500 HU)" in text
    rules = {m.name: (m.unit, m.decimals, m.negligible) for m in load_run(out).result.measured}
    assert rules["rmse_hu"] == rules["rmse_hu_body"] == ("HU", 1, 0.5)
    assert rules["psnr_lung"] == rules["psnr_soft"] == ("dB", 2, 0.05)


def test_a_secure_run_without_noise_spends_nothing(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", {"privacy": {"secure": True, "unit": None, "epsilon": None}})
    card = write_card(out).read_text(encoding="utf-8")
    assert "- Differential privacy: none\n- Secure sum: yes\n" in card
    text = page_of(out).text
    assert "No differential privacy was used" in text
    assert "only their sum over sites could be read" in text


def test_a_metric_that_no_patient_of_a_site_has_is_a_dash(tmp_path: Path) -> None:
    table = metrics()
    table["federated"]["CS"]["psnr"] = None
    table["federated"]["FG"]["psnr"] |= {"ci_low": None, "ci_high": None}
    out = write_run(tmp_path / "run", {"metrics": table})
    assert "Over the 3 of 4 training sites" in page_of(out).text
    (row,) = (row for row in comparison(load_run(out), load_run(out).result.measured[0]) if row.title == "CS")
    assert [cell.text for cell in row.cells].count("–") == 1
    table["federated"]["DU"]["psnr"]["value"] = float("nan")
    with pytest.raises(JournalError, match=r"damaged: metrics\.federated\.DU\.psnr\.value"):
        load_run(write_run(tmp_path / "run", {"metrics": table}))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>"
    table = metrics()
    table["pooled"]["CS"] = None
    table[evil] = {"DU": {evil: {"value": 1.0, "ci_low": 0.5, "ci_high": 1.5, "n": 2}}}
    lines = rounds(3)
    lines[0] |= {"missing": {evil: evil, "CS": evil}, "validation": {evil: 1.0}, "participants": [evil]}
    lines.append(lines[0] | {"arm": f"local/{evil}", "missing": {}})
    spent = {
        "epsilon": 1.0,
        "epsilon_ledger": 1.0,
        "delta": 0.1,
        "noise_multiplier": 1.0,
        "sample_rate": 1.0,
        "steps": 1,
    }
    changed = {
        "study": evil, "metrics": table, "notes": [evil], "fingerprint": {evil: evil},
        "privacy": {"secure": True, "epsilon": 1.0, "note": evil, "sites": {evil: spent}},
        "steps": {evil: 1}, "selected_round": {evil: 1}, "study_sha256": evil, "withheld": {"FG": evil},
        "failed": {evil: evil}, "participants": [evil, *TRAINING], "local_sha256": {evil: evil},
        "scanners": {evil: {"scanners": [evil]}},
    }  # fmt: skip
    study = STUDY | {"description": evil}
    out = write_run(tmp_path / "run", changed, study=study, lines=lines)
    page = page_of(out)
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert evil in page.text
    card = write_card(out).read_text(encoding="utf-8")
    assert "<script" not in card
    assert "<img" not in card


def test_a_site_name_cannot_lead_out_of_the_run(tmp_path: Path) -> None:
    outside, name = tmp_path / "elsewhere", "../../elsewhere/sites/CS"
    write_run(outside)
    table = {"federated": {name: metrics()["federated"]["CS"]}}
    out = write_run(tmp_path / "run", {"metrics": table, "left_out": ...}, with_pictures=False)
    assert page_of(out).all("img") == []
    study = STUDY | {"sites": {**STUDY["sites"], name: {"role": "unseen"}}}
    with pytest.raises(StudyError, match="sites"):
        page_of(write_run(tmp_path / "run", {"metrics": table}, study=study, with_pictures=False))


def test_unknown_arms_and_metrics_are_shown_under_their_names(tmp_path: Path) -> None:
    table = metrics()
    table["fedbn"] = table["federated"]
    table["dreaming"] = {"CS": {"dice": {"value": 0.8125, "ci_low": 0.7, "ci_high": 0.9, "n": 3}}}
    specs = [*result()["metric_specs"], spec("dice")]
    text = page_of(write_run(tmp_path / "run", {"metrics": table, "metric_specs": specs})).text
    assert "fedbn" in text
    assert "dreaming" in text
    assert "0.812" in text
    assert "dice" in text


def test_a_baseline_that_is_no_alias_is_an_arm(tmp_path: Path) -> None:
    alias = load_run(write_run(tmp_path / "alias", with_pictures=False))
    assert "baseline" not in [arm.key for arm in alias.arms]
    table = {key: value for key, value in metrics().items() if key != "zero_filled"}
    own = load_run(write_run(tmp_path / "own", {"metrics": table}, with_pictures=False))
    assert "baseline" in [arm.key for arm in own.arms]


def test_one_site_alone(tmp_path: Path) -> None:
    table = {
        arm: {"CS": entry["CS"], "mean": entry["CS"]}
        for arm, entry in metrics().items()
        if arm in ("tv", "local", "federated")
    }
    study = STUDY | {"sites": {"CS": {"role": "train"}}}
    changed = {"metrics": table, "participants": ["CS"], "left_out": ...}
    lines = [line for line in rounds(1) if line["arm"] in ("federated", "local/CS")]
    text = page_of(write_run(tmp_path / "run", changed, study=study, lines=lines)).text
    assert "gained +2.30 dB over training alone (one site, CS)" in text


@pytest.mark.parametrize("left", ["federated", "local", "pooled", "tv"])
def test_any_single_arm_makes_a_page(tmp_path: Path, left: str) -> None:
    out = write_run(tmp_path / "run", {"metrics": {left: metrics()[left]}, "left_out": ...}, with_pictures=False)
    text = page_of(out).text
    assert "gained" not in text.partition("Site by site")[0]
    if left == "federated":
        assert "not compared with training alone: it reached 33.12 dB" in text


def test_a_run_in_which_nothing_could_be_measured(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", {"metrics": ..., "left_out": ...}, lines=[], with_pictures=False)
    page = page_of(out)
    assert "This run holds no metrics" in page.text
    assert "The run left no record of its rounds" in page.text
    assert "Research use only" in write_card(out).read_text(encoding="utf-8")
    assert tables_of(load_run(out).result, 80) == []


def test_a_half_written_last_round_is_left_out(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    path = out / "rounds.jsonl"
    count = len(path.read_text(encoding="utf-8").splitlines())
    with path.open("a", encoding="utf-8") as file:
        file.write('{"arm": "feder')
    assert len(load_run(out).rounds) == count
    text = path.read_text(encoding="utf-8")
    path.write_text("nonsense\n" + text, encoding="utf-8")
    with pytest.raises(JournalError, match=r"line 1 of rounds\.jsonl"):
        load_run(out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no finished run"),
        ("{", "not JSON"),
        ("[]", "not a JSON"),
        ("{}", "another version"),
        ("\xff", "not JSON"),
        ('{"version": 2}', "another version"),
        ('{"version": 1}', "damaged: metric_specs: Field required"),
    ],
)
def test_errors_name_the_file_and_not_the_folder(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(JournalError, match=message) as caught:
        write_report(tmp_path)
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path) in caught.value.detail


def test_model_card(whole: tuple[Path, Page]) -> None:
    card = write_card(whole[0]).read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert heads == [
        "Intended use",
        "Data",
        "Results on test patients",
        "Training",
        "Limits",
        "Reproducibility",
    ]
    assert "not a medical device" in card.lower()
    for site in (*TRAINING, *UNSEEN):
        found = result()["metrics"]["federated"][site]["psnr"]
        low, high = f"{found['ci_low']:.2f}", f"{found['ci_high']:.2f}"
        assert (f"{found['value']:.2f} ({low} to {high})" in card) == (PATIENTS[site] >= 5)
        assert f"{found['value']:.2f}" in card
        assert re.search(rf"^\| {site} \| \w.* \| {PATIENTS[site]} \|", card, re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_writing_twice_gives_the_same_bytes(whole: tuple[Path, Page]) -> None:
    first = write_report(whole[0]).read_bytes()
    assert write_report(whole[0]).read_bytes() == first
    assert not list(whole[0].glob("*.draft"))
    json.loads((whole[0] / "result.json").read_text(encoding="utf-8"))


def _patients(out: Path, site: str, rows: dict[str, list[float]]) -> None:
    lines = [f"{n},Doe-{n},{row},psnr,{value}" for row, values in rows.items() for n, value in enumerate(values)]
    table = "\n".join(["patient,folder,row,metric,value", *lines])
    (out / "sites" / site / "patients.csv").write_text(table, encoding="utf-8")


def test_each_patient_is_a_pair_and_the_least_and_the_most_gain_have_numbers_and_no_names(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run")
    assert "patients" not in page_of(out).ids
    _patients(out, "CS", {"local/CS": [30.0, 31.0, 32.0], "tv": [1.0, 1.0, 1.0], "federated": [31.5, 30.5, 32.0]})
    # A site that trained no model of its own is compared with the best baseline.
    _patients(out, "EZ", {"tv": [29.0], "zero_filled": [20.0], "federated": [29.25]})
    page = page_of(out)
    assert "patients" in page.ids
    assert "#patients" in [link["href"] for link in page.all("a")]
    assert "Doe-" not in (out / "report.html").read_text(encoding="utf-8")
    labels = [figure["aria-label"] for figure in page.all("figure") if "paired" in figure.get("class", "")]
    assert labels == [
        "CS, Together against Alone: 3 test patients: 1 better, 1 worse, 1 unchanged. "
        f"Least gain: patient 1, {MINUS}0.50{NO_BREAK}dB. Largest gain: patient 0, +1.50{NO_BREAK}dB.",
        "EZ, Together against TV: 1 test patient: 1 better, 0 worse. "
        f"Least gain: patient 0, +0.25{NO_BREAK}dB. Largest gain: patient 0, +0.25{NO_BREAK}dB.",
    ]
    drawn = [line["class"] for line in page.all("line") if "pair" in line.get("class", "").split()]
    assert drawn == ["pair gain-down", "pair gain-up", "pair gain-up", "pair gain-up"]
    write_run(out, {"withheld": {"CS": "its rules"}})
    assert all(not figure.get("aria-label", "").startswith("CS,") for figure in page_of(out).all("figure"))


def test_pairs_stand_from_the_least_to_the_largest_gain_whatever_the_metrics_direction() -> None:
    metric = MetricInfo.model_validate(spec("nmse", larger_is_better=False))
    pairs = pairs_of({0: 3.0, 1: 1.0, 2: 2.0, 4: 9.0}, {2: 2.5, 1: 1.0, 0: 1.0, 3: 1.0}, metric)
    assert [(pair.number, pair.gain) for pair in pairs] == [(2, -0.5), (1, 0.0), (0, 2.0)]
