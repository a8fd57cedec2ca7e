"""A site's own results: n, value and standard errors of a cohort, and nothing that could be solved for a patient."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.cohorts import CohortTask, cohort_study, let_test
from tests.federation.rig import ARM, Recorder, Rig, Sent
from tests.toys import toy_sites
from wardround.engines.local import LocalEngine
from wardround.errors import DataError, StudyError
from wardround.federation.exchange import ERROR, EVALUATE, UPDATE
from wardround.plan.arms import arms_of
from wardround.plan.sums import results_in
from wardround.runs.session import Result, evaluate, run
from wardround.site.egress import ACROSS_HOSPITALS, EgressRules
from wardround.site.evaluators import evaluators_of
from wardround.site.measured import KEY, SETS, MeasuredSets, fewest_told
from wardround.site.patients import PatientRows, results_of
from wardround.site.rules import rules_of
from wardround.site.site import Site
from wardround.storage.cipher import StoreCipher
from wardround.storage.store import SiteStore
from wardround.study.load import load_study, plan_sha256, study_sha256
from wardround.study.sites import Egress, SitesFile
from wardround.tasks.estimates import Mean, mean_of, two_digits
from wardround.tasks.metrics import RECONSTRUCTION_METRICS
from wardround.wire.message import Message
from wardround.wire.ring import ExactSum
from wardround.wire.update import Aggregate

METRICS = ("r", "mse")
STEP = 1e-6


def ruled(folder: Path, history: Path | None = None, **egress: Any) -> SitesFile:
    sites = toy_sites(folder, ("A", "B", "C"))
    update = {"egress": Egress.model_validate(egress), "history": history}
    return SitesFile(sites={name: entry.model_copy(update=update) for name, entry in sites.sites.items()})


def table_of(out: Path, site: str) -> dict[tuple[str, str], np.ndarray]:
    """patients.csv as (row, metric) -> one value for each patient."""
    found: dict[tuple[str, str], list[float]] = {}
    with (out / "sites" / site / "patients.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            found.setdefault((line["row"], line["metric"]), []).append(float(line["value"]))
    return {key: np.array(values) for key, values in found.items()}


# What leaves --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A run, its sites, and every message of it."""

    result: Result
    sites: SitesFile
    sent: list[Sent]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    sites = ruled(folder)
    let_test(folder / "B", range(9, 12))
    recorder: list[Recorder] = []

    def recording(find: Any) -> Recorder:
        recorder.append(Recorder(LocalEngine(find)))
        return recorder[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wardround.engines.local.LocalEngine", recording)
        result = run(
            cohort_study(), sites, folder / "out", compare=("local", "pooled"), engine="local", allow_code=True
        )
    return Whole(result, sites, recorder[0].sent)


def test_the_bytes_of_an_evaluation_hold_n_value_and_standard_errors_alone(whole: Whole, tmp_path: Path) -> None:
    """Replicate sums once were as many equations as there are patients, and more: they gave all values away."""
    rig, out = Rig(cohort_study(), tmp_path), whole.result.out
    layout, specs = rig.arm_spec.evaluation_layout, rig.host.task.metrics
    # A contributor, n, and a value and two standard errors of each metric.
    assert len(layout.entries) - 2 == 3 * len(METRICS)
    hashes = study_sha256(rig.study), plan_sha256(rig.study)
    arms = {arm.identity(*hashes): arm.name for arm in arms_of(rig.study, ("local", "pooled"))}
    asked = {s.message.id: s.message.header for s in whole.sent if s.message.header.kind == EVALUATE}
    told = [s for s in whole.sent if s.message.header.reply_to in asked]
    told = [s for s in told if asked[s.message.header.reply_to].meta["split"] == "test"]
    # Federated, pooled and three local models at three sites.
    assert len(told) == 15
    for one in told:
        request, site = asked[one.message.header.reply_to], one.message.header.site
        assert len(one.body) == layout.nbytes
        total = ExactSum(layout.segments)
        total.add(one.body, 0)
        results = results_in(Aggregate(layout, total, {}), specs)
        row, table = arms[request.study], table_of(out, site)
        for name in METRICS:
            values, result = table[(row, name)], results[name]
            assert (result.mean.count, result.mean.value) == (len(values), pytest.approx(values.mean(), abs=STEP))
            assert result.mean.error == pytest.approx(stats.sem(values), abs=STEP)
            difference = table[("federated", name)] - values
            assert result.paired == (None if row == "federated" else pytest.approx(stats.sem(difference), abs=STEP))
        # Whatever the order or the scale: no entry is a patient's value.
        entries = [v for r in results.values() for v in (r.mean.value, r.mean.error, r.paired) if v]
        assert not any(math.isclose(e, v, abs_tol=STEP) for e in entries for v in np.concatenate([*table.values()]))


def test_every_number_of_a_result_follows_from_the_patients(whole: Whole) -> None:
    values = whole.result
    gains: dict[str, list[Mean]] = {"pooled": [], "local": []}
    for site in "ABC":
        table = table_of(whole.result.out, site)
        assert {row for row, _ in table} == {"federated", "pooled", "local/A", "local/B", "local/C"}
        for arm, row in (("federated", "federated"), ("local", f"local/{site}")):
            told, patients = values.metrics[arm][site]["mse"], table[(row, "mse")]
            assert told.value == pytest.approx(patients.mean(), abs=STEP)
            assert told.n == len(patients) == (3 if site == "B" else 7)
            if site == "B":
                assert told.se is told.ci_low is told.ci_high is None
            else:
                ends = stats.t.interval(0.95, 6, patients.mean(), stats.sem(patients))
                assert [told.ci_low, told.ci_high] == pytest.approx(ends, abs=1e-5)
        for row in gains:
            other = table[("pooled" if row == "pooled" else f"local/{site}", "mse")]
            difference = other - table[("federated", "mse")]
            told = values.gains["federated"][row][site]["mse"]
            assert told.value == pytest.approx(difference.mean(), abs=2 * STEP)
            assert told.se == (None if site == "B" else pytest.approx(stats.sem(difference), abs=2 * STEP))
            gains[row].append(mean_of(difference))
    for row, means in gains.items():
        told = values.gains["federated"][row]["mean"]["mse"]
        squares = [mean.error**2 for mean in means if mean.error is not None]
        assert told.se == pytest.approx(math.sqrt(sum(squares)) / 3, abs=2 * STEP)
        assert told.ci_low < told.value < told.ci_high
    assert evaluate(whole.result.out, whole.sites, engine="local", allow_code=True).gains == values.gains


def test_one_patient_gives_a_value_and_no_interval(tmp_path: Path) -> None:
    sites = ruled(tmp_path)
    for site in "ABC":
        let_test(tmp_path / site, [9])
    values = run(cohort_study(), sites, tmp_path / "out", compare=("local",), engine="local", allow_code=True)
    for table in (*values.metrics.values(), values.gains["federated"]["local"]):
        for entry in table.values():
            assert entry["mse"].value is not None
            assert entry["mse"].se is entry["mse"].ci_low is entry["mse"].ci_high is None


def test_replicates_are_refused_with_the_reason() -> None:
    with pytest.raises(StudyError, match="gave away every test patient"):
        load_study({"name": "old", "sites": {"A": {}}, "task": {"evaluation": {"bootstrap": 200}}})


# What a coordinator may ask -----------------------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(cohort_study(), tmp_path)
    rig.train()
    return rig


def ask(rig: Rig, split: str = "test", layout: Any = None, **meta: Any) -> Message:
    found = layout or (rig.arm_spec.metrics_layout if split == "validation" else rig.arm_spec.evaluation_layout)
    call = rig.coordinator._call(EVALUATE, rig.journal.state(2), meta.pop("number", 2), {"split": split, **meta}, found)
    return rig.sites["A"].handle(call.message("A"))


def reason(reply: Message) -> str:
    assert reply.header.kind == ERROR
    return str(reply.header.meta["reason"])


def test_rows_are_compared_with_one_row_alone(rig: Rig, tmp_path: Path) -> None:
    assert "no row federated to compare with" in reason(ask(rig, against="federated"))
    assert ask(rig).header.kind == UPDATE
    assert ask(rig, against="federated").header.kind == UPDATE
    assert "compares rows with federated alone" in reason(ask(rig, against="local/B"))
    rig.sites["A"]._evaluators = evaluators_of(tmp_path, tmp_path / "pictures.npz")
    for name in ("tv", "federated"):
        assert "a baseline that the study does not have" in reason(ask(rig, evaluator="baseline", baseline=name))


def test_a_model_is_tested_in_one_way(rig: Rig) -> None:
    """With and without its private part, or with that of another round, one file would be many models."""
    assert ask(rig).header.kind == UPDATE
    assert ask(rig, again="once more").header.kind == UPDATE
    for other in ({"unseen_site": True}, {"number": 1}):
        assert "test sums of one model of an arm" in reason(ask(rig, **other))


def test_validation_is_pooled_and_tests_are_not(rig: Rig) -> None:
    own, pooled = rig.arm_spec.evaluation_layout, rig.arm_spec.metrics_layout
    for split, layout in (("validation", own), ("test", pooled)):
        assert "gives sums of validation patients" in reason(ask(rig, split, layout))
    assert ask(rig, "validation").header.kind == UPDATE


def across_hospitals(rig: Rig, folder: Path, rows: PatientRows | None = None) -> Site:
    rules = replace(rules_of(rig.host, ARM), egress=EgressRules(floor=ACROSS_HOSPITALS))
    store, sets = SiteStore(folder / "store"), MeasuredSets(folder / "history")
    return Site("A", rules, lambda: rig.learner("A"), store, rows=rows, sets=sets)


def test_an_agent_gives_nothing_of_a_handful_of_patients(tmp_path: Path) -> None:
    rig = Rig(cohort_study(), tmp_path)
    rig.train()
    few = Rig(cohort_study(), tmp_path / "few", task=CohortTask())
    let_test(tmp_path / "few" / "data" / "A", range(9, 13))
    few.train()
    for built, kind in ((rig, UPDATE), (few, ERROR)):
        folder = tmp_path / kind
        built.sites["A"] = across_hospitals(built, folder)
        reply = ask(built)
        assert reply.header.kind == kind
        assert (folder / "history" / SETS).exists() == (kind == UPDATE)
    assert "fewer than 5 patients" in reason(reply)


def test_standard_errors_that_leave_a_hospital_have_two_digits() -> None:
    """All digits of PSNR and RMSE of one slice a patient, over six rows, come within 0.02 dB of 5 patients' values."""
    values = {"psnr": np.random.default_rng(0).normal(38.0, 1.5, 7)}
    other = {"psnr": values["psnr"] + np.random.default_rng(1).normal(0.5, 0.2, 7)}
    specs, root = RECONSTRUCTION_METRICS[:1], bytes(32)
    here = results_of("A", specs, values, other, least=1, root=root)["psnr"]
    there = results_of("A", specs, values, other, least=5, root=root)["psnr"]
    assert there.mean.value == here.mean.value
    assert here.mean.error is not None
    assert here.paired is not None
    assert (there.mean.error, there.paired) == (two_digits(here.mean.error), two_digits(here.paired))
    four = {"psnr": other["psnr"][:4]}
    few = results_of("A", specs, {"psnr": values["psnr"][:4]}, four, least=2, root=root)["psnr"]
    assert (few.mean.error, few.paired) == (None, None)
    with pytest.raises(DataError, match="on other patients"):
        results_of("A", specs, values, four, least=1, root=root)


def rotated(values: np.ndarray, seed: int) -> np.ndarray:
    """Other values of the patients (rows, n): a rotation of patients that leaves their sum where it is."""
    count = values.shape[1]
    frame = np.random.default_rng(0).standard_normal((count, count))
    frame[:, 0] = 1.0
    basis = np.linalg.qr(frame)[0]
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((count - 1, count - 1)))[0]
    inner = basis[:, 1:]
    return values.mean(1, keepdims=True) + (values - values.mean(1, keepdims=True)) @ inner @ turn @ inner.T


@pytest.mark.parametrize("count", [5, 11])
def test_other_patients_give_the_very_same_answers(count: int) -> None:
    """Means and second moments of as many rows as one likes: patients' values can be turned into others."""
    rows = np.random.default_rng(2).normal(30.0, 2.0, (10, count))
    others = rotated(rows, seed=3)
    assert np.abs(np.sort(others) - np.sort(rows)).max() > 0.1
    for ours, theirs in zip(rows, others, strict=True):
        for a, b in ((ours, theirs), (ours - rows[0], theirs - others[0])):
            assert mean_of(a).value == pytest.approx(mean_of(b).value, abs=1e-9)
            assert mean_of(a).error == pytest.approx(mean_of(b).error, abs=1e-9)


# What a site keeps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, b"k" * 32])
def test_rows_survive_a_restart(tmp_path: Path, key: bytes | None) -> None:
    values = {"mse": np.array([0.1, 0.25, 1 / 3])}
    PatientRows(tmp_path, StoreCipher.of(key)).keep("local/A", values, ())
    again = PatientRows(tmp_path, StoreCipher.of(key)).of("local/A")
    assert again is not None
    assert np.array_equal(again["mse"], values["mse"])
    assert PatientRows(tmp_path, StoreCipher.of(key)).of("federated") is None
    assert (b"0.25" in b"".join(p.read_bytes() for p in tmp_path.iterdir())) == (key is None)


def test_a_restarted_site_still_compares(rig: Rig, tmp_path: Path) -> None:
    rig.sites["A"] = across_hospitals(rig, tmp_path / "new", PatientRows(tmp_path / "rows"))
    assert ask(rig).header.kind == UPDATE
    rig.sites["A"].close()
    rig.sites["A"] = across_hospitals(rig, tmp_path / "new", PatientRows(tmp_path / "rows"))
    assert ask(rig, against="federated").header.kind == UPDATE


@pytest.mark.parametrize("egress", [{"per_site_results": False}, {"minimum_cohort": 2}])
def test_no_table_of_patients_where_single_ones_stay(tmp_path: Path, egress: dict[str, Any]) -> None:
    out = run(cohort_study(), ruled(tmp_path, **egress), tmp_path / "out", engine="local", allow_code=True).out
    assert not list(out.glob("sites/*/patients.csv"))


def test_names_of_patients_are_in_the_sites_own_folder_alone(whole: Whole) -> None:
    out = whole.result.out
    assert "Doe-9" in (out / "sites" / "A" / "patients.csv").read_text()
    for name in ("report.html", "model_card.md", "result.json", "rounds.jsonl"):
        assert "Doe-" not in (out / name).read_text(encoding="utf-8")
    assert not any(b"Doe-" in one.data for one in whole.sent)


# Which patients it measured -----------------------------------------------------------------------------------------


def joined(sets: MeasuredSets, patients: Sequence[int], least: int = 5) -> str | None:
    return sets.join("test", [f"Doe-{n}" for n in patients], "print", least)


def test_patients_join_and_leave_a_measured_set_in_groups(tmp_path: Path) -> None:
    sets = MeasuredSets(tmp_path)
    first = list(range(10))
    assert joined(sets, first) is None
    for other in ([*first, 10], first[:-1], [*first[:-1], 10], [*first, *range(20, 24)]):
        assert "differ from those it measured before by fewer than 5" in str(joined(MeasuredSets(tmp_path), other))
    assert joined(sets, [*first, *range(20, 25)]) is None
    assert joined(sets, range(20, 25)) is None
    assert joined(sets, first[::-1]) is None
    # Now a set of any other size is a difference of two.
    assert joined(sets, [*first, *range(20, 26)]) is not None
    assert len((tmp_path / SETS).read_text().splitlines()) == 3
    assert sets.join("validation", ["Doe-1"] * 1, "print", 1) is None


def test_sets_that_add_up_to_a_patient_are_refused(tmp_path: Path) -> None:
    """Every pair differs by 5 patients and more, and still a sum of four of them is one patient."""
    one, two, three = range(1, 6), range(6, 11), range(11, 16)
    asked = [[0, *one], [*one, *two], [*two, *three], list(three)]
    names = [frozenset(map(str, a)) for a in asked]
    assert all(len(a ^ b) >= 5 for a in names for b in names if a != b)
    assert fewest_told(names, 5) == 1
    sets = MeasuredSets(tmp_path)
    assert [joined(sets, a) is None for a in asked] == [True, True, True, False]


def test_overlaps_that_give_nobody_away_are_allowed() -> None:
    drawn = np.random.default_rng(0)
    sets = [frozenset(map(str, drawn.permutation(50)[:12])) for _ in range(3)]
    assert min(len(a & b) for a in sets for b in sets) < 5
    assert fewest_told(sets, 5) >= 5


@pytest.mark.parametrize("seed", range(5))
def test_the_fewest_patients_are_those_of_all_weighted_sums(seed: int) -> None:
    """Against every subset of patients: it is told where the sets' rows without it have a smaller rank."""
    drawn = np.random.default_rng(seed)
    rows = (drawn.random((9, 3)) < 0.5).astype(float)
    rows = rows[rows.any(axis=1)]
    rank = np.linalg.matrix_rank(rows)
    fewest = min(
        bin(chosen).count("1")
        for chosen in range(1, 1 << len(rows))
        if np.linalg.matrix_rank(rows[[not chosen >> i & 1 for i in range(len(rows))]]) < rank
    )
    sets = [frozenset(str(i) for i in range(len(rows)) if rows[i, j]) for j in range(3)]
    assert fewest_told([s for s in sets if s], 100) == fewest


def test_a_record_of_many_studies_errs_on_the_safe_side() -> None:
    drawn = np.random.default_rng(0)
    sets = [frozenset(map(str, drawn.permutation(200)[:60])) for _ in range(9)]
    assert fewest_told(sets, 5) == 1


def test_the_record_names_no_patient_and_is_not_begun_anew(tmp_path: Path) -> None:
    sets = MeasuredSets(tmp_path)
    joined(sets, range(10))
    assert "Doe" not in (tmp_path / SETS).read_text()
    assert (tmp_path / KEY).stat().st_mode & 0o077 == 0
    # A line that a crash cut off had no results: it goes.
    with (tmp_path / SETS).open("ab") as file:
        file.write(b'{"split": "te')
    assert joined(sets, [*range(10), 10]) is not None
    assert joined(sets, range(10)) is None
    secret = (tmp_path / KEY).read_text()
    (tmp_path / KEY).unlink()
    with pytest.raises(DataError, match="key of the site's history is gone"):
        joined(sets, range(10))
    (tmp_path / KEY).write_text(secret)
    (tmp_path / SETS).write_text("nonsense\n")
    with pytest.raises(DataError, match="damaged"):
        joined(sets, range(10))


def test_data_without_names_are_measured_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    sets = MeasuredSets(tmp_path)
    assert sets.join("test", None, "print", 5) is None
    assert sets.join("test", None, "print", 5) is None
    assert "cannot be told" in str(sets.join("test", None, "another", 5))
    assert "cannot be told" in str(joined(sets, range(10)))


@pytest.mark.parametrize("named", [True, False])
def test_a_later_study_with_one_patient_more_gets_no_results(tmp_path: Path, named: bool) -> None:
    sites = ruled(tmp_path, minimum_cohort=5)
    sites = SitesFile(
        sites={n: e.model_copy(update={"history": tmp_path / "kept" / n}) for n, e in sites.sites.items()}
    )
    study = cohort_study(options={"named": named})

    def go(name: str, **changes: Any) -> Result:
        return run(study.model_copy(update=changes), sites, tmp_path / name, engine="local", allow_code=True)

    assert go("first").withheld == {}
    let_test(tmp_path / "B", range(9, 17))
    if not named:
        (tmp_path / "B" / "changed").touch()
    second = go("second", seed=4)
    assert second.withheld.keys() == {"B"}
    assert second.metrics["federated"]["A"] is not None
    assert ("fewer than 5" if named else "cannot be told") in second.withheld["B"]
    assert "Doe" not in second.model_dump_json()
