"""The folder of a run: nobody else's is written into, changed data are said, and a run can go on without a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.toys import toy_sites, toy_study
from wardround.cli import app
from wardround.errors import DataError, Interrupted, JournalError, StudyError, WardroundError
from wardround.federation.release import load_model
from wardround.runs.folder import alone
from wardround.runs.session import Result, evaluate, run
from wardround.storage.journal import RoundReport
from wardround.study.hashes import plan_sha256, study_sha256
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.wire.canonical import digest

ROUNDS = {"schedule": {"rounds": 3, "min_sites": 2, "validate_every": 0, "release": "last"}}


class Stopping:
    """Ctrl-C after a round of the federation."""

    def __init__(self, number: int = 1) -> None:
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def round(self, report: RoundReport) -> None:
        if (report.arm, report.round) == ("federated", self._number):
            raise KeyboardInterrupt


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Somebody else's folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "work/notes.txt", "study.yaml", ".hidden"])
def test_a_folder_that_is_not_the_run_s_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    out, study = tmp_path / "out", toy_study()
    (out / name).parent.mkdir(parents=True)
    # Not even the very study makes it the folder of a run.
    (out / name).write_text(yaml.safe_dump(study.model_dump(mode="json")))
    before = files_of(out)
    with pytest.raises(JournalError, match=r"not of this run or audit.*choose another --out") as caught:
        run(study, toy_sites(tmp_path / "data"), out, engine="local")
    assert caught.value.detail == str(out / Path(name).parts[0])
    assert files_of(out) == before
    with pytest.raises(JournalError, match="a file lies where the folder"):
        run(study, toy_sites(tmp_path / "data"), out / name, engine="local")
    assert CliRunner().invoke(app, ["demo", "--out", str(out)]).exit_code != 0
    assert files_of(out) == before


@pytest.mark.parametrize("left", [[], ["work"], ["work/lock"]])
def test_an_empty_folder_and_one_of_a_run_that_was_killed_at_once_are_taken(tmp_path: Path, left: list[str]) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True) if left else out.mkdir()
    if left == ["work/lock"]:
        (out / "work" / "lock").touch()
    with alone(out):
        pass
    (out / "data").mkdir()  # What a demo makes, once the folder is its own.
    with alone(out):
        pass


@pytest.mark.parametrize("place", ["work", "work/sites/A/federated/blobs", "models", "sites/A"])
def test_a_link_in_the_folder_of_a_run_is_refused(tmp_path: Path, place: str) -> None:
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    with alone(out):
        pass
    theirs.mkdir()
    for name in ("a" * 64, "federated.safetensors", "lock", "compare.json"):
        (theirs / name).write_text("mine")
    before = files_of(theirs)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    if place == "work":
        (out / "work" / "lock").unlink()
        (out / "work").rmdir()
    (out / place).symlink_to(theirs)
    with pytest.raises(JournalError, match="symbolic link"):
        run(toy_study(), toy_sites(tmp_path / "data"), out, engine="local")
    assert files_of(theirs) == before


# Data that changed -------------------------------------------------------------------------------------------------


def begun(tmp_path: Path, study: Study, compare: tuple[str, ...] = ()) -> SitesFile:
    """A run that was stopped after its first round."""
    sites = toy_sites(tmp_path / "data", tuple(study.sites))
    with pytest.raises(Interrupted):
        run(study, sites, tmp_path / "out", compare=compare, engine="local", watcher=Stopping())
    return sites


def go_on(tmp_path: Path, study: Study, sites: SitesFile, **options: Any) -> Result:
    return run(study, sites, tmp_path / "out", engine="local", **options)


def change(tmp_path: Path, *names: str) -> None:
    """Other data at some sites than the run began with."""
    for name in names:
        (tmp_path / "data" / name / "changed").touch()


def test_a_run_whose_data_changed_is_refused_and_nothing_is_trained(tmp_path: Path) -> None:
    study = toy_study(**ROUNDS)
    sites = begun(tmp_path, study)
    change(tmp_path, "B")
    with pytest.raises(DataError, match=r"the data of B changed since the run began.*--without B"):
        go_on(tmp_path, study, sites)
    change(tmp_path, "A")
    with pytest.raises(DataError, match=r"the data of A, B changed.*--without A --without B"):
        go_on(tmp_path, study, sites)
    for name in "AB":
        (tmp_path / "data" / name / "changed").unlink()
    assert [line["round"] for line in lines(go_on(tmp_path, study, sites))] == [1, 2, 3]


def test_a_run_that_began_with_other_defaults_is_refused_and_names_them(tmp_path: Path) -> None:
    study = toy_study(**ROUNDS)
    sites = begun(tmp_path, study)
    plan = tmp_path / "out" / "work" / "plan.json"
    ours = plan.read_text()
    assert json.loads(ours) == study.model_dump(mode="json")
    # As a version that had other defaults, one setting less and one more wrote it.
    other = json.loads(ours)
    other["local"]["momentum"] = 0.25
    del other["schedule"]["keep"]
    plan.write_text(json.dumps(other))
    keys = r"local\.momentum was 0\.25 and is 0\.0; schedule\.keep is new"
    said = rf"same study, and this version .*fills in other defaults .*{keys}.*: go on with that version"
    with pytest.raises(JournalError, match=said):
        go_on(tmp_path, study, sites)
    assert json.loads(plan.read_text()) == other
    with pytest.raises(JournalError, match="of another study"):
        go_on(tmp_path, study.model_copy(update={"seed": 99}), sites)
    plan.unlink()
    with pytest.raises(JournalError, match=r"work/plan\.json of the run is lost: restore it"):
        go_on(tmp_path, study, sites)
    plan.write_text(ours)
    result = go_on(tmp_path, study, sites)
    assert (result.study_sha256, result.plan_sha256) == (study_sha256(study), plan_sha256(study))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    assert f"study_sha256 {study_sha256(study)}" in shown
    assert f"plan_sha256  {plan_sha256(study)}" in shown
    for name in ("model_card.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert study_sha256(study) in text
        assert plan_sha256(study) in text
    model = load_model(tmp_path / "out" / "models" / "federated.safetensors")[1]
    assert (model["study_sha256"], model["plan_sha256"]) == (study_sha256(study), plan_sha256(study))
    # What was measured is of the defaults that it was trained with.
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    (tmp_path / "out" / "result.json").write_text(json.dumps({**told, "plan_sha256": "0" * 64}))
    with pytest.raises(JournalError, match="fills in other defaults than the one that began it: go on with"):
        evaluate(tmp_path / "out", sites, engine="local", quiet=True, allow_code=True)


def lines(result: Result, arm: str = "federated") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (result.out / "rounds.jsonl").read_text().splitlines()]
    return [line for line in found if line["arm"] == arm]


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_goes_on_without_a_site_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, secure: bool
) -> None:
    names = {name: {} for name in "ABCD"}
    study = toy_study(sites=names, protection={"secure": secure}, **ROUNDS)
    compare = () if secure else ("local", "pooled")
    sites = begun(tmp_path, study, compare)
    change(tmp_path, "B")
    result = go_on(tmp_path, study, sites, compare=compare, without=["B"])
    assert [(line["participants"], line["missing"]) for line in lines(result)] == [
        (["A", "B", "C", "D"], {}),
        (["A", "C", "D"], {}),
        (["A", "C", "D"], {}),
    ]
    assert not caplog.records
    values = result
    (note, *others) = values.notes
    assert note == (
        "the run was resumed without B (--without): it took part up to round 1, and is in no number and no mean of the "
        "results"
    )
    ended = "without B there are no results of pooled, local/B"
    assert others[:1] == ([] if secure else [ended])
    assert values.failed == {"B": "the run went on without it (--without)"}
    assert values.metrics["federated"]["B"] is None
    assert values.metrics["federated"]["mean"] is not None
    assert (values.metrics.get("local", {}).get("mean") is None) == secure
    assert "pooled" not in values.metrics
    assert "the run was resumed without B" in (result.out / "report.html").read_text()
    # It is on record: neither the next process nor the numbers anew ask the site again.
    sites = SitesFile(sites={name: entry for name, entry in sites.sites.items() if name != "B"}).with_code()
    again = go_on(tmp_path, study, sites, compare=compare)
    assert (again.notes, again.metrics) == (values.notes, values.metrics)
    assert evaluate(result.out, sites, engine="local").metrics == values.metrics
    # What hospitals compare by another way is shown, and stands in each site's log.
    roster = result.out / "work" / "arms" / "federated" / "roster.json"
    assert roster.exists() == secure
    shown = CliRunner().invoke(app, ["inspect", str(result.out)]).output
    if secure:
        sha256 = digest(json.loads(roster.read_text()))
        assert f"roster {sha256}" in " ".join(shown.split())
        assert sha256 in (result.out / "work" / "sites" / "A" / "federated" / "log.jsonl").read_text()
    else:
        assert "roster" not in shown


def test_what_a_run_cannot_go_on_without_is_said(tmp_path: Path) -> None:
    study = toy_study(**ROUNDS)
    with pytest.raises(JournalError, match="--without: the folder holds no run"):
        go_on(tmp_path, study, toy_sites(tmp_path / "data"), without=["B"])
    sites = begun(tmp_path, study)
    for names, words in (
        (["X"], "no such site"),
        (["A", "B"], "1 training sites are left, and schedule.min_sites is 2"),
    ):
        with pytest.raises(StudyError, match=words):
            go_on(tmp_path, study, sites, without=names)
    equal = {"kind": "fedavg", "weights": "equal"}
    private = toy_study(method=equal, protection={"privacy": {"noise_multiplier": 1.0, "delta": 0.01}}, **ROUNDS)
    with pytest.raises(WardroundError, match="the run's statement needs what every site spent"):
        run(private, sites, tmp_path / "private", without=["B"], engine="local")
