"""The law of devices: on any device nothing changes but speed and last digits.

Every built-in task takes a training step and an evaluation on torch's `meta` device, where a number that is taken
without `on_host`, or a constant of the CPU, is an error; where there is a GPU, on the GPU, with the CPU's results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.chain import STAGES, chain_study, stage_of
from tests.ct_hospitals import ct_study, make_ct_hospitals
from tests.devices import DEVICES, META, arm_specs_of, device_named, learner_of, stand_ins, tensors_of
from tests.mri_hospitals import head, save
from tests.toys import Regression, toy_study
from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.solvers import tv
from wardround.learning.device import CPU, Compute
from wardround.learning.training import Learner, Trained
from wardround.plan.arm_specs import ArmSpecs
from wardround.runs.machine import Machine
from wardround.site.evaluators import evaluators_of
from wardround.storage.store import NOTHING, Memory
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile

_TINY = {"preset": "tiny"}
_ANATOMY = {"dimension": 8, "pool": 2, "width": 8, "map": 4}
MRI: dict[str, dict[str, Any]] = {
    "modl": {"model": {"kind": "modl", **_TINY, "norm": "batch"}, "method": {"kind": "fedbn"}},
    "modl of real images": {"model": {"kind": "modl", **_TINY, "image": "real"}, "method": {"kind": "fedprox"}},
    "unet": {"model": {"kind": "unet", **_TINY}},
    "learn": {"model": {"kind": "learn", **_TINY}},
    "modl along a trajectory": {
        "model": {"kind": "modl", **_TINY},
        "acquisition": {"kind": "mri_noncartesian", "coils": 2, "trajectory": {"kind": "radial", "spokes": 12}},
    },
    "cascade": {"model": {"kind": "cascade", **_TINY}},
    "varnet": {"model": {"kind": "varnet", **_TINY}},
    "e2e_varnet": {"model": {"kind": "e2e_varnet", **_TINY}},
    "swin_denoiser": {"model": {"kind": "swin_denoiser", **_TINY, "prompts": 3}},
    "without true images": {
        "model": {"kind": "modl", **_TINY},
        "sites": {"A": {"supervision": {"kind": "split"}}, "B": {}},
    },
    "generative_prior": {
        "model": {"kind": "generative_prior", **_TINY, "size": 32, "codes": 2, "iterations": 2},
        "method": {"kind": "fedgimp"},
    },
}
CT: dict[str, dict[str, Any]] = {
    "modl": {"model": {"kind": "modl", **_TINY}},
    "unet": {"model": {"kind": "unet", **_TINY, "conditioned": True}, "method": {"kind": "hyperfed"}},
    "learn": {"model": {"kind": "learn", **_TINY}},
    "guided learn": {
        "model": {"kind": "learn", **_TINY, "gradient": "fbp", "weighted": True, "guided": True, "conditioned": True}
    },
    "learn of unets": {"model": {"kind": "learn", **_TINY, "prox": "unet"}},
    "redcnn": {"model": {"kind": "redcnn", **_TINY, "conditioning": "every"}},
    "redcnn with anatomy": {
        "model": {"kind": "redcnn", **_TINY, "conditioning": "bottleneck", "anatomy": _ANATOMY},
        "method": {"kind": "scan_physfed"},
    },
    "lpd": {"model": {"kind": "lpd", **_TINY, "conditioned": True}},
    "two_band": {"model": {"kind": "two_band", **_TINY}, "method": {"kind": "fedfdd", "unseen": "mean"}},
    "iradonmap": {"model": {"kind": "iradonmap", **_TINY}, "method": {"kind": "fedct"}},
}
_EVALUATION = {"slices": {"per_patient": 1}, "tuning_slices": 1, "tv_weights": [0.001, 0.01]}
_LOCAL = {"steps": 1, "batch": 2, "optimizer": "adam", "optimizer_state": "keep", "clip_norm": 1.0}


def _quick(names: Iterable[str], *quick: str) -> list[Any]:
    """All names; those that are not `quick` are of `make test-all`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    for number in range(4):
        save(head(number, slices=2)[::2, ::2], root / f"Doe-John-{number}" / "flair.nii.gz")
    return root


@pytest.fixture(scope="module")
def thoraxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ct_hospitals(tmp_path_factory.mktemp("thoraxes"))["A"]


def _mri(name: str) -> Study:
    baselines = ["zero_filled", "cg_sense", "tv", "tv_real"]
    evaluation = {**_EVALUATION, "baselines": baselines}
    values = {
        "name": "mri",
        "sites": {"A": {}, "B": {}},
        "acquisition": {"coils": 2, "mask": {"calibration": 0.2}},
        "task": {"kind": "reconstruction", "contrasts": ["flair"], "size": [32, 32], "evaluation": evaluation},
        "local": _LOCAL,
    }
    return Study.model_validate(values | MRI[name])


def _ct(name: str) -> Study:
    evaluation = {
        "slices": {"per_patient": 1},
        "baselines": ["fbp", "tv", "weighted_tv"],
        "tuning_slices": 1,
        "tv_weights": [0.001, 0.01],
    }
    task = {**ct_study()["task"], "augment": True, "evaluation": evaluation}
    return Study.model_validate(ct_study(task=task, local=_LOCAL) | CT[name])


def _step(plans: ArmSpecs, learner: Learner, memory: Memory = NOTHING, number: int = 1) -> Trained:
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, memory)
    return learner.train(number, public, memory)


def _steps_and_evaluation(study: Study, folder: Path, compute: Compute, out: Path, **embeddings: Path) -> Trained:
    """Two rounds of a step, the second from what the site kept, and all that a site is asked to evaluate."""
    plans = arm_specs_of(study, embeddings)
    learner = learner_of(plans, folder, compute)
    trained = _step(plans, learner)
    trained = _step(plans, learner, Memory(trained.memory, {}), 2)
    assert all(tensor.device == compute.device for tensor in tensors_of(learner))
    given = {group: set(part) for group, part in trained.changes.items() if part}
    layout = plans.arm_spec("federated").layout
    assert given == {group.name: {info.name for info in group.tensors} for group in layout.groups}
    rows = learner.held_out.evaluate("test")
    assert all(len(rows[spec.name]) == learner.dataset.patients("test") > 0 for spec in plans.task.metrics)
    released = evaluators_of(out, out / "pictures.npz")["released"]
    meta = {"picture": "model", "unseen_site": True}
    released(learner, plans.model_context.initial_values(), meta, "test")  # type: ignore[arg-type]
    return trained


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", _quick(MRI, "modl"))
def test_mri_trains_and_is_evaluated(
    name: str, device: str, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _steps_and_evaluation(_mri(name), heads, device_named(device, monkeypatch), tmp_path)
    if device != "meta":
        _agree(found, _steps_and_evaluation(_mri(name), heads, CPU, tmp_path))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", _quick(CT, "learn", "redcnn"))
def test_ct_trains_and_is_evaluated(
    name: str, device: str, thoraxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = tmp_path / "vectors.npz"
    np.savez(vectors, all=np.ones(8, np.float32))
    compute = device_named(device, monkeypatch)
    found = _steps_and_evaluation(_ct(name), thoraxes, compute, tmp_path, A=vectors, B=vectors)
    if device != "meta":
        _agree(found, _steps_and_evaluation(_ct(name), thoraxes, CPU, tmp_path, A=vectors, B=vectors))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("modality", _quick(("mri", "ct"), "mri"))
def test_baselines_are_tuned_and_evaluated(
    modality: str, device: str, heads: Path, thoraxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Meta kernels are slow, and a third iteration does what the second does.
    def quick(operator: LinearOperator, data: Tensor, weight: float, *_: int, **more: float) -> Tensor:
        return tv(operator, data, weight, 2, **more)

    monkeypatch.setattr("wardround.imaging.acquisition.solvers.tv", quick)
    study, folder = (_mri("modl"), heads) if modality == "mri" else (_ct("learn"), thoraxes)
    learner = learner_of(arm_specs_of(study), folder, device_named(device, monkeypatch))
    evaluator = evaluators_of(tmp_path, tmp_path / "pictures.npz")["baseline"]
    for name in study.baselines:
        rows = evaluator(learner, None, {"baseline": name, "picture": name}, "test")
        assert len(rows["psnr"]) == learner.dataset.patients("test")


def _agree(found: Trained, known: Trained) -> None:
    """Sums of n float32 numbers in another order differ by about sqrt(n) 2^-24 of their terms; n is below 2^16."""
    assert found.loss == pytest.approx(known.loss, rel=2.0**-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [False, True])
def test_the_toy_trains_and_is_evaluated(
    norm: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"norm": norm, "patients": 12}
    study = toy_study(task={"kind": "custom", "factory": "tests.toys:make_task", "options": options}, local=_LOCAL)
    compute = device_named(device, monkeypatch)
    plans = arm_specs_of(study)
    learner = learner_of(plans, tmp_path, compute)
    trained = _step(plans, learner)
    assert trained.changes["model"].keys() == {name for name, _ in plans.model_context.model.named_parameters()}
    assert learner.held_out.evaluate("test")["mse"].shape == (2,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learns", [*((stage,) for stage in STAGES), STAGES])
def test_a_chain_trains_and_is_evaluated(
    learns: tuple[str, ...], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = chain_study(local=_LOCAL, schedule={"phases": [{"train": learns}]})
    compute = device_named(device, monkeypatch)
    plans = arm_specs_of(study)
    learner = learner_of(plans, tmp_path, compute)
    trained = _step(plans, learner)
    trained = _step(plans, learner, Memory(trained.memory, {}), 2)
    assert all(tensor.device == compute.device for tensor in tensors_of(learner))
    assert trained.changes["model"].keys() == {name for name, _ in plans.model_context.model.named_parameters()}
    for group in ("model", "buffers"):
        assert not any(c.any() for n, c in trained.changes[group].items() if stage_of(n) not in learns)
    assert learner.held_out.evaluate("test")["dice"].shape == (2,)


# What the law finds ---------------------------------------------------------------------------------------------------


class Numbers(Regression):
    """Takes a number in its loss, as a task may that was written for the CPU."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) / float(batch[1].detach().abs().max().numpy())


class Item(Regression):
    """The same by `.item()`."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) / batch[1].abs().max().item()


class Constant(Regression):
    """Multiplies with a constant of the CPU."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (super().loss(model, batch) * torch.ones(3)).mean()


class InScore(Regression):
    """Forgets it in what is measured."""

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        scores = super().score(model, batch)
        return {name: torch.from_numpy(value.numpy()) for name, value in scores.items()}


@pytest.mark.parametrize("task", [Numbers, Item, Constant, InScore])
def test_a_forgotten_host_copy_is_found(
    task: type[Regression], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(monkeypatch)
    plans = arm_specs_of(toy_study())
    plans.__dict__["task"] = task()
    for compute, fails in ((CPU, False), (META, True)):
        learner = learner_of(plans, tmp_path, compute)

        def work(learner: Learner = learner) -> None:
            _step(plans, learner)
            learner.held_out.evaluate("test")

        if fails:
            with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
                work()
        else:
            work()


# What a machine is given ---------------------------------------------------------------------------------------------


def _machine(tmp_path: Path, study: Study, *compare: str, **entries: dict[str, Any]) -> Machine:
    for name in study.sites:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    sites = {name: SiteData.model_validate({"data": tmp_path / name, **entries.get(name, {})}) for name in study.sites}
    return Machine(study, SitesFile(sites=sites).with_code(), tmp_path / "out", compare)


def test_sites_of_one_machine_compute_where_their_own_entries_say(tmp_path: Path) -> None:
    machine = _machine(tmp_path, toy_study(), "pooled", B={"precision": "bf16"}, C={"precision": "bf16"})
    arms = machine.arm_spec("federated")
    learners = {site: machine.learner(arms, site) for site in "ABC"}
    assert {site: learner.compute.precision for site, learner in learners.items()} == {
        "A": "fp32",
        "B": "bf16",
        "C": "bf16",
    }
    assert learners["B"].model is learners["C"].model is not learners["A"].model
    # Where the sites' data are pooled they do not agree.
    assert machine.agent("pooled").held.compute == CPU
    assert machine.agent("B").facts().machine["precision"] == "bf16"


def test_all_devices_start_from_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = arm_specs_of(toy_study())
    before = plans.model_context.initial_values()
    other = plans.model_context.on(Compute(torch.device("cpu"), "bf16"))
    assert other is plans.model_context.on(Compute(torch.device("cpu"), "bf16"))
    assert other.model is not plans.model_context.model
    assert all(np.array_equal(other.initial_values()[name], value) for name, value in before.items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_change_the_digits_that_they_lack(precision: str, tmp_path: Path) -> None:
    plans = arm_specs_of(toy_study())
    compute = Compute(torch.device("cpu"), precision)  # type: ignore[arg-type]
    known, found = (_step(plans, learner_of(plans, tmp_path, c)) for c in (CPU, compute))
    # A product of the toy's layers has 2^-8 or 2^-11 of relative error, and the loss a few of them.
    assert found.loss != known.loss
    assert found.loss == pytest.approx(known.loss, rel=2.0**-5)
    for name, change in known.changes["model"].items():
        assert found.changes["model"][name].dtype == change.dtype
        assert np.linalg.norm(found.changes["model"][name] - change) < 2.0**-4 * np.linalg.norm(change)


def test_physics_stays_in_full_precision(thoraxes: Path) -> None:
    study = _ct("learn")
    plans = arm_specs_of(study)
    batch = plans.task.dataset("A", (thoraxes,)).batch([0], np.random.default_rng(0))
    (part,) = batch.parts
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = part.operator.normal(part.target), part.operator.solve(part.target, 0.1, iterations=3)
    outside = part.operator.normal(part.target), part.operator.solve(part.target, 0.1, iterations=3)
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


# With privacy --------------------------------------------------------------------------------------------------------

_PRIVATE: dict[str, Any] = {
    "protection": {"privacy": {"epsilon": 50.0, "noise_multiplier": 1.0, "clip": 1.0, "patients_per_step": 2}},
    "method": {"kind": "fedavg", "weights": "equal"},
    "schedule": {"rounds": 4, "release": "last"},
}


@dataclass(frozen=True)
class Unrepeatable(Regression):
    """Uses an operation whose result depends on an order that torch does not promise."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().loss(model, batch)


def test_with_privacy_an_operation_that_cannot_be_repeated_is_refused_before_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(monkeypatch)
    for task, refused in ((Unrepeatable(), True), (Regression(), False)):
        machine = _machine(tmp_path / f"{refused}", toy_study(**_PRIVATE))
        machine.__dict__["task"] = task
        agent = machine.agent("A")
        agent.held.__dict__["compute"] = META
        learner = machine.learner(machine.arm_spec("federated"), "A")
        if refused:
            with pytest.raises(StudyError, match=r"device: cpu.*|protection\.privacy: an operation") as error:
                _step(machine, learner)
            assert "put_" in str(error.value.detail)
        else:
            _step(machine, learner)
        assert (agent.spent().steps > 0) is not refused
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("compute", "why"), [(Compute(torch.device("mps")), "mps"), (Compute(CPU.device, "fp16"), "")])
def test_with_privacy_a_device_that_promises_nothing_is_refused(compute: Compute, why: str) -> None:
    with pytest.raises(StudyError, match=f"protection.privacy: .*{why}.*sites file"):
        compute.fit_for_privacy()


def test_with_privacy_another_device_is_charged_anew(tmp_path: Path) -> None:
    machine = _machine(tmp_path, toy_study(**_PRIVATE))
    agent, arm = machine.agent("A"), machine.arm_spec("federated")
    spent = []
    for compute in (CPU, CPU, Compute(CPU.device, "bf16")):
        agent.held.__dict__["compute"] = compute
        _step(machine, machine.learner(arm, "A"))
        spent.append(agent.spent().steps)
    assert spent[0] == spent[1] < spent[2]
