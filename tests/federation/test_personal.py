"""Methods that keep a part of the model at the site, against their definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from tests.examples import quickly
from tests.federation.rig import Rig, Sent
from tests.scanners import FEATURES, PROTOCOLS, Network, scanner_study
from tests.toys import toy_sites
from wardround.errors import StudyError
from wardround.imaging.acquisition.ct.scanners import protocol_features
from wardround.learning.methods.fedct import FedCT
from wardround.learning.methods.fedfdd import FedFDD
from wardround.learning.methods.hyperfed import HyperFed
from wardround.learning.methods.method import LocalRound
from wardround.learning.methods.personal import UNSEEN, Personal
from wardround.learning.methods.scan_physfed import ScanPhysFed, scanner_code
from wardround.learning.model_context import parameters_of
from wardround.plan.arm_specs import protocols_of
from wardround.runs.explain import explain
from wardround.runs.session import run
from wardround.wire.ring import ExactSum, levels
from wardround.wire.update import Aggregate

Array = npt.NDArray[Any]
# The largest relative error of rounding to float32.
HALF_ULP = 2.0**-24
TRAINING = ("Alpha", "Beta", "Gamma")
METHODS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "hyperfed"}, "hypernetwork."),
    ({"kind": "scan_physfed"}, "decoder."),
    ({"kind": "fedfdd"}, "low."),
    ({"kind": "fedfdd", "private": "high"}, "high."),
    ({"kind": "fedct"}, "projection."),
]


def _named(value: Any) -> str:
    return value if isinstance(value, str) else value["kind"]


EACH = pytest.mark.parametrize(("method", "prefix"), METHODS, ids=_named)
STRANGERS = pytest.mark.parametrize("unseen", ["initial", "mean"])


def names_in(sent: Sent) -> set[str]:
    """Every tensor that a message's header names."""
    header = json.loads(sent.message.header.to_bytes())
    return {row["name"] for row in header["tensors"]} | set(header["meta"].get("scales", {}))


def kept_by(rig: Rig, number: int) -> list[dict[str, Array]]:
    """What each site of the rig keeps of the model after a round."""
    return [dict(rig.learner(s).local_tensors(site.store.memory(number))) for s, site in rig.sites.items()]


# What stays and what travels ---------------------------------------------------------------------------------------


@EACH
def test_the_private_part_stays_and_differs_and_the_rest_is_shared(
    tmp_path: Path, method: dict[str, Any], prefix: str
) -> None:
    rig = Rig(scanner_study(method), tmp_path)
    state = rig.train()
    model = {p.name for p in rig.host.model_context.parameters}
    private = {name for name in model if name.startswith(prefix)}
    assert private
    counters = {name for name in model if name.endswith("num_batches_tracked")}
    kept = kept_by(rig, 3)
    assert all(set(tensors) == private | counters for tensors in kept)
    for name in private - counters:
        values = [tensors[name] for tensors in kept]
        assert not any(np.array_equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert {name.split("/")[1] for name in state.public} == model - private - counters
    assert not dict(state.private)
    travelled = {name.split("/")[1] for sent in rig.engine.sent for name in names_in(sent)}
    assert travelled == model - private - counters
    assert sum(g.size for g in rig.arm_spec.layout.groups) == sum(state.public[n].size for n in state.public)


@pytest.mark.parametrize(("method", "prefix"), quickly(METHODS, 1, 2), ids=_named)
def test_the_declared_side_channel_is_the_float_values_of_the_private_part_and_no_more(
    tmp_path: Path, method: dict[str, Any], prefix: str
) -> None:
    plain, declared = (Rig(scanner_study(method | {"unseen": s}), tmp_path / s) for s in ("initial", "mean"))
    *same, extra = declared.arm_spec.layout.groups
    assert tuple(same) == plain.arm_spec.layout.groups
    private = [p for p in declared.host.model_context.parameters if p.name.startswith(prefix)]
    assert (extra.name, extra.tensors) == (UNSEEN, tuple(p.info for p in private if p.is_float))
    assert plain.method.discloses == ""
    assert "unseen: mean" in declared.method.discloses
    # Training is the same to the last bit but for the rounding of the sum, which has its own draw for every tensor.
    ours, theirs = plain.train(), declared.train()
    assert set(ours.public) == set(theirs.public)
    for name in ours.public:
        assert np.allclose(ours.public[name], theirs.public[name], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "prefix", "weights"),
    quickly([(*each, weights) for each in METHODS for weights in ("equal", "samples")], 0, 3, 4, 9),
    ids=_named,
)
def test_strangers_get_the_mean_of_the_private_parts(
    tmp_path: Path, method: dict[str, Any], prefix: str, weights: str
) -> None:
    rig = Rig(scanner_study(method | {"unseen": "mean", "weights": weights}), tmp_path)
    states = list(rig.states())
    start = rig.method.release_for(None, states[0].public, states[0].private)
    initial = rig.host.model_context.initial_values()
    assert {n for n in start if n.startswith(prefix)}
    assert all(np.array_equal(tensor, initial[name]) for name, tensor in start.items())
    bits = rig.arm_spec.layout.bits_of(rig.arm_spec.layout.groups[-1])
    sites = [rig.host.dataset(site) for site in rig.sites]
    shares = [1.0 if weights == "equal" else len(points) / 16.0 for points in sites]
    state = states[-1]
    released = rig.method.release_for(None, state.public, state.private)
    kept = kept_by(rig, 3)
    told = [n for n in kept[0] if n.startswith(prefix) and not n.endswith("num_batches_tracked")]
    for name in told:
        mean = np.average([t[name].astype(np.float64) for t in kept], axis=0, weights=shares)
        step = states[-2].scales[f"{UNSEEN}/{name}"] / levels(bits)
        # A site's change is rounded to float32 and then by up to a step; what is released is rounded to float32.
        change = max(np.abs(t[name] - initial[name]).max() for t in kept)
        error = len(kept) * step / sum(shares) + HALF_ULP * (change + np.abs(released[name]).max())
        assert np.abs(released[name] - mean).max() <= error
        assert np.abs(mean - initial[name]).max() > 10 * error
    for site in rig.sites:
        assert not any(n.startswith(prefix) for n in rig.method.release_for(site, state.public, state.private))


def test_a_mean_is_over_the_sites_of_its_round(tmp_path: Path) -> None:
    study = scanner_study({"kind": "hyperfed", "unseen": "mean"})
    rig = Rig(study, tmp_path)
    answer, fall_silent = rig.sites["Beta"].handle, {2, 3}

    def handle(request: Any) -> Any:
        if request.header.kind == "train" and request.header.round in fall_silent:
            raise OSError
        return answer(request)

    def broken(request: Any) -> Any:
        try:
            return handle(request)
        except OSError:
            return request.reply("error", meta={"reason": "away"})

    rig.sites["Beta"].handle = broken  # type: ignore[method-assign]
    state = rig.train()
    present = [t for site, t in zip(rig.sites, kept_by(rig, 3), strict=True) if site != "Beta"]
    released = rig.method.release_for(None, state.public, state.private)
    for name in present[0]:
        if name.startswith("hypernetwork."):
            assert np.allclose(released[name], np.mean([t[name] for t in present], axis=0), atol=1e-6)


def test_the_sum_of_an_update_holds_how_far_the_private_part_is_from_its_start(tmp_path: Path) -> None:
    """What the side channel says, read from the bytes at the seam."""
    rig = Rig(scanner_study({"kind": "hyperfed", "unseen": "mean"}), tmp_path)
    scales = rig.start().scales
    rig.train()
    initial = rig.host.model_context.initial_values()
    for sent in rig.engine.sent:
        header = sent.message.header
        if (header.kind, header.round) != ("update", 1):
            continue
        total = ExactSum(rig.arm_spec.layout.segments)
        total.add(sent.body, 0)
        said = Aggregate(rig.arm_spec.layout, total, scales)
        kept = rig.sites[header.site].store.memory(1).tensors
        for info in rig.arm_spec.layout.groups[-1].tensors:
            change = kept[f"local/{info.name}"] - initial[info.name]
            assert np.allclose(said.mean(UNSEEN, info.name), change, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "fix"),
    [
        (HyperFed(), r"`hypernetwork`.*model\.conditioned: true"),
        (FedFDD(), r"`low`.*model\.kind: two_band"),
        (FedCT(), r"`projection`.*iradonmap"),
        (ScanPhysFed(scanners=(("A", (0.0,)), ("B", (1.0,)))), r"`encoder`.*redcnn.*bottleneck"),
    ],
)
def test_a_model_without_the_parts_is_refused(method: Personal, fix: str) -> None:
    with pytest.raises(StudyError, match=fix):
        method.policy(parameters_of(torch.nn.Linear(2, 2)))


# SCAN-PhysFed ------------------------------------------------------------------------------------------------------


def scan_of(*sites: str, repulsion: float = 1e-4) -> ScanPhysFed:
    features = {site: protocol_features(PROTOCOLS[site]) for site in sites}
    return ScanPhysFed(repulsion=repulsion, scanners=tuple((s, tuple(map(float, f))) for s, f in features.items()))


def round_at(site: str, model: torch.nn.Module, number: int, step: int) -> LocalRound:
    return LocalRound(site, model, {}, {}, {}, {}, number, 2, 0.1, seed=3, step=step)


def code_by_hand(model: Network, features: Any) -> Array:
    films = model.hypernetwork(torch.tensor(features, dtype=torch.float32)[None])
    return np.concatenate([t.detach().numpy()[0] for f in films.values() for t in (f.gamma, f.beta)])


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model, method = Network(), scan_of(*TRAINING, repulsion=0.3)
    protocols = dict(method.scanners)
    for step in range(6):
        local = round_at("Alpha", model, 2, step)
        a, b = (code_by_hand(model, g) for g in (protocols["Alpha"], method.another_scanner(local)))
        cosine = abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert 0.01 < cosine < 0.999
        loss = method.objective(local, torch.tensor(2.0))
        assert loss.item() == pytest.approx(2.0 + 0.3 * cosine, rel=1e-5)
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.hypernetwork.parameters())
    assert model.encoder[0].weight.grad is None


def test_the_other_scanner_is_never_the_sites_own() -> None:
    """Echo has the scanner of Alpha: another site, but not another protocol."""
    method = scan_of("Alpha", "Beta", "Gamma", "Echo")
    protocols = dict(method.scanners)
    model = torch.nn.Identity()
    for site in protocols:
        drawn = [method.another_scanner(round_at(site, model, n, s)) for n in range(1, 21) for s in range(3)]
        assert protocols[site] not in drawn
        assert set(drawn) == set(protocols.values()) - {protocols[site]}
        again = [method.another_scanner(round_at(site, model, n, s)) for n in range(1, 21) for s in range(3)]
        assert drawn == again


def test_one_scanner_everywhere_is_refused() -> None:
    with pytest.raises(StudyError, match="different CT scanners"):
        scan_of("Alpha", "Echo").policy(parameters_of(Network()))


def test_a_site_trains_with_the_repulsion(tmp_path: Path) -> None:
    method = {"kind": "scan_physfed", "repulsion": 0.5}
    rig = Rig(scanner_study(method, local={"steps": 3, "batch": 4, "optimizer": "sgd", "lr": 0.1}), tmp_path)
    scan = rig.method
    assert isinstance(scan, ScanPhysFed)
    public, memory = dict(rig.start().public), rig.sites["Beta"].store.memory(0)
    learner = rig.learner("Beta")
    learner.load(public, memory)
    trained = learner.train(1, public, memory)
    initial = rig.host.model_context.initial
    model = Network()
    model.load_state_dict(initial)
    indices = learner._examples.of_round(1, 12)
    own = torch.tensor(dict(scan.scanners)["Beta"])
    for step in range(3):
        model.zero_grad()
        x, y = learner.dataset.batch(indices[4 * step : 4 * step + 4], np.random.default_rng())
        other = torch.tensor(scan.another_scanner(round_at("Beta", model, 1, step)))
        a, b = (torch.cat([t for film in model.hypernetwork(g).values() for t in film]) for g in (own, other))
        loss = (model(x) - y).square().mean() + 0.5 * ((a @ b) / (a.norm() * b.norm())).abs()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    for name, p in model.named_parameters():
        change = (p.detach() - initial[name]).numpy()
        if name.startswith("decoder."):
            change = trained.memory[f"local/{name}"] - initial[name].numpy() - change
            assert np.abs(change).max() < 1e-6
        else:
            assert np.allclose(trained.changes["model"][name], change, atol=1e-6)


def test_a_stranger_is_served_with_the_nearest_code() -> None:
    torch.manual_seed(1)
    model, method = Network().eval(), scan_of(*TRAINING)
    known = [np.array(g, dtype=np.float32) for _, g in method.scanners]
    book = [code_by_hand(model, g) for g in known]
    unseen_sites = np.random.default_rng(2).uniform(size=(12, FEATURES)).astype(np.float32)
    unseen_sites[:3] = known
    nearest = [int(np.argmin([np.linalg.norm(code_by_hand(model, g) - c) for c in book])) for g in unseen_sites]
    assert nearest[:3] == [0, 1, 2]
    assert len(set(nearest[3:])) > 1
    x = torch.randn(12, 6)
    seen = torch.cat([x, torch.from_numpy(unseen_sites)], dim=1)
    replaced = torch.cat([x, torch.from_numpy(np.stack([known[i] for i in nearest]))], dim=1)
    with torch.no_grad():
        plain, wanted = model(seen), model(replaced)
        with method.serving_unseen(model):
            assert torch.equal(model(seen), wanted)
            one = model.hypernetwork(torch.from_numpy(unseen_sites[5]))
        assert torch.equal(model(seen), plain)
    assert torch.allclose(one["one"].gamma, torch.from_numpy(book[nearest[5]][:6]))
    assert not torch.allclose(plain, wanted)
    assert torch.equal(scanner_code(model, torch.from_numpy(known[1])), torch.from_numpy(book[1]))


# Whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "prefix", "unseen"),
    [
        (*METHODS[0], "mean"),
        (*METHODS[1], "initial"),
        pytest.param(*METHODS[0], "initial", marks=pytest.mark.slow),
        pytest.param(*METHODS[1], "mean", marks=pytest.mark.slow),
        pytest.param(*METHODS[4], "initial", marks=pytest.mark.slow),
        pytest.param(*METHODS[4], "mean", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_with_a_stranger_and_all_comparisons(
    tmp_path: Path, method: dict[str, Any], prefix: str, unseen: str
) -> None:
    """The stranger's figures are those of the released model, which has the promised private part."""
    study = scanner_study(method | {"unseen": unseen}, unseen=("Delta",), schedule={"rounds": 2, "release": "last"})
    sites = toy_sites(tmp_path, tuple(study.sites))
    result = run(study, sites, tmp_path / "out", compare=("local", "pooled"), engine="local")
    rig = Rig(study, tmp_path / "rig")
    released = load_file(result.out / "models" / "federated.safetensors")
    parts = [load_file(result.out / "models" / site / "federated" / "local.safetensors") for site in TRAINING]
    assert set(result.local_sha256) == set(TRAINING)
    initial = rig.host.model_context.initial_values()
    for name in parts[0]:
        if not name.startswith(prefix) or name.endswith("num_batches_tracked"):
            continue
        wanted = initial[name] if unseen == "initial" else np.mean([p[name] for p in parts], axis=0)
        assert np.allclose(released[name], wanted, atol=0 if unseen == "initial" else 1e-6)
    model = Network()
    model.load_state_dict({name: torch.from_numpy(t) for name, t in released.items()})
    ((x, y),) = (
        (torch.cat(t) for t in zip(*(b for _, b in rig.host.dataset("Delta").evaluation("test")), strict=True)),
    )
    with torch.no_grad(), rig.method.serving_unseen(model.eval()):
        mse = float((model(x) - y).square().mean())
    assert result.metric("federated", "Delta", "mse") == pytest.approx(mse, abs=2e-6)
    assert set(result.metrics) >= {"federated", "local", "pooled"}


def test_left_out_arms_know_only_the_scanners_of_their_own_sites() -> None:
    study = scanner_study({"kind": "scan_physfed"}, unseen=("Delta",))
    protocols = protocols_of(study, ("Alpha", "Gamma"))
    assert list(protocols) == ["Alpha", "Gamma"]
    assert np.array_equal(protocols["Gamma"], protocol_features(PROTOCOLS["Gamma"]))


@STRANGERS
def test_a_secure_sum_comes_to_the_same_bits(tmp_path: Path, unseen: str) -> None:
    """Shared part and side channel are both masked: the released models are those of the clear sum."""
    released = []
    for secure in (False, True):
        study = scanner_study(
            {"kind": "hyperfed", "unseen": unseen},
            schedule={"rounds": 2, "min_sites": 3, "release": "last"},
            protection={"max_sites": 4, "initial_scale": 1.0, "secure": secure},
        )
        folder = tmp_path / str(secure)
        result = run(study, toy_sites(folder, TRAINING), folder / "out", engine="local")
        released.append(load_file(result.out / "models" / "federated.safetensors"))
    clear, masked = released
    assert clear.keys() == masked.keys()
    assert all(np.array_equal(clear[name], masked[name]) for name in clear)


def test_compression_leaves_the_side_channel_whole(tmp_path: Path) -> None:
    """It is told anew in every round: what compression holds back for the next would be counted twice."""
    study = scanner_study(
        {"kind": "hyperfed", "unseen": "mean"},
        protection={"max_sites": 4, "initial_scale": 1.0, "compression": {"kind": "top_k", "ratio": 0.1}},
    )
    rig = Rig(study, tmp_path)
    state = rig.train()
    released, kept = rig.method.release_for(None, state.public, state.private), kept_by(rig, 3)
    for name in (n for n in kept[0] if n.startswith("hypernetwork.")):
        assert np.allclose(released[name], np.mean([t[name] for t in kept], axis=0), atol=1e-6)


@STRANGERS
def test_check_says_what_leaves(tmp_path: Path, unseen: str) -> None:
    study = scanner_study({"kind": "hyperfed", "unseen": unseen})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    said = " ".join(explain(tmp_path / "study.yaml", None, (), (), allow_code=True).split())
    assert ("its private part as well" in said) == (unseen == "mean")
    assert ("what the method keeps at the site" in said) == (unseen == "initial")
