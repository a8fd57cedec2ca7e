"""Filtered back projection gives amplitudes and shapes back, for every geometry and window."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from tests.examples import quickly

from wardround.errors import GeometryError
from wardround.imaging.acquisition.ct.fbp import FBP, fbp
from wardround.imaging.acquisition.ct.phantom import HEAD, Ellipse, ellipse_image, ellipse_sinogram
from wardround.study.ct import CTGeometry

FAN: dict[str, Any] = {"source_distance": 595.0, "detector_distance": 490.6, "bin": 2.5}
KINDS: list[dict[str, Any]] = [
    {"kind": "parallel", "bin": 1.3},
    {"kind": "parallel", "bin": 1.3, "sweep": 360.0, "views": 241},
    {"kind": "fan_flat", **FAN},
    {"kind": "fan_arc", **FAN},
    {"kind": "fan_arc", **FAN, "start": 11.0, "views": 241},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['kind']} {kind.get('views', 240)}")


def _geometry(kind: dict[str, Any]) -> CTGeometry:
    return CTGeometry(**{"size": (96, 96), "pixel": 2.5, "views": 240, "bins": 240, "offset": 0.25, **kind})


@pytest.mark.parametrize(("kind", "window"), quickly(product(KINDS, ("ramp", "hann")), 0, 3, 5, 8))
def test_a_disc_keeps_its_value(kind: dict[str, Any], window: Any) -> None:
    geometry = _geometry(kind)
    disc = (Ellipse(20, -12, 70, 70, 0, 0.02),)
    sinogram = torch.from_numpy(ellipse_sinogram(disc, geometry, rays_per_bin=4))
    image = fbp(sinogram[None], geometry, window)[0].numpy()
    inside = ellipse_image((Ellipse(20, -12, 60, 60, 0, 1.0),), geometry) == 1
    outside = ellipse_image((Ellipse(20, -12, 80, 80, 0, 1.0),), geometry) == 0
    circle = ellipse_image((Ellipse(0, 0, 110, 110, 0, 1.0),), geometry) == 1
    assert image[inside].mean() == pytest.approx(0.02, rel=0.003)
    assert np.abs(image[inside] / 0.02 - 1).max() < 0.05
    assert abs(image[outside & circle].mean()) < 0.01 * 0.02


@every_kind
def test_a_head_comes_back(kind: dict[str, Any]) -> None:
    geometry = _geometry(kind)
    image = ellipse_image(HEAD, geometry)
    back = FBP(geometry)(torch.from_numpy(ellipse_sinogram(HEAD, geometry, rays_per_bin=4)).float()[None])
    error = back[0].numpy() - image
    assert back.dtype == torch.float32
    assert 10 * np.log10(image.max() ** 2 / np.mean(error**2)) > 30


def test_it_is_linear_and_differentiable() -> None:
    geometry = CTGeometry(size=(4, 4), views=4, bins=8, bin=1.5, source_distance=30, detector_distance=10)
    y = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reconstruct = FBP(geometry, "hann")
    assert torch.autograd.gradcheck(reconstruct, y)
    assert torch.autograd.gradgradcheck(reconstruct, y)
    torch.testing.assert_close(reconstruct(2 * y + 1), 2 * reconstruct(y) + reconstruct(torch.ones_like(y)))


@pytest.mark.parametrize("kind", [{**FAN, "sweep": 220.0}, {"kind": "parallel", "sweep": 200.0}])
def test_sweeps_without_weights_are_refused(kind: dict[str, Any]) -> None:
    with pytest.raises(GeometryError, match="knows no weights for a sweep of 2"):
        FBP(CTGeometry(**kind))
