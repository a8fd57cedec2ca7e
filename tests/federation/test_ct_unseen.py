"""What a hospital with an unknown scanner gets of each method that personalises to scanners, with the real networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.ct_hospitals import GEOMETRY, ct_study
from wardround.federation.release import serve
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.learning.methods.method import state_name
from wardround.learning.methods.personal import UNSEEN
from wardround.models.build import build_model
from wardround.runs.machine import Machine
from wardround.study.ct import CTAcquisition
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SitesFile

# A scanner that is none of the study's.
UNKNOWN = CTAcquisition.model_validate({"photons": 2e4, "geometry": GEOMETRY | {"views": 30, "bins": 60, "bin": 15.0}})
REDCNN = {"kind": "redcnn", "preset": "tiny"}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "hyperfed": ({"kind": "hyperfed"}, REDCNN | {"conditioning": "every"}, "hypernetwork."),
    "scan_physfed": ({"kind": "scan_physfed"}, REDCNN | {"conditioning": "bottleneck"}, "decoder."),
    "fedfdd low": ({"kind": "fedfdd"}, {"kind": "two_band", "preset": "tiny"}, "low."),
    "fedfdd high": ({"kind": "fedfdd", "private": "high"}, {"kind": "two_band", "preset": "tiny"}, "high."),
    "fedct": ({"kind": "fedct"}, {"kind": "iradonmap", "preset": "tiny"}, "projection."),
}


@dataclass(frozen=True)
class Served:
    """The network as an unknown hospital gets it, and its scan."""

    network: nn.Module
    study: Study
    system: CTSystem
    data: Tensor

    def image(self, network: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            found: Tensor = (network or self.network)(self.system, self.data)
        return found


def _served(name: str, unseen: str, folder: Path) -> Served:
    """A release after training that moved every shared value, and every private mean where there is one."""
    method, model, prefix = METHODS[name]
    study = load_study(ct_study(method=method | {"unseen": unseen}, model=model))
    host = Machine(study, SitesFile(sites={}), folder, ())
    arm_spec, values = host.arm_spec("federated"), host.model_context.initial_values()
    public, private = arm_spec.method.initial(arm_spec.layout.groups, values)
    random = np.random.default_rng(1)
    moved = {n: (v + 0.05 * random.standard_normal(v.shape)).astype(v.dtype) for n, v in public.items()}
    means = {
        n: (v + 0.05 * random.standard_normal(v.shape)).astype(v.dtype)
        for n, v in private.items()
        if n.startswith(state_name(UNSEEN, ""))
    }
    released = arm_spec.method.release_for(None, moved, {**private, **means})
    # The shared part is everybody's; of the private one there is the mean, or nothing.
    assert any(n.startswith(prefix) for n in released) == (unseen == "mean")
    network = build_model(study.model, "ct")
    network.load_state_dict({n: torch.from_numpy(released.get(n, values[n])) for n in values})
    serve(network.eval(), study, {}, None)
    system = CTSystem(UNKNOWN)
    return Served(network, study, system, torch.rand(1, *system.data_shape))


def _without(served: Served, **changes: Any) -> nn.Module:
    """The same study's network with another model section, and the weights that both have."""
    model = build_model(served.study.model.model_copy(update=changes), "ct")
    state = served.network.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval()


def _silenced(served: Served, part: str) -> nn.Module:
    """The network with the last layer of a part at zero."""
    model = _without(served)
    with torch.no_grad():
        *_, last = (module for module in model.get_submodule(part).modules() if isinstance(module, nn.Conv2d))
        last.weight.zero_()
        last.bias.zero_()  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_scanner_gets_a_network_that_works(name: str, tmp_path: Path) -> None:
    """By default: the shared part, and of the private one what changes nothing."""
    served = _served(name, "initial", tmp_path)
    image = served.image()
    start = served.system.initial(served.data)
    assert torch.isfinite(image).all()
    if name == "scan_physfed":
        assert torch.allclose(image, start, atol=1e-6)  # an untrained decoder adds nothing: filtered back projection
        return
    assert float((image - start).abs().max()) > 1e-3  # the shared part is at work
    same = {
        "hyperfed": lambda: _without(served, conditioning="none"),
        "fedfdd low": lambda: _silenced(served, "low"),
        "fedfdd high": lambda: _silenced(served, "high"),
        "fedct": lambda: _silenced(served, "projection"),
    }[name]()
    assert torch.allclose(image, served.image(same), atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_scanner_gets_the_mean_where_the_study_says_so(name: str, tmp_path: Path) -> None:
    served, plain = _served(name, "mean", tmp_path), _served(name, "initial", tmp_path)
    image = served.image()
    assert torch.isfinite(image).all()
    # The shared parts are drawn alike; what differs is the private one.
    prefix = METHODS[name][2]
    ours, theirs = served.network.state_dict(), plain.network.state_dict()
    assert {n.startswith(prefix) for n in ours if not torch.equal(ours[n], theirs[n])} == {True}
    with torch.no_grad():
        other = plain.network(served.system, served.data)
    assert float((image - other).abs().max()) > 1e-4


@torch.no_grad()
def test_an_unknown_scanner_is_served_with_the_nearest_code(tmp_path: Path) -> None:
    """SCAN-PhysFed's network sees a training scanner instead, whichever's code is nearest."""
    served = _served("scan_physfed", "mean", tmp_path)
    plain = _without(served)
    hypernetwork: Any = served.network.hypernetwork
    code, own = (
        torch.cat([part for film in call(served.system.protocol).values() for part in (film.gamma, film.beta)])
        for call in (hypernetwork, hypernetwork.forward)
    )
    known = [CTSystem(served.study.acquisition_of(site)).protocol for site in "AB"]  # type: ignore[arg-type]
    book = [torch.cat([p for f in plain.hypernetwork(g).values() for p in (f.gamma, f.beta)]) for g in known]  # type: ignore[operator]
    nearest = min(book, key=lambda other: float((own - other).norm()))
    assert torch.allclose(code, nearest, atol=1e-6)
    assert not torch.allclose(code, own, atol=1e-4)
