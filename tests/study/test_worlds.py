"""A task brings its own network, and refuses those that are of no use to it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from wardround.errors import StudyError
from wardround.study.hashes import plan_sha256, study_sha256
from wardround.study.schema import Study

SCANNER = {"kind": "mri", "coils": 4}
TASKS: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "segmentation": {},
    "chain": {},
    "classification": {"classes": ["x", "y"]},
}


def _study(kind: str, **changes: Any) -> Study:
    task = {"kind": kind, **TASKS[kind]}
    return Study.model_validate({"name": "worlds", "sites": {"a": {}}, "task": task, **changes})


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("reconstruction", "modl"),
        ("segmentation", "monai_unet"),
        ("classification", "densenet"),
        ("chain", "modl"),
    ],
)
def test_a_study_without_a_model_has_the_one_of_its_task(kind: str, model: str) -> None:
    assert _study(kind).model.kind == model
    small = _study(kind, model={"preset": "tiny"}).model
    assert (small.kind, small.model_dump()["preset"]) == (model, "tiny")


@pytest.mark.parametrize(
    ("kind", "model", "fits"),
    [
        ("segmentation", "densenet", "monai_unet, segresnet"),
        ("segmentation", "modl", "monai_unet, segresnet"),
        ("classification", "monai_unet", "densenet, resnet"),
    ],
)
def test_a_model_of_no_use_is_refused_with_those_that_are(kind: str, model: str, fits: str) -> None:
    with pytest.raises(ValidationError, match=rf"model\.kind: {model} does not fit task\.kind: {kind}; take {fits}"):
        _study(kind, model={"kind": model})


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_task_of_images_has_no_scanner(kind: str) -> None:
    study = _study(kind)
    assert not study.scans
    assert study.model_dump()["acquisition"] is None
    assert Study.model_validate(study.model_dump(mode="json")) == study
    assert plan_sha256(Study.model_validate(study.model_dump(mode="json"))) == plan_sha256(study)
    with pytest.raises(StudyError, match="has no scanner"):
        study.acquisition_of("a")
    with pytest.raises(ValidationError, match=r"acquisition: task\.kind " + kind):
        _study(kind, acquisition=SCANNER)
    with pytest.raises(ValidationError, match=r"sites\.a\.acquisition: task\.kind " + kind):
        _study(kind, sites={"a": {"acquisition": SCANNER}})


def test_a_task_of_ones_own_has_the_scanner_that_its_study_names_and_no_other() -> None:
    own = {"kind": "custom", "factory": "tests.toys:make_task"}
    values = {"name": "own", "sites": {"a": {}, "b": {}}, "task": own}
    study = Study.model_validate(values)
    assert not study.scans
    assert study.model.kind == "own_network"
    named = Study.model_validate({**values, "acquisition": SCANNER})
    assert named.acquisition_of("a").kind == "mri"
    assert Study.model_validate({**values, "sites": {"a": {"acquisition": SCANNER}, "b": {}}}).scans
    assert study_sha256(study) != study_sha256(named)


@pytest.mark.parametrize("kind", ["reconstruction", "chain"])
def test_what_begins_with_raw_data_always_scans_and_takes_no_segmenter(kind: str) -> None:
    assert _study(kind).acquisition_of("a").kind == "mri"
    with pytest.raises(ValidationError, match=rf"acquisition: task\.kind {kind} needs one"):
        _study(kind, acquisition=None)
    with pytest.raises(ValidationError, match=r"model\.kind: own_network does not fit|model\.kind: own_network is for"):
        _study(kind, model={"kind": "own_network"})
    with pytest.raises(ValidationError, match=r"model\.kind: segresnet"):
        _study(kind, model={"kind": "segresnet"})
