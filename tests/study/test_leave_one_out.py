"""Every task may ask for arms without one site, and the same refusals hold."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tests.outlines import outline_study

from wardround.errors import StudyError
from wardround.plan.arms import WITHOUT, arms_of
from wardround.study.schema import Study

SITES: dict[str, Any] = {"a": {}, "b": {}, "c": {}}


def _classes(leave_one_out: bool) -> Study:
    task = {"kind": "classification", "classes": ["x", "y"], "leave_one_out": leave_one_out}
    return Study.model_validate({"name": "classes", "sites": SITES, "model": {"kind": "densenet"}, "task": task})


def _left_out(study: Study) -> list[str]:
    return [arm.name for arm in arms_of(study, ()) if arm.name.startswith(WITHOUT)]


def test_tasks_without_a_scanner_leave_out_each_site() -> None:
    every = [WITHOUT + site for site in SITES]
    assert _left_out(outline_study(SITES, task={"leave_one_out": True})) == every
    assert _left_out(_classes(True)) == every
    assert not _left_out(outline_study(SITES))
    assert not _left_out(_classes(False))


def test_a_secure_sum_refuses_it_by_its_key() -> None:
    study = outline_study(SITES, task={"leave_one_out": True}, protection={"secure": True})
    with pytest.raises(StudyError, match=r"^task\.leave_one_out: with protection\.secure"):
        arms_of(study, ())


def test_two_sites_are_too_few() -> None:
    study = outline_study({"a": {}, "b": {}}, task={"leave_one_out": True})
    with pytest.raises(StudyError, match=r"^task\.leave_one_out needs at least 3"):
        arms_of(study, ())


def test_distributed_noise_refuses_it_by_its_key() -> None:
    with pytest.raises(ValidationError, match=r"task\.leave_one_out: the noise of"):
        outline_study(
            SITES,
            task={"leave_one_out": True},
            local={"steps": 1, "optimizer": "sgd"},
            method={"kind": "fedavg", "weights": "equal"},
            schedule={"rounds": 2, "release": "last"},
            protection={
                "secure": True,
                "privacy": {"epsilon": 8.0, "delta": 1e-5, "noise": "distributed", "clip": 1.0},
            },
        )
