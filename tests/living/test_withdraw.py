"""A patient withdraws: no split, round or test has it from then on, and the run that was going on goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.outlines import make_outlines, outline_study
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.plan.arm_specs import ArmSpecs
from wardround.results.files import read_result
from wardround.runs.session import evaluate, open_host, run
from wardround.runs.watching import Silent
from wardround.runs.withdrawing import withdraw_from_runs
from wardround.site.datasets import Datasets
from wardround.site.drift import Reference
from wardround.site.shelf import FOLDER, clear_shelves, shelf_folder
from wardround.site.splits import SPLITS, KnownParts
from wardround.site.withdrawn import KEY, WITHDRAWN, Begun, Withdrawn
from wardround.storage.journal import RoundReport
from wardround.study.sites import Egress, SiteData, SitesFile
from wardround.study.tasks import Split

RULE = Split(validation=0.2, test=0.3)
NAMES = [f"DOE-{number:02d}" for number in range(10)]


def dealt(folder: Path, names: list[str] = NAMES, first: int | None = None) -> dict[str, str]:
    record = KnownParts(folder, first)
    parts = record.deal("A", names, RULE, 1, "train")
    if first is None:
        record.settle()
    return {names[i]: part for part, numbers in parts.items() for i in numbers}


# The record ----------------------------------------------------------------------------------------------------------


def test_who_withdrew_is_dealt_to_no_part_and_the_others_keep_theirs(tmp_path: Path) -> None:
    before = dealt(tmp_path)
    assert KnownParts(tmp_path).withdraw("DOE-03")
    assert dealt(tmp_path) == {name: part for name, part in before.items() if name != "DOE-03"}
    # With the file gone, and back again, and with others.
    assert dealt(tmp_path, [*NAMES[:3], *NAMES[4:]]).keys() == set(NAMES) - {"DOE-03"}
    assert "DOE-03" not in dealt(tmp_path, [*NAMES, "ZOE"])
    # As it was before he withdrew, part for part.
    assert dealt(tmp_path, first=0) == before


def test_withdrawing_twice_changes_nothing_more(tmp_path: Path) -> None:
    dealt(tmp_path)
    assert KnownParts(tmp_path).withdraw("DOE-03")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not KnownParts(tmp_path).withdraw("DOE-03")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_after_a_crash_between_the_two_records_the_rest_is_done(tmp_path: Path) -> None:
    before = dealt(tmp_path)
    kept = (tmp_path / SPLITS).read_bytes()
    KnownParts(tmp_path).withdraw("DOE-03")
    # The tombstone is there, and the splits' record is still the old one.
    (tmp_path / SPLITS).write_bytes(kept)
    assert not KnownParts(tmp_path).withdraw("DOE-03")
    assert not KnownParts(tmp_path).holds("DOE-03")
    assert dealt(tmp_path, first=0) == before


def test_a_run_that_dealt_him_before_does_not_put_him_back(tmp_path: Path) -> None:
    late = KnownParts(tmp_path)
    late.deal("A", NAMES, RULE, 1, "train")
    KnownParts(tmp_path).withdraw("DOE-03")
    late.settle()
    assert KnownParts(tmp_path).holds("DOE-04")
    assert not KnownParts(tmp_path).holds("DOE-03")


def test_the_records_name_no_patient(tmp_path: Path) -> None:
    dealt(tmp_path)
    KnownParts(tmp_path).withdraw("DOE-03")
    assert b"DOE" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len((tmp_path / WITHDRAWN).read_text().splitlines()) == 1


def test_steps_lead_from_the_data_of_a_run_s_beginning_to_those_of_now(tmp_path: Path) -> None:
    record = Withdrawn(tmp_path)
    assert record.begun("a", "b") is None
    record.step("a", "b", Begun(8, 4))
    record.step("b", "c", Begun(6, 3))
    record.step("x", "y", Begun(9, 9))
    # A run goes on by what it began with, and none goes on by the way of another, or back.
    assert Withdrawn(tmp_path).begun("a", "c") == Begun(8, 4)
    assert record.begun("b", "c") == Begun(6, 3)
    assert record.begun("a", "y") is None
    assert record.begun("c", "a") is None


@pytest.mark.parametrize("damage", ["line", "part", "gone"])
def test_a_damaged_record_is_an_error(tmp_path: Path, damage: str) -> None:
    dealt(tmp_path)
    KnownParts(tmp_path).withdraw("DOE-03")
    record = tmp_path / WITHDRAWN
    match damage:
        case "line":
            record.write_bytes(b"{}\n")
        case "part":
            record.write_bytes(record.read_bytes().replace(b'": "t', b'": "r'))
            record.write_bytes(record.read_bytes().replace(b'": "v', b'": "r'))
        case "gone":
            (tmp_path / KEY).unlink()
    with pytest.raises(DataError, match=r"damaged|gone"):
        dealt(tmp_path)


def test_the_shelf_of_before_a_withdrawal_is_deleted(tmp_path: Path) -> None:
    for count in (0, 1, 2):
        (shelf_folder(tmp_path, count) / FOLDER / "base").mkdir(parents=True)
    clear_shelves(tmp_path, 2)
    assert [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("base")] == ["after-withdrawal-2"]
    clear_shelves(tmp_path)
    assert not list(tmp_path.rglob("base"))


# Runs ----------------------------------------------------------------------------------------------------------------


class Between(Silent):
    """Does something once, after a round."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self._number, self._act = number, act

    def round(self, report: RoundReport) -> None:
        if report.round == self._number:
            self._number = -1
            self._act()


STUDY = outline_study({"A": {}, "B": {}}, schedule={"rounds": 3}, local={"steps": 1, "batch": 2})


def parts_of(sites: SitesFile, out: Path) -> dict[str, tuple[str, ...]]:
    data = Datasets(ArmSpecs(STUDY, ()), sites, folder=out).of("A")
    return {split: tuple(data.names(split)) for split in ("train", "validation", "test")}  # type: ignore[attr-defined]


def rounds(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> SitesFile:
    return make_outlines(tmp_path_factory.mktemp("data"), {"A": 8, "B": 6}, slices=1)


@pytest.fixture(scope="module")
def finished(hospitals: SitesFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; tests take copies."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(STUDY, hospitals, out, engine="local", quiet=True)
    return out


@pytest.mark.parametrize("part", ["train", pytest.param("test", marks=pytest.mark.slow)])
def test_a_running_study_goes_on_without_him(hospitals: SitesFile, tmp_path: Path, part: str) -> None:
    out = tmp_path / "out"
    before = parts_of(hospitals, out)
    name = before[part][0]

    def leave() -> None:
        assert withdraw_from_runs("A", [name], hospitals, [out]).stuck == ()

    result = run(STUDY, hospitals, out, engine="local", watcher=Between(1, leave), compare=["pooled"])
    assert [line["round"] for line in rounds(out) if line["arm"] == "federated"] == [1, 2, 3]
    after = parts_of(hospitals, out)
    assert after == {split: tuple(n for n in names if n != name) for split, names in before.items()}
    # What it said of itself before the first round is what it says to the end.
    said = result.patients["A"]
    assert said is not None
    assert said["train"] == len(before["train"])
    tests = {line.split(",")[1] for line in (out / "sites" / "A" / "patients.csv").read_text().splitlines()[1:]}
    assert tests == set(after["test"])
    # A finished run is looked at again, and measured again, by the same model.
    again = run(STUDY, hospitals, out, engine="local", quiet=True, compare=["pooled"])
    assert again.model_sha256 == result.model_sha256
    evaluate(out, hospitals, engine="local", quiet=True)


def test_the_weight_of_a_site_stays_what_it_was(hospitals: SitesFile, finished: Path, tmp_path: Path) -> None:
    """Else the coordinator sees the round in which somebody withdrew, and how many images were his."""
    out = shutil.copytree(finished, tmp_path / "out")
    name = parts_of(hospitals, out)["train"][0]
    withdraw_from_runs("A", [name], hospitals, [out])
    host = open_host(STUDY, hospitals, out, (), (), None)
    learner = host.learner(host.arm_spec("federated"), "A")
    assert len(learner.dataset) < learner.known.least_weights["model"]
    assert learner.known.least_weights["model"] == len(Datasets(host, hospitals, folder=out).before("A", 0).of("A"))
    host.close()


@pytest.mark.slow
def test_of_a_test_set_that_lost_one_patient_nothing_leaves(hospitals: SitesFile, tmp_path: Path) -> None:
    """Two means, over n and n - 1 patients, would be the value of the one who withdrew."""
    rule = Egress(minimum_cohort=2)
    entries = {name: entry.model_copy(update={"egress": rule}) for name, entry in hospitals.sites.items()}
    sites, out = SitesFile(sites=entries), tmp_path / "out"
    result = run(STUDY, sites, out, engine="local", quiet=True)
    assert result.metrics["federated"]["A"] is not None
    withdraw_from_runs("A", [parts_of(sites, out)["test"][0]], sites, [out])
    again = evaluate(out, sites, engine="local", quiet=True)
    assert again.metrics["federated"]["A"] is None
    assert again.metrics["federated"]["B"] == result.metrics["federated"]["B"]


def copied(hospitals: SitesFile, tmp_path: Path) -> SitesFile:
    """The same data in folders of a test's own."""
    for name, entry in hospitals.sites.items():
        shutil.copytree(entry.data[0], tmp_path / "data" / name)
    return SitesFile(sites={name: SiteData(data=tmp_path / "data" / name) for name in hospitals.sites})


@pytest.mark.slow
def test_data_that_changed_otherwise_too_stop_the_run(hospitals: SitesFile, finished: Path, tmp_path: Path) -> None:
    sites, out = copied(hospitals, tmp_path), shutil.copytree(finished, tmp_path / "out")
    parts = parts_of(sites, out)
    other = tmp_path / "data" / "A" / parts["train"][1]
    other.rename(tmp_path / "aside")
    found = withdraw_from_runs("A", [parts["train"][0]], sites, [out])
    assert found.stuck == (out,)
    with pytest.raises(DataError, match="the data of A changed since the run began"):
        run(STUDY, sites, out, engine="local", quiet=True)
    (tmp_path / "aside").rename(other)
    run(STUDY, sites, out, engine="local", quiet=True)


@pytest.mark.slow
def test_files_may_go_after_he_withdrew(hospitals: SitesFile, finished: Path, tmp_path: Path) -> None:
    sites, out = copied(hospitals, tmp_path), shutil.copytree(finished, tmp_path / "out")
    result = read_result(out)
    name = parts_of(sites, out)["train"][0]
    found = withdraw_from_runs("A", [name], sites, [out])
    assert found.stuck == ()
    assert [(use.release, use.part) for use in found.uses[name]] == [(result.model_sha256, "train")]
    (tmp_path / "data" / "A" / name).rename(tmp_path / "deleted")
    assert run(STUDY, sites, out, engine="local", quiet=True).model_sha256 == result.model_sha256
    # And again, when nothing is left that could be looked at.
    again = withdraw_from_runs("A", [name], sites, [out])
    assert (again.new, again.stuck) == (0, ())


def test_a_name_that_is_not_there_changes_nothing(hospitals: SitesFile, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    history = out / "work" / "sites" / "A" / "history"
    before = {path.name for path in history.iterdir()}
    said = []
    for name in ("DOE-0", "DOE-000", "SOMEBODY", "../A/DOE-00"):
        with pytest.raises(DataError) as error:
            withdraw_from_runs("A", ["DOE-00", name], hospitals, [out])
        said.append(str(error.value))
        assert error.value.detail == ""
    # One and the same, whether names like it are there or not.
    assert len(set(said)) == 1
    assert "DOE" not in said[0]
    assert {path.name for path in history.iterdir()} == before


def test_without_a_history_a_run_must_be_named(hospitals: SitesFile, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"sites\.A\.history is not set"):
        withdraw_from_runs("A", ["DOE-00"], hospitals, [])
    with pytest.raises(StudyError, match="the folder holds no run"):
        withdraw_from_runs("A", ["DOE-00"], hospitals, [tmp_path])
    with pytest.raises(StudyError, match="name a patient"):
        withdraw_from_runs("A", [], hospitals, [])


def test_the_command(hospitals: SitesFile, tmp_path: Path) -> None:
    sites = tmp_path / "sites.yaml"
    entry = {"data": str(hospitals.of("A").data[0]), "history": str(tmp_path / "history")}
    sites.write_text(yaml.safe_dump({"sites": {"A": entry}}))
    (tmp_path / "names.txt").write_text("DOE-01\n\nDOE-02\n")
    kept = Reference(tmp_path / "history").path("0" * 64)
    kept.parent.mkdir(parents=True)
    kept.write_text("rows of patients without names")
    runner = CliRunner()
    done = runner.invoke(
        app, ["site", "withdraw", "DOE-00", "--file", str(tmp_path / "names.txt"), "--sites", str(sites)]
    )
    assert done.exit_code == 0, done.output
    assert "Withdrawn." in done.output
    assert not kept.exists()
    assert Withdrawn(tmp_path / "history").of(NAMES) == frozenset(NAMES[:3])
    again = runner.invoke(app, ["site", "withdraw", "DOE-00", "--sites", str(sites)])
    assert "Was withdrawn before" in again.output
    unknown = runner.invoke(app, ["site", "withdraw", "DOE-", "--sites", str(sites)])
    assert unknown.exit_code == 2


def test_a_list_of_patients_may_still_name_him(tmp_path: Path) -> None:
    make_outlines(tmp_path / "data", {"A": 8}, slices=1)
    (tmp_path / "list.txt").write_text("".join(f"DOE-0{n}\n" for n in range(8)))
    entry = SiteData(data=tmp_path / "data" / "A", patients=tmp_path / "list.txt", history=tmp_path / "history")
    sites = SitesFile(sites={"A": entry})
    withdraw_from_runs("A", ["DOE-00"], sites, [])
    (tmp_path / "data" / "A" / "DOE-00").rename(tmp_path / "deleted")
    assert sum(map(len, parts_of(sites, tmp_path).values())) == 7
