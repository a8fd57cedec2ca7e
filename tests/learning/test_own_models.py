"""Methods that give each site a model of its own, against plain loops in double precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from tests.examples import quickly
from tests.federation.rig import Rig
from tests.protection.test_secure_rounds import SecureRig
from tests.toys import Regression, toy_sites, toy_study
from wardround.errors import StudyError
from wardround.federation.release import own_folder
from wardround.learning.footprint import footprint
from wardround.learning.methods.apfl import APFL
from wardround.learning.methods.ditto import Ditto
from wardround.learning.methods.fedper import FedPer
from wardround.learning.methods.fedrep import FedRep
from wardround.learning.methods.method import Method
from wardround.learning.model_context import parameters_of
from wardround.learning.passes import Pass, parted, steps_in
from wardround.learning.training import Learner
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.runs.explain import training_lines
from wardround.runs.releases import ReleasedModel
from wardround.runs.session import run
from wardround.storage.store import NOTHING, Memory
from wardround.study.schema import Study

Array = npt.NDArray[Any]
State = dict[str, Tensor]
LR, BATCH, STEPS = 0.1, 4, 2
HEAD = {"head": ["2.*"]}
METHODS: dict[str, dict[str, Any]] = {
    "ditto": {"kind": "ditto", "pull": [0.1, 2.0]},
    "apfl": {"kind": "apfl", "alpha": 0.3},
    "fedper": {"kind": "fedper", **HEAD},
    "fedrep": {"kind": "fedrep", "head_steps": 3, **HEAD},
    "fedmri": {"kind": "fedmri", "contrast": 0.0, "encoder": ["0.*"]},
    "modfed": {"kind": "modfed", "encoder": ["0.*"]},
}
OWN = ("ditto", "apfl")
# Of float32 arithmetic: some ten steps with values of about 1, each with a few roundings of 2^-24.
CLOSE = {"rtol": 0.0, "atol": 100 * 2.0**-24}


def study_of(method: Mapping[str, Any], *, norm: bool = False, **changes: Any) -> Study:
    options = {"norm": norm, "patients": 10}
    return toy_study(
        **{
            "method": dict(method),
            "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": options},
            "local": {"steps": STEPS, "batch": BATCH, "optimizer": "sgd", "lr": LR},
            "schedule": {"rounds": 3},
            **changes,
        }
    )


def gradient(model: nn.Module, values: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> State:
    """The gradient of the loss at given values, in double precision."""
    point = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in values.items()}
    x, y = (part.double() for part in batch)
    loss = (torch.func.functional_call(model, point, (x,)) - y).square().mean()
    return dict(zip(point, torch.autograd.grad(loss, list(point.values())), strict=True))


def validation_loss(model: nn.Module, values: State, learner: Learner) -> float:
    losses = []
    for _, (x, y) in learner.dataset.evaluation("validation"):
        with torch.no_grad():
            losses.append(float((torch.func.functional_call(model, values, (x.double(),)) - y).square().mean()))
    return float(np.mean(losses))


class Plain:
    """A site's rounds in the open: the values that it receives, its batches, and a network in double precision."""

    def __init__(self, method: Mapping[str, Any], folder: Path) -> None:
        self.rig = Rig(study_of(method), folder)
        self.learner = self.rig.learner("A")
        self.network = Regression().build_model().double()
        self.memory = NOTHING
        self.random = np.random.default_rng(3)
        self.public = dict(self.rig.start().public)

    def batches(self, number: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        taken = self.learner._examples.of_round(number, steps * BATCH)
        for step in range(steps):
            yield self.learner.dataset.batch(taken[step * BATCH : (step + 1) * BATCH], self.random)

    def received(self) -> State:
        """The common model before the next round, which other sites have moved as well."""
        for name, tensor in self.public.items():
            self.public[name] = (tensor + 0.1 * self.random.standard_normal(tensor.shape)).astype(np.float32)
        return {n.removeprefix("model/"): torch.from_numpy(t).double() for n, t in self.public.items()}

    def round(self, number: int) -> dict[str, Array]:
        """What the product's learner would send."""
        self.learner.load(self.public, self.memory)
        trained = self.learner.train(number, self.public, self.memory)
        self.memory = Memory(trained.memory, {})
        return trained.changes["model"]

    def sgd(self, values: State, number: int, steps: int = STEPS, learns: str = "") -> State:
        for batch in self.batches(number, steps):
            found = gradient(self.network, values, batch)
            values = {n: t - LR * found[n] if n.startswith(learns) else t for n, t in values.items()}
        return values

    def kept(self) -> State:
        return {n: torch.from_numpy(t).double() for n, t in self.learner.local_tensors(self.memory).items()}


def same(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.allclose(np.asarray(found[name]), tensor.numpy(), **CLOSE), name


@pytest.mark.parametrize(("pulls", "own_steps"), [((0.7,), 3), ((5.0, 0.05, 9.0), None)])
def test_ditto_draws_each_site_s_model_to_the_common_one(
    tmp_path: Path, pulls: Sequence[float], own_steps: int | None
) -> None:
    """Algorithm 1; of several strengths, in each round the one that validation patients prefer."""
    plain = Plain({"kind": "ditto", "pull": list(pulls), "own_steps": own_steps}, tmp_path)
    own: State | None = None
    chosen = []
    for number in (1, 2, 3):
        common = plain.received()
        own = dict(common) if own is None else own
        found = []
        for pull in pulls:
            values = dict(own)
            for batch in plain.batches(number, own_steps or STEPS):
                slope = gradient(plain.network, values, batch)
                values = {n: t - LR * (slope[n] + pull * (t - common[n])) for n, t in values.items()}
            found.append((validation_loss(plain.network, values, plain.learner), pull, values))
        _, pull, own = min(found, key=lambda one: one[0])
        chosen.append(pull)
        trained = plain.sgd(common, number)
        same(plain.round(number), {n: trained[n] - common[n] for n in common})
        same(plain.kept(), own)
    # Neither the first nor the last of the list.
    assert set(chosen) == ({0.05} if len(pulls) > 1 else {0.7})


def test_a_site_without_validation_patients_takes_the_middle_strength(tmp_path: Path) -> None:
    plain, middle = (
        Plain({"kind": "ditto", "pull": p}, tmp_path / str(i)) for i, p in enumerate(([0.1, 1.0, 9.0], 1.0))
    )
    plain.learner.dataset.splits["validation"].clear()  # type: ignore[attr-defined]
    for one in (plain, middle):
        one.round(1)
    same(plain.kept(), middle.kept())


@pytest.mark.parametrize("alpha_lr", [None, 0.5, 0.0])
def test_apfl_mixes_and_learns_the_share(tmp_path: Path, alpha_lr: float | None) -> None:
    plain = Plain({"kind": "apfl", "alpha": 0.4, "alpha_lr": alpha_lr}, tmp_path)
    alpha, own, shares = 0.4, {}, []
    for number in (1, 2, 3):
        common = plain.received()
        own = own or dict(common)
        trained = plain.sgd(common, number)
        for batch in plain.batches(number, STEPS):
            mixed = {n: alpha * own[n] + (1 - alpha) * common[n] for n in common}
            slope = gradient(plain.network, mixed, batch)
            moved = {n: own[n] - LR * alpha * slope[n] for n in common}
            product = float(sum((slope[n] * (own[n] - common[n])).sum() for n in common))
            alpha = min(1.0, max(0.0, alpha - (LR if alpha_lr is None else alpha_lr) * product))
            own = moved
        shares.append(alpha)
        same(plain.round(number), {n: trained[n] - common[n] for n in common})
        same(plain.kept(), {n: alpha * own[n] + (1 - alpha) * common[n] for n in common})
        assert float(plain.memory.tensors["method/alpha"]) == pytest.approx(alpha, abs=1e-5)
    # The share of the first round stays at its first step, where both models are the same.
    assert (len(set(shares)) == 1) == (alpha_lr == 0.0)


@pytest.mark.parametrize("kind", OWN)
def test_a_site_goes_on_from_the_own_model_that_it_has_of_a_release(tmp_path: Path, kind: str) -> None:
    """As where a study continues one: it has nothing else of an earlier round."""
    method = {"kind": "ditto", "pull": 0.7} if kind == "ditto" else {"kind": "apfl", "alpha": 0.4, "alpha_lr": 0.0}
    plain = Plain(method, tmp_path)
    common = plain.received()
    own = {n: t + 0.5 for n, t in common.items()}
    plain.memory = Memory({f"local/{n}": t.numpy().astype(np.float32) for n, t in own.items()}, {})
    for batch in plain.batches(1, STEPS):
        if kind == "ditto":
            slope = gradient(plain.network, own, batch)
            own = {n: t - LR * (slope[n] + 0.7 * (t - common[n])) for n, t in own.items()}
        else:
            slope = gradient(plain.network, {n: 0.4 * own[n] + 0.6 * common[n] for n in own}, batch)
            own = {n: t - LR * 0.4 * slope[n] for n, t in own.items()}
    plain.round(1)
    same(plain.kept(), own if kind == "ditto" else {n: 0.4 * own[n] + 0.6 * common[n] for n in own})


def test_a_share_stays_within_0_and_1(tmp_path: Path) -> None:
    plain = Plain({"kind": "apfl", "alpha": 0.5, "alpha_lr": 1e6}, tmp_path)
    for number in (1, 2, 3):
        plain.received()
        plain.round(number)
        assert 0.0 <= float(plain.memory.tensors["method/alpha"]) <= 1.0
    assert float(plain.memory.tensors["method/alpha"]) in (0.0, 1.0)


@pytest.mark.parametrize("kind", ["fedper", "fedrep"])
def test_the_head_stays_and_the_body_is_sent(tmp_path: Path, kind: str) -> None:
    """FedRep fits the head to the body as it came, and then the body to that head; FedPer both at once."""
    plain = Plain(METHODS[kind], tmp_path)
    network = dict(plain.network.state_dict())
    assert list(network) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    initial = plain.rig.host.model_context.initial_values()
    head = {n: torch.from_numpy(initial[n]).double() for n in ("2.weight", "2.bias")}
    for number in (1, 2, 3):
        body = plain.received()
        assert body.keys() == {"0.weight", "0.bias"}
        if kind == "fedrep":
            fitted = plain.sgd({**body, **head}, number, 3, "2.")
            trained = plain.sgd(fitted, number, STEPS, "0.")
        else:
            trained = plain.sgd({**body, **head}, number)
        head = {n: trained[n] for n in head}
        same(plain.round(number), {n: trained[n] - body[n] for n in body})
        same(plain.kept(), head)


@pytest.mark.parametrize(("kind", "optimizer"), [("ditto", "adam"), ("apfl", "sgd")])
def test_a_model_of_its_own_moves_no_bit_of_the_common_one(tmp_path: Path, kind: str, optimizer: str) -> None:
    """With running statistics, counters, layers that stay at the sites, and moments that are kept."""
    local = {"steps": 2, "batch": 4, "optimizer": optimizer, "lr": 0.02, "optimizer_state": "keep"}
    found = []
    for method in ({"kind": "fedavg"}, METHODS[kind]):
        study = study_of(method, norm=True, local=local, parts={"local": ["1.weight"]})
        rig = Rig(study, tmp_path / str(method["kind"]))
        learner, public, memory = rig.learner("A"), rig.start().public, NOTHING
        for number in (1, 2):
            learner.load(public, memory)
            trained = learner.train(number, public, memory)
            memory = Memory(trained.memory, {})
        found.append((trained.changes, {n: t for n, t in trained.memory.items() if n.startswith("optimizer/")}))
        beside = "local/" if method["kind"] == "fedavg" else "received/"
        found[-1] += ({n: trained.memory[beside + n] for n in ("1.weight", "1.num_batches_tracked")},)
    (plain, plain_moments, plain_layer), (own, own_moments, own_layer) = found
    for group, changes in plain.items():
        assert all(np.array_equal(changes[name], own[group][name]) for name in changes)
    assert plain_moments.keys() == own_moments.keys()
    assert all(np.array_equal(plain_moments[name], own_moments[name]) for name in plain_moments)
    assert all(np.array_equal(plain_layer[name], own_layer[name]) for name in plain_layer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", quickly(METHODS, 0, 3))
def test_a_stopped_run_ends_with_the_same_own_models(tmp_path: Path, kind: str) -> None:
    study = study_of(METHODS[kind], local={"steps": 2, "batch": 4, "optimizer": "adam", "optimizer_state": "keep"})
    whole = Rig(study, tmp_path / "whole")
    ended = whole.train()
    first = Rig(study, tmp_path / "halves")
    rounds = first.coordinator.rounds(first.start())
    next(rounds)
    rounds.close()
    again = Rig(study, tmp_path / "halves")
    assert again.train().public_sha256 == ended.public_sha256
    for name, site in whole.sites.items():
        mine, other = site.store.memory(3).tensors, again.sites[name].store.memory(3).tensors
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[n], other[n]) for n in mine)


@pytest.mark.slow
@pytest.mark.parametrize("kind", quickly(METHODS, 0))
def test_masks_change_nothing(tmp_path: Path, kind: str) -> None:
    study = study_of(METHODS[kind], protection={"max_sites": 4}, sites={name: {} for name in "ABCD"})
    plain, masked = Rig(study, tmp_path / "plain"), SecureRig(study, tmp_path / "masked")
    assert plain.train().public_sha256 == masked.train().public_sha256


# What serves where ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def mse(rig: Rig, site: str, values: Mapping[str, Array], split: Any) -> float:
    network = Regression().build_model().eval()
    network.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in values.items()})
    return float(
        np.mean([float((network(x) - y).square().mean()) for _, (x, y) in rig.host.dataset(site).evaluation(split)])
    )


@pytest.mark.parametrize("kind", quickly(METHODS, 0, 3))
def test_each_site_uses_its_own_model_and_a_stranger_the_common_one(tmp_path: Path, kind: str) -> None:
    """In validations that choose the round, in tests, and in what is released."""
    study = study_of(METHODS[kind], sites={"A": {}, "B": {}, "D": {"role": "unseen"}}, schedule={"rounds": 2})
    result = run(study, toy_sites(tmp_path / "data", "ABD"), tmp_path / "out", engine="local", quiet=True)
    assert set(result.local_sha256) == {"A", "B"}
    released = result.out / "models" / "federated.safetensors"
    common, rig = load_file(released), Rig(study, tmp_path)
    for site in "AB":
        own = load_file(own_folder(released, site) / "local.safetensors")
        assert (own.keys() == common.keys()) == (kind in OWN)
        served = ReleasedModel.opened(released).loaded(rig.host.task.build_model, site, None).state_dict()
        for name, tensor in {**common, **own}.items():
            assert np.array_equal(served[name].numpy(), tensor)
        assert result.metric("federated", site, "mse") == pytest.approx(
            mse(rig, site, {**common, **own}, "test"), abs=1e-5
        )
    assert result.metric("federated", "D", "mse") == pytest.approx(mse(rig, "D", common, "test"), abs=1e-5)


@pytest.mark.parametrize("kind", quickly(OWN, 0))
def test_the_released_round_is_chosen_by_the_models_that_sites_use(tmp_path: Path, kind: str) -> None:
    rig = Rig(study_of(METHODS[kind], schedule={"rounds": 2, "keep": 3}), tmp_path)
    found: dict[int, list[float]] = {1: [], 2: []}
    for report in rig.coordinator.rounds(rig.start()):
        if report.validation is None:
            for name, site in rig.sites.items():
                own = rig.learner(name).local_tensors(site.store.memory(report.round))
                found[report.round].append(mse(rig, name, own, "validation"))
    reports = {report.round: report for report in rig.journal.reports()}
    for number, of_sites in found.items():
        assert reports[number].validation is not None
        assert reports[number].validation["mse"] == pytest.approx(np.mean(of_sites), abs=1e-5)


# Refusals and figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FedPer(), FedRep()])
def test_a_model_without_a_known_head_is_refused(method: FedPer) -> None:
    with pytest.raises(StudyError, match=r"method\.head: \[PATTERN\]"):
        method.policy(parameters_of(Regression().build_model()))


def test_patterns_of_the_head_must_match() -> None:
    with pytest.raises(StudyError, match=r"method\.head: '7\.\*' matches no name"):
        FedPer(head=("7.*",)).policy(parameters_of(Regression().build_model()))


@pytest.mark.parametrize("kind", ["ditto", "apfl", "fedrep"])
def test_a_budget_of_privacy_covers_no_second_pass(kind: str) -> None:
    privacy = {"privacy": {"epsilon": 5.0, "patients_per_step": 2}}
    with pytest.raises(ValueError, match="cannot be combined with protection"):
        study_of({**METHODS[kind], "weights": "equal"}, protection=privacy, schedule={"release": "last"})


def test_a_method_of_one_s_own_has_one_pass_with_privacy(tmp_path: Path) -> None:
    rig = Rig(study_of(METHODS["ditto"]), tmp_path)
    privacy = study_of({"kind": "fedavg", "weights": "equal"}, schedule={"release": "last"},
                       protection={"privacy": {"epsilon": 5.0, "patients_per_step": 2}})  # fmt: skip
    rig.host.study = privacy
    with pytest.raises(StudyError, match="passes over the patients more than once"):
        rig.host._check_passes(rig.arm_spec.arm, rig.method)


@pytest.mark.parametrize(
    "passes", [(), (Pass("own", own=True),), (Pass("own", own=True), Pass()), (Pass(), Pass())], ids=str
)
def test_passes_that_make_no_round(passes: tuple[Pass, ...]) -> None:
    with pytest.raises(StudyError, match="passes"):
        parted(passes)


@pytest.mark.parametrize(
    ("method", "steps"),
    [(Method(), 5), (Ditto(pull=(1.0, 2.0)), 15), (Ditto(own_steps=2), 7), (FedRep(head_steps=3), 8), (APFL(), 10)],
)
def test_a_round_has_the_steps_of_all_passes(method: Method, steps: int) -> None:
    assert steps_in(method.passes(), 5) == steps


def test_check_and_plan_say_what_a_second_model_costs(tmp_path: Path) -> None:
    plain, own = (
        Rig(study_of(m, norm=True), tmp_path / str(m["kind"])) for m in ({"kind": "fedavg"}, METHODS["ditto"])
    )
    said = " ".join(training_lines(own.host, own.arm_spec).split())
    assert "pass 2 2 steps of the site's own copy of the model, which is never sent, once for each of 0.1, 2" in said
    assert "pass" not in training_lines(plain.host, plain.arm_spec)
    assert (plain.arm_spec.steps, own.arm_spec.steps) == (STEPS, 3 * STEPS)
    sizes = {p.name: p.info.nbytes for p in own.host.model_context.parameters}
    assert plain.arm_spec.own == ()
    assert sorted(own.arm_spec.own) == sorted(sizes)
    shared = own.arm_spec.policy.names("shared")
    one, other = (
        footprint(own.host.model_context, shared, own.study.local, None, own=n) for n in ((), own.arm_spec.own)
    )
    assert other.total - one.total == 3 * sum(sizes.values())


@pytest.mark.parametrize("method", [Ditto(), APFL(), FedRep(), FedPer()])
def test_what_is_sent_goes_no_further_than_a_round_of_steps(method: Method) -> None:
    bound = UpdateBound(value=0.1)
    assert method.update_bound(bound) == bound

    class Other(type(method)):  # type: ignore[misc]
        def passes(self) -> tuple[Pass, ...]:
            return (Pass(steps=1000),)

    assert Other().update_bound(bound) == UNKNOWN
    assert deepcopy(method) == method
