"""Looks at a model of a study as a whole, as an audit does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from wardround.federation.training import Workbench
from wardround.protection.lint import Finding, lint_against
from wardround.study.schema import Study
from wardround.tasks.build import build_task

Array = npt.NDArray[Any]


def lint_model(tensors: Mapping[str, Array], study: Study) -> tuple[Finding, ...]:
    """What is suspicious about the tensors of a model of a study, by `lint_against`; empty where nothing is."""
    return lint_against(tensors, Workbench(build_task(study), study.seed).initial_values())
