"""A toy of hospitals whose scanners differ, with a model that has every part that a personal method can keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.toys import Points, Regression, toy_study
from wardround.imaging.acquisition.ct.scanners import SCANNERS, protocol_features
from wardround.study.schema import Study
from wardround.tasks.task import Source

FEATURES = 7
HERE = "tests.scanners"
# Delta does not train where a test says so; Echo has the scanner of Alpha.
PROTOCOLS = {
    "Alpha": SCANNERS["hyperfed_1"],
    "Beta": SCANNERS["hyperfed_2"],
    "Gamma": SCANNERS["hyperfed_5"],
    "Delta": SCANNERS["ge_lightspeed_vct"],
    "Echo": SCANNERS["hyperfed_1"],
}


class Film(NamedTuple):
    gamma: Tensor
    beta: Tensor


class HyperNet(nn.Module):
    """As `wardround.models.conditioning.ProtocolHyperNet`, but not zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 20))

    def forward(self, protocol: Tensor) -> dict[str, Film]:
        first, second = self.layers(protocol).split((12, 8), -1)
        return {"one": Film(*first.chunk(2, -1)), "two": Film(*second.chunk(2, -1))}


class Network(nn.Module):
    """Six numbers and the protocol of the scanner (B, 13) -> (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 6)
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.hypernetwork = HyperNet()
        self.image = nn.Linear(6, 4)
        self.low = nn.Linear(6, 1)
        self.high = nn.Linear(6, 1)
        self.decoder = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        films = self.hypernetwork(x[:, -FEATURES:])
        one, two = films["one"], films["two"]
        h = self.encoder(self.projection(x[:, :-FEATURES]))
        h = (1 + one.gamma) * h + one.beta
        code = (1 + two.gamma) * torch.tanh(self.image(h)) + two.beta
        result: Tensor = self.decoder(code) + self.low(h) + self.high(h)
        return result


class Scans(Regression):
    """The toy regression, with every site's protocol beside its points."""

    def build_model(self) -> nn.Module:
        return Network()

    def dataset(self, site: str, source: Source) -> Points:
        points = super().dataset(site, source)
        protocol = torch.from_numpy(protocol_features(PROTOCOLS[site])).expand(len(points.x), -1)
        return replace(points, x=torch.cat([points.x, protocol], dim=1))


def make_scans(**options: Any) -> Scans:
    return Scans(**options)


def scanner_study(
    method: dict[str, Any],
    training: Sequence[str] = ("Alpha", "Beta", "Gamma"),
    unseen: Sequence[str] = (),
    **changes: Any,
) -> Study:
    """A toy study of sites with their own CT scanners."""
    sites = {
        site: {"role": "train" if site in training else "unseen", "acquisition": PROTOCOLS[site].model_dump()}
        for site in (*training, *unseen)
    }
    values: dict[str, Any] = {
        "acquisition": {"kind": "ct"},
        "method": method,
        "task": {"kind": "custom", "factory": f"{HERE}:make_scans", "options": {}},
        "local": {"steps": 2, "batch": 4, "optimizer": "sgd", "lr": 0.1},
        "schedule": {"rounds": 3, "keep": 4},
        "protection": {"max_sites": 4, "max_weight": 16.0, "initial_scale": 1.0},
    }
    return toy_study(sites, **{**values, **changes})
