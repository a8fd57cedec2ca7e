"""The classical baselines: they converge, and they are better than doing nothing."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from wardround.imaging.acquisition.ct.simulate import CTSimulator
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.imaging.acquisition.operator import LinearOperator, trust
from wardround.imaging.acquisition.solvers import (
    cg_sense,
    gradient,
    gradient_adjoint,
    total_variation,
    tv,
    tv_objective,
    weighted_tv,
    zero_filled,
)
from wardround.study import Mask, MRIAcquisition
from wardround.study.ct import CTAcquisition, CTGeometry

WEIGHT = 0.004


def _images(size: int = 64) -> Tensor:
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    head = (np.hypot(rows / 0.9, columns) < 0.42) * 0.6
    inner = (np.hypot(rows + 0.1, columns - 0.1) < 0.12) * 0.4 - (np.abs(rows) + np.abs(columns) < 0.08) * 0.5
    stripes = 0.1 * (np.sin(40 * columns) > 0) * (rows > 0.1) * (head > 0)
    return torch.from_numpy(np.stack([head + inner, head + stripes]).astype(np.float32)).clamp_min(0)


@cache
def _case(family: str) -> tuple[CartesianMRI, Tensor, Tensor]:
    images = _images()
    acquisition = MRIAcquisition(coils=4, mask=Mask(family=family, acceleration=4, calibration=0.12))
    scans = [simulate(x.numpy(), acquisition, np.random.default_rng(i)) for i, x in enumerate(images)]
    operator = CartesianMRI(torch.stack([s.maps for s in scans]), torch.stack([s.mask for s in scans]))
    return operator, torch.stack([s.kspace for s in scans]), images


@cache
def _minimum(family: str) -> Tensor:
    operator, data, _ = _case(family)
    return tv(operator, data, WEIGHT, 400)


def _error(x: Tensor, images: Tensor) -> Tensor:
    return (x.abs() - images).flatten(1).norm(dim=1)


def test_gradient_and_its_adjoint() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 6, generator=random, dtype=torch.complex128)
    g = torch.randn(2, 2, 7, 6, generator=random, dtype=torch.complex128)
    torch.testing.assert_close((gradient(x) * g.conj()).sum(), (x * gradient_adjoint(g).conj()).sum())


def test_total_variation_of_a_square_is_nearly_its_perimeter() -> None:
    x = torch.zeros(1, 20, 20)
    x[:, 5:15, 5:15] = 2.0
    # Of four corners, one lies in a single pixel's forward differences.
    assert float(total_variation(x)) == pytest.approx(2 * (38 + 2**0.5))
    torch.testing.assert_close(total_variation(1j * x), total_variation(x))


@pytest.mark.parametrize("family", [pytest.param("random", marks=pytest.mark.slow), "poisson"])
@pytest.mark.slow
def test_tv_decreases_its_objective_to_the_minimum(family: str) -> None:
    operator, data, _ = _case(family)
    values = torch.stack([tv_objective(operator, data, WEIGHT, tv(operator, data, WEIGHT, n)) for n in (2, 5, 10, 40)])
    start = tv_objective(operator, data, WEIGHT, zero_filled(operator, data))
    assert (values.diff(dim=0) < 0).all()
    assert (values[0] < start).all()
    least = tv_objective(operator, data, WEIGHT, _minimum(family))
    assert (values[-1] <= 1.01 * least).all()


def test_tv_minimum_satisfies_the_optimality_condition() -> None:
    """For slope = A*(y - A x) at the minimum, <slope, z> <= weight TV(z) for all z, and equal for z = x."""
    operator, data, images = _case("poisson")
    x = _minimum("poisson")
    slope = operator.A_adjoint(data) - operator.normal(x)
    for z in (x, 1j * x, images + 0j, zero_filled(operator, data)):
        inner = (slope * z.conj()).sum((1, 2)).real
        assert (inner <= WEIGHT * total_variation(z) * 1.01).all()
    inner = (slope * x.conj()).sum((1, 2)).real
    torch.testing.assert_close(inner, WEIGHT * total_variation(x), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", ["random", "equispaced", "poisson"])
def test_baselines_beat_zero_filling_in_order(family: str) -> None:
    operator, data, images = _case(family)
    nothing = _error(zero_filled(operator, data), images)
    sense = _error(cg_sense(operator, data, 0.01), images)
    variation = _error(tv(operator, data, WEIGHT), images)
    assert (sense < nothing).all()
    assert (variation < 0.8 * nothing).all()
    assert (variation < sense).all()


def test_slices_do_not_influence_each_other() -> None:
    operator, data, _ = _case("random")
    together = tv(operator, data, WEIGHT, 10)
    alone = tv(CartesianMRI(operator.maps[1:], operator.mask[1:]), data[1:], WEIGHT, 10)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)


def test_tv_does_not_depend_on_units() -> None:
    operator, data, _ = _case("random")
    torch.testing.assert_close(
        tv(operator, 100 * data, 100 * WEIGHT, 20) / 100, tv(operator, data, WEIGHT, 20), atol=1e-4, rtol=1e-3
    )


def test_an_empty_slice_stays_empty() -> None:
    operator, data, _ = _case("random")
    empty = CartesianMRI(torch.zeros_like(operator.maps), operator.mask)
    for solved in (tv(empty, 0 * data, WEIGHT, 5), cg_sense(empty, 0 * data, 0.01), tv(operator, 0 * data, WEIGHT, 5)):
        assert (solved == 0).all()


class _Identity(LinearOperator):
    """Real images, no physics: the solvers must not assume complex ones."""

    image_shape = data_shape = (16, 16)

    def A(self, x: Tensor) -> Tensor:
        return x.clone()

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y.clone()


def test_tv_denoises_real_images_on_any_operator() -> None:
    clean = torch.zeros(1, 16, 16)
    clean[:, 4:12, 4:12] = 1
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    x = tv(_Identity(), noisy, 0.1)
    assert x.dtype == torch.float32
    assert (x - clean).norm() < 0.6 * (noisy - clean).norm()


@pytest.mark.slow
def test_weighted_tv_lowers_its_own_objective_and_serves_few_photons_better() -> None:
    """Where some rays count ten photons and others thousands, to trust all alike costs quality."""
    geometry = CTGeometry(size=(64, 64), pixel=5.0, views=60, bins=96, bin=6.5,
                          source_distance=595.0, detector_distance=490.6)  # fmt: skip
    acquisition = CTAcquisition(geometry=geometry, photons=5e3, electronic_noise=5.0)
    rows, columns = np.mgrid[:128, :128] / 128 - 0.5
    wide = (np.hypot(rows / 0.5, columns) < 0.45) * 1000.0 - 1000 + (np.hypot(rows, columns - 0.2) < 0.08) * 800.0
    scan = CTSimulator(acquisition)(wide.astype(np.float32), np.random.default_rng(0))
    system, truth = CTSystem(acquisition), scan.reference[None] / acquisition.mu_water
    data = system.scaled(scan.sinogram)[None]
    error = {
        name: min(float((method(system, data, w) - truth).norm()) for w in (1e-4, 3e-4, 1e-3, 3e-3))
        for name, method in (("tv", tv), ("weighted", weighted_tv))
    }
    assert error["weighted"] < 0.9 * error["tv"]
    weights = trust(system.uncertainty(data), 0.005)

    def objective(x: Tensor) -> float:
        misfit = (weights * (system.A(x) - data).square()).sum() / 2
        return float(misfit + 3e-4 * total_variation(x).sum())

    best = objective(weighted_tv(system, data, 3e-4))
    others = (tv(system, data, 3e-4), system.initial(data), truth)
    assert all(best < objective(other) for other in others)


def test_weighted_tv_is_tv_where_the_noise_is_alike_everywhere() -> None:
    operator, data, _ = _case("random")
    assert torch.equal(weighted_tv(operator, data, WEIGHT, 10), tv(operator, data, WEIGHT, 10))
