"""Metrics of each kind from training to the report, and which of them a site keeps to itself."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cohorts import let_test
from tests.federation.rig import ARM, Rig
from tests.federation.test_own_results import ask, ruled
from tests.kinds import METRICS, KindsTask, kinds_study, numbers_of, released, values_of
from wardround.plan.sums import (
    evaluation_entries,
    evaluation_metrics,
    results_in,
    validation_metrics,
    validation_state,
    validation_sums,
    validation_values,
)
from wardround.runs.session import Result, evaluate, run
from wardround.site.cohorts import kept_back
from wardround.site.egress import EgressRules
from wardround.site.measured import SETS, MeasuredSets
from wardround.site.patients import PatientRows, results_of
from wardround.site.rules import rules_of
from wardround.site.site import Site
from wardround.storage.store import SiteStore
from wardround.study.sites import SitesFile
from wardround.tasks.estimates import Mean, difference, estimate, mean_of_sites
from wardround.tasks.histograms import auroc
from wardround.tasks.resampling import RESAMPLES
from wardround.tasks.states import Histogram, state_of
from wardround.tasks.task import MetricSpec
from wardround.wire.message import Message
from wardround.wire.ring import ExactSum
from wardround.wire.update import Aggregate, Layout, encode

NAMES = [spec.name for spec in METRICS]
STEP = 1e-6
AREA = MetricSpec("area", 0.0, 1.0, STEP, True, kind=Histogram(auroc, bins=5))


# From training to the report ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A run, its sites, and the values of every patient's examples under its federated model."""

    result: Result
    sites: SitesFile
    tested: dict[str, dict[int, list[dict[str, Any]]]]
    validated: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, task = tmp_path_factory.mktemp("kinds"), KindsTask()
    sites = ruled(folder)
    # Site C tests patients without a finding alone.
    let_test(folder / "C", range(21, 40, 3))
    result = run(kinds_study(), sites, folder / "out", compare=("local",), engine="local", allow_code=True)
    model = released(task, result.out / "models" / "federated.safetensors")
    tested, validated = {}, []
    for site in "ABC":
        points = task.dataset(site, (folder / site,))
        tested[site] = numbers_of(task, model, points, "test")
        validated += numbers_of(task, model, points, "validation").values()
    return Whole(result, sites, tested, validated)


def test_the_best_round_is_that_of_the_first_metric_over_all_sites_patients(whole: Whole) -> None:
    rounds = [json.loads(line) for line in (whole.result.out / "rounds.jsonl").read_text().splitlines()]
    rounds = [one for one in rounds if one["arm"] == "federated"]
    assert all(set(one["validation"]) == set(NAMES) for one in rounds)
    areas = {one["round"]: one["validation"]["auroc"] for one in rounds}
    selected = whole.result.values["selected_round"]["federated"]
    assert areas[selected] == max(areas.values())
    # Over all sites' patients at once: an AUROC is no mean of the sites' AUROCs.
    (chosen,) = [one for one in rounds if one["round"] == selected]
    expected = values_of(whole.validated)
    assert chosen["validation"] == {name: pytest.approx(expected[name], abs=1e-5) for name in NAMES}


@pytest.mark.parametrize("site", ["A", "B"])
def test_a_sites_results_are_those_of_its_patients(whole: Whole, site: str) -> None:
    told, patients = whole.result.values["metrics"]["federated"][site], list(whole.tested[site].values())
    expected = values_of(patients)
    for name in NAMES:
        assert told[name]["value"] == pytest.approx(expected[name], abs=1e-5)
        assert told[name]["se"] > 0.0
        assert told[name]["ci_low"] < told[name]["value"] < told[name]["ci_high"]
    found = sum(patient[0]["finding"] for patient in patients)
    assert {name: told[name]["n"] for name in NAMES} == {**dict.fromkeys(NAMES, 20), "finding": found}
    assert told["finding"]["absent"] == 20 - found == 7
    # A result without absent patients has the keys that it always had.
    assert all(set(told[n]) == {"value", "n", "se", "ci_low", "ci_high"} for n in NAMES if n != "finding")


def test_a_site_where_no_patient_has_a_value_has_none_and_is_no_part_of_the_mean(whole: Whole) -> None:
    table = whole.result.values["metrics"]["federated"]
    assert table["C"]["finding"] is None
    assert table["C"]["mse"]["n"] == 7
    expected = [values_of(list(whole.tested[site].values()))["finding"] for site in "AB"]
    assert table["mean"]["finding"]["value"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert (table["mean"]["finding"]["n"], table["mean"]["finding"]["absent"]) == (26, 21)
    assert table["mean"]["mse"]["n"] == 47


def test_gains_are_paired_and_the_report_shows_every_kind(whole: Whole) -> None:
    values = whole.result.values
    gains = values["gains"]["federated"]["local"]
    for name, spec in zip(NAMES, METRICS, strict=True):
        ours, theirs = (values["metrics"][arm]["A"][name]["value"] for arm in ("federated", "local"))
        sign = 1.0 if spec.larger_is_better else -1.0
        assert gains["A"][name]["value"] == pytest.approx(sign * (ours - theirs), abs=3 * STEP)
        # Better known than two numbers that have nothing to do with each other.
        apart = math.hypot(*(values["metrics"][arm]["A"][name]["se"] for arm in ("federated", "local")))
        assert 0.0 < gains["A"][name]["se"] < apart
    assert gains["C"]["finding"] is None
    report = (whole.result.out / "report.html").read_text(encoding="utf-8")
    assert all(label in report for label in ("AUROC", "AUPRC", "Error of the finding", "explained"))


def test_all_results_can_be_recomputed(whole: Whole) -> None:
    again = evaluate(whole.result.out, whole.sites, engine="local", allow_code=True)
    assert again.metrics == whole.result.metrics
    assert again.gains == whole.result.gains


def test_the_sites_own_table_has_the_values_that_a_patient_has(whole: Whole) -> None:
    with (whole.result.out / "sites" / "A" / "patients.csv").open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["row"] == "federated"]
    by_metric = {name: [float(one["value"]) for one in lines if one["metric"] == name] for name in NAMES}
    patients = list(whole.tested["A"].values())
    assert by_metric["auroc"] == []
    ratios = [sum(e["error"] for e in p) / sum(e["energy"] for e in p) for p in patients]
    assert by_metric["explained"] == pytest.approx(ratios, rel=1e-3, abs=1e-3)
    assert [math.isnan(value) for value in by_metric["finding"]] == [not p[0]["finding"] for p in patients]


# What travels -------------------------------------------------------------------------------------------------------


def random_rows(seed: int, count: int) -> dict[str, np.ndarray]:
    """Rows of patients for all metrics of the toy; every fourth has no finding."""
    random = np.random.default_rng(seed)
    counts = np.zeros((count, 1, 2, 100))
    for patient in counts:
        np.add.at(patient, (0, random.integers(0, 2, 2), random.integers(0, 100, 2)), 1.0)
    errors = random.integers(0, 1000, count) / 8.0
    finding = np.where(np.arange(count) % 4 == 0, np.nan, errors.clip(0, 100))
    ratio = random.integers(1, 1000, (count, 2)) / 4.0
    rows = {"finding": finding, "explained": ratio, "mse": errors.clip(0, 100)}
    return rows | dict.fromkeys(("auroc", "auprc", "ece"), counts)


def summed(layout: Layout, entries: list[dict[str, Any]]) -> Aggregate:
    total = ExactSum(layout.segments)
    for one in entries:
        data = b"".join(bytes(part) for part in encode(layout, {}, {}, {}, one, np.random.default_rng(0)))
        total.add(data, 0)
    return Aggregate(layout, total, {})


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_sites_in_any_order_and_grouping_give_the_state_of_all_patients(sizes: list[int], order: Any) -> None:
    layout = Layout((), validation_metrics(METRICS), 8)
    rows = random_rows(len(sizes), sum(sizes))
    cuts = np.cumsum(sizes)[:-1]
    sites = [
        dict(zip(rows, parts, strict=True)) for parts in zip(*(np.split(r, cuts) for r in rows.values()), strict=True)
    ]
    entries = [validation_sums(METRICS, site) for site in sites]
    order.shuffle(entries)
    found = summed(layout, entries)
    for spec in METRICS:
        whole, state = state_of(spec, rows[spec.name]), validation_state(found, spec)
        # All numbers are whole steps; a mean's step of 1e-6 is rounded once a site.
        assert state.total == pytest.approx(whole.total, abs=len(sizes) * spec.resolution)
        if spec.kind.shape:
            assert np.array_equal(state.total, whole.total)
        else:
            assert state.count == whole.count
        assert state.broken == 0
    one = validation_values(found, METRICS)
    assert one == validation_values(summed(layout, entries[::-1]), METRICS)
    assert (one is None) == (sum(sizes) == 0)


def test_reconstruction_sums_what_it_summed_before() -> None:
    plain = METRICS[-1]
    assert [m.name for m in validation_metrics((plain,))] == ["validation_patients", "validation/mse"]
    assert [m.name for m in evaluation_metrics((plain,))] == ["patients", "value/mse", "error/mse", "paired/mse"]
    assert validation_sums((plain,), {"mse": np.array([1.0, 2.0])}) == {"validation_patients": 2, "validation/mse": 3.0}


def test_sites_send_no_more_than_a_value_needs_and_one_histogram_of_a_source() -> None:
    assert [(m.name, m.size) for m in validation_metrics(METRICS)] == [
        ("validation_patients", 1),
        ("validation/counts/high", 200),
        ("validation_broken/auroc", 1),
        ("validation_broken/auprc", 1),
        ("validation_broken/ece", 1),
        ("validation/finding", 1),
        ("validation_count/finding", 1),
        ("validation/numerator/explained", 1),
        ("validation/denominator/explained", 1),
        ("validation_broken/explained", 1),
        ("validation/mse", 1),
    ]
    # Of diverged patients no more than that there are some.
    broken = validation_sums(METRICS, {**random_rows(0, 6), "explained": np.full((6, 2), np.nan)})
    assert broken["validation_broken/explained"] == 1
    # With a model that gave no number for all but one patient the sums would be that patient's.
    rows = random_rows(0, 6)
    one_left = {**rows, "explained": np.vstack((np.full((5, 2), np.nan), rows["explained"][5:]))}
    said = validation_sums(METRICS, one_left)
    assert said["validation/numerator/explained"] == said["validation/denominator/explained"] == 0.0


def test_nothing_but_n_absent_value_and_errors_leaves_of_a_test() -> None:
    layout = Layout((), evaluation_metrics(METRICS), 8)
    # A contributor, the plain metric's n, and of each metric value and two errors; of five n and absent, too.
    assert len(layout.entries) == 2 + 3 * 6 + 2 * 5
    rows = random_rows(0, 12)
    results = results_of("A", METRICS, rows, random_rows(1, 12), least=1, root=bytes(32))
    found = results_in(summed(layout, [evaluation_entries(METRICS, results)]), METRICS)
    for name, result in results.items():
        assert found[name].mean.value == pytest.approx(result.mean.value, abs=STEP)
        assert found[name].mean.error == pytest.approx(result.mean.error, abs=STEP)
        assert found[name].paired == pytest.approx(result.paired, abs=STEP)
    assert (found["finding"].mean.count, found["finding"].mean.absent) == (9, 3)


def test_standard_errors_are_of_the_secret_root_and_always_the_same() -> None:
    rows, other = random_rows(0, 12), random_rows(1, 12)

    def told(root: bytes) -> list[float | None]:
        found = results_of("A", METRICS, rows, other, least=1, root=root)
        return [number for name in NAMES for number in (found[name].mean.error, found[name].paired)]

    first, again, another = told(bytes(32)), told(bytes(32)), told(b"\1" * 32)
    assert first == again
    # A mean's are s / sqrt(n); the others differ by what 400 draws leave open.
    drawn = [number for name, number in zip(np.repeat(NAMES, 2), first, strict=True) if name not in ("finding", "mse")]
    drawn_again = [n for name, n in zip(np.repeat(NAMES, 2), another, strict=True) if name not in ("finding", "mse")]
    assert all(a != b for a, b in zip(drawn, drawn_again, strict=True))
    assert drawn == pytest.approx(drawn_again, rel=8.0 / math.sqrt(2 * RESAMPLES))


def test_a_pair_of_rows_with_other_patients_without_a_value_is_drawn_anew() -> None:
    spec = METRICS[NAMES.index("finding")]
    random = np.random.default_rng(0)
    rows = random.normal(5.0, 1.0, 20)
    same, other = rows + random.normal(0.0, 0.1, 20), rows + 0.5
    rows[3] = same[3] = other[7] = np.nan
    exact = results_of("A", [spec], {"finding": rows}, {"finding": same}, least=1, root=bytes(32))["finding"]
    keep = np.arange(20) != 3
    assert exact.paired == pytest.approx((same - rows)[keep].std(ddof=1) / math.sqrt(19))
    drawn = results_of("A", [spec], {"finding": rows}, {"finding": other}, least=1, root=bytes(32))["finding"]
    assert drawn.paired is not None
    assert 0.01 < drawn.paired < 0.5
    assert (drawn.mean.count, drawn.mean.absent) == (19, 1)


def test_estimates_carry_the_absent_and_no_mean_hides_a_site_that_keeps_its_own() -> None:
    a, b, none = Mean(1.0, 0.1, 8, 2), Mean(3.0, 0.1, 6), Mean(math.nan, None, 0, 5)
    kept = Mean(math.nan, None, 0, withheld=True)
    assert estimate(a).absent == 2
    found = mean_of_sites([a, b, none])
    assert (found.value, found.n, found.absent) == (2.0, 14, 7)
    assert mean_of_sites([a, b, kept]).n == 0
    gain = difference(a, b, 0.05, larger_is_better=False)
    assert (gain.value, gain.error, gain.count) == (2.0, 0.05, 6)
    assert difference(a, kept, None, larger_is_better=True).withheld
    assert difference(a, none, None, larger_is_better=True).count == 0


# A network that diverged --------------------------------------------------------------------------------------------


def test_a_diverged_network_is_the_worst_and_never_absent(tmp_path: Path) -> None:
    rig = Rig(kinds_study(), tmp_path)
    learner = rig.learner("A")
    sound = learner.held_out.evaluate("test")
    assert sum(np.isnan(sound["finding"])) == 7
    with torch.no_grad():
        next(learner.model.parameters()).fill_(math.nan)
    rows = learner.held_out.evaluate("test")
    for spec in METRICS:
        result = results_of("A", [spec], rows, None, least=1, root=bytes(32))[spec.name]
        assert (result.mean.value, result.mean.count, result.mean.absent) == (spec.worst, 20, 0)
    sums = summed(
        Layout((), validation_metrics(METRICS), 8), [validation_sums(METRICS, learner.held_out.evaluate("validation"))]
    )
    assert validation_values(sums, METRICS) == {spec.name: spec.worst for spec in METRICS}


# What a site keeps to itself ----------------------------------------------------------------------------------------


def rows_with(present: int, absent: int, spec: MetricSpec) -> np.ndarray:
    if spec.kind.shape == (2,):
        return np.array([[1.0, 2.0]] * present + [[0.0, 0.0]] * absent)
    return np.array([1.0] * present + [np.nan] * absent)


@pytest.mark.parametrize("spec", [METRICS[3], METRICS[4]], ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("present", "absent", "why"),
    [
        (9, 0, None),
        (0, 9, None),
        (5, 5, None),
        (9, 4, "fewer than 5 patients have no value"),
        (9, 1, "fewer than 5 patients have no value"),
        (4, 9, "fewer than 5 patients have a value"),
    ],
)
def test_a_handful_with_or_without_a_value_keeps_the_metric_at_the_site(
    spec: MetricSpec, present: int, absent: int, why: str | None
) -> None:
    rows = {spec.name: rows_with(present, absent, spec)}
    stays = kept_back((spec,), rows, 5, bins=False)
    assert stays == ({} if why is None else {spec.name: f"{spec.name}: {why}"})
    assert kept_back((spec,), rows, 1, bins=True) == {}


def labelled(*bins: tuple[int, int, int]) -> np.ndarray:
    """One patient an example: (bin, label, how many)."""
    rows = np.zeros((sum(many for *_, many in bins), 1, 2, 5))
    at = 0
    for place, label, many in bins:
        rows[at : at + many, 0, label, place] = 1.0
        at += many
    return rows


def test_an_auroc_of_a_handful_of_sick_patients_stays_at_the_site() -> None:
    few, enough = labelled((0, 0, 9), (4, 1, 4)), labelled((0, 0, 9), (4, 1, 5))
    assert "fewer than 5 patients have a class" in kept_back((AREA,), {"area": few}, 5, bins=False)["area"]
    assert kept_back((AREA,), {"area": enough}, 5, bins=False) == {}
    spread = labelled((0, 0, 9), (4, 1, 5), (3, 1, 1))
    assert kept_back((AREA,), {"area": spread}, 5, bins=False) == {}
    assert "fewer than 5 patients are in a bin" in kept_back((AREA,), {"area": spread}, 5, bins=True)["area"]
    assert kept_back((AREA,), {"area": enough}, 5, bins=True) == {}


def cautious(rig: Rig, folder: Path, *, hidden: bool = False, least: int = 5) -> Site:
    rules = replace(rules_of(rig.host, ARM), egress=EgressRules(minimum_cohort=least), hidden=hidden)
    store, sets = SiteStore(folder / "store"), MeasuredSets(folder / "history")
    return Site("A", rules, lambda: rig.learner("A"), store, rows=PatientRows(folder / "rows"), sets=sets)


def told_by(rig: Rig, reply: Message, layout: Layout) -> Aggregate:
    assert reply.header.kind == "update", reply.header.meta
    total = ExactSum(layout.segments)
    total.add(b"".join(bytes(c) for c in reply.body.chunks()), 0)
    return Aggregate(layout, total, {})


@dataclass(frozen=True)
class Scored(KindsTask):
    """The toy with other metrics."""

    metrics: tuple[MetricSpec, ...] = ()


def blocked(site: Site) -> set[str]:
    return {str(e.payload["reason"]) for e in site.minutes.record.entries() if e.event == "blocked"}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(kinds_study(schedule={"rounds": 2}), tmp_path)
    rig.train()
    return rig


def test_one_metric_stays_and_the_others_leave(rig: Rig, tmp_path: Path) -> None:
    """7 of 20 test patients have no finding: too few for a cohort of 8, and nothing tells that there are 7."""
    rig.sites["A"] = cautious(rig, tmp_path / "eight", least=8)
    found = results_in(told_by(rig, ask(rig), rig.arm_spec.evaluation_layout), METRICS)
    finding = found["finding"].mean
    assert (finding.withheld, finding.count, finding.absent, finding.error) == (True, 0, 0, None)
    assert found["mse"].mean.count == 20
    assert blocked(rig.sites["A"]) == {"finding: fewer than 8 patients have no value"}
    rig.sites["A"] = cautious(rig, tmp_path / "five")
    found = results_in(told_by(rig, ask(rig), rig.arm_spec.evaluation_layout), METRICS)
    assert (found["finding"].mean.count, found["finding"].mean.absent) == (13, 7)


def test_a_histogram_of_single_patients_leaves_under_masks_alone(rig: Rig, tmp_path: Path) -> None:
    layout = rig.arm_spec.metrics_layout
    for hidden in (False, True):
        rig.sites["A"] = cautious(rig, tmp_path / str(hidden), hidden=hidden)
        sums = told_by(rig, ask(rig, "validation"), layout)
        # 16 validation patients of two examples each.
        assert sums.metrics["validation/counts/high"].sum() == (32 if hidden else 0)
        values = validation_values(sums, METRICS) or {}
        assert set(values) == set(NAMES if hidden else NAMES[3:])
        kept = {f"{name}: fewer than 5 patients are in a bin" for name in NAMES[:3]}
        assert blocked(rig.sites["A"]) == (set() if hidden else kept)


def test_rules_say_whether_sums_are_masked(tmp_path: Path) -> None:
    for secure, hidden in ((True, True), (False, False)):
        rig = Rig(kinds_study(protection={"secure": secure}), tmp_path / str(secure))
        assert rules_of(rig.host, ARM).hidden is hidden


def test_patients_with_a_value_join_and_leave_in_groups_too(rig: Rig, tmp_path: Path) -> None:
    """A next study may have 6 more patients, a whole group, of whom 5 have no value: the sixth would stand alone."""
    rig.sites["A"] = cautious(rig, tmp_path / "site")
    ask(rig)
    sets = MeasuredSets(tmp_path / "site" / "history")
    everyone, having = ([f"Doe-{n}" for n in range(20, 40) if n % 3 or which] for which in (True, False))
    assert sets.join("test", everyone, "", 5) is None
    assert sets.join("test", having, "", 5) is None
    assert len((tmp_path / "site" / "history" / SETS).read_text().splitlines()) == 2
    assert sets.join("test", [*everyone, *(f"new-{n}" for n in range(6))], "", 5) is None
    assert "fewer than 5" in str(sets.join("test", [*having, "new-0"], "", 5))


def test_absence_that_depends_on_the_model_stays_at_the_site(rig: Rig, tmp_path: Path) -> None:
    """Two rows over sets that differ by one patient are the count, and nearly the value, of that patient."""
    site = rig.sites["A"] = cautious(rig, tmp_path / "site")
    learner = site.learner
    values = learner.held_out.evaluate("test")
    assert site._own.kept_back("test", 1, values, learner, hidden=True) == frozenset()
    other = values["finding"].copy()
    other[np.flatnonzero(np.isnan(other))[0]] = 1.0
    assert site._own.kept_back("test", 1, values | {"finding": other}, learner, hidden=True) == {"finding"}
    assert any("differ from those it measured before" in why for why in blocked(site))


def test_two_numbers_of_absent_patients_name_no_small_group() -> None:
    one, other = METRICS[3], replace(METRICS[3], name="other")
    for differ, stays in ((0, False), (1, True), (4, True), (5, False)):
        rows = {"finding": rows_with(12, 12, one), "other": rows_with(12 + differ, 12 - differ, one)}
        assert ("other" in kept_back((one, other), rows, 5, bins=False)) is stays
        assert "finding" not in kept_back((one, other), rows, 5, bins=False)


def test_what_is_kept_of_a_source_is_kept_of_all_its_metrics(rig: Rig, tmp_path: Path) -> None:
    """Sums go by source: what one metric may not tell, another of the same sums would."""
    first = replace(AREA, name="first", source="area", kind=Histogram(auroc, classes=2, bins=5, only=0))
    second = replace(first, name="second", kind=replace(first.kind, only=1))
    patients = np.zeros((20, 2, 2, 5))
    patients[:10, :, 0, 1] = patients[10:, :, 1, 3] = 1.0
    patients[7:10, 1] = 0.0
    site = cautious(rig, tmp_path / "site")
    learner = rig.learner("A")
    learner.task = Scored(metrics=(first, second))
    rows = {"first": patients, "second": patients}
    assert set(kept_back((first, second), rows, 5, bins=False)) == {"second"}
    assert site._own.kept_back("test", 1, rows, learner, hidden=True) == {"second"}
    sixteen = {name: of_all[2:18] for name, of_all in rows.items()}
    assert site._own.kept_back("validation", 1, sixteen, learner, hidden=True) == {"first", "second"}


@pytest.mark.slow
def test_masks_change_no_number_of_any_kind(whole: Whole, tmp_path: Path) -> None:
    """Under masks the histograms of all sites are one sum, and every result is that of the clear run."""
    sites = ruled(tmp_path)
    let_test(tmp_path / "C", range(21, 40, 3))
    study = kinds_study(protection={"secure": True})
    masked = run(study, sites, tmp_path / "out", compare=("local",), engine="local", allow_code=True)
    assert masked.values["model_sha256"] == whole.result.values["model_sha256"]
    assert masked.values["metrics"] == whole.result.values["metrics"]
    rounds = [
        [json.loads(line) for line in (result.out / "rounds.jsonl").read_text().splitlines()]
        for result in (masked, whole.result)
    ]
    ours, theirs = ([one["validation"] for one in lines if one["arm"] == "federated"] for lines in rounds)
    assert ours == theirs
