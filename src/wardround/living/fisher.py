"""Measures the Fisher information of a release before an update that is held by it (`update.retain: ewc`)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wardround.errors import StudyError
from wardround.federation.release import open_model, study_of
from wardround.plan.arms import FEDERATED
from wardround.plan.retention import elastic_of
from wardround.plan.weights import file_sha256, place_of
from wardround.results.files import read_rounds
from wardround.runs.session import run
from wardround.runs.watching import Watcher
from wardround.study.load import load_study, written
from wardround.study.registry import MEASURING
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.study.start import FromRelease
from wardround.wire.scales import GROWTH, SATURATED

#: The most examples that a site squares gradients of.
EXAMPLES = 256
_ATTEMPTS = 3


def fisher_study(
    study: Study, trained_at: tuple[str, ...], examples: int = EXAMPLES, scale: float | None = None
) -> Study:
    """The study of one round that measures the Fisher information which an update needs.

    It starts from the same release, under the same protection, at those of the study's sites where the release trained
    (`trained_at`), and looks at the patients from whom the release learned, at `examples` of their examples at most.
    `scale` is the largest square that is said whole, by default the study's `protection.initial_scale`. Raises
    `StudyError` where the study is not held by Fisher information, and where none of its sites has trained.
    """
    if elastic_of(study) is None:
        raise StudyError("update.retain: no Fisher information is needed unless it says `kind: ewc`")
    sites = [name for name in study.sites if name in trained_at]
    if not sites:
        raise StudyError(
            "update.retain: ewc remembers what the release learned at its sites, and none of those is in this study; "
            f"add one of {', '.join(trained_at)} (`role: evaluate`)"
        )
    said = written(study)
    protection = {
        k: v for k, v in said.get("protection", {}).items() if k not in ("compression", "robust", "threshold")
    }
    protection |= {"initial_scale": study.protection.initial_scale if scale is None else scale}
    local = {"steps": examples, "batch": 1}
    return load_study(
        {
            **{key: said[key] for key in ("version", "seed", "acquisition", "model", "start", "parts") if key in said},
            "name": f"{study.name[:56]}-fisher",
            "description": f"Fisher information of a release, for {study.name}",
            "sites": {name: {**(said["sites"][name] or {}), "role": "train"} for name in sites},
            "task": _untaught(said["task"]),
            "method": {"kind": MEASURING},
            "update": {"train_on": "old"},
            "local": local,
            "schedule": {"rounds": 1, "validate_every": 0, "release": "last"},
            "protection": protection,
        }
    )


def with_fisher(
    study: Study,
    sites: SitesFile,
    out: Path,
    near: Path,
    *,
    examples: int = EXAMPLES,
    engine: str | None = None,
    watcher: Watcher | None = None,
    quiet: bool = False,
    allow_code: bool = False,
) -> Study:
    """The same study with the Fisher information that it needs, measured by a run in `out` where it lacks that.

    The file is put beside the study, in `near`, by its hash. Where squares are larger than the fixed point of a round
    can say, the same sites measure again with a scale 16 times as large. A run that was stopped goes on where it was.
    Raises what `run` raises, and `StudyError` where the third scale is too small as well.
    """
    retain = elastic_of(study)
    if retain is None or retain.fisher is not None:
        return study
    where = trained_at(study, near)
    scale = study.protection.initial_scale
    for attempt in range(_ATTEMPTS):
        measuring = fisher_study(study, where, examples, scale)
        folder = out / f"scale-{attempt}"
        result = run(
            measuring, sites, folder, engine=engine, watcher=watcher, quiet=quiet, allow_code=allow_code, near=near
        )
        if max(line.saturated for line in read_rounds(result.out) if line.arm == FEDERATED) <= SATURATED:
            break
        scale *= GROWTH
    else:
        raise StudyError(
            f"squared gradients are larger than {scale / GROWTH:g}: the release does not fit this study's data or "
            "loss; lower what the loss weighs, or take `update.retain: lwf`"
        )
    measured = result.out / "models" / "fisher.safetensors"
    sha256 = file_sha256(measured)
    place = near / f"fisher-{sha256[:12]}.safetensors"
    shutil.copyfile(measured, place)
    return named(study, place.name, sha256)


def needed_fisher(study: Study, near: Path) -> Study | None:
    """The study that measures the Fisher information which a study lacks; `None` where it lacks none."""
    retain = elastic_of(study)
    if retain is None or retain.fisher is not None:
        return None
    return fisher_study(study, trained_at(study, near))


def named(study: Study, file: str, sha256: str) -> Study:
    """The study with its Fisher information named."""
    said = written(study)
    said["update"]["retain"]["fisher"] = {"file": file, "sha256": sha256}
    return load_study(said)


def trained_at(study: Study, near: Path) -> tuple[str, ...]:
    """The sites from which the release that a study continues learned, by its own file.

    Of a release that continued another one, those that only evaluated as well: they had trained before.
    """
    assert isinstance(study.start, FromRelease)
    path = place_of(study.start, study.places(near))
    parent = study_of(path, open_model(path)[1])
    return (*parent.training_sites, *(parent.evaluating_sites if parent.update is not None else ()))


def _untaught(task: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in task.items() if key != "teacher"}
