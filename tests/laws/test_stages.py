"""The law of stages: what a phase does not train does not move, whatever else is at work; what it trains, does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from tests.chain import STAGES, Chain, ChainTask, chain_study, moved, stage_of
from tests.devices import arm_specs_of, learner_of
from tests.examples import quickly
from tests.federation.rig import Rig
from tests.federation.test_private_training import _drawn
from tests.protection.test_secure_rounds import SecureRig
from tests.toys import toy_sites
from wardround.errors import StudyError
from wardround.learning.device import CPU
from wardround.learning.gradients import BatchedGradients, ExactGradients
from wardround.learning.methods.method import LocalRound, Method
from wardround.learning.optimizer import build_optimizer
from wardround.learning.training import Learner, Trained
from wardround.plan.arm_specs import ArmSpecs
from wardround.runs.session import run
from wardround.storage.store import NOTHING, Memory
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.wire import scales

# Which stages move, of each phase.
LEARNS = ({"reconstruct"}, {"segment"}, {"reconstruct", "segment"})
KEEPING = {"steps": 2, "batch": 4, "optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1, "optimizer_state": "keep"}


@dataclass(frozen=True)
class Pushing(Method):
    """A method that gives every parameter a gradient, also where none is made."""

    def gradients(self, local: LocalRound) -> None:
        for parameter in local.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad


def make_pushing() -> Method:
    return Pushing("equal")


AT_WORK: dict[str, dict[str, Any]] = {
    "adam that is kept, with decay": {"local": KEEPING},
    "sgd with momentum and decay": {
        "local": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "optimizer_state": "keep"}
    },
    "a proximal term": {"method": {"kind": "fedprox", "mu": 0.5}},
    "momentum at the coordinator": {"method": {"kind": "fedavgm", "momentum": 0.9}},
    "adam at the coordinator": {"method": {"kind": "fedadam", "server_lr": 0.05}},
    "private layers": {"method": {"kind": "fedbn"}},
    "a head that is fitted first": {
        "method": {"kind": "fedrep", "head": ["segment.3.*"], "head_steps": 2},
        "local": KEEPING,
    },
    "a model of each site's own": {"method": {"kind": "ditto", "pull": [0.1, 1.0]}, "local": KEEPING},
    "what waits at the sites": {"protection": {"compression": {"kind": "top_k", "ratio": 0.1}}},
    "momentum at the sites": {
        "protection": {"robust": {"rule": "median", "momentum": 0.5}},
        "schedule": {"release": "last"},
        "sites": "ABC",
    },
    "gradients of a hook": {"method": {"kind": "custom", "factory": "tests.laws.test_stages:make_pushing"}},
    "control variates": {"method": {"kind": "scaffold"}, "local": KEEPING},
    "changes a step": {
        "method": {"kind": "fednova"},
        "local": {"passes": 1, "batch": 4, "optimizer": "sgd", "lr": 0.1},
    },
    "weights by losses": {"method": {"kind": "fedpidavg"}},
    "flat steps": {"method": {"kind": "harmofl"}, "local": KEEPING},
    "a shared encoder": {"method": {"kind": "modfed", "encoder": ["reconstruct.*", "segment.0.*"]}, "local": KEEPING},
}


@pytest.mark.parametrize("name", quickly(AT_WORK, 0, 3, 5, 6, 7, 9, 11))
def test_only_what_a_phase_trains_moves(name: str, tmp_path: Path) -> None:
    """Bit for bit: weights, running statistics, and what stays at the sites."""
    rig = Rig(chain_study(**AT_WORK[name]), tmp_path)
    states = list(rig.states())
    assert len(states) == 4
    for number, (before, after) in enumerate(pairwise(states), start=1):
        found = moved(before.public, after.public)
        for stage in STAGES:
            if stage in LEARNS[number - 1]:
                assert True in found[stage]
            else:
                assert found[stage] == {False}


def test_private_layers_of_an_idle_stage_stay_as_they_were(tmp_path: Path) -> None:
    study = chain_study(method={"kind": "fedbn"})
    plans = arm_specs_of(study)
    learner = learner_of(plans, tmp_path, CPU)
    public, _ = plans.initial(plans.arm_spec("federated"))
    memory = NOTHING
    kept = []
    for number in (1, 2, 3):
        learner.load(public, memory)
        memory = Memory(learner.train(number, public, memory).memory, {})
        kept.append({n: t for n, t in learner.local_tensors(memory).items() if not n.endswith("tracked")})
    initial = {name: plans.model_context.initial_values()[name] for name in kept[0]}
    for number, (before, after) in enumerate(pairwise([initial, *kept]), start=1):
        expected = {stage: {stage in LEARNS[number - 1]} for stage in STAGES}
        assert moved(before, after) == expected


def _round(plans: ArmSpecs, folder: Path, number: int = 1) -> tuple[Learner, Trained]:
    """A round of one site from the initial values."""
    learner = learner_of(plans, folder, CPU)
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, NOTHING)
    return learner, learner.train(number, public, NOTHING)


def test_a_hook_moves_no_idle_stage_at_a_site(tmp_path: Path) -> None:
    study = chain_study(method={"kind": "custom", "factory": "tests.laws.test_stages:make_pushing"}, local=KEEPING)
    plans = arm_specs_of(study)
    learner, _ = _round(plans, tmp_path)
    after = {name: tensor.detach().numpy() for name, tensor in learner.model.state_dict().items()}
    assert moved(plans.model_context.initial_values(), after) == {"reconstruct": {True}, "segment": {False}}


# What a round is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_round_is_a_plain_loop_over_what_learns(number: int, tmp_path: Path) -> None:
    """One site, one round of each phase: the bits of torch alone, with an optimiser of those parameters only."""
    study = chain_study(local={"steps": 3, "batch": 4, "optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1})
    plans = arm_specs_of(study)
    learner, found = _round(plans, tmp_path, number)
    indices = learner._examples.of_round(number, 12)

    model, task = Chain(True), ChainTask()
    model.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in plans.model_context.initial_values().items()})
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    learns = LEARNS[number - 1]
    for stage in STAGES:
        model.get_submodule(stage).train(stage in learns)
    parts = nn.ModuleList(model.get_submodule(stage) for stage in STAGES if stage in learns)
    optimizer, total = build_optimizer((parts,), study.local), 0.0
    for step in range(3):
        losses = task.losses(model, learner.dataset.batch(indices[4 * step : 4 * step + 4], np.random.default_rng()))
        loss = losses["reconstruct"] if number == 1 else losses["segment"]
        if number == 3:
            loss = losses["reconstruct"] + 0.5 * losses["segment"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += float(loss.detach())
    assert found.loss == pytest.approx(total / 3, rel=1e-6)
    for name, change in (found.changes["model"] | found.changes["buffers"]).items():
        assert np.array_equal(change, (model.state_dict()[name] - before[name]).numpy()), name


def test_the_second_loss_reaches_the_first_stage(tmp_path: Path) -> None:
    """The first network learns by the second one's loss alone, through a second network that stands still."""
    weights = {"reconstruct": 0.0, "segment": 1.0}
    study = chain_study(
        local={"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.5},
        schedule={"phases": [{"train": ["reconstruct"], "weights": weights}]},
    )
    plans = arm_specs_of(study)
    learner, trained = _round(plans, tmp_path)
    changes = trained.changes["model"]
    found = moved({n: np.zeros_like(c) for n, c in changes.items()}, changes)
    assert True in found["reconstruct"]
    assert found["segment"] == {False}
    learner.load(plans.initial(plans.arm_spec("federated"))[0], NOTHING)
    model, task = learner.model, ChainTask()
    model.get_submodule("segment").eval()
    losses = task.losses(model, learner.dataset.batch(learner._examples.of_round(1, 4), np.random.default_rng()))
    parameters = {name: p for name, p in model.named_parameters() if stage_of(name) == "reconstruct"}
    gradients = torch.autograd.grad(losses["segment"], list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        # A bias before batch norm has a gradient of rounding errors alone.
        assert np.allclose(changes[name], -0.5 * gradient.numpy(), rtol=1e-4, atol=1e-7)


def test_a_stage_learns_at_its_share_of_the_rate(tmp_path: Path) -> None:
    """A step of plain gradient descent goes a quarter as far, and the other stage as far as ever."""
    changes = []
    for rates in ({}, {"reconstruct": 0.25}):
        phase = {"train": list(STAGES), "rates": rates}
        local = {"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.5}
        study = chain_study(local=local, schedule={"phases": [phase]})
        changes.append(_round(arm_specs_of(study), tmp_path)[1].changes["model"])
    whole, slow = changes
    for name, change in whole.items():
        share = 0.25 if stage_of(name) == "reconstruct" else 1.0
        # A change is the difference of two float32 weights of size about 1.
        assert np.allclose(slow[name], share * change, rtol=0, atol=2**-22), name


def test_a_stage_that_stands_still_has_no_rate() -> None:
    phase = {"train": ["segment"], "rates": {"reconstruct": 0.1}}
    with pytest.raises(StudyError, match=r"phases\.0\.rates: 'reconstruct' does not learn in this phase"):
        arm_specs_of(chain_study(schedule={"phases": [phase]})).arm_spec("federated")


def test_shares_of_1_change_no_bit_of_rounds_with_a_kept_optimiser(tmp_path: Path) -> None:
    found = []
    for name, rates in (("without", {}), ("with", dict.fromkeys(STAGES, 1.0))):
        phases = [{"rounds": 2, "train": ["segment"]}, {"train": list(STAGES), "rates": rates}]
        rig = Rig(chain_study(local=KEEPING, schedule={"rounds": 4, "phases": phases}), tmp_path / name)
        found.append({n: t.tobytes() for n, t in list(rig.states())[-1].public.items()})
    assert found[0] == found[1]


def test_without_phases_everything_learns_by_the_task_s_loss(tmp_path: Path) -> None:
    found = []
    for phases in ((), [{"train": list(STAGES)}]):
        changes = _round(arm_specs_of(chain_study(schedule={"phases": phases})), tmp_path)[1].changes["model"]
        found.append({name: change.tobytes() for name, change in changes.items()})
    assert found[0] == found[1]


def test_a_site_with_momentum_sends_nothing_of_an_idle_stage(tmp_path: Path) -> None:
    """Its average over rounds would: what it sends of the first stage in round 1 is not all that it learned."""
    plans = arm_specs_of(chain_study())
    learner = learner_of(plans, tmp_path, CPU)
    learner._momentum = 0.5
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, NOTHING)
    first = learner.train(1, public, NOTHING)
    learner.load(public, Memory(first.memory, {}))
    second = learner.train(2, public, Memory(first.memory, {}))
    for trained, learns in ((first, "reconstruct"), (second, "segment")):
        sent = {stage_of(name) for name, change in trained.changes["model"].items() if change.any()}
        assert sent == {learns}


# The run --------------------------------------------------------------------------------------------------------------


def test_masks_change_nothing(tmp_path: Path) -> None:
    study = chain_study(sites="ABCD", protection={"max_sites": 4})
    plain, masked = Rig(study, tmp_path / "plain"), SecureRig(study, tmp_path / "masked")
    assert plain.train().public_sha256 == masked.train().public_sha256


def test_a_run_goes_on_between_phases(tmp_path: Path) -> None:
    study = chain_study(local=KEEPING, method={"kind": "fedavgm"})
    whole = Rig(study, tmp_path / "whole").train()
    first = Rig(study, tmp_path / "halves")
    rounds = first.coordinator.rounds(first.start())
    assert next(rounds).round == 1
    rounds.close()
    again = Rig(study, tmp_path / "halves").train()
    assert again.public_sha256 == whole.public_sha256
    assert again.scales == whole.scales


def test_all_arms_have_the_phases(tmp_path: Path) -> None:
    """Together, alone and pooled."""
    study = chain_study(schedule={"rounds": 1, "phases": [{"train": ["segment"]}]})
    run(study, toy_sites(tmp_path), tmp_path / "out", compare=("local", "pooled"), engine="local", quiet=True)
    initial = ArmSpecs(study, (), None, Plugins(code=True)).model_context.initial_values()
    released = {path.stem: load_file(path) for path in (tmp_path / "out" / "models").glob("*.safetensors")}
    assert released.keys() == {"federated", "pooled", "local-A", "local-B"}
    for tensors in released.values():
        found = moved({name: initial[name] for name in tensors}, tensors)
        assert found["reconstruct"] == {False}
        assert True in found["segment"]


def test_the_released_round_is_of_the_last_phase(tmp_path: Path) -> None:
    phases = [{"rounds": 1, "train": ["reconstruct"]}, {"train": ["segment"]}]
    rig = Rig(chain_study(schedule={"phases": phases}), tmp_path)
    rig.train()
    for report in rig.journal.reports():
        best = {1: 1.0, 2: 0.8, 3: 0.7}[report.round]
        rig.journal.amend(replace(report, validation={"dice": best, "mse": 1.0}))
    assert rig.coordinator.release().number == 2


def test_scales_of_an_idle_stage_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay while it stands still, and then follow the first sum as those of round 1 do."""
    monkeypatch.setattr(scales, "_FEW", 1)  # its tensors are small, and theirs would fall by half in any round
    study = chain_study(protection={"initial_scale": 4096.0, "ring_bits": 32})
    states = list(Rig(study, tmp_path).states())
    for name, start in states[0].scales.items():
        if stage_of(name) == "segment" and name.startswith("model/"):
            assert states[1].scales[name] == start
            # By half, as after any other round, it would be at 2048.
            assert states[2].scales[name] < 0.25 * start
        elif stage_of(name) == "reconstruct":
            assert states[1].scales[name] == states[2].scales[name]


# With privacy ---------------------------------------------------------------------------------------------------------

PRIVACY = {"epsilon": 50.0, "noise_multiplier": 1.0, "clip": 1.0, "patients_per_step": 2}


class Weighted(ChainTask):
    """Trained in phases alone, so that its own loss is never asked for."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise AssertionError("a phase asks for the stages' losses")


def make_weighted(**options: Any) -> ChainTask:
    return Weighted(**options)


def _private(**changes: Any) -> Study:
    privacy = {**PRIVACY, **changes.pop("privacy", {})}
    return chain_study(
        **{
            "task": {
                "kind": "custom",
                "factory": "tests.laws.test_stages:make_weighted",
                "options": {"norm": False, "patients": 12},
            },
            "protection": {"privacy": privacy, **changes.pop("protection", {})},
            **changes,
            "schedule": {"rounds": 1, "release": "last", "phases": [{"train": ["segment"]}]},
        }
    )


DISTRIBUTED = {
    "privacy": {"noise": "distributed", "delta": 0.01, "epsilon": 8.0},
    "protection": {"secure": True},
    "sites": "ABC",
    "local": {"steps": 1, "optimizer": "sgd", "lr": 0.1},
}


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"privacy": {"gradients": "opacus"}}, marks=pytest.mark.slow), DISTRIBUTED],
    ids=["a site's noise", "opacus", "distributed"],
)
def test_noise_is_on_what_learns_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    """Every value of the stage that learns is noised; of the idle one none moves."""
    study = _private(**changes)
    result = run(study, toy_sites(tmp_path), tmp_path / "out", engine="local", quiet=True)
    assert result.privacy is not None
    released = load_file(tmp_path / "out" / "models" / "federated.safetensors")
    found = moved(ArmSpecs(study, (), None, Plugins(code=True)).model_context.initial_values(), released)
    assert found == {"reconstruct": {False}, "segment": {True}}


def test_a_patient_s_gradient_is_clipped_over_what_learns(tmp_path: Path) -> None:
    """The idle stage takes no part of the bound: the gradient has the length of the learning stage's alone."""
    plans = arm_specs_of(_private())
    task, model = plans.curriculum.task(1, plans.task), plans.model_context.model
    stint = plans.curriculum.at(1)
    assert stint is not None
    dataset = plans.task.dataset("A", (tmp_path,))
    draw = _drawn([(0,), (3, 4)])
    with stint.holding(model):
        exact = list(ExactGradients(task, model).per_patient(dataset, draw))
        with BatchedGradients.attached(task, model) as batched:
            batched.self_test(dataset)
            at_once = list(batched.per_patient(dataset, draw))
    size = sum(p.numel() for p in model.get_submodule("segment").parameters())
    for one, other in zip(exact, at_once, strict=True):
        assert one.shape == other.shape == (size,)
        assert float((one - other).norm()) < 1e-4 * float(one.norm())
