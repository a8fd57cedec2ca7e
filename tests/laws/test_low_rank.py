"""Laws of low-rank products: what the mean of the sites' factors is, and what no message carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.federation.rig import ARM, Rig
from tests.toys import toy_sites, toy_study
from wardround.errors import StudyError
from wardround.federation.exchange import PlainSum
from wardround.federation.release import model_path
from wardround.federation.spooled import each_update
from wardround.learning.methods.fedex_lora import FedExLoRA
from wardround.learning.methods.flora import FLoRA
from wardround.learning.methods.folded import Folded, is_part
from wardround.learning.methods.method import Method, Writers
from wardround.models.low_rank import folded_of, is_first_factor, is_folded, second_of
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import frozen_part, load_model
from wardround.protection.lint import lint_against
from wardround.runs.session import run
from wardround.study.places import Places
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Group, Layout

Floats = npt.NDArray[np.float64]
FIRST = "layer.lora.a.weight"
SECOND, FOLDED = second_of(FIRST), folded_of(FIRST)
EXACT = 1e-6
NOISED = {
    "method": {"kind": "fedavg", "weights": "equal"},
    "local": {"steps": 1, "optimizer": "sgd", "lr": 0.1},
    "protection": {"secure": True, "privacy": {"patients_per_step": 2, "noise": "distributed", "delta": 1e-3}},
}
LORA = {"kind": "lora", "targets": ["0", "2"], "rank": 2, "alpha": 4.0}


@dataclass(frozen=True)
class Changes:
    """Sites' changes as they are, before any of them is written in whole numbers."""

    layout: Layout
    changed: dict[str, Floats]
    shares: Floats

    def parts(self, group: str) -> Floats:
        return self.shares

    def each(self, group: str, tensor: str) -> Floats:
        return self.changed[tensor]

    def mean(self, group: str, tensor: str) -> Floats:
        found: Floats = np.tensordot(self.shares, self.changed[tensor], axes=1)
        return found

    def moved(self, group: str, tensor: str, old: Floats) -> Floats:
        return (self.mean(group, tensor) + old).astype(old.dtype)


def effective(public: dict[str, Any], method: Method) -> Floats:
    """What the layer's weight differs by from its base: product and what is folded."""
    values = method.release_for(None, public, {})
    a, b = values[FIRST].astype(np.float64), values[SECOND].astype(np.float64)
    folded = values[FOLDED].astype(np.float64) if FOLDED in values else 0.0
    found: Floats = (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(len(b), *a.shape[1:]) + folded
    return found


def relative_errors(method: Method, *, both: bool, seed: int, inputs: tuple[int, ...], rounds: int = 3) -> list[float]:
    """By how far each round's weight is from the mean of the sites', over the size of its change since the start."""
    random = np.random.default_rng(seed)
    rank, d, sites = 2, 5, int(random.integers(1, 5))
    values = {
        FIRST: random.standard_normal((rank, *inputs)).astype(np.float32),
        SECOND: np.zeros((d, rank, *(1 for _ in inputs[1:])), np.float32),
        FOLDED: np.zeros((d, *inputs), np.float32),
    }
    sent = [FIRST, SECOND] if both else [SECOND]
    group = Group("model", tuple(TensorInfo(n, "float32", values[n].shape) for n in sent), 32)
    held = {} if both else {f"model/{FIRST}": values[FIRST]}
    public, private = method.initial((group,), values)
    found = []
    for _ in range(rounds):
        shares = random.uniform(0.1, 1.0, sites)
        shares /= shares.sum()
        changed = {n: random.standard_normal((sites, *values[n].shape)) for n in sent}
        own = []
        for site in range(sites):
            trained = {f"model/{n}": public[f"model/{n}"] + changed[n][site] for n in sent}
            own.append(effective({**public, **held, **trained}, method))
        before = effective({**public, **held}, method)
        following: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        aggregate: Any = Changes(Layout((group,), (), 8, 1.0), changed, shares)
        method.apply(public, private, aggregate, Writers(following.__setitem__, kept.__setitem__))
        public, private = following, kept
        mean = np.tensordot(shares, np.array(own), axes=1)
        error = np.abs(effective({**public, **held}, method) - mean).max()
        found.append(float(error / max(np.abs(mean).max(), np.abs(before).max())))
    return found


INPUTS = st.sampled_from([(4,), (9,), (3, 2, 2), (2, 3)])
EXACTLY = [(FedExLoRA("equal"), True), (FLoRA("equal"), True), (Method("equal"), False)]


@pytest.mark.parametrize(("method", "both"), EXACTLY, ids=["fedex", "flora", "second-factor-alone"])
@settings(deadline=None, max_examples=examples(25))
@given(seed=st.integers(0, 2**32 - 1), inputs=INPUTS)
def test_the_weight_changes_by_the_mean_of_the_sites_products(
    method: Method, both: bool, seed: int, inputs: tuple[int, ...]
) -> None:
    # A few roundings to float32.
    assert max(relative_errors(method, both=both, seed=seed, inputs=inputs)) <= EXACT


def test_mean_factors_are_not_the_mean_product() -> None:
    assert min(relative_errors(Method("equal"), both=True, seed=3, inputs=(4,))) > 0.01


@pytest.mark.parametrize("method", [FedExLoRA("equal"), FLoRA("equal")])
def test_what_is_folded_is_never_larger_than_twice_the_weights(method: Method) -> None:
    d, k = 5, 4
    values = {
        FIRST: np.ones((2, k), np.float32),
        SECOND: np.ones((d, 2), np.float32),
        FOLDED: np.zeros((d, k), np.float32),
    }
    group = Group("model", tuple(TensorInfo(n, "float32", values[n].shape) for n in (FIRST, SECOND)), 32)
    public, private = method.initial((group,), values)
    sizes = []
    for number in range(4):
        random = np.random.default_rng(number)
        changed = {n: random.standard_normal((3, *values[n].shape)) for n in (FIRST, SECOND)}
        following: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        aggregate: Any = Changes(Layout((group,), (), 8, 1.0), changed, np.full(3, 1 / 3))
        method.apply(public, private, aggregate, Writers(following.__setitem__, kept.__setitem__))
        public, private = following, kept
        sizes.append(sum(array.size for name, array in public.items() if is_part(name)))
    # Factors, and the whole weights that earlier ones were added up to.
    assert max(sizes) <= 2 * d * k


# Whole arms --------------------------------------------------------------------------------------------------------


def study(method: dict[str, Any] | None = None, adapters: dict[str, Any] = LORA, **changes: Any) -> Study:
    given = {"schedule": {"rounds": 3, "release": "last"}, "protection": {"initial_scale": 4.0}} | changes
    return toy_study(adapters=adapters, method=method or {"kind": "fedavg"}, **given)


def rig_of(study: Study, folder: Path) -> Rig:
    """With the exchange that the study's method needs."""
    return Rig(study, folder, protocol=each_update(folder / "updates") if study.method.folds else PlainSum)


@pytest.mark.parametrize("kind", ["fedavg", "fedex_lora", "flora", "fedsa_lora"])
def test_a_federation_trains_and_no_message_carries_the_base(kind: str, tmp_path: Path) -> None:
    rig = rig_of(study({"kind": kind}), tmp_path)
    first = rig.host.model_context.initial_values()
    last = rig.train()
    base = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert rig.host.model_context.frozen >= base
    for sent in rig.engine.sent:
        assert not [t.name for t in sent.message.header.tensors if t.name.split("/")[-1] in base]
    learner = rig.learner("A")
    learner.load(last.public, rig.sites["A"].store.memory(3))
    now = {name: tensor.numpy() for name, tensor in learner.model.state_dict().items()}
    assert all(np.array_equal(now[name], first[name]) for name in base)
    moved = {name for name in now if not np.array_equal(now[name], first[name])}
    # What FLoRA learned is all folded, and its next second factor is zero.
    assert any(is_folded(name) if kind == "flora" else "lora.b" in name for name in moved)


@pytest.mark.parametrize("kind", ["fedex_lora", "flora"])
def test_a_run_changes_the_weight_by_the_mean_product_of_its_sites(kind: str, tmp_path: Path) -> None:
    rig = rig_of(study({"kind": kind, "weights": "equal"}), tmp_path)
    states = rig.states()
    before = next(states)
    after = next(states)
    means = {}
    for name in ("A", "B", "C"):
        learner = rig.learner(name)
        memory = rig.sites[name].store.memory(0)
        learner.load(before.public, memory)
        learner.train(1, before.public, memory)
        for layer in ("0", "2"):
            part = learner.model.get_submodule(f"{layer}.lora")
            means[layer] = means.get(layer, 0.0) + part.product().numpy() / 3  # type: ignore[operator]
    learner.load(after.public, rig.sites["A"].store.memory(1))
    for layer in ("0", "2"):
        parts = [learner.model.get_submodule(f"{layer}.{part}") for part in ("lora", "lora_folded")]
        now = sum(part.product().numpy() for part in parts)  # type: ignore[operator]
        # A step of 30-bit rounding of each site's factors, times the other factor.
        assert np.abs(now - means[layer]).max() <= 1e-5 * np.abs(means[layer]).max() + 1e-7


def test_a_site_of_a_smaller_rank_trains_a_product_of_that_rank(tmp_path: Path) -> None:
    rig = Rig(study({"kind": "flora", "ranks": {"A": 1}}), tmp_path)
    learner, start = rig.learner("A"), rig.start()
    learner.load(start.public, rig.sites["A"].store.memory(0))
    learner.train(1, start.public, rig.sites["A"].store.memory(0))
    product = learner.model.get_submodule("0.lora").product()  # type: ignore[operator]
    assert torch.linalg.matrix_rank(product) == 1


def test_what_is_dual_stays_at_its_site(tmp_path: Path) -> None:
    rig = Rig(study(adapters={**LORA, "local_rank": 1}), tmp_path)
    rig.train()
    assert rig.arm_spec.policy.names("local") == tuple(
        f"{layer}.lora_local.{part}.weight" for layer in ("0", "2") for part in ("a", "b")
    )
    assert not any("lora_local" in t.name for sent in rig.engine.sent for t in sent.message.header.tensors)
    kept = rig.sites["A"].store.memory(3).tensors
    assert any("lora_local" in name and np.abs(kept[name]).sum() > 0 for name in kept)


def test_the_fixed_first_factor_is_the_same_at_all_sites_and_in_no_message(tmp_path: Path) -> None:
    rig = Rig(study(adapters={**LORA, "factors": "second"}), tmp_path)
    rig.train()
    assert {t.name for sent in rig.engine.sent for t in sent.message.header.tensors} == {
        f"model/{layer}.lora.b.weight" for layer in ("0", "2")
    }
    assert all(is_first_factor(n) or "lora" not in n for n in rig.arm_spec.policy.names("frozen"))


def test_what_stays_at_a_site_is_refused_where_noise_must_add_up() -> None:
    with pytest.raises(ValueError, match=r"adapters\.local_rank: with protection\.privacy\.noise"):
        study(adapters={**LORA, "local_rank": 1}, **NOISED)


@pytest.mark.parametrize("kind", ["fedex_lora", "flora", "fedsa_lora"])
def test_a_method_of_products_needs_some(kind: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"set adapters\.kind: lora"):
        Rig(toy_study(method={"kind": kind}), tmp_path).host.arm_spec(ARM)


def test_a_trap_folded_into_a_weight_is_seen(tmp_path: Path) -> None:
    rig = rig_of(study({"kind": "fedex_lora"}), tmp_path)
    learner, start = rig.learner("A"), dict(rig.start().public)
    weight = learner.model.get_submodule("0").get_parameter("weight").detach().numpy()
    scale = learner.model.get_submodule("0.lora_folded").scale
    alike = np.ones_like(weight)
    still = np.zeros_like(learner.model.get_submodule("2").get_parameter("weight").detach().numpy())
    start |= Folded.of(start).begun_with([(alike - weight) / scale, still]).parts
    found = lint_against(learner.known.received(start), learner.known.approved())
    assert [(finding.check, finding.tensor) for finding in found] == [("imprint", "0.lora_folded.weight")]
    assert not lint_against(learner.known.received(rig.start().public), learner.known.approved())


@pytest.mark.parametrize("kind", ["fedavg", "fedex_lora", "flora"])
def test_a_run_goes_on_from_the_release_of_another(kind: str, tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data")
    first = run(study({"kind": kind}), sites, tmp_path / "first", engine="local", compare=["local"], quiet=True)
    released = load_model(model_path(tmp_path / "first", "federated"))[0]
    assert any(np.abs(tensor).max() > 0 for name, tensor in released.items() if "lora" in name and ".a." not in name)
    start = {"kind": "release", "file": "first", "sha256": first.model_sha256}
    again = ArmSpecs(
        study({"kind": kind}, start=start), (), plugins=Plugins(code=True), places=Places((tmp_path / "first",))
    )
    spec = again.arm_spec(ARM)
    serves = spec.method.release_for("A", again.start(spec), {})
    assert serves.keys() <= released.keys()
    assert all(np.array_equal(serves[name], released[name]) for name in serves)


@pytest.mark.parametrize("kind", ["fedavg", "fedex_lora"])
def test_the_bill_counts_adapters_and_no_base(kind: str, tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data")
    result = run(study({"kind": kind}), sites, tmp_path / "out", engine="local", quiet=True)
    bill = result.traffic.arms["federated"].rounds
    assert bill.up.adapters > 0
    assert bill.down.adapters > 0
    assert (bill.up.base, bill.down.base, bill.up.model, bill.down.model) == (0, 0, 0, 0)


# A base of 16 bits -------------------------------------------------------------------------------------------------

HALF = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"half": True}}


def test_a_base_of_16_bits_keeps_its_bits_and_shares_float32(tmp_path: Path) -> None:
    """No message holds a value of 16 bits, nor one of the base; the release is the base and what was learned."""
    given = study(task=HALF)
    rig = rig_of(given, tmp_path)
    before = {name: t.clone() for name, t in rig.host.model_context.model.state_dict().items()}
    base = {name for name, t in before.items() if t.dtype is torch.bfloat16}
    assert base == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert rig.host.model_context.frozen >= base
    last = rig.train()
    sent = [info for each in rig.engine.sent for info in each.message.header.tensors]
    assert sent
    assert {info.dtype for info in sent if "lora" in info.name} <= {"float32", "int32", "int64", "uint8"}
    assert not [info.name for info in sent if info.name.split("/")[-1] in base or "16" in info.dtype]
    learner = rig.learner("A")
    learner.load(last.public, rig.sites["A"].store.memory(3))
    now = learner.model.state_dict()
    assert all(torch.equal(now[name], before[name]) and now[name].dtype == before[name].dtype for name in base)
    assert all(t.dtype is torch.float32 for name, t in now.items() if name not in base)
    assert any(not torch.equal(now[name], before[name]) for name in now)


def test_a_run_over_a_base_of_16_bits_releases_it(tmp_path: Path) -> None:
    """Widened to 32 bits on the disk, where numpy has no others: the same values, and a network of 16 bits again."""
    result = run(study(task=HALF), toy_sites(tmp_path / "data"), tmp_path / "out", engine="local", quiet=True)
    path = model_path(result.out, "federated")
    tensors, metadata = load_model(path)
    tensors |= frozen_part(path, metadata)
    begun = ArmSpecs(study(task=HALF), (), plugins=Plugins(code=True)).model_context.model
    known = {name: t.clone() for name, t in begun.state_dict().items()}
    begun.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    for name, t in begun.state_dict().items():
        assert t.dtype == known[name].dtype
        assert torch.equal(t, known[name]) == ("lora.b" not in name and "lora.a" not in name)


@pytest.mark.parametrize("parts", [{}, {"frozen": ["0.*"]}])
def test_what_is_trained_in_16_bits_is_refused_and_not_kept_in_silence(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"weight of the network is bfloat16, and what is trained and shared has 32 b"):
        rig_of(toy_study(task=HALF, parts=parts), tmp_path)
    with pytest.raises(StudyError, match=r"2.weight of the network is bfloat16"):
        rig_of(study(task=HALF, adapters={**LORA, "trained": ["2.weight"]}), tmp_path)
