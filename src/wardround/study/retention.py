"""What a study that continues a release may not say, and the teacher that `update.retain: lwf` comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.study.adapters import NoAdapters
from wardround.study.protection import NoCompression
from wardround.study.registry import MEASURING
from wardround.study.start import FromRelease
from wardround.study.teacher import TaughtBy
from wardround.study.update import Distilled, Elastic, ForgetAsItMay

if TYPE_CHECKING:
    from wardround.study.schema import Study
    from wardround.study.tasks import TaskSettings


def taught_by_release(study: Study) -> TaskSettings | None:
    """The task with the release as its teacher, where `update.retain` says lwf; else `None`. Raises ValueError.

    What the study wrote stays as it is: the teacher follows from `update`, and is in no hash but the plan's.
    """
    retain = None if study.update is None else study.update.retain
    if not isinstance(retain, Distilled) or study.task.closed:
        return None
    if not isinstance(study.start, FromRelease):
        raise ValueError("update.retain: lwf learns from the release that `start` names; name it (`kind: release`)")
    field = type(study.task).model_fields.get("teacher")
    if field is None:
        raise ValueError(
            f"update.retain: lwf needs a task that a released model can teach, as segmentation and classification are; "
            f"task.kind {study.task.kind} has no teacher; take `ewc`"
        )
    teacher, given = retain.teacher(study.start), getattr(study.task, "teacher", None)
    if isinstance(given, TaughtBy) and given != teacher:
        raise ValueError("update.retain: lwf makes the release the teacher, and task.teacher names one; leave one out")
    task = study.task.model_copy(update={"teacher": teacher})
    task.model_fields_set.discard("teacher")
    return task


def check_retention(study: Study) -> None:
    """Refuse what retention, memory and fine-tuning cannot be combined with. Raises ValueError."""
    update = study.update
    if update is None:
        return
    if update.memory and update.train_on != "new":
        raise ValueError(
            f"update.memory: is the share of old patients beside the new ones, and update.train_on is "
            f"{update.train_on}; set that to new, or leave memory out"
        )
    retain = update.retain
    if not isinstance(retain, ForgetAsItMay) and not isinstance(study.start, FromRelease):
        raise ValueError(
            f"update.retain: {retain.kind} holds the model to the release that `start` names; name it (`kind: release`)"
        )
    if isinstance(retain, Elastic):
        _check_elastic(study)
    if update.finetune is not None and study.protection.privacy is not None:
        raise ValueError(
            "update.finetune: with protection.privacy no budget pays for the steps that a site takes by itself, and "
            "the results of its own model would tell of them; leave it out"
        )


def _check_elastic(study: Study) -> None:
    if not isinstance(study.adapters, NoAdapters):
        raise ValueError(
            "update.retain: ewc weighs the network's own weights, and with `adapters` these stand still and others "
            "begin anew; take lwf, or leave adapters out"
        )
    privacy = study.protection.privacy
    if privacy is not None and privacy.noise == "distributed":
        raise ValueError(
            "update.retain: with protection.privacy.noise=distributed an update must be one sum of gradients, and ewc "
            "adds a pull of its own; take lwf, or set `noise: site`"
        )


def check_fisher(study: Study) -> None:
    """Refuse a study that measures Fisher information in a way that would not be it. Raises ValueError."""
    if study.method.kind != MEASURING or study.method.closed:
        return
    said = "method.kind=fisher squares the gradient of one example after another, once, as they are"
    refused = {
        "local.batch": (study.local.batch != 1, "set it to 1"),
        "schedule.rounds": (study.schedule.rounds != 1, "set it to 1"),
        "protection.compression": (
            not isinstance(study.protection.compression, NoCompression),
            "leave it out: squares that are left out until later would be missing",
        ),
        "protection.robust": (study.protection.robust is not None, "leave it out"),
        "schedule.phases": (bool(study.schedule.phases), "leave them out"),
        "adapters": (not isinstance(study.adapters, NoAdapters), "leave them out"),
    }
    for key, (wrong, remedy) in refused.items():
        if wrong:
            raise ValueError(f"{key}: {said}; {remedy}")
