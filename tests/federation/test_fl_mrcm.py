"""FL-MRCM against its equations by a plain loop, and what its side channel tells."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.devices import DEVICES, arm_specs_of, device_named, learner_of
from tests.examples import quickly
from tests.federation.alignment import Away, descend, gradients, unlike_study
from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.errors import StudyError, Withheld
from wardround.learning.adversary import Adversary
from wardround.learning.device import CPU
from wardround.learning.latents import bottleneck_of, width_of
from wardround.learning.methods.apart import APART
from wardround.learning.methods.fl_mrcm import FLMRCM, LATENTS, confusion, grouped
from wardround.learning.methods.method import LocalRound
from wardround.models.blocks import Denoiser, ResidualUNet
from wardround.plan.arm_specs import ArmSpecs
from wardround.storage.store import NOTHING, Memory
from wardround.study.models import Layer
from wardround.study.plugins import Plugins
from wardround.study.registry import builtin

LR, RATE, WEIGHT, TARGET = 0.1, 1e-2, 0.7, "C"
METHOD = {"kind": "fl_mrcm", "target": TARGET, "layer": "0", "patients": 2, "vectors": 7, "lr": RATE, "hidden": 5}
METHOD = {**METHOD, "adversarial": WEIGHT}


def rig_of(tmp_path: Path, rounds: int = 3, **changes: Any) -> Rig:
    return Rig(unlike_study(METHOD, {"steps": 2, "lr": LR}, rounds, **changes), tmp_path)


def table_of(public: Any) -> np.ndarray[Any, Any]:
    """The vectors that are told, as they were."""
    table = np.asarray(public[f"{APART}/{LATENTS}"], np.float64)
    return np.asarray(table[table[:, -1] > -4.0, :-1] + 8.0)


def bce(logits: Tensor, label: tuple[float, float]) -> Tensor:
    said, wanted = torch.sigmoid(logits), torch.tensor(label, dtype=logits.dtype)
    return -(wanted * torch.log(said) + (1.0 - wanted) * torch.log(1.0 - said)).mean()


@pytest.mark.parametrize("rounds", quickly([2, 3], 0))
def test_it_follows_its_equations(rounds: int, tmp_path: Path) -> None:
    """A plain loop in double precision, two steps a round: discriminators go on from step to step and from round to
    round, and z_t is of the target's network after its steps.
    """
    rig = rig_of(tmp_path, rounds)
    states, discriminators, squares = rig.states(), {}, {}
    before, terms = next(states), []
    for number in range(1, rounds + 1):
        assert len(table_of(before.public)) == (0 if number == 1 else 7)
        there = torch.from_numpy(table_of(before.public))
        told = None
        for site in rig.sites:
            learner, memory = rig.learner(site), rig.sites[site].store.memory(number - 1)
            learner.load(before.public, memory)
            start, model = floats64(learner.model), deepcopy(learner.model).double()
            if site != TARGET and site not in discriminators and len(there):
                discriminators[site] = first_discriminator(learner.model, site, rig.study.seed)
                squares[site] = [torch.zeros_like(p) for p in discriminators[site].parameters()]
            indices = learner._examples.of_round(number, 8)
            for k in range(2):
                x, y = (t.double() for t in learner.dataset.batch(indices[4 * k : 4 * k + 4], np.random.default_rng()))
                z = model[0](x)
                loss = (model[1:](z) - y).square().mean()
                if site != TARGET and len(there):
                    d = discriminators[site]
                    here = torch.stack([z[:2].mean(0), z[2:].mean(0)])
                    own = 0.5 * (bce(d(here.detach()), (1.0, 0.0)) + bce(d(there), (0.0, 1.0)))
                    found = torch.autograd.grad(own, list(d.parameters()))
                    with torch.no_grad():
                        for p, g, v in zip(d.parameters(), found, squares[site], strict=True):
                            v.mul_(0.99).add_(0.01 * g**2)
                            p -= RATE * g / (v.sqrt() + 1e-8)
                    term = 0.5 * (bce(d(here), (0.0, 1.0)) + bce(d(there), (1.0, 0.0)))
                    terms.append(float(term.detach()))
                    loss = loss + WEIGHT * term
                descend(model, gradients(model, loss), LR)
            trained = learner.train(number, before.public, memory)
            for name, change in trained.changes["model"].items():
                wanted = model.state_dict()[name].numpy() - start[name]
                assert np.allclose(change, wanted, rtol=0, atol=2e-5), (number, site, name)
            if site == TARGET:
                told = [model[0](x).detach().numpy().mean(0) for x in of_groups(rig, site)]
                assert not any(name.startswith("method/") for name in trained.memory)
            else:
                assert not trained.changes[APART][LATENTS].any()
            if site in discriminators:
                kept = {n.partition("method/adversary/")[2]: t for n, t in trained.memory.items()}
                for name, value in discriminators[site].state_dict().items():
                    assert np.allclose(kept[name], value.numpy(), atol=2e-5)
        before = next(states)
        assert np.allclose(table_of(before.public), told, atol=2e-5)
    assert len(terms) == 4 * (rounds - 1)
    assert np.ptp(terms) > 1e-4
    assert set(rig.method.release_for(None, before.public, {})) == set(rig.host.model_context.model.state_dict())


def floats64(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().double().numpy().copy() for name, tensor in model.state_dict().items()}


def first_discriminator(model: nn.Module, site: str, seed: int) -> nn.Module:
    """As a site begins it."""
    shared = dict(model.named_parameters())
    local = LocalRound(site, model, shared, {}, {}, {}, 1, 1, LR, seed=seed)  # type: ignore[arg-type]
    return Adversary.of(local, FLMRCM(width=8, hidden=5)._discriminator, RATE).network.double()


def of_groups(rig: Rig, site: str) -> list[Tensor]:
    """The inputs that a vector of the target is the mean over, each of two patients."""
    survey = survey_of(rig, site)
    data = survey.dataset
    groups = survey.across_patients(2, 7)
    # 11 patients: five pairs, one left out, then the same pairs' other examples.
    assert len(groups) == 7
    owners = [frozenset(data.owners()[i] for i in group) for group in groups]
    assert len({i for group in groups for i in group}) == 14
    assert owners[5:] == owners[:2]
    assert sorted(len(one & other) for one in owners[:5] for other in owners[:5]) == [0] * 20 + [2] * 5
    return [data.batch(group, np.random.default_rng())[0].double() for group in groups]


def survey_of(rig: Rig, site: str) -> Any:
    from wardround.learning.survey import Survey

    learner = rig.learner(site)
    return Survey(site, learner.dataset, learner.examples, rig.study.local, rig.study.seed)


def test_the_losses_by_hand() -> None:
    here, there = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]])
    plain = [np.log1p(np.exp(v)) for v in (0.0, 2.0, 1.0, -1.0)]
    # BCE of a logit v is log(1 + e^v) for the label 0, and that minus v for 1.
    first = 0.5 * ((plain[0] - 0.0 + plain[1]) / 2 + (plain[2] + plain[3] + 1.0) / 2)
    second = 0.5 * ((plain[0] + plain[1] - 2.0) / 2 + (plain[2] - 1.0 + plain[3]) / 2)
    assert float(confusion(here, there, 0)) == pytest.approx(first)
    assert float(confusion(here, there, 1)) == pytest.approx(second)
    assert grouped(torch.arange(10.0).reshape(5, 2), 2).tolist() == [[1.0, 2.0], [5.0, 6.0]]


@pytest.mark.slow
def test_a_run_that_goes_on_after_a_stop_comes_to_the_same_bits(tmp_path: Path) -> None:
    whole = rig_of(tmp_path / "whole").train()
    stopped = rig_of(tmp_path / "stopped")
    states = stopped.states()
    assert [next(states).round for _ in range(3)] == [0, 1, 2]
    for site in stopped.sites.values():
        site.close()
    again = rig_of(tmp_path / "stopped").train()
    assert again.public_sha256 == whole.public_sha256


@pytest.mark.slow
def test_where_the_target_is_away_its_last_vectors_stay(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, 4, schedule={"min_sites": 2})
    rig.sites[TARGET] = Away(rig.sites[TARGET], (2,))  # type: ignore[assignment]
    tables = [table_of(state.public) for state in rig.states()]
    assert np.array_equal(tables[1], tables[2])
    assert not np.allclose(tables[2], tables[3], atol=1e-3)


@pytest.mark.slow
def test_without_weight_it_is_fedavg(tmp_path: Path) -> None:
    """The discriminators train, and move nothing."""
    found = []
    for method in ({**METHOD, "adversarial": 0.0}, {"kind": "fedavg", "weights": "equal"}):
        rig = Rig(unlike_study(method, {"steps": 2, "lr": LR}, 3), tmp_path / str(method["kind"]))
        public = rig.train().public
        found.append({n: np.asarray(public[n]) for n in public if n.startswith("model/")})
    for name, tensor in found[0].items():
        assert np.allclose(tensor, found[1][name], rtol=0, atol=1e-6)


def test_vectors_of_too_few_patients_stay_at_the_target(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    state, learner = rig.start(), rig.learner(TARGET)
    learner._least = 3
    learner.load(state.public, rig.sites[TARGET].store.memory(0))
    with pytest.raises(
        Withheld, match=r"a vector is of 2 patients, and the site lets out nothing of fewer than 3; set"
    ):
        learner.train(1, state.public, rig.sites[TARGET].store.memory(0))
    few = Rig(unlike_study({**METHOD, "target": "A", "patients": 4}, {"steps": 2}, 1), tmp_path / "few")
    learner = few.learner("A")
    learner.load(few.start().public, few.sites["A"].store.memory(0))
    with pytest.raises(Withheld, match="it has 3 patients, and the site lets out nothing of fewer than 4"):
        learner.train(1, few.start().public, few.sites["A"].store.memory(0))


@pytest.mark.slow
def test_no_hook_is_left_and_the_vectors_are_a_side_channel(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    rig.train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rig.host.model_context.model.modules())
    assert rig.arm_spec.kinds.side_channels == {APART}
    assert "of site C alone: every round 7 vectors of 8 numbers at most, what layer '0'" in rig.method.discloses
    assert "one image each of 2 of its training patients; no image" in rig.method.discloses


@pytest.mark.slow
def test_statistics_of_batch_norm_count_the_targets_batches_alone(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, options={"norm": True})
    state, memory = rig.start(), rig.sites[TARGET].store.memory(0)
    learner = rig.learner(TARGET)
    learner.load(state.public, memory)
    trained = learner.train(1, state.public, memory)
    assert int(trained.memory["local/1.num_batches_tracked"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("site", ["A", TARGET])
def test_discriminator_and_vectors_are_where_the_site_computes(
    site: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for compute in (CPU, device_named(device, monkeypatch)):
        plans = arm_specs_of(unlike_study(METHOD, {"steps": 2, "lr": LR}))
        learner, memory = learner_of(plans, tmp_path, compute, site), NOTHING
        public, _ = plans.initial(plans.arm_spec("federated"))
        table = np.random.default_rng(0).normal(-8.0, 1.0, public[f"{APART}/{LATENTS}"].shape).astype(np.float32)
        table[:, -1] = 0.0
        public[f"{APART}/{LATENTS}"] = table
        for number in (1, 2):
            learner.load(public, memory)
            trained = learner.train(number, public, memory)
            memory = Memory(trained.memory, {})
        found.append(trained)
    here, there = found
    assert {n: t.shape for n, t in here.memory.items()} == {n: t.shape for n, t in there.memory.items()}
    assert any("adversary" in name for name in here.memory) == (site != TARGET)
    assert here.changes[APART][LATENTS].shape == there.changes[APART][LATENTS].shape
    if device == "cuda":
        assert np.allclose(here.changes[APART][LATENTS], there.changes[APART][LATENTS], atol=1e-4)


REFUSED = {
    "target": ({"method": {**METHOD, "target": "X"}}, r"method\.target: 'X' is no training site; choose from A, B, C"),
    "secure": ({"protection": {"secure": True}}, "cannot be combined with protection.secure: the target's latents"),
    "privacy": (
        {
            "protection": {"privacy": {"patients_per_step": 2}},
            "schedule": {"rounds": 2, "release": "last"},
        },
        "method.kind=fl_mrcm cannot be combined with protection.privacy",
    ),
    "robust": (
        {"protection": {"robust": {"rule": "median"}}, "schedule": {"rounds": 2, "release": "last"}},
        "protection.robust",
    ),
    "batch": ({"local": {"batch": 1}}, "set local.batch to 2 or a multiple"),
    "pieces": ({"local": {"batch": 4, "accumulate": 2}}, r"local\.accumulate: with method.kind=fl_mrcm"),
    "late": ({"schedule": {"asynchronous": {"buffer": 2}, "rounds": 2}}, "asynchronous"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        toy_study(**{"method": METHOD, "local": {"batch": 4}, **changes})


def test_a_network_without_such_a_layer_is_refused_with_the_key_to_set() -> None:
    for layer, reason in (
        (None, r"model\.kind=own_network does not say where.*as method\.layer"),
        ("none", r"method\.layer: the network has no module 'none'"),
        ("1", r"method\.layer: '1' does not say how many features it has"),
    ):
        study = toy_study(method={**METHOD, "layer": layer}, local={"batch": 4})
        with pytest.raises(StudyError, match=reason):
            ArmSpecs(study, (), plugins=Plugins(code=True)).arm_spec("federated")


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_denoisers_and_unets_say_where_their_middle_is(layers: int, norm: Any) -> None:
    stack = Denoiser(4, layers, norm=norm)
    found = bottleneck_of(nn.ModuleDict({"denoiser": stack}))
    assert found is not None
    assert width_of(nn.ModuleDict({"denoiser": stack}), found) == 4
    # What comes next is a ReLU, with as many convolutions before it as behind it, or one more.
    place = int(found.name.rpartition(".")[2])
    assert isinstance(stack.stack[place + 1], nn.ReLU)
    before = sum(isinstance(layer, nn.Conv2d) for layer in stack.stack[: place + 1])
    assert before - (layers - before) in (0, 1)
    unet = ResidualUNet(4, 3)
    assert bottleneck_of(unet) == Layer("inner.2")
    assert width_of(unet, Layer("inner.2")) == 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modl", "learn", "unet"])
def test_networks_of_mri_have_a_default(kind: str) -> None:
    network = builtin("model", kind).model_validate({"kind": kind, "preset": "tiny"}).build("mri")  # type: ignore[attr-defined]
    layer = bottleneck_of(network)
    assert layer is not None
    assert width_of(network, layer)
