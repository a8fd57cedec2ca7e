"""Stages of a task and phases of a study: what fits together, what is refused, and what `check` says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.chain import STAGES, Chain, ChainTask, chain_study
from tests.devices import arm_specs_of, learner_of
from tests.toys import toy_study
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.learning.device import CPU
from wardround.learning.training import Trained
from wardround.plan.arm_specs import ArmSpecs
from wardround.runs.explain import explain
from wardround.storage.store import NOTHING
from wardround.study.load import load_study
from wardround.tasks.stages import weighted_sum


def _round(plans: ArmSpecs, folder: Path) -> Trained:
    """The first round of one site."""
    learner = learner_of(plans, folder, CPU)
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, NOTHING)
    return learner.train(1, public, NOTHING)


def test_losses_add_up_by_their_weights() -> None:
    losses = {"one": torch.tensor(2.0), "two": torch.tensor(3.0), "three": torch.tensor(math.nan)}
    assert float(weighted_sum(losses, {"one": 1.0, "two": 0.5, "three": 0.0})) == 3.5
    assert float(weighted_sum({"one": losses["one"], "two": losses["two"]})) == 5.0
    with pytest.raises(StudyError, match="no loss of the stage 'four'"):
        weighted_sum(losses, {"four": 1.0})


@pytest.mark.parametrize(
    ("phases", "why"),
    [
        ([{"rounds": 2, "train": ["segment"]}], "schedule.phases: .* take 2 rounds in all, and schedule.rounds is 3"),
        ([{"rounds": 3, "train": ["segment"]}, {"train": ["segment"]}], "take 3 rounds.*none is left for the last"),
        ([{"train": ["segment"]}, {"train": ["segment"]}], "schedule.phases: phase 1 of 2 has no `rounds`"),
        ([{"train": ["segment", "segment"]}], "phase 1 of 1 names a stage twice"),
        ([{"train": ["segment"], "weights": {"segment": 0.0}}], "gives every loss the weight 0"),
        ([{"train": ["segment"], "weights": {"segment": -1.0}}], "schedule.phases.0.weights.segment"),
        ([{"train": []}], "schedule.phases.0.train"),
        ([{"train": ["segment"], "round": 3}], "unknown key.*rounds"),
    ],
)
def test_phases_that_cannot_be_are_refused_by_the_study(phases: Any, why: str, tmp_path: Path) -> None:
    study = chain_study().model_dump(mode="json", exclude_unset=True)
    study["schedule"]["phases"] = phases
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(StudyError, match=why):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    ("phases", "why"),
    [
        ([{"train": ["segmnt"]}], r"schedule.phases.0.train: 'segmnt' is no stage.*reconstruct, segment"),
        ([{"train": ["segment"], "weights": {"recon": 1.0}}], r"schedule.phases.0.weights: 'recon' is no stage"),
        (
            [{"train": list(STAGES), "weights": {"segment": 0.0}}],
            "the stage 'segment' learns, and no loss that depends on it has a weight",
        ),
    ],
)
def test_phases_that_do_not_fit_the_task_are_refused_before_training(phases: Any, why: str) -> None:
    with pytest.raises(StudyError, match=why):
        arm_specs_of(chain_study(schedule={"phases": phases})).arm_spec("federated")


def test_phases_of_a_task_without_stages_are_refused() -> None:
    with pytest.raises(StudyError, match=r"schedule.phases: the task has no stages.*remove it"):
        arm_specs_of(toy_study(schedule={"phases": [{"train": ["segment"]}]})).arm_spec("federated")


class Tied(ChainTask):
    """A tensor in two stages."""

    def build_model(self) -> nn.Module:
        model = Chain(self.norm)
        model.get_submodule("segment")[3].bias = model.get_submodule("reconstruct")[3].bias  # type: ignore[index]
        return model


class Loose(ChainTask):
    """A parameter of no stage."""

    def build_model(self) -> nn.Module:
        model = Chain(self.norm)
        model.temperature = nn.Parameter(torch.ones(()))
        return model


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (ChainTask(stages=("reconstruct",)), r"segment\.0\.weight of the model belongs to no stage"),
        (ChainTask(stages=("reconstruct", "segment", "segment.0")), "stages segment and segment.0"),
        (ChainTask(stages=("reconstruct", "segment", "grade")), "no part 'grade'"),
        (Tied(), "one tensor in two stages"),
        (Loose(), "temperature of the model belongs to no stage"),
    ],
)
def test_stages_part_the_model(task: ChainTask, why: str) -> None:
    plans = arm_specs_of(chain_study())
    plans.__dict__["task"] = task
    with pytest.raises(StudyError, match=why):
        plans.arm_spec("federated")


class Detached(ChainTask):
    """The second network is fed what no gradient passes."""

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {name: loss.detach() for name, loss in super().losses(model, batch).items()}


class Forgetful(ChainTask):
    """Gives one loss only."""

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"reconstruct": super().losses(model, batch)["reconstruct"]}


@pytest.mark.parametrize(("task", "why"), [(Detached(), "does not depend on"), (Forgetful(), "no loss of the stage")])
def test_losses_that_teach_nothing_are_an_error(task: ChainTask, why: str, tmp_path: Path) -> None:
    plans = arm_specs_of(chain_study(schedule={"phases": [{"train": ["segment"]}]}))
    plans.__dict__["task"] = task
    with pytest.raises(StudyError, match=why):
        _round(plans, tmp_path)
    assert all(parameter.requires_grad for parameter in plans.model_context.model.parameters())


def test_a_loss_without_weight_may_be_no_number(tmp_path: Path) -> None:
    class Broken(ChainTask):
        def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            losses = super().losses(model, batch)
            return {**losses, "reconstruct": losses["reconstruct"] * torch.nan}

    plans = arm_specs_of(chain_study(schedule={"phases": [{"train": ["segment"]}]}))
    plans.__dict__["task"] = Broken()
    assert math.isfinite(_round(plans, tmp_path).loss)


def test_check_says_which_stages_learn_when(tmp_path: Path) -> None:
    study = chain_study().model_dump(mode="json", exclude_unset=True)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    text = " ".join(explain(tmp_path / "study.yaml", None, (), (), allow_code=True).split())
    assert "from round 1: reconstruct; loss 1 reconstruct; idle: segment" in text
    assert "from round 3: reconstruct, segment; loss 1 reconstruct, 0.5 segment" in text
