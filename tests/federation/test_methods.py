"""Every method against its equation, written out once more in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.federation.rig import Rig
from tests.toys import Regression, toy_sites, toy_study
from wardround.errors import StudyError
from wardround.federation.release import model_path
from wardround.learning.methods.build import build_method
from wardround.learning.methods.fedbn import FedBN
from wardround.learning.methods.feddyn import FedDyn
from wardround.learning.methods.fedprox import FedProx, FedProxSettings
from wardround.learning.methods.method import Facts, LocalRound, Method, Writers
from wardround.learning.model_context import parameters_of
from wardround.learning.training import Trained
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import load_model
from wardround.runs.session import run
from wardround.study.methods import CustomMethod
from wardround.study.plugins import Plugins

Array = npt.NDArray[Any]
ROUNDS = 4


def rig_of(tmp_path: Path, method: dict[str, Any], *, norm: bool = False, lr: float = 0.1) -> Rig:
    """Three sites whose updates are so fine that only the method is measured."""
    return Rig(
        toy_study(
            method=method,
            task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": norm}},
            local={"steps": 2, "batch": 4, "optimizer": "sgd", "lr": lr},
            schedule={"rounds": ROUNDS, "keep": ROUNDS + 1},
            protection={"max_sites": 4, "max_weight": 16.0, "initial_scale": 4.0},
        ),
        tmp_path,
    )


def told(rig: Rig, number: int, public: Mapping[str, Array]) -> list[Trained]:
    """What every site would say in a round, trained once more from the state before it."""
    said = []
    for name, site in rig.sites.items():
        learner, memory = rig.learner(name), site.store.memory(number - 1)
        learner.load(public, memory)
        said.append(learner.train(number, public, memory))
    return said


def means(said: list[Trained]) -> dict[str, Array]:
    """The weighted mean of the changes, by name in the global state."""
    return {
        f"{group}/{name}": np.average(
            [s.changes[group][name].astype(np.float64) for s in said], axis=0, weights=[s.weights[group] for s in said]
        )
        for group, tensors in said[0].changes.items()
        for name in tensors
    }


Step = Callable[[str, Array], Array]


def follow(rig: Rig, step: Step) -> None:
    """Check every round's state against `step`, which turns a mean change into what is added."""
    states = rig.states()
    before = {name: t for name, t in next(states).public.items()}  # noqa: C416
    for number in range(1, ROUNDS + 1):
        # The sites' memories of a round are gone two rounds later, so each round is checked as it comes.
        expected = means(told(rig, number, before))
        after = dict(next(states).public)
        assert after.keys() == before.keys() == expected.keys()
        for name, mean in expected.items():
            wanted = before[name] + step(name, mean)
            assert np.allclose(after[name], wanted, rtol=0, atol=2e-6), (number, name)
            assert np.abs(after[name] - before[name]).max() > 1e-4 or np.abs(mean).max() < 1e-3
        before = after


def test_fedavg_is_the_weighted_mean(tmp_path: Path) -> None:
    follow(rig_of(tmp_path, {"kind": "fedavg"}), lambda name, mean: mean)


def test_fedavgm_has_momentum_and_only_averages_buffers(tmp_path: Path) -> None:
    velocity: dict[str, Array] = {}

    def step(name: str, mean: Array) -> Array:
        if name.startswith("buffers/"):
            return mean
        velocity[name] = 0.9 * velocity.get(name, 0.0) + mean
        return 0.5 * velocity[name]

    rig = rig_of(tmp_path, {"kind": "fedavgm", "momentum": 0.9, "server_lr": 0.5}, norm=True)
    follow(rig, step)
    latest = rig.journal.latest()
    assert latest is not None
    assert {n.split("/")[1] for n in latest.private} == {"model"}
    for name, kept in latest.private.items():
        assert np.allclose(kept, velocity[name.removeprefix("momentum/")], atol=1e-5)
    assert any(name.startswith("buffers/") for name in latest.public)


def test_fedadam_follows_algorithm_2(tmp_path: Path) -> None:
    lr, beta1, beta2, tau = 0.05, 0.8, 0.95, 1e-2
    first: dict[str, Array] = {}
    second: dict[str, Array] = {}

    def step(name: str, mean: Array) -> Array:
        if name.startswith("buffers/"):
            return mean
        first[name] = beta1 * first.get(name, 0.0) + (1 - beta1) * mean
        second[name] = beta2 * second.get(name, tau**2) + (1 - beta2) * mean**2
        return lr * first[name] / (np.sqrt(second[name]) + tau)

    method = {"kind": "fedadam", "server_lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau}
    follow(rig_of(tmp_path, method, norm=True), step)
    assert first


def test_feddyn_follows_algorithm_1_at_the_coordinator(tmp_path: Path) -> None:
    alpha, pull = 0.5, {}

    def step(name: str, mean: Array) -> Array:
        if name.startswith("buffers/"):
            return mean
        pull[name] = pull.get(name, 0.0) - alpha * mean
        return mean - pull[name] / alpha

    follow(rig_of(tmp_path, {"kind": "feddyn", "alpha": alpha}, norm=True), step)
    assert pull


def test_unlike_sites_end_at_the_common_optimum_with_feddyn_and_not_with_fedavg() -> None:
    """Two sites with losses a/2 (w - c)^2: the optimum of their mean is the mean of c weighed by a."""
    curvature, centre = torch.tensor([0.4, 2.0]), torch.tensor([3.0, -1.0])
    optimum = float((curvature * centre).sum() / curvature.sum())

    def final(method: Method) -> float:
        x, memories, private = np.zeros(1), [{}, {}], {}
        for number in range(1, 41):
            changes = []
            for site in range(2):
                w = torch.from_numpy(x.copy()).requires_grad_(True)
                local = LocalRound("A", torch.nn.Module(), {"w": w}, {"w": w.detach().clone()}, {}, memories[site],
                                   number, 15, 0.4)  # fmt: skip
                for _ in range(15):
                    loss = (0.5 * curvature[site] * (w - centre[site]) ** 2).sum()
                    (slope,) = torch.autograd.grad(method.objective(local, loss), w)
                    w.data -= 0.4 * slope
                changes.append(method.changes(local)["model"]["w"].numpy())
            x = x + method.server_step("model/w", np.mean(changes, axis=0), dict(private), private.__setitem__)
        return float(x[0])

    # Many steps end near each site's own optimum: averaging them forgets how steep they are.
    assert abs(final(Method("equal")) - optimum) > 0.5
    assert final(FedDyn("equal", alpha=0.5)) == pytest.approx(optimum, abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "facts", "expected"),
    [
        ("samples", Facts(17), 17.0),
        ("equal", Facts(17), 1.0),
        ("validation", Facts(17, 0.7), math.exp(-0.7)),
        ("validation", Facts(17, 50.0), 1e-3),
        ("validation", Facts(17, -3.0), 1.0),
    ],
)
def test_weights(weights: Any, facts: Facts, expected: float) -> None:
    assert Method(weights).weight(facts) == pytest.approx(expected)


def test_weights_by_validation_need_a_validation_patient() -> None:
    with pytest.raises(StudyError, match="validation patient"):
        Method("validation").weight(Facts(17))


def test_validation_weights_reach_the_sum(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, {"kind": "fedavg", "weights": "validation"})
    said = told(rig, 1, dict(rig.start().public))
    for name, trained in zip(rig.sites, said, strict=True):
        learner = rig.learner(name)
        learner.load(dict(rig.start().public), rig.sites[name].store.memory(0))
        learner.train(1, dict(rig.start().public), rig.sites[name].store.memory(0))
        learner.model.eval()
        with torch.no_grad():
            losses = [float(learner.task.loss(learner.model, b)) for _, b in learner.dataset.evaluation("validation")]
        assert trained.weights["model"] == pytest.approx(math.exp(-np.mean(losses)))
    follow(rig, lambda name, mean: mean)


def test_fedprox_adds_the_gradient_of_the_proximal_term(tmp_path: Path) -> None:
    mu, lr = 0.7, 0.1
    rig = rig_of(tmp_path, {"kind": "fedprox", "mu": mu, "weights": "equal"}, lr=lr)
    public = {n.removeprefix("model/"): torch.from_numpy(t) for n, t in rig.start().public.items()}
    said = told(rig, 1, dict(rig.start().public))
    for name, trained in zip(rig.sites, said, strict=True):
        learner = rig.learner(name)
        model = Regression().build_model()
        model.load_state_dict(public)
        indices = learner._examples.of_round(1, 8)
        for step in range(2):
            model.zero_grad()
            x, y = learner.dataset.batch(indices[4 * step : 4 * step + 4], np.random.default_rng())
            (model(x) - y).square().mean().backward()
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p -= lr * (p.grad + mu * (p - public[key]))
        for key, p in model.state_dict().items():
            assert np.allclose(trained.changes["model"][key], (p - public[key]).numpy(), atol=1e-6)
    follow(rig, lambda name, mean: mean)
    assert build_method(FedProxSettings(kind="fedprox", mu=mu)) == FedProx("samples", mu=mu)


def test_fedbn_shares_all_but_the_batch_norm_layers(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, {"kind": "fedbn"}, norm=True)
    follow(rig, lambda name, mean: mean)
    local = {f"local/1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    memories = [site.store.memory(ROUNDS).tensors for site in rig.sites.values()]
    assert all(set(m) == local for m in memories)
    for name in local - {"local/1.num_batches_tracked"}:
        values = [m[name] for m in memories]
        assert not any(np.array_equal(a, b) for i, a in enumerate(values) for b in values[:i])
    # Every site's model is the shared part and its own layers.
    public = rig.journal.state(ROUNDS).public
    loaded = []
    for name, site in rig.sites.items():
        learner = rig.learner(name)
        learner.load(public, site.store.memory(ROUNDS))
        loaded.append({n: t.numpy().copy() for n, t in learner.model.state_dict().items()})
    for key in ("0.weight", "0.bias", "3.weight", "3.bias"):
        assert all(np.array_equal(m[key], public[f"model/{key}"]) for m in loaded)
    for m, memory in zip(loaded, memories, strict=True):
        assert np.array_equal(m["1.running_mean"], memory["local/1.running_mean"])


def test_fedbn_is_refused_on_a_model_without_batch_norm() -> None:
    with pytest.raises(StudyError, match=r"model\.norm: batch"):
        FedBN().policy(parameters_of(Regression().build_model()))


def test_floating_buffers_are_averaged_and_counters_stay(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, {"kind": "fedavg", "weights": "equal"}, norm=True)
    roles = rig.arm_spec.policy.roles
    assert roles["1.num_batches_tracked"] == "local"
    assert roles["1.running_mean"] == roles["1.running_var"] == roles["1.weight"] == "shared"
    assert {g.name: [t.name for t in g.tensors] for g in rig.arm_spec.layout.groups} == {
        "model": ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
        "buffers": ["1.running_mean", "1.running_var"],
    }
    follow(rig, lambda name, mean: mean)
    steps = rig.study.local.steps * ROUNDS
    assert all(int(s.store.memory(ROUNDS).tensors["local/1.num_batches_tracked"]) == steps for s in rig.sites.values())


@dataclass(frozen=True)
class Medians(Method):
    """Each value of the model moves by the median of the sites' moves."""

    needs: ClassVar[Literal["sum", "updates"]] = "updates"

    def apply(self, public: Any, private: Any, aggregate: Any, write: Writers) -> None:
        for group in aggregate.layout.groups:
            for info in group.tensors:
                name = f"{group.name}/{info.name}"
                moved = np.median(aggregate.each(group.name, info.name), axis=0)
                write.public(name, (public[name] + moved).astype(np.float32))


MEDIANS = {"kind": "custom", "factory": "tests.federation.test_methods:Medians"}


def test_a_custom_method_gets_each_sites_update(tmp_path: Path) -> None:
    fine = {"max_sites": 4, "max_weight": 16.0, "initial_scale": 4.0}
    study = toy_study(method=MEDIANS, schedule={"rounds": 1, "release": "last"}, protection=fine)
    run(study, toy_sites(tmp_path / "data").with_code(), tmp_path / "out", engine="local", quiet=True)
    released = load_model(model_path(tmp_path / "out", "federated"))[0]
    rig = Rig(study, tmp_path)
    start = rig.start().public
    said = told(rig, 1, start)
    for name, tensor in released.items():
        moved = np.median([s.changes["model"][name] for s in said], axis=0)
        # Half a step of each site's rounding.
        assert np.allclose(tensor, start[f"model/{name}"] + moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("protection", "error"),
    [
        ({"secure": True}, "needs each site's update, which protection.secure hides in their sum"),
        ({"robust": {"rule": "median"}}, "leave out protection.robust"),
        ({"compression": {"kind": "top_k"}}, "leave out protection.compression"),
    ],
)
@pytest.mark.parametrize("method", [MEDIANS, {"kind": "flora"}], ids=["custom", "flora"])
def test_what_hides_each_sites_update_is_refused(
    method: dict[str, Any], protection: dict[str, Any], error: str
) -> None:
    adapters = {"kind": "lora", "targets": ["0"], "rank": 2} if method["kind"] == "flora" else {"kind": "none"}
    study = toy_study(method=method, protection=protection, schedule={"release": "last"}, adapters=adapters)
    with pytest.raises(StudyError, match=error):
        ArmSpecs(study, (), plugins=Plugins(code=True)).arm_spec("federated")


def test_a_custom_method_must_be_one() -> None:
    custom = CustomMethod(kind="custom", factory="tests.toys:make_task", options={})
    with pytest.raises(StudyError, match="does not make"):
        build_method(custom, plugins=Plugins(code=True))
    with pytest.raises(StudyError, match="cannot be imported"):
        build_method(CustomMethod(kind="custom", factory="tests.toys:nothing"), plugins=Plugins(code=True))
