"""What an audit is of: the model, the study as it is audited, and what it claims."""

from __future__ import annotations

from pathlib import Path

from wardround.audit.epsilon import Claim
from wardround.learning.private_training import training_patients
from wardround.plan.arms import FEDERATED
from wardround.protection.privacy import terms_of
from wardround.study.schema import Study
from wardround.study.tasks import ReconstructionTask
from wardround.tasks.task import Dataset


def model_file(model: Path | None) -> Path | None:
    """The model that is meant: of a run's folder, the one trained together."""
    if model is None or not model.is_dir():
        return model
    return model / "models" / f"{FEDERATED}.safetensors"


def held_out_alike(study: Study) -> Study:
    """The study with held-out slices chosen as training's are: attacks would tell rules apart, and not members."""
    task = study.task
    if not isinstance(task, ReconstructionTask):
        return study
    alike = task.evaluation.model_copy(update={"slices": task.slices})
    return study.model_copy(update={"task": task.model_copy(update={"evaluation": alike})})


def claimed(study: Study, site: str, dataset: Dataset) -> Claim | None:
    """What the study claims of a site's privacy for the federated model: its own noise, and epsilon from that.

    Nothing where sites share the noise: none of them adds enough for a claim of its own.
    """
    privacy = study.protection.privacy
    if privacy is None or privacy.noise == "distributed":
        return None
    steps = study.schedule.rounds * study.local.steps_of(len(dataset))
    terms = terms_of(privacy, site, training_patients(dataset), steps)
    return Claim(terms.noise, terms.clip, steps, terms.rate, terms.delta)
