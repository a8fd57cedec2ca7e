"""From a study's task section to a task."""

from __future__ import annotations

from importlib import import_module

from wardround.errors import StudyError
from wardround.study import schema
from wardround.tasks.reconstruction import ReconstructionTask
from wardround.tasks.task import Task

_PARTS = ("metrics", "build_model", "dataset", "loss", "score")


def build_task(study: schema.Study) -> Task:
    """The task of a study. Raises StudyError where a custom factory cannot be imported or makes no task."""
    match study.task:
        case schema.ReconstructionTask():
            return ReconstructionTask(study)
        case schema.CustomTask() as custom:
            return _custom(custom)


def _custom(config: schema.CustomTask) -> Task:
    module, _, name = config.factory.partition(":")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StudyError(
            f"task.factory: {config.factory!r} cannot be imported; check the spelling, "
            "and that its package is installed in this environment",
            detail=str(error),
        ) from error
    task: Task = factory(**config.options)
    lacking = [part for part in _PARTS if not hasattr(task, part)]
    if lacking:
        raise StudyError(f"task.factory: what {config.factory!r} made has no {', '.join(lacking)}")
    return task
