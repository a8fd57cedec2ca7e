"""`wardround update`: who trains, with whom, and what becomes of the release and of the new model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.living.ward import ROLES, admit, ward_sites, ward_study
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.federation.expected import expected
from wardround.living.chain import Chain
from wardround.living.release import Release
from wardround.living.update import PARENT_FILE, STUDY_FILE, prepare, update
from wardround.plan.weights import file_sha256
from wardround.results.schema import Result
from wardround.runs.machine import NOWHERE, Machine
from wardround.runs.session import evaluate, run
from wardround.site.lineage import Lineage
from wardround.study.hashes import study_sha256
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.study.start import Fresh

FEW = {"A": 12, "B": 12}
NEW = [f"A-ROE-{number}" for number in range(5)]


def first(tmp_path: Path, history: bool = True, **changes: Any) -> tuple[Result, SitesFile]:
    sites = ward_sites(tmp_path, FEW, history)
    return run(ward_study(**changes), sites, tmp_path / "one", engine="local", quiet=True), sites


@pytest.mark.parametrize("history", [True, False])
def test_only_sites_with_new_patients_train(tmp_path: Path, monkeypatch: Any, history: bool) -> None:
    """With a history folder of the site's own, and with the one in the run's folder, which goes on as a copy."""
    parent, sites = first(tmp_path, history)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()}
    admit(tmp_path / "A", NEW)
    monkeypatch.setitem(ROLES, "B", "evaluate")
    told: list[str] = []
    child = update(
        Release.at(tmp_path / "one"),
        ward_study(),
        sites,
        tmp_path / "two",
        engine="local",
        quiet=True,
        told=told.append,
    )
    assert told == [f"Continues release {parent.model_sha256[:12]}: A (2 new) train; B only measures"]
    study = load_study(tmp_path / "two" / "study.yaml")
    assert {name: site.role for name, site in study.sites.items()} == {"A": "train", "B": "evaluate"}
    assert study.continues == parent.model_sha256
    assert child.participants == ("A",)
    assert child.gate is not None
    assert child.gate.sites.keys() == {"A", "B"}
    # What was planned holds the test of the release before, whose request carries no model.
    planned = expected(Machine(study.model_copy(update={"start": Fresh()}), sites, NOWHERE, ()))
    assert child.traffic.arms["federated"].tests.up.metrics == 2 * planned.tests.up.metrics
    folder = tmp_path / "history-A" if history else tmp_path / "two/work/sites/A/history"
    known = Lineage(folder)
    assert known.ancestors(child.model_sha256) == (parent.model_sha256,)
    everyone = [f"A-DOE-{number:02d}" for number in range(12)]
    parts = known.parts(parent.model_sha256, everyone)
    assert known.parts(child.model_sha256, everyone) == parts, "no patient changes sides"
    # The old run's folder is as it was.
    assert {path: path.read_bytes() for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()} == before
    # Made again, it is the same run; and the numbers can be computed once more.
    again = update(Release.at(tmp_path / "one"), ward_study(), sites, tmp_path / "two", engine="local", quiet=True)
    assert again.model_sha256 == child.model_sha256
    assert evaluate(tmp_path / "two", sites, engine="local", quiet=True).gate == child.gate


def test_a_new_hospital_trains(tmp_path: Path) -> None:
    _, sites = first(tmp_path)
    more = ward_sites(tmp_path, {**FEW, "C": 12})
    prepared = prepare(Release.at(tmp_path / "one"), ward_study(("A", "B", "C")), tmp_path / "two", sites=more)
    assert prepared.study.training_sites == ("C",)
    assert prepared.new == {"A": 0, "B": 0, "C": 5}
    assert sites.sites.keys() == {"A", "B"}


def test_a_site_that_was_away_comes_back(tmp_path: Path, monkeypatch: Any) -> None:
    """It trained the first release and was not in the second: who trained tests in none, and its new patients train."""
    parent, sites = first(tmp_path)
    admit(tmp_path / "A", NEW)
    only = ward_study(("A",))
    second = update(Release.at(tmp_path / "one"), only, sites, tmp_path / "two", engine="local", quiet=True)
    release = Release.at(tmp_path / "two")
    assert release.ancestors == (parent.model_sha256,)
    admit(tmp_path / "B", [name.replace("A-", "B-") for name in NEW])
    away = Lineage(tmp_path / "history-B")
    assert not away.knows(second.model_sha256)
    everyone = [f"B-DOE-{number:02d}" for number in range(12)]
    before = away.parts(parent.model_sha256, everyone)
    third = prepare(release, ward_study(), tmp_path / "three", sites=sites)
    assert third.new == {"A": 0, "B": 2}
    assert third.study.update is not None
    assert third.study.update.ancestors == (parent.model_sha256,)
    monkeypatch.setitem(ROLES, "A", "evaluate")
    child = run(third.study, sites, tmp_path / "three", engine="local", quiet=True, near=tmp_path / "three")
    assert child.participants == ("B",)
    assert away.parts(child.model_sha256, everyone, (parent.model_sha256,)) == before
    assert Release.at(tmp_path / "three").ancestors == (second.model_sha256, parent.model_sha256)


def test_nothing_new_names_the_flag_and_more_rounds_train_all(tmp_path: Path) -> None:
    parent, sites = first(tmp_path)
    release = Release.at(tmp_path / "one")
    with pytest.raises(
        StudyError, match=r"no site has training patients that the release did not see.*--more-rounds N"
    ):
        update(release, ward_study(), sites, tmp_path / "two", engine="local", quiet=True)
    child = update(release, ward_study(), sites, tmp_path / "three", more_rounds=1, engine="local", quiet=True)
    assert (child.rounds, child.participants) == (1, ("A", "B"))
    assert child.start.sha256 == parent.model_sha256


@pytest.mark.slow
def test_fisher_information_is_measured_where_the_study_asks_for_it(tmp_path: Path) -> None:
    """By a run in the new study's folder, with the copy of the history that lies in the old one's."""
    _, sites = first(tmp_path, history=False)
    admit(tmp_path / "A", NEW)
    ward = ward_study()
    told = {**ward.model_dump(exclude_unset=True, mode="json"), "update": {"retain": {"kind": "ewc", "weight": 10.0}}}
    told |= {"sites": {"A": {}}, "protection": {"initial_scale": 100.0}}
    child = update(Release.at(tmp_path / "one"), told, sites, tmp_path / "two", engine="local", quiet=True)
    study = load_study(tmp_path / "two" / "study.yaml")
    assert study.update is not None
    assert getattr(study.update.retain, "fisher", None) is not None
    assert list((tmp_path / "two").glob("fisher-*.safetensors"))
    again = update(Release.at(tmp_path / "one"), told, sites, tmp_path / "two", engine="local", quiet=True)
    assert again.model_sha256 == child.model_sha256
    assert load_study(tmp_path / "two" / STUDY_FILE) == study


def test_under_masks_and_without_validation_others_only_test(tmp_path: Path) -> None:
    sites = ward_sites(tmp_path, {**FEW, "C": 12, "D": 12})
    names = ("A", "B", "C", "D")
    run(ward_study(names), sites, tmp_path / "one", engine="local", quiet=True)
    for site in "ABC":
        admit(tmp_path / site, [name.replace("A-", f"{site}-") for name in NEW])
    study = ward_study(names, protection={"secure": True})
    prepared = prepare(Release.at(tmp_path / "one"), study, tmp_path / "two", sites=sites)
    assert prepared.study.sites["D"].role == "unseen"


def test_a_study_for_hospitals_is_written_and_whole(tmp_path: Path) -> None:
    """Without data at hand people say who has new patients. The file and the release beside it are all that is needed,
    and the same study comes of it whoever writes it."""
    parent, sites = first(tmp_path)
    release = Release.at(tmp_path / "one" / "models" / "federated.safetensors")
    with pytest.raises(StudyError, match="say with --train which sites have some"):
        prepare(release, ward_study(), tmp_path / "zero")
    with pytest.raises(StudyError, match="--train Z: the study has no such site"):
        prepare(release, ward_study(), tmp_path / "zero", train=["Z"])
    one = prepare(release, ward_study(), tmp_path / "two", train=["A"])
    other = prepare(release, ward_study(), tmp_path / "elsewhere" / "three", train=["A"])
    assert study_sha256(one.study) == study_sha256(other.study)
    assert study_sha256(load_study(tmp_path / "two" / STUDY_FILE)) == study_sha256(one.study)
    assert Release.at(tmp_path / "two" / PARENT_FILE).sha256 == parent.model_sha256
    # A site that was delivered the release finds it in its own history, wherever the study's file lies.
    found = one.study.places(tmp_path / "nowhere", list(sites.sites.values())).start
    kept = [place for place in found if place.exists()]
    assert [place.parent.parent for place in kept] == [tmp_path / "history-A", tmp_path / "history-B"]
    assert {file_sha256(place) for place in kept} == {file_sha256(release.model)}


def other_task(study: Study) -> Study:
    return Study.model_validate({**study.model_dump(exclude_unset=True), "task": {"kind": "reconstruction"}})


def test_bad_releases_are_one_clear_error_each(tmp_path: Path) -> None:
    _, sites = first(tmp_path)
    release = Release.at(tmp_path / "one")
    out = tmp_path / "two"
    with pytest.raises(StudyError, match=r"of another task \(`custom`\) than the study \(`reconstruction`\)"):
        prepare(release, other_task(ward_study()), out, sites=sites)
    with pytest.raises(StudyError, match="the release does not exist"):
        Release.at(tmp_path / "nowhere")
    with pytest.raises(StudyError, match="holds no released model"):
        Release.at(tmp_path / "A")
    with pytest.raises(DataError, match=r"sites.A.history: the site trained the release"):
        prepare(Release(release.model), ward_study(), out, sites=ward_sites(tmp_path, FEW, history=False))
    (tmp_path / "history-A" / "lineage.jsonl").unlink()
    with pytest.raises(DataError, match=r"site A trained the release .* its history folder does not know it"):
        prepare(release, ward_study(), out, sites=sites)
    assert not out.exists()
    prepare(release, ward_study(), out, train=["A"])
    other = run(ward_study(seed=9), sites, tmp_path / "other", engine="local", quiet=True)
    with pytest.raises(StudyError, match=f"does not continue release {other.model_sha256[:12]}"):
        prepare(Release.at(tmp_path / "other"), ward_study(), out, train=["A"])


def test_the_commands_from_a_first_run_to_a_rollback(tmp_path: Path, monkeypatch: Any) -> None:
    parent, sites = first(tmp_path)
    admit(tmp_path / "A", NEW)
    monkeypatch.setitem(ROLES, "B", "evaluate")
    study, site_file, chain = tmp_path / "study.yaml", tmp_path / "sites.yaml", tmp_path / "chain"
    told = {
        "name": "toy",
        "seed": 3,
        "sites": {"A": {}, "B": {}},
        "local": {"steps": 3, "batch": 2, "lr": 0.05, "optimizer": "sgd"},
    }
    task = {"kind": "custom", "factory": "tests.living.ward:make_ward"}
    study.write_text(yaml.safe_dump({**told, "task": task, "schedule": {"rounds": 2}}))
    site_file.write_text(yaml.safe_dump({"sites": json.loads(sites.model_dump_json(exclude_unset=True))["sites"]}))

    def say(*words: object, code: int = 0) -> str:
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == code, found.output
        return found.output

    run_options = ("--sites", site_file, "--chain", chain, "--allow-code", "--engine", "local", "--quiet")
    roomy = ("--set", "update.margins={r: 50.0}")
    said = say("update", tmp_path / "one", study, "--out", tmp_path / "two", *run_options, *roomy)
    assert "A (2 new) train; B only measures" in said
    assert "Promoted: the new model takes the place of the release" in said
    monkeypatch.delitem(ROLES, "B")
    worse = ("--set", "local.lr=9.0")
    said = say("update", "current", study, "--out", tmp_path / "bad", *run_options, "--more-rounds", 1, *worse, code=1)
    assert "Not promoted: the release stays" in said

    explained = say("check", tmp_path / "two" / "update.yaml", "--sites", site_file, "--allow-code")
    assert f"Continues the release {parent.model_sha256}" in explained
    assert "The new model takes its place only where no site loses more than the margin: r 50." in explained
    assert "of the release that the study continues, too" in " ".join(explained.split())

    listed = json.loads(say("releases", "list", chain, "--json"))
    assert [entry["kind"] for entry in listed] == ["released", "released", "refused"]
    assert [entry["current"] for entry in listed] == [False, True, False]
    assert [entry["parent"] for entry in listed] == [None, parent.model_sha256, listed[1]["release"]]
    assert "in use again (entry 4)" in say("releases", "rollback", chain, 1, "--reason", "a scanner was replaced")
    assert json.loads(say("releases", "show", chain, "--json"))["release"] == parent.model_sha256
    assert "a scanner was replaced" in say("releases", "list", chain)
    assert parent.model_sha256 in say("releases", "show", chain, "current")
    compared = json.loads(say("releases", "diff", chain, 1, 2, "--json"))["metrics"]
    assert {row["site"] for row in compared} == {"A", "B", "mean"}
    assert "Each on the test patients of its own run" in say("releases", "diff", chain, 1, 2)
    assert len(list((chain / "models").iterdir())) == 3
    assert Chain(chain).current() is not None
