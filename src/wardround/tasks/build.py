"""From a study's task section to a task."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wardround.errors import StudyError
from wardround.study import schema
from wardround.study import tasks as tasks_config
from wardround.study.base import at
from wardround.study.plugins import NO_PLUGINS, Plugins
from wardround.tasks.task import Compared, ReadsFiles, Task

if TYPE_CHECKING:
    from wardround.study.baselines import Baseline
    from wardround.tasks.reconstruction import ReconstructionBase

_PARTS = ("metrics", "build_model", "dataset", "pooled", "loss", "score")


def build_task(
    study: schema.Study, embeddings: Mapping[str, Path] | None = None, plugins: Plugins = NO_PLUGINS
) -> Task:
    """The task of a study; `embeddings` are the files of the sites that provide them.

    Raises StudyError where a custom factory is not allowed by `plugins`, cannot be imported or makes no task.
    """
    # Late: a process imports the readers, operators and networks of its own task alone.
    match study.task:
        case tasks_config.ReconstructionTask():
            return _reconstruction(study, embeddings or {}, plugins)
        case tasks_config.CustomTask() as custom:
            return _whole(_custom(custom, plugins), f"factory: {custom.factory!r}")
        case other:
            made = _whole(other.build(study, embeddings or {}), f"kind: {other.kind!r}")
            if isinstance(made, ReadsFiles):
                made.read_by(plugins.readers)
            if isinstance(made, Compared):
                made.compare_with(_compared(study, plugins))
            return made


def _reconstruction(study: schema.Study, embeddings: Mapping[str, Path], plugins: Plugins) -> Task:
    """The task that the study's acquisition names."""
    if study.scanner.closed:
        kind = study.scanner.kind
        raise StudyError(
            plugins.refusal("acquisition", kind, "acquisition.kind") or f"the plug-in {kind!r} is not opened"
        )
    made: ReconstructionBase[Any] = at(study.scanner.reconstruction)(study, embeddings)
    made.compare_with(_compared(study, plugins))
    return made


def _compared(study: schema.Study, plugins: Plugins) -> dict[str, Baseline]:
    """The classical methods of a study, by name."""
    return {name: plugins.baseline(name, study.modality) for name in study.baselines}


def _custom(config: tasks_config.CustomTask, plugins: Plugins) -> Any:
    factory = plugins.load("task", config.factory)
    try:
        inspect.signature(factory).bind(**config.options)
    except TypeError as error:
        raise StudyError(f"task.options: {config.factory!r} cannot be called with them: {error}") from error
    except ValueError:
        pass  # A callable in C has no signature; it says itself what it does not take.
    return factory(**config.options)


def _whole(task: Any, made_by: str) -> Task:
    lacking = [part for part in _PARTS if not hasattr(task, part)]
    if lacking:
        raise StudyError(f"task.{made_by} made what has no {', '.join(lacking)}")
    whole: Task = task
    return whole
