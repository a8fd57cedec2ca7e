"""The released model that teaches in a study: found by place, known by hash, and made once in a process."""

from __future__ import annotations

import torch

from wardround.errors import DataError, StudyError
from wardround.learning.policy import listed
from wardround.models.adapters import attach
from wardround.plan.weights import place_of_teacher, study_of, whole_release
from wardround.study.places import Places
from wardround.study.plugins import Plugins
from wardround.study.teacher import TaughtBy
from wardround.tasks.build import build_task
from wardround.tasks.distillation import Teacher

_SECTION = "task.teacher"


def teacher_of(named: TaughtBy, places: Places, plugins: Plugins) -> Teacher:
    """The teacher of a study, whole, from the first of the places at which it lies.

    No random number is taken: what a site learns does not depend on when it is made. Raises `StudyError` for another
    model than the study's, for one of which a part stays at its sites, and for a plug-in's that may not be imported.
    """
    path = place_of_teacher(named, places)
    tensors, metadata, covered = whole_release(named, path, _SECTION)
    private = sorted(n for n in tensors.keys() - set(covered) if tensors[n].dtype.kind == "f")
    if private:
        raise StudyError(
            f"{_SECTION}.file: {named.file} keeps a part at each of its sites ({listed(tuple(private))}), which its "
            "hash does not cover; choose a model of a method that shares all of it"
        )
    try:
        study = plugins.opened(study_of(path, metadata))
    except DataError as error:
        raise StudyError(f"{_SECTION}.file: {named.file}: {error}", detail=error.detail) from error
    if refused := next(plugins.refused(study), None):
        raise StudyError(f"{_SECTION}.file: {named.file} names a plug-in: {refused}")
    with torch.random.fork_rng([]):
        task = build_task(study, plugins=plugins)
        network = task.build_model()
        attach(network, study.adapters, folds=study.method.folds)
    values = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    try:
        network.load_state_dict(values)
    except RuntimeError as error:
        raise StudyError(
            f"{_SECTION}.file: {named.file} holds values that do not fit the network of its study; get it again",
            detail=f"{path}: {' '.join(str(error).split())}",
        ) from error
    return Teacher(task, network)
