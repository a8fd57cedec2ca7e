"""FedMRI, ModFed, FedPR and fair weights, each against its equation as a plain loop in double precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

from tests.examples import quickly
from tests.federation.alignment import FINE, Away, descend, gradients, plain, shared_in, unlike_study
from tests.federation.rig import Rig, assert_billed, recorded_sessions
from tests.federation.test_methods import told
from tests.learning.mri_methods import TOKENS, WIDTH, Prompted, prompted_study
from tests.mri_hospitals import make_hospitals, write_study
from tests.toys import Regression, toy_sites, toy_study
from wardround.errors import StudyError
from wardround.federation.expected import expected
from wardround.federation.release import own_folder
from wardround.federation.spooled import each_update
from wardround.learning.methods.encoder import SharesEncoder
from wardround.learning.methods.fair_weights import FAIR, adjusted
from wardround.learning.methods.fedmri import COUNT, PREVIOUS, ContrastiveFedMRI, FedMRI
from wardround.learning.methods.fedpr import FedPR, null_space
from wardround.learning.methods.method import MODEL, Facts
from wardround.learning.methods.modfed import ModFed
from wardround.learning.model_context import parameters_of
from wardround.living.joining import join
from wardround.models.blocks import Denoiser, ResidualUNet
from wardround.models.cnn import PostUNet, UNetShape
from wardround.models.encoder import encoder_of
from wardround.models.swin_denoiser import SwinDenoiserSettings
from wardround.models.unrolled import MoDL, MoDLShape
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import file_sha256
from wardround.protection.drift import UpdateBound
from wardround.runs.explain import explain
from wardround.runs.machine import Machine
from wardround.runs.session import run
from wardround.study.hashes import written
from wardround.study.load import load_study
from wardround.study.plugins import Plugins
from wardround.study.sites import load_sites

Array = npt.NDArray[Any]
CODE = Plugins(code=True)
ROUNDS = 3
ENCODER = {"encoder": ["0.*"]}
FEDMRI = {"kind": "fedmri", "contrast": 0.3, **ENCODER}
MODFED = {"kind": "modfed", **ENCODER}
FAIR_WEIGHTS = {"kind": "fair_weights", "step": 0.4}
# Float32 arithmetic of some ten steps with values of about 1, and sums of steps of their scales.
CLOSE = {"rtol": 0.0, "atol": 3e-6}


def rig_of(method: Mapping[str, Any], folder: Path, rounds: int = ROUNDS, **changes: Any) -> Rig:
    study = unlike_study(method, {"steps": 3, **changes.pop("local", {})}, rounds, **changes)
    contrasted = study.method.kind == "fedmri" and study.method.contrast
    return Rig(study, folder, **({"protocol": each_update(folder / "updates")} if contrasted else {}))


def loaded(rig: Rig, site: str, number: int, public: Mapping[str, Array]) -> dict[str, Array]:
    """What a site begins a round with: the shared values, and its own of the rest."""
    memory = rig.sites[site].store.memory(number - 1).tensors
    initial = rig.host.model_context.initial_values()
    own = {n: memory.get(f"local/{n}", initial[n]) for n in rig.arm_spec.policy.names("local")}
    return {**own, **shared_in(public)}


def validation_loss(rig: Rig, site: str, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        losses = [
            float((model(x.double()) - y.double()).square().mean())
            for _, (x, y) in rig.learner(site).dataset.evaluation("validation")
        ]
    return float(np.mean(losses))


# FedMRI ---------------------------------------------------------------------------------------------------------------


def test_the_contrast_is_that_of_the_equation_and_of_all_sites_of_the_round_before(tmp_path: Path) -> None:
    rig, beta = rig_of(FEDMRI, tmp_path), 0.3
    states = rig.states()
    before, previous = next(states), list[dict[str, Array]]()
    felt = 0.0
    for number in range(1, ROUNDS + 1):
        said = told(rig, number, before.public)
        shared = {n: torch.from_numpy(t) for n, t in shared_in(before.public).items()}
        for site, trained in zip(rig.sites, said, strict=True):
            start = loaded(rig, site, number, before.public)

            def step(model: nn.Module, loss: Any, k: int, shared: Any = shared, previous: Any = previous) -> None:
                nonlocal felt
                by = gradients(model, loss(model))
                own = {n: p.detach() for n, p in model.named_parameters()}
                near = sum(float((own[n] - shared[n]).abs().sum()) for n in shared)
                far = sum(float((own[n] - torch.from_numpy(one[n])).abs().sum()) for one in previous for n in shared)
                for n in shared if previous else ():
                    towards = torch.sign(own[n] - shared[n])
                    away = sum(torch.sign(own[n] - torch.from_numpy(one[n])) for one in previous)
                    added = beta * (towards / far - near * away / far**2)
                    assert k or not added.abs().max() > 1e-12
                    felt = max(felt, float(added.detach().abs().max()))
                    by[n] = by[n] + added
                descend(model, by, 0.1)

            model = plain(rig, site, number, start, step)
            for n in shared:
                wanted = model.state_dict()[n].numpy() - shared[n].numpy()
                assert np.allclose(trained.changes[MODEL][n], wanted, **CLOSE), (site, number, n)
            assert set(trained.memory) == {"local/2.weight", "local/2.bias"}
        # Encoders count alike, and each of them is in the next broadcast.
        state = next(states)
        moved = [{n: s.changes[MODEL][n].astype(np.float64) for n in shared} for s in said]
        for n in shared:
            mean = shared[n].numpy() + np.mean([m[n] for m in moved], axis=0)
            assert np.allclose(state.public[f"{MODEL}/{n}"], mean, **CLOSE)
            told_of = state.public[f"{PREVIOUS}/{n}"]
            assert np.allclose(told_of, [shared[n].numpy() + m[n] for m in moved], **CLOSE)
        assert state.public[f"{COUNT}/{COUNT}"].tolist() == [3.0]
        previous = [{n: np.asarray(state.public[f"{PREVIOUS}/{n}"][k], np.float64) for n in shared} for k in range(3)]
        before = state
    assert felt > 1e-2


@pytest.mark.slow
def test_a_site_that_is_away_is_not_contrasted_with(tmp_path: Path) -> None:
    rig = rig_of(FEDMRI, tmp_path, schedule={"min_sites": 2})
    rig.sites["B"] = Away(rig.sites["B"], (2,))  # type: ignore[assignment]
    states = list(rig.states())
    assert [float(s.public[f"{COUNT}/{COUNT}"][0]) for s in states] == [0.0, 3.0, 2.0, 3.0]
    left = states[2].public[f"{PREVIOUS}/0.weight"]
    assert left[:2].any(axis=(1, 2)).all()
    assert not left[2].any()
    assert set(rig.method.release_for(None, states[3].public, {})) == {"0.weight", "0.bias"}


@pytest.mark.slow
def test_without_contrast_it_is_fedper_and_works_under_masks(tmp_path: Path) -> None:
    ends = []
    for name, method, secure in (
        ("fedmri", {**FEDMRI, "contrast": 0.0}, False),
        ("masked", {**FEDMRI, "contrast": 0.0}, True),
        ("fedper", {"kind": "fedper", "head": ["2.*"]}, False),
    ):
        study = unlike_study(method, {"steps": 2}, 2, protection={"secure": secure}, schedule={"release": "last"})
        out = tmp_path / name / "out"
        ends.append(run(study, toy_sites(tmp_path / name), out, engine="local", quiet=True, allow_code=True))
    assert len({end.model_sha256 for end in ends}) == 1
    assert ends[0].local_sha256 == ends[2].local_sha256


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"protection": {"secure": True}}, "protection.secure"),
        ({"protection": {"robust": {}}, "schedule": {"release": "last"}}, "protection.robust"),
        ({"protection": {"compression": {"kind": "top_k"}}}, "protection.compression"),
        ({"protection": {"privacy": {"patients_per_step": 2}}, "schedule": {"release": "last"}}, "protection.privacy"),
        ({"schedule": {"asynchronous": {"buffer": 2}}}, "schedule.asynchronous"),
    ],
)
def test_what_hides_or_ages_an_encoder_is_refused_with_the_contrast_alone(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=f"cannot be combined with {key}.*set method.contrast to 0"):
        toy_study(method=FEDMRI, **changes)
    toy_study(method={**FEDMRI, "contrast": 0.0}, **changes)


@pytest.mark.slow
def test_every_encoder_is_on_the_bill_and_in_what_check_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_bill, bill = (
        expected(rig_of({**FEDMRI, "contrast": contrast}, tmp_path / str(contrast)).host).training
        for contrast in (0.0, 0.3)
    )
    encoder = 4 * (6 * 8 + 8)
    assert plain_bill.down.side_channels == 0
    assert bill.down.side_channels == 3 * encoder + 4
    assert bill.up == plain_bill.up
    assert bill.down.model == plain_bill.down.model == encoder
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written(unlike_study(FEDMRI, {"steps": 2}, 2))))
    text = " ".join(explain(tmp_path / "study.yaml", None, (), (), allow_code=True).split())
    assert "its encoder as it is after the round" in text
    assert "all sites in the next round" in text
    sent = recorded_sessions(monkeypatch)
    study = unlike_study(FEDMRI, {"steps": 2}, 2, sites={"A": {}, "B": {}, "C": {"role": "unseen"}})
    found = run(study, toy_sites(tmp_path), tmp_path / "out", engine="local", quiet=True, allow_code=True)
    assert_billed(found, sent)
    assert found.estimate("federated", "C", "mse") is not None


def test_networks_know_their_encoders() -> None:
    nine = encoder_of(Denoiser(4, 9))
    assert nine == {f"stack.{2 * k}.{part}" for k in range(6) for part in ("weight", "bias")}
    # A normalisation belongs to the convolution before it.
    normed = encoder_of(Denoiser(4, 3, norm="batch"))
    assert {n.split(".")[1] for n in normed} == {"0", "2", "3"}
    net = ResidualUNet(4, 2)
    assert {n.split(".")[0] for n in encoder_of(net)} == {"down", "inner"}
    unrolled = MoDL(MoDLShape(unrolls=1, cg_iterations=1, channels=4, layers=3))
    assert encoder_of(unrolled) == {f"denoiser.stack.{k}.{part}" for k in (0, 2) for part in ("weight", "bias")}
    assert encoder_of(nn.Linear(2, 2)) == frozenset()


@pytest.mark.slow
def test_the_way_down_of_a_unet_is_its_encoder() -> None:
    unet = encoder_of(PostUNet(UNetShape((8, 8, 8, 8, 8, 8))))
    assert {n.split(".")[1] for n in unet} == {"conv_0", "down_1", "down_2", "down_3", "down_4"}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"kind": "fedmri"}, "shares the encoder of a network, and of this one it is not known"),
        ({"kind": "modfed", "encoder": ["9.*"]}, r"method\.encoder: '9\.\*' matches no name"),
        ({"kind": "fedmri", "encoder": ["*"]}, "nothing that learns does"),
        ({"kind": "fedpr"}, "the study begins with an untrained network"),
    ],
)
def test_a_network_without_the_parts_is_refused(method: dict[str, Any], reason: str) -> None:
    with pytest.raises((StudyError, ValidationError), match=reason):
        ArmSpecs(toy_study(method=method), (), plugins=CODE).arm_spec("federated")


@pytest.mark.slow
def test_of_an_unrolled_network_two_thirds_of_the_denoiser_are_shared(tmp_path: Path) -> None:
    make_hospitals(tmp_path / "data")
    study, sites = write_study(tmp_path, tmp_path / "data", method={"kind": "fedmri", "contrast": 0.1})
    result = run(load_study(study, ()), load_sites(sites), tmp_path / "out", engine="local", quiet=True)
    released = result.out / "models" / "federated.safetensors"
    for site in ("Alpha", "Beta"):
        own = load_file(own_folder(released, site) / "local.safetensors")
        assert set(own) == {"log_weight", "denoiser.stack.4.weight", "denoiser.stack.4.bias"}
        assert set(load_file(released)) - set(own) == {
            f"denoiser.stack.{place}.{part}" for place in (0, 2) for part in ("weight", "bias")
        }
    assert result.estimate("federated", "Alpha", "psnr") is not None


# ModFed ---------------------------------------------------------------------------------------------------------------


def test_modfed_weighs_by_the_softmax_of_the_sites_validation_losses(tmp_path: Path) -> None:
    rig = rig_of(MODFED, tmp_path, 2)
    states = rig.states()
    before = next(states)
    for number in (1, 2):
        said, shared, losses, moved = told(rig, number, before.public), shared_in(before.public), [], []
        for site, trained in zip(rig.sites, said, strict=True):
            start = loaded(rig, site, number, before.public)
            model = plain(rig, site, number, start, lambda m, loss, k: descend(m, gradients(m, loss(m)), 0.1))
            losses.append(validation_loss(rig, site, model))
            moved.append({n: model.state_dict()[n].numpy() - shared[n] for n in shared})
            assert trained.weights[MODEL] == pytest.approx(math.exp(losses[-1] - 2.0), rel=1e-5)
        weights = np.exp(losses) / np.exp(losses).sum()
        assert weights.argmax() == int(np.argmax(losses))
        assert np.ptp(weights) > 1e-3
        state = next(states)
        for n in shared:
            wanted = shared[n] + sum(w * m[n] for w, m in zip(weights, moved, strict=True))
            assert np.allclose(state.public[f"{MODEL}/{n}"], wanted, **CLOSE), (number, n)
        before = state
    assert set(rig.arm_spec.policy.names("shared")) == {"0.weight", "0.bias"}


def test_losses_of_any_size_have_a_weight(tmp_path: Path) -> None:
    method = ModFed("validation", most=2.0)
    assert method.weight(Facts(9, 1.5)) / method.weight(Facts(1, 0.5)) == pytest.approx(math.e)
    assert method.weight(Facts(1, 2.0)) == method.weight(Facts(1, math.inf)) == 1.0
    assert method.weight(Facts(1, -math.inf)) == pytest.approx(math.exp(-4.0))
    assert method.least_weights(7, ("model",)) == {"model": pytest.approx(math.exp(-4.0))}
    with pytest.raises(StudyError, match="needs a validation patient at every site"):
        method.weight(Facts(1))
    with pytest.raises(ValidationError, match=r"modfed cannot be combined with protection\.privacy"):
        toy_study(method=MODFED, protection={"privacy": {"patients_per_step": 2}}, schedule={"release": "last"})


# Fair weights ---------------------------------------------------------------------------------------------------------


def test_a_site_that_the_common_model_serves_worse_counts_more(tmp_path: Path) -> None:
    rig, step, rounds = rig_of(FAIR_WEIGHTS, tmp_path, 4), 0.4, 4
    states = rig.states()
    before, own, weights = next(states), dict[str, float](), np.full(3, 1 / 3)
    gaps_seen = 0
    for number in range(1, rounds + 1):
        said, shared, moved, gaps = told(rig, number, before.public), shared_in(before.public), [], []
        for site, trained in zip(rig.sites, said, strict=True):
            after = validation_loss(rig, site, plain(rig, site, number, shared, lambda m, loss, k: None))
            gaps.append(max(0.0, after - own.get(site, after)))
            model = plain(rig, site, number, shared, lambda m, loss, k: descend(m, gradients(m, loss(m)), 0.1))
            own[site] = validation_loss(rig, site, model)
            moved.append({n: model.state_dict()[n].numpy() - shared[n] for n in shared})
            place = list(rig.sites).index(site)
            assert trained.weights == pytest.approx({MODEL: weights[place] / weights.max(), "apart": 1.0}, rel=1e-4)
            assert trained.changes["apart"]["weights"] == pytest.approx(gaps[-1] * np.eye(3)[place], abs=1e-6)
        state = next(states)
        for n in shared:
            wanted = shared[n] + sum(w * m[n] for w, m in zip(weights, moved, strict=True))
            assert np.allclose(state.public[f"{MODEL}/{n}"], wanted, **CLOSE), (number, n)
        # What the next round is averaged with.
        if max(gaps) > 0.0:
            gaps_seen += 1
            weights = weights + step * np.array(gaps) / max(gaps)
            weights /= weights.sum()
        assert state.public[FAIR] == pytest.approx(3 * weights, abs=1e-4)
        before = state
    assert gaps_seen >= 2
    assert np.ptp(weights) > 0.05
    assert set(rig.method.release_for(None, before.public, {})) == set(shared)


def test_how_weights_follow_gaps() -> None:
    equal = np.full(4, 0.25)
    found = adjusted(equal, np.array([0.2, -1.0, 0.1, 0.0]), 0.05)
    assert found == pytest.approx(np.array([0.30, 0.25, 0.275, 0.25]) / 1.075)
    assert adjusted(equal, np.array([-0.2, -1.0, 0.0, 0.0]), 0.05) == pytest.approx(equal)


@pytest.mark.slow
def test_fair_weights_say_what_they_tell_and_what_they_cannot_go_with(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written(unlike_study(FAIR_WEIGHTS, {"steps": 2}, 2))))
    text = " ".join(explain(tmp_path / "study.yaml", None, (), (), allow_code=True).split())
    assert "how much higher the loss of the common model is" in text
    bill = expected(rig_of(FAIR_WEIGHTS, tmp_path).host).training
    assert (bill.up.side_channels, bill.down.side_channels) == (12, 12)
    last = {"release": "last"}
    for changes, reason in (
        ({"protection": {"robust": {}}, "schedule": last}, "made of sums over sites"),
        ({"protection": {"privacy": {"patients_per_step": 2}}, "schedule": last}, r"protection\.privacy"),
        ({"schedule": {"asynchronous": {"buffer": 2}}}, r"schedule\.asynchronous"),
        ({"schedule": {"phases": [{"train": ["x"]}]}}, "compares losses of two rounds"),
    ):
        with pytest.raises(ValidationError, match=reason):
            toy_study(method=FAIR_WEIGHTS, **changes)


# FedPR ----------------------------------------------------------------------------------------------------------------


def project(prompt: Array, ratio: float = 0.8) -> Array:
    """T of the equation, by the eigenvectors of C."""
    flat = np.asarray(prompt, np.float64).reshape(-1, prompt.shape[-1])
    values, vectors = np.linalg.eigh(flat.T @ flat)
    kept = vectors[:, np.argsort(values)[: math.ceil(ratio * flat.shape[1] - 1e-9)]]
    inner = kept @ kept.T
    return np.asarray(inner / np.linalg.norm(inner))


class Adam:
    """Its steps, by hand (Kingma and Ba, 2015), or those of plain descent."""

    def __init__(self, lr: float, plainly: bool) -> None:
        self.lr, self.plainly, self.count = lr, plainly, 0
        self.first: dict[str, Array] = {}
        self.second: dict[str, Array] = {}

    def steps(self, by: Mapping[str, Array]) -> dict[str, Array]:
        if self.plainly:
            return {n: -self.lr * g for n, g in by.items()}
        self.count += 1
        found = {}
        for n, g in by.items():
            self.first[n] = 0.9 * self.first.get(n, 0.0) + 0.1 * g
            self.second[n] = 0.999 * self.second.get(n, 0.0) + 0.001 * g**2
            rise, spread = self.first[n] / (1 - 0.9**self.count), self.second[n] / (1 - 0.999**self.count)
            found[n] = -self.lr * rise / (np.sqrt(spread) + 1e-8)
        return found


@pytest.mark.parametrize("optimizer", quickly(["adam", "sgd"], 0))
def test_fedpr_moves_prompts_alone_by_projected_steps(tmp_path: Path, optimizer: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lr = {"adam": 0.05, "sgd": 2.0}[optimizer]
    local = {"steps": 3, "batch": 4, "optimizer": optimizer, "lr": lr}
    rig = Rig(prompted_study(tmp_path, local=local), tmp_path)
    prompts = {"1.prompts", "3.prompts"}
    assert set(rig.arm_spec.policy.names("shared")) == prompts
    assert set(rig.arm_spec.policy.names("frozen")) == set(Prompted().build_model().state_dict()) - prompts
    frozen = {n: t.clone() for n, t in rig.host.model_context.initial.items()}
    states = rig.states()
    before = next(states)
    for number in (1, 2):
        said, shared = told(rig, number, before.public), shared_in(before.public)
        spaces = {n: project(shared[n]) if number > 1 else np.eye(WIDTH) for n in shared}
        moved = []
        for site, trained in zip(rig.sites, said, strict=True):
            values = {n: np.asarray(t, np.float64) for n, t in frozen.items()} | shared
            optimiser = Adam(lr, optimizer == "sgd")

            def step(model: nn.Module, loss: Any, k: int, spaces: Any = spaces, optimiser: Any = optimiser) -> None:
                model.eval()  # What is frozen is in evaluation mode.
                learn = [model.get_parameter(n) for n in spaces]
                by = dict(zip(spaces, torch.autograd.grad(loss(model), learn), strict=True))
                steps = optimiser.steps({n: g.numpy() for n, g in by.items()})
                with torch.no_grad():
                    for n, parameter in zip(spaces, learn, strict=True):
                        parameter += torch.from_numpy(steps[n] @ spaces[n])

            model = plain(rig, site, number, values, step)
            moved.append({n: model.state_dict()[n].numpy() - shared[n] for n in shared})
            assert set(trained.changes[MODEL]) == prompts
            for n in shared:
                assert np.allclose(trained.changes[MODEL][n], moved[-1][n], rtol=0, atol=1e-5), (site, number, n)
        state = next(states)
        for n in shared:
            wanted = shared[n] + np.average([m[n] for m in moved], axis=0, weights=[s.weights[MODEL] for s in said])
            assert np.allclose(state.public[f"{MODEL}/{n}"], wanted, rtol=0, atol=1e-5)
            if number > 1:
                # Two of ten directions: those that the common prompts use most, whatever the optimiser.
                top = np.linalg.svd(shared[n][0])[2][:2]
                assert np.abs((state.public[f"{MODEL}/{n}"] - shared[n]) @ top.T).max() < 1e-5
                assert np.abs(state.public[f"{MODEL}/{n}"] - shared[n]).max() > 1e-4
        before = state
    after = rig.learner("A").model.state_dict()
    assert all(torch.equal(after[n], frozen[n]) for n in frozen if n not in prompts)


def test_the_null_space_of_prompts() -> None:
    random = np.random.default_rng(3)
    for tokens, width, ratio, dropped in ((20, 40, 0.8, 8), (6, 5, 0.8, 1), (3, 30, 0.8, 3), (4, 8, 1.0, 0)):
        prompt = random.standard_normal((1, tokens, width)).astype(np.float32)
        found = null_space(prompt, ratio)
        assert np.linalg.norm(found) == pytest.approx(1.0)
        assert np.linalg.matrix_rank(found) == width - dropped
        assert found == pytest.approx(found.T)
        top = np.linalg.svd(prompt[0].astype(np.float64))[2][:dropped]
        assert np.abs(found @ top.T).max(initial=0.0) < 1e-6
        if tokens >= width * (1.0 - ratio):
            assert found == pytest.approx(project(prompt, ratio), abs=1e-6)
    # Of a prompt that says nothing, no direction is taken.
    assert null_space(np.zeros((1, 3, 4), np.float32), 0.5) == pytest.approx(np.eye(4) / 2.0)


def test_no_value_goes_further_than_the_bound_says() -> None:
    """Steps whose every value is at most 1 in size, along the worst direction."""
    method, width = FedPR(ratio=0.8), 10
    space = null_space(np.random.default_rng(1).standard_normal((1, 4, width)), 0.8)
    bound = method.update_bound(UpdateBound(value=1.0))
    assert np.abs(space).sum(axis=0).max() <= bound.value
    assert np.linalg.norm(space, 2) <= 1.0


@pytest.mark.slow
def test_every_arm_of_a_study_of_prompts_trains_prompts(tmp_path: Path) -> None:
    study = prompted_study(tmp_path, schedule={"rounds": 1, "release": "last"})
    sites, arms = toy_sites(tmp_path), ("local", "pooled")
    result = run(
        study, sites, tmp_path / "out", compare=arms, engine="local", quiet=True, near=tmp_path, allow_code=True
    )
    host = Machine(study, sites, tmp_path / "out", arms, places=study.places(tmp_path))
    bill = expected(host).training
    assert bill.up.model == bill.down.model == 4 * 2 * TOKENS * WIDTH
    assert bill.up.base == bill.down.base == 0
    start = host.model_context.initial_values()
    for name in ("federated", "local-A", "pooled"):
        released = load_file(result.out / "models" / f"{name}.safetensors")
        moved = {n for n, t in released.items() if not np.array_equal(t, start[n])}
        assert moved == {"1.prompts", "3.prompts"}


@pytest.mark.slow
def test_prompts_are_covered_by_privacy_and_masks(tmp_path: Path) -> None:
    """A projected step of a noised gradient is as private as the step."""
    protection = {"privacy": {"patients_per_step": 2}, "secure": True}
    study = prompted_study(
        tmp_path,
        method={"kind": "fedpr", "weights": "equal"},
        protection=protection,
        schedule={"rounds": 2, "release": "last"},
    )
    found = run(
        study, toy_sites(tmp_path), tmp_path / "out", engine="local", quiet=True, near=tmp_path, allow_code=True
    )
    assert found.privacy is not None


@pytest.mark.slow
def test_prompts_of_a_swin_transformer_travel_and_nothing_else_of_it(tmp_path: Path) -> None:
    """From the network trained without prompts, which begin fresh in the study."""
    torch.manual_seed(2)
    make_hospitals(tmp_path / "data")
    trained = SwinDenoiserSettings(kind="swin_denoiser", preset="tiny").build("mri").state_dict()
    trained = {n: t + 0.02 * torch.randn_like(t) if t.is_floating_point() else t for n, t in trained.items()}
    save_file(trained, tmp_path / "trained.safetensors")
    sha256 = file_sha256(tmp_path / "trained.safetensors")
    study, sites = write_study(
        tmp_path,
        tmp_path / "data",
        method={"kind": "fedpr"},
        model={"kind": "swin_denoiser", "preset": "tiny", "prompts": 4},
        start={"kind": "weights", "file": "trained.safetensors", "sha256": sha256, "partial": True},
        local={"steps": 2, "optimizer": "adam", "lr": 0.1},
    )
    read = load_study(study, ())
    result = run(read, load_sites(sites), tmp_path / "out", engine="local", quiet=True, near=tmp_path)
    host = Machine(read, load_sites(sites), tmp_path / "out", (), places=read.places(tmp_path))
    shared = host.arm_spec("federated").policy.names("shared")
    assert len(shared) == 2
    assert all(name.endswith(".prompts") for name in shared)
    start, released = host.model_context.initial_values(), load_file(result.out / "models" / "federated.safetensors")
    assert set(released) == set(shared)
    assert not any(np.array_equal(released[name], start[name]) for name in shared)


@pytest.mark.slow
def test_a_hospital_that_joins_a_release_of_prompts_trains_prompts(tmp_path: Path) -> None:
    study = prompted_study(tmp_path, sites={"A": {}, "B": {}}, schedule={"rounds": 1, "release": "last"})
    sites = toy_sites(tmp_path, ("A", "B", "New"))
    before = run(study, sites, tmp_path / "out", engine="local", quiet=True, near=tmp_path, allow_code=True).out
    found = join(before, sites, "New", tmp_path / "new", rounds=2, steps=3, lr=0.5)
    start, joined = load_file(before / "models" / "federated.safetensors"), load_file(found.model)
    assert {n for n in start if not np.array_equal(start[n], joined[n])} == {"1.prompts", "3.prompts"}


def test_a_network_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="trains prompts alone, and the model has none"):
        FedPR().policy(parameters_of(Regression().build_model()))


# All ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", quickly([FEDMRI, MODFED, FAIR_WEIGHTS], 0, 2), ids=lambda m: m["kind"])
def test_a_run_that_goes_on_after_a_stop_comes_to_the_same_bits(method: dict[str, Any], tmp_path: Path) -> None:
    local = {"optimizer": "adam", "lr": 0.02, "optimizer_state": "keep", "steps": 2}
    whole = rig_of(method, tmp_path / "whole", local=local, options={"norm": True}).train()
    stopped = rig_of(method, tmp_path / "stopped", local=local, options={"norm": True})
    states = stopped.states()
    assert [next(states).round for _ in range(3)] == [0, 1, 2]
    for site in stopped.sites.values():
        site.close()
    again = rig_of(method, tmp_path / "stopped", local=local, options={"norm": True}).train()
    assert again.public_sha256 == whole.public_sha256


def test_kinds_are_what_they_build() -> None:
    study = toy_study(method={**FEDMRI, "contrast": 0.0})
    assert type(study.method.build({})) is FedMRI
    assert type(toy_study(method=FEDMRI).method.build({})) is ContrastiveFedMRI
    assert isinstance(toy_study(method=MODFED).method.build({}), SharesEncoder)
    assert FINE["max_sites"] >= 3
