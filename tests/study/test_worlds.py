"""A task brings its own network, and refuses those that are of no use to it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from wardround.study.schema import Study

TASKS: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "segmentation": {},
    "classification": {"classes": ["x", "y"]},
}


def _study(kind: str, **changes: Any) -> Study:
    task = {"kind": kind, **TASKS[kind]}
    return Study.model_validate({"name": "worlds", "sites": {"a": {}}, "task": task, **changes})


@pytest.mark.parametrize(
    ("kind", "model"), [("reconstruction", "modl"), ("segmentation", "monai_unet"), ("classification", "densenet")]
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
    with pytest.raises(ValidationError, match=rf"model\.kind: {model} is not for {kind}; take one of {fits}"):
        _study(kind, model={"kind": model})
