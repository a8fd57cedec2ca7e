"""A study that trains nothing measures a given model: the same numbers, messages and files, and nothing else leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.apart import apart, comparable
from tests.applied import reconstruct
from tests.diagnoses import diagnosis_study, make_diagnoses
from tests.examples import quickly
from tests.federation.rig import assert_billed, recorded_sessions
from tests.mri_hospitals import head, make_hospitals, save, write_study
from tests.outlines import make_outlines, outline_study
from tests.toys import Points, Regression, toy_sites, toy_study
from wardround.cli import app
from wardround.errors import Interrupted, StudyError
from wardround.federation.exchange import ERROR, EVALUATE, TRAIN, UPDATE, Call
from wardround.federation.facts import DELIVER, FACTS
from wardround.federation.grouped import GROUPS
from wardround.federation.measuring import RELEASED
from wardround.federation.release import as_tensor_file, model_path
from wardround.plan.weights import file_sha256, load_model
from wardround.results.files import read_result
from wardround.results.schema import Result
from wardround.results.tables import numbers_of
from wardround.runs import conduct
from wardround.runs.explain import explain
from wardround.runs.inspection import inspect_model, inspect_run
from wardround.runs.machine import Machine
from wardround.runs.outlook import outlook
from wardround.runs.session import evaluate, run
from wardround.study.groups import Column, Groups
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import Egress, SitesFile
from wardround.tasks.temperature import kept_calibration
from wardround.wire.message import FileBody, Header, Message

ROLES: dict[str, Any] = {"A": {}, "B": {}, "C": {"role": "evaluate"}, "D": {"role": "unseen"}}
NONE = {"rounds": 0}
Makes = Callable[..., Study]


def go(study: Study, sites: SitesFile, out: Path, **how: Any) -> Result:
    """A run on one machine whose start lies beside its folder."""
    return run(study, sites, out, engine=how.pop("engine", "local"), near=out.parent, quiet=True, **how)


def of_release(result: Result) -> dict[str, Any]:
    return {"kind": "release", "file": result.out.name, "sha256": result.model_sha256}


def of_file(result: Result) -> dict[str, Any]:
    """The released model of a run as a bare weights file, as anybody publishes one."""
    path = result.out.parent / "published.safetensors"
    tensors = load_model(model_path(result.out, "federated"))[0]
    save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {"kind": "weights", "file": path.name, "sha256": file_sha256(path)}


def toys(folder: Path, roles: dict[str, Any] = ROLES) -> tuple[Makes, SitesFile]:
    return lambda **changes: toy_study(roles, **changes), toy_sites(folder / "data", tuple(roles))


def trained(folder: Path, **changes: Any) -> tuple[Makes, SitesFile, Result]:
    """A toy study, and a run of two rounds of it."""
    make, sites = toys(folder)
    return make, sites, go(make(schedule={"rounds": 2}, **changes), sites, folder / "first")


# The law: the numbers are those that the run of the model states ------------------------------------------------------


def outlines(folder: Path) -> tuple[Makes, SitesFile]:
    sites = make_outlines(folder / "data", dict.fromkeys(ROLES, 6))
    return lambda **changes: outline_study(ROLES, **changes), sites


def diagnoses(folder: Path) -> tuple[Makes, SitesFile]:
    sites = make_diagnoses(folder / "data", dict.fromkeys(ROLES, (5, 5, 5)))
    return lambda **changes: diagnosis_study(ROLES, **changes), sites


def scans(folder: Path) -> tuple[Makes, SitesFile]:
    data = make_hospitals(folder / "data")
    study, sites = write_study(folder, data)
    text = yaml.safe_load(study.read_text())
    return lambda **changes: Study.model_validate({**text, **changes}), load(sites)


def load(path: Path) -> SitesFile:
    from wardround.study.sites import load_sites

    return load_sites(path)


@pytest.mark.parametrize(
    ("made", "start"),
    quickly([(m, s) for m in (toys, scans, diagnoses, outlines) for s in (of_release, of_file)], 0, 3),
)
def test_the_numbers_are_those_of_the_run_that_made_the_model(
    tmp_path: Path, made: Callable[[Path], tuple[Makes, SitesFile]], start: Callable[[Result], dict[str, Any]]
) -> None:
    make, sites = made(tmp_path)
    first = go(make(schedule={"rounds": 1}), sites, tmp_path / "first")
    found = go(make(schedule=NONE, start=start(first)), sites, tmp_path / "measured")
    for row, table in first.metrics.items():
        for site in found.patients:
            assert found.metrics[row][site] == table[site]
    trains = {site for site in first.patients if site in first.participants}
    gains = first.gains["federated"]
    assert {row: {s: table[s] for s in trains & table.keys()} for row, table in found.gains["federated"].items()} == {
        row: {s: table[s] for s in trains & table.keys()} for row, table in gains.items()
    }
    if trains == first.patients.keys():
        assert found.metrics == first.metrics
    assert found.model_sha256 == first.model_sha256
    assert (found.rounds, found.participants, found.steps, found.selected_round) == (
        0,
        (),
        {"federated": 0},
        {"federated": 0},
    )
    assert (found.out / "rounds.jsonl").read_text() == ""
    assert found.patients == first.patients


def test_the_mean_is_over_all_sites_with_patients_of_their_own(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    found = go(make(schedule=NONE, start=of_release(first)), sites, tmp_path / "measured")
    row = found.metrics["federated"]
    values = [cell["mse"].value for site in ROLES if (cell := row[site]) and cell["mse"]]
    assert found.metric("federated", "mean", "mse") == pytest.approx(np.mean(values), abs=1e-6)
    assert first.metric("federated", "mean", "mse") == pytest.approx(np.mean(values[:2]), abs=1e-6)


@pytest.mark.parametrize("role", ["evaluate", "unseen", "train"])
def test_all_sites_may_have_one_role(tmp_path: Path, role: str) -> None:
    _, sites, first = trained(tmp_path)
    roles = {site: {"role": role} for site in ROLES}
    found = go(toy_study(roles, schedule=NONE, start=of_release(first)), sites, tmp_path / "measured")
    assert [found.metrics["federated"][site] for site in ROLES] == [first.metrics["federated"][s] for s in ROLES]
    assert found.metric("federated", "mean")


@pytest.mark.slow
@pytest.mark.parametrize("made", [toys, scans, outlines, diagnoses])
@pytest.mark.parametrize("start", [of_release, of_file])
def test_every_engine_comes_to_the_same_result(
    tmp_path: Path, made: Callable[[Path], tuple[Makes, SitesFile]], start: Callable[[Result], dict[str, Any]]
) -> None:
    make, sites = made(tmp_path)
    first = go(make(schedule={"rounds": 1}), sites, tmp_path / "first")
    given = start(first)
    study, place = make(schedule=NONE, start=given), tmp_path / given["file"]
    there = sites.model_copy(
        update={"sites": {name: entry.model_copy(update={"start": place}) for name, entry in sites.sites.items()}}
    )
    there = there.with_code() if sites.allows_code else there
    local = go(study, sites, tmp_path / "local")
    workers = go(study, sites, tmp_path / "workers", engine="workers", processes=2)
    parted = apart(study, there, tmp_path / "apart", near=tmp_path)
    assert comparable(workers.values) == comparable(parted.values) == comparable(local.values)


def test_frozen_values_are_part_of_the_model_that_is_measured(tmp_path: Path) -> None:
    parts = {"parts": {"frozen": ["0.*"]}}
    make, sites, first = trained(tmp_path, **parts)
    found = go(make(schedule=NONE, start=of_release(first), **parts), sites, tmp_path / "measured")
    assert (found.model_sha256, found.frozen_sha256) == (first.model_sha256, first.frozen_sha256)
    # Without the same parts the identity covers the same values another way, and the numbers are the same.
    whole = go(make(schedule=NONE, start=of_release(first)), sites, tmp_path / "whole")
    assert whole.start.sha256 == first.model_sha256 != whole.model_sha256
    assert numbers_of(whole) == numbers_of(found)


@pytest.mark.slow
def test_a_site_of_role_evaluate_chooses_thresholds_on_its_validation_patients(tmp_path: Path) -> None:
    """As a site that trained does; a site of role unseen labels no patient for the model."""
    sites = make_diagnoses(tmp_path / "data", {"A": (14, 14, 14), "C": (14, 14, 14), "D": (14, 14, 14)})
    roles = {"A": {}, "C": {"role": "evaluate"}, "D": {"role": "unseen"}}
    changes: dict[str, Any] = {"task": {"split": {"validation": 0.4, "test": 0.4}}}
    first = go(diagnosis_study(roles, schedule={"rounds": 1}, **changes), sites, tmp_path / "first")
    study = diagnosis_study(roles, schedule=NONE, start=of_release(first), **changes)
    found = go(study, sites, tmp_path / "measured")
    kept = {site: kept_calibration(found.out / "models" / site / "federated") for site in roles}
    assert kept["A"] == kept_calibration(first.out / "models" / "A" / "federated") is not None
    assert kept["C"] is not None
    assert kept["D"] is None
    assert first.estimate("federated", "C", "ece_scaled") is None
    assert found.estimate("federated", "C", "ece_scaled") is not None
    assert found.estimate("federated", "A", "ece_scaled") == first.estimate("federated", "A", "ece_scaled")
    again = evaluate(found.out, sites, engine="local", quiet=True)
    assert numbers_of(again) == numbers_of(found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ""),
        ({"seed": 4}, "trained at A, B, and"),
        ({"B": {"role": "evaluate"}}, "trained at B, and"),
    ],
)
def test_patients_who_may_have_trained_the_model_are_pointed_out(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """A release says which study made it; a site that deals its patients out otherwise may test on those."""
    _, sites, first = trained(tmp_path)
    roles = {site: changes.get(site, role) for site, role in ROLES.items()}
    study = toy_study(roles, schedule=NONE, start=of_release(first), seed=changes.get("seed", 3))
    found = go(study, sites, tmp_path / "measured")
    assert any(named in note for note in found.notes) if named else not found.notes
    assert ("which flatters the numbers" in (found.out / "report.html").read_text()) == bool(named)


# What leaves a site ---------------------------------------------------------------------------------------------------


def test_nothing_leaves_but_what_a_test_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers to the same questions as after training, none of them with an update or a validation."""
    sent = recorded_sessions(monkeypatch)
    make, sites, first = trained(tmp_path)
    trained_answers = [s for s in sent if s.message.header.reply_to]
    sent.clear()
    study = make(schedule=NONE, start=of_release(first))
    found = go(study, sites, tmp_path / "measured")
    asked = [s.message.header for s in sent if not s.message.header.reply_to]
    answers = [s for s in sent if s.message.header.reply_to]
    assert {header.kind for header in asked} == {FACTS, EVALUATE, GROUPS, DELIVER}
    assert {h.meta["split"] for h in asked if h.kind == EVALUATE} == {"test"}
    assert [h.kind for h in asked].count(EVALUATE) == len(ROLES)
    # An answer has the keys, and of the test the very size, that it has in the study that trained.
    before = {
        (s.message.header.kind, s.message.header.site): s for s in trained_answers if s.message.header.body_nbytes
    }
    for each in answers:
        header = each.message.header
        alike = [s.message.header for s in trained_answers if s.message.header.kind == header.kind]
        assert any(header.meta.keys() == other.meta.keys() for other in alike)
        if header.kind == UPDATE:
            assert len(each.body) == len(before[UPDATE, header.site].body)
    assert_billed(found, sent)


def test_a_site_measures_the_given_model_and_no_other(tmp_path: Path) -> None:
    """Whatever the coordinator asks: no training, no sums over validation patients, and no model of its own choice."""
    make, sites, first = trained(tmp_path)
    study = make(schedule=NONE, start=of_release(first))
    machine = Machine(study, sites, tmp_path / "out", (), places=study.places(tmp_path))
    spec = machine.arm_spec("federated")
    whole = load_model(model_path(first.out, "federated"))[0]

    def reply(site: str, tensors: dict[str, Any], meta: dict[str, Any], layout: Any, kind: str = EVALUATE) -> Message:
        body = as_tensor_file(tensors, tmp_path / "asked")
        call = Call(
            kind=kind,
            study=spec.identity,
            round=0,
            sites=(site,),
            layout=layout,
            scales={},
            meta=meta,
            tensors=body[0].table,
            body=FileBody(body[0].path, body[0].nbytes),
            body_sha256=body[1],
        )
        message = call.message(site)
        return machine.find(message.header).handle(message)

    test = {"evaluator": RELEASED, "split": "test", "unseen_site": False, "picture": None}
    changed = {**whole, "2.bias": whole["2.bias"] + 1.0}
    for site in ROLES:
        refused = reply(site, changed, test, spec.evaluation_layout)
        assert refused.header.kind == ERROR
        assert "another model than the one that the study starts from" in refused.header.meta["reason"]
        for meta in ({"split": "validation"}, {**test, "split": "validation"}):
            assert reply(site, whole, meta, spec.metrics_layout).header.kind == ERROR
        trains = machine.find(Header(TRAIN, spec.identity, site, 1)).handle(
            Message(Header(TRAIN, spec.identity, site, 1))
        )
        assert "it only tests the model" in trains.header.meta["reason"]
        assert reply(site, whole, test, spec.evaluation_layout).header.kind == UPDATE
    machine.close()


def test_egress_rules_hold_as_ever(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    silent = sites.sites["A"].model_copy(update={"egress": Egress(per_site_results=False)})
    quiet = sites.model_copy(update={"sites": {**sites.sites, "A": silent}}).with_code()
    found = go(make(schedule=NONE, start=of_release(first)), quiet, tmp_path / "measured")
    assert found.metrics["federated"]["A"] is None
    # A mean over some sites would look like one over all.
    assert found.metrics["federated"]["mean"] is None
    assert "per_site_results" in found.withheld["A"]
    said = (found.out / "model_card.md").read_text()
    assert "at 3 of 4 hospitals" in said


class FewTests(Regression):
    """Site B has no test patients."""

    def dataset(self, site: str, source: Any) -> Points:
        points = super().dataset(site, source)
        return replace(points, splits={**points.splits, "test": []}) if site == "B" else points


def few_tests(**options: Any) -> FewTests:
    return FewTests(**options)


def test_a_site_without_test_patients_is_left_out_with_its_reason(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    task = {"kind": "custom", "factory": "tests.runs.test_evaluation_only:few_tests"}
    found = go(make(task=task, schedule=NONE, start=of_release(first)), sites, tmp_path / "measured")
    assert found.metrics["federated"]["B"] is None
    assert "minimum_cohort" in found.withheld["B"]
    assert found.metrics["federated"]["A"] == first.metrics["federated"]["A"]
    assert "withheld by the site" in (found.out / "report.html").read_text()


@pytest.mark.slow
def test_results_by_group_come_as_ever(tmp_path: Path) -> None:
    make, sites = outlines(tmp_path)
    first = go(make(schedule={"rounds": 1}), sites, tmp_path / "first")
    table = tmp_path / "clinic.csv"
    table.write_text("patient,sex\n" + "".join(f"DOE-{n:02d},{'FM'[n % 2]}\n" for n in range(6)))
    groups = Groups(file=table, columns={"sex": Column(values={"female": ("F",), "male": ("M",)})})
    entry = sites.sites["D"].model_copy(update={"groups": groups, "egress": Egress(minimum_cohort=1)})
    declared = sites.model_copy(update={"sites": {**sites.sites, "D": entry}})
    found = go(make(schedule=NONE, start=of_release(first)), declared, tmp_path / "measured")
    assert {(g.column, g.group) for g in found.groups} == {("sex", "female"), ("sex", "male")}
    assert "By sex" in (found.out / "report.html").read_text()


# Again, and after a crash ---------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, sites, first = trained(tmp_path)
    study = make(schedule=NONE, start=of_release(first))
    whole = go(study, sites, tmp_path / "whole")
    for name in ("_release", "measured", "_conclude"):
        with monkeypatch.context() as patch:

            def stops(*_: Any, **__: Any) -> Any:
                raise Interrupted("power cut")

            patch.setattr(conduct, name, stops)
            with pytest.raises(Interrupted):
                go(study, sites, tmp_path / "cut")
    again = go(study, sites, tmp_path / "cut", resume=True)
    assert comparable(again.values) == comparable(whole.values)
    assert comparable(go(study, sites, tmp_path / "cut").values) == comparable(whole.values)
    assert evaluate(again.out, sites, engine="local", quiet=True, allow_code=True).metrics == again.metrics


def test_it_goes_on_without_a_site_whose_data_changed(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    study = make(schedule=NONE, start=of_release(first))
    go(study, sites, tmp_path / "out")
    (tmp_path / "data" / "A" / "changed").touch()
    found = go(study, sites, tmp_path / "out", without=["A"])
    assert "went on without it" in found.failed["A"]
    assert found.metric("federated", "mean")


# What people read -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_say_that_nothing_was_trained_and_what_was_measured(tmp_path: Path) -> None:
    data = make_hospitals(tmp_path / "data")
    study, sites = write_study(tmp_path, data)
    first = run(study, sites, tmp_path / "first", engine="local", quiet=True)
    study, sites = write_study(tmp_path, data, start=of_release(first), schedule=NONE)

    def said(*command: object) -> str:
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    named = f"the released model {first.model_sha256}"
    check = said("check", study, "--sites", sites)
    assert "nothing is trained: schedule.rounds is 0" in check
    assert named in check
    assert "every round" not in check
    assert "Training" not in check
    assert "Nothing is trained" in said("plan", study, "--sites", sites)
    assert "Nothing is trained" in outlook(study, None, (), (), ()).text
    assert "Alpha measured" in " ".join(explain(study, None, (), ()).split())
    out = tmp_path / "measured"
    ran = said("run", study, "--sites", sites, "--out", out, "--engine", "local")
    assert "training:" not in ran
    assert f"Nothing was trained. Measured: {named}" in ran
    assert "Given model" in ran
    assert "Mean of sites" in ran
    again = said("evaluate", out, "--sites", sites, "--engine", "local", "--quiet")
    assert "numbers agree with result.json" in again
    assert "Given model" in again
    card, page = (out / "model_card.md").read_text(), (out / "report.html").read_text()
    assert "Nothing was trained in this study" in card
    assert f"Measured: {named}" in card
    assert "Measured at: Alpha, Beta" in card
    assert "Sites that trained" not in card
    assert "Nothing was trained: the given model reached" in page
    assert "Does the given model work here?" in page
    assert first.model_sha256 in page
    for absent in ("Learning curves", "Who took part", "training together", "Mean of training sites", "shared model"):
        assert absent not in page, absent
    assert "nothing is trained" in " ".join(inspect_run(out).split())
    # The scanners are those that the model learned on, as its file said.
    assert "simulated scanner of Beta" in inspect_model(model_path(out, "federated"))
    assert read_result(out).scanners == {}


@pytest.mark.slow
def test_the_measured_model_is_applied_as_the_one_that_it_is(tmp_path: Path) -> None:
    data = make_hospitals(tmp_path / "data")
    study, sites = write_study(tmp_path, data)
    first = run(study, sites, tmp_path / "first", engine="local", quiet=True)
    image = tmp_path / "image.nii.gz"
    save(head(1, slices=1), image)
    reconstruct(model_path(first.out, "federated"), image, tmp_path / "first.nii.gz")
    for start in (of_release(first), of_file(first)):
        out = tmp_path / start["kind"]
        study, sites = write_study(tmp_path, data, start=start, schedule=NONE)
        run(study, sites, out, engine="local", quiet=True)
        reconstruct(model_path(out, "federated"), image, tmp_path / "again.nii.gz")
        assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "first.nii.gz").read_bytes()


# What means nothing ---------------------------------------------------------------------------------------------------

START = {"kind": "weights", "file": "w.safetensors", "sha256": "0" * 64}
TAUGHT = {
    "kind": "classification",
    "classes": ["a", "b"],
    "teacher": {"file": "w.safetensors", "sha256": "0" * 64},
}
LORA = {"kind": "lora", "targets": ["0", "2"], "rank": 2, "alpha": 1.0, "local_rank": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"start": {"kind": "fresh"}}, r"schedule.rounds: 0 measures a given model, and `start` names none; name it"),
        ({"protection": {"secure": True}}, "protection.secure: .* there is no sum to mask; .* leave it out"),
        (
            {"protection": {"privacy": {"patients_per_step": 2}}, "method": {"weights": "equal"}},
            "protection.privacy: .* no privacy is spent and no noise is added; .* leave it out",
        ),
        ({"protection": {"robust": {}}}, "protection.robust: .* no update to defend against; leave it out"),
        ({"protection": {"compression": {"kind": "top_k", "ratio": 0.1}}}, "protection.compression: .* leave it out"),
        ({"parts": {"local": ["0.*"]}}, "parts.local: .* no site has a part of its own; leave it out"),
        ({"adapters": LORA}, "adapters.local_rank: .* no site has adapters of its own; leave it out"),
        (
            {"task": {"kind": "reconstruction", "evaluation": {"leave_one_out": True}}},
            "task.evaluation.leave_one_out: .* no site can be left out of it; leave it out",
        ),
        ({"task": TAUGHT, "model": {"kind": "densenet"}}, "task.teacher: .* there is nothing to teach; leave it out"),
        (
            {"schedule": {"rounds": 0, "phases": [{"train": ["network"], "rounds": 2}]}},
            "schedule.phases: .* there are no phases; leave it out",
        ),
    ],
)
def test_what_a_study_that_trains_nothing_cannot_have_is_one_error(changes: dict[str, Any], reason: str) -> None:
    values = toy_study(ROLES).model_dump(exclude_unset=True, mode="json")
    with pytest.raises(StudyError, match=reason) as found:
        load_study({**values, "schedule": NONE, "start": START, **changes})
    assert "has 1 problem" in str(found.value)


def test_a_scanner_that_sees_the_patients_of_others_is_in_no_mean() -> None:
    given = {"schedule": NONE, "start": START}
    study = toy_study({"A": {"role": "unseen"}, "B": {}, "S": {"role": "unseen", "scans": ["A", "B"]}}, **given)
    assert (study.averaged_sites, study.training_sites, study.member_sites) == (("A", "B"), (), ("B",))
    with pytest.raises(ValueError, match=r"sites.S.scans: 'T' has no patients of its own"):
        toy_study({"A": {}, **{s: {"role": "unseen", "scans": [o]} for s, o in (("S", "T"), ("T", "A"))}}, **given)


def test_a_value_that_the_given_model_lacks_is_an_error_even_where_a_study_may_begin_it_fresh(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    path = tmp_path / "part.safetensors"
    tensors = load_model(model_path(first.out, "federated"))[0]
    save_file({name: np.array(t) for name, t in tensors.items() if name.startswith("0.")}, path)
    start = {"kind": "weights", "file": path.name, "sha256": file_sha256(path), "partial": True}
    with pytest.raises(StudyError, match=r"no values for 2\.(weight|bias), 2\.(weight|bias), and with"):
        go(make(schedule=NONE, start=start), sites, tmp_path / "measured")
    assert not (tmp_path / "measured" / "result.json").exists()


def test_a_method_that_keeps_a_part_at_each_site_is_an_error(tmp_path: Path) -> None:
    task = {"task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}}
    make, sites, first = trained(tmp_path, **task)
    study = make(schedule=NONE, start=of_release(first), method={"kind": "fedbn"}, **task)
    with pytest.raises(
        StudyError, match=r"method.kind=fedbn keeps 1.weight.* at the sites, and with schedule.rounds 0"
    ):
        go(study, sites, tmp_path / "measured")


def test_comparisons_are_refused_in_one_sentence(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    study = make(schedule=NONE, start=of_release(first))
    for arm in ("local", "pooled"):
        with pytest.raises(StudyError, match=f"--compare {arm}: with schedule.rounds 0 nothing is trained"):
            go(study, sites, tmp_path / "measured", compare=[arm])


def test_another_file_than_the_study_s_is_refused(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    start = {**of_file(first), "sha256": "1" * 64}
    with pytest.raises(StudyError, match="is another file than the study's, or it changed"):
        go(make(schedule=NONE, start=start), sites, tmp_path / "measured")


def test_an_empty_set_of_rounds_leaves_an_empty_file(tmp_path: Path) -> None:
    make, sites, first = trained(tmp_path)
    found = go(make(schedule=NONE, start=of_release(first)), sites, tmp_path / "measured")
    assert json.loads((found.out / "result.json").read_text())["participants"] == []
    assert found.traffic.bytes_up == found.traffic.bytes_down == 0
    assert found.privacy is None
