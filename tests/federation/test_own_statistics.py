"""FedBN at a hospital that did not train: its batch norm normalises by the hospital's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.federation.rig import Rig
from tests.toys import Regression, toy_sites, toy_study
from wardround.learning.methods.own_statistics import own_statistics
from wardround.learning.methods.personal import UNSEEN
from wardround.runs.session import run

NORM = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}


def far_from_unit(seed: int = 0) -> nn.Sequential:
    """Two batch norms in evaluation whose running statistics fit nothing."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    for layer in (network[1], network[4]):
        layer.running_mean.fill_(50.0)
        layer.running_var.fill_(1e4)
        nn.init.normal_(layer.weight)
    return network.eval()


def test_images_are_normalised_by_themselves_as_in_training_and_nothing_stays() -> None:
    network, images = far_from_unit(), 30.0 * torch.randn(2, 1, 9, 9) + 5.0
    before, plain = {n: t.clone() for n, t in network.state_dict().items()}, network(images)
    with own_statistics(network):
        own = network(images)
    assert not torch.allclose(own, plain)
    assert torch.equal(network(images), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.allclose(own, far_from_unit().train()(images), atol=1e-5)


def test_it_holds_from_the_call_on_for_whoever_serves_a_model_for_good() -> None:
    network, images = far_from_unit(), torch.randn(1, 1, 9, 9)
    own_statistics(network)
    assert torch.allclose(network(images), far_from_unit().train()(images), atol=1e-5)


def test_one_value_has_no_variance() -> None:
    layer, one = nn.BatchNorm1d(4).eval(), torch.randn(1, 4)
    with own_statistics(layer):
        assert torch.equal(layer(one), nn.BatchNorm1d(4).eval()(one))


def test_running_statistics_never_leave_a_site(tmp_path: Path) -> None:
    """The declared side channel is scales and shifts."""
    rig = Rig(toy_study(task=NORM, method={"kind": "fedbn", "unseen": "mean"}), tmp_path)
    state = rig.train()
    (group,) = (group for group in rig.arm_spec.layout.groups if group.name == UNSEEN)
    assert {info.name for info in group.tensors} == {"1.weight", "1.bias"}
    assert not any(b"running_" in sent.data for sent in rig.engine.sent)
    released = rig.method.release_for(None, state.public, state.private)
    memories = [site.store.memory(4).tensors for site in rig.sites.values()]
    shares = [len(rig.host.dataset(name)) for name in rig.sites]
    for name in ("1.weight", "1.bias"):
        mean = np.average([memory["local/" + name] for memory in memories], axis=0, weights=shares)
        assert released[name] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "fedbn", "unseen": "initial"},
        {"kind": "fedbn", "unseen": "mean"},
        {"kind": "fedavg", "unseen_norm": "own"},
        {"kind": "fedprox", "unseen_norm": "own"},
    ],
)
def test_an_unseen_hospital_is_measured_so(tmp_path: Path, method: dict[str, str]) -> None:
    study: Any = toy_study({"A": {}, "B": {}, "U": {"role": "unseen"}}, task=NORM, method=method)
    result = run(study, toy_sites(tmp_path / "data", ("A", "B", "U")), tmp_path / "out", engine="local")
    network = Regression(norm=True).build_model()
    network.load_state_dict(load_file(result.out / "models" / "federated.safetensors"), strict=False)
    errors = []
    with torch.no_grad():
        for _, (x, y) in Regression(norm=True).dataset("U", (tmp_path / "data" / "U",)).evaluation("test"):
            hidden = network[0](x)
            centred = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + network[1].eps).sqrt()
            out = network[3](torch.tanh(centred * network[1].weight + network[1].bias))
            errors.append(float((out - y).square().mean()))
    assert result.metric("federated", "U", "mse") == pytest.approx(np.mean(errors), abs=1e-4)
