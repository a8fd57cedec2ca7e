"""Submitting: what would stop a study is said before anything is written, and a study is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.hospitals.loopback import make_federation, write_toy
from tests.toys import toy_study
from wardround.cli import app
from wardround.errors import StudyError, WardroundError
from wardround.hospitals.coordinator import submission
from wardround.hospitals.coordinator.submission import read_submission, resume, submit, submitted, withdraw
from wardround.hospitals.folders import CoordinatorFolder, StudyFolder
from wardround.study.load import load_study, study_sha256
from wardround.study.schema import Study


@pytest.fixture
def place(tmp_path: Path) -> CoordinatorFolder:
    return make_federation(tmp_path)


def _submit(place: CoordinatorFolder, study: Study | None = None, **how: Any) -> tuple[str, bool]:
    how = {"allow_code": True, **how}
    return submit(place, write_toy(place.root.parent, study), **how)


def test_a_study_lies_there_with_its_overrides_resolved(place: CoordinatorFolder) -> None:
    assert _submit(place, overrides=["schedule.rounds=7"], compare=["local"]) == ("toy", True)
    folder = StudyFolder(place.studies / "toy")
    study = load_study(folder.study)
    assert study.schedule.rounds == 7
    wanted = read_submission(folder)
    assert wanted.study_sha256 == study_sha256(study)
    assert wanted.compare == ("local",)
    assert os.listdir(folder.out) == []
    assert submitted(place) == ("toy",)


def test_the_same_again_is_nothing_new_and_another_of_its_name_is_refused(place: CoordinatorFolder) -> None:
    assert _submit(place) == ("toy", True)
    before = (place.studies / "toy" / "submission.json").read_bytes()
    assert _submit(place) == ("toy", False)
    assert (place.studies / "toy" / "submission.json").read_bytes() == before
    for how in ({"overrides": ["seed=4"]}, {"compare": ["local"]}):
        with pytest.raises(StudyError, match="choose --name"):
            _submit(place, **how)
    assert _submit(place, overrides=["seed=4"], name="toy-2") == ("toy-2", True)
    assert submitted(place) == ("toy", "toy-2")


@pytest.mark.parametrize(
    ("study", "how", "words"),
    [
        (toy_study(), {"compare": ["pooled"]}, "data of all sites in one place"),
        (toy_study(("A", "D")), {}, "sites.D: is no site of this federation"),
        (toy_study(), {"allow_code": False}, "is code by its place"),
        (toy_study(), {"name": "../elsewhere"}, "take letters"),
        (toy_study(), {"name": ".hidden"}, "take letters"),
        (toy_study(), {"name": "a/b"}, "take letters"),
        (toy_study(), {"name": "x" * 65}, "take letters"),
    ],
)
def test_what_would_stop_a_study_is_refused(
    study: Study, how: dict[str, Any], words: str, place: CoordinatorFolder
) -> None:
    with pytest.raises(StudyError, match=words):
        _submit(place, study, **how)
    assert submitted(place) == ()
    assert not place.studies.exists() or os.listdir(place.studies) in ([], [".lock"])


def test_a_scanner_without_patients_of_its_own_is_refused(tmp_path: Path) -> None:
    from tests.mri_hospitals import make_hospitals, write_study

    place = make_federation(tmp_path, ("Alpha", "Beta", "Gamma"))
    more = {"Alpha": {}, "Beta": {}, "Gamma": {"role": "unseen", "scans": ["Alpha"]}}
    study, _ = write_study(tmp_path, make_hospitals(tmp_path / "data"), sites=more)
    with pytest.raises(StudyError, match=r"sites\.Gamma\.scans: needs patients of other sites"):
        submit(place, study)


def test_a_list_of_sites_that_is_not_the_roots_is_refused(place: CoordinatorFolder, tmp_path: Path) -> None:
    other = make_federation(tmp_path / "other")
    place.roster.write_bytes(other.roster.read_bytes())
    with pytest.raises(WardroundError, match="root did not sign"):
        _submit(place)


def test_nothing_is_left_of_a_submission_that_failed(place: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission, "write_text", refuse)
    with pytest.raises(OSError, match="No space"):
        _submit(place)
    assert os.listdir(place.studies) == [".lock"]


def test_a_link_in_the_place_of_a_study_is_not_followed(place: CoordinatorFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place.studies.mkdir()
    (place.studies / "toy").symlink_to(elsewhere)
    with pytest.raises(StudyError, match="something else lies"):
        _submit(place)
    assert os.listdir(elsewhere) == []


def test_people_withdraw_a_study_and_let_it_go_on(place: CoordinatorFolder) -> None:
    _submit(place)
    folder = StudyFolder(place.studies / "toy")
    assert withdraw(place, "toy")
    assert read_submission(folder).withdrawn
    assert not withdraw(place, "toy")
    assert resume(place, "toy", ["C"])
    assert read_submission(folder).model_dump() | {"submitted": 0.0} == {
        **read_submission(folder).model_dump(),
        "submitted": 0.0,
        "withdrawn": False,
        "resumed": 1,
        "without": ("C",),
    }
    with pytest.raises(StudyError, match="no such site"):
        resume(place, "toy", ["D"])
    for name in ("other", "../toy", ""):
        with pytest.raises(StudyError, match="no study of this name"):
            withdraw(place, name)


def _said(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_the_command_says_what_to_do(place: CoordinatorFolder, tmp_path: Path) -> None:
    study = write_toy(tmp_path)
    code, _, said = _said("submit", study, "--federation", place.root)
    assert code == 2
    assert "is code by its place" in said
    code, _, said = _said("submit", study, "--withdraw", "toy", "--federation", place.root)
    assert code == 2
    assert "give one of these" in said
    code, _, said = _said("submit", study, "--without", "A", "--federation", place.root)
    assert "goes with --resume" in said
    _submit(place)
    assert _said("submit", "--withdraw", "toy", "--federation", place.root)[1] == "toy is withdrawn."
    assert _said("submit", "--resume", "toy", "--federation", place.root)[1] == "toy goes on."
    code, _, said = _said("watch", "--once", "--federation", place.root)
    assert code == 2
    assert "federation start" in said


def test_the_command_says_what_a_study_takes_before_it_submits_it(tmp_path: Path) -> None:
    from tests.mri_hospitals import make_hospitals, write_study

    place = make_federation(tmp_path, ("Alpha", "Beta"))
    study, _ = write_study(tmp_path, make_hospitals(tmp_path / "data"))
    code, said, wrong = _said("submit", study, "--federation", place.root, "--bandwidth", "10Mbit/s")
    assert code == 0, wrong
    assert "Messages of a round" in said
    assert "at 10Mbit/s" in said
    assert "Submitted as" in said
    assert "No coordinator is at work there" in said
