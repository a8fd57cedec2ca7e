"""A simulated scan: its parts fit, its noise is as stated, and a seed repeats it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import SimulatedScan, simulate, smooth_phase
from wardround.study import Mask, MRIAcquisition


def _disc(shape: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (np.hypot(rows / shape[0] - 0.5, columns / shape[1] - 0.5) < 0.35).astype(np.float32)


def _scan(seed: int = 0, shape: tuple[int, int] = (48, 51), **options: object) -> SimulatedScan:
    return simulate(_disc(shape), MRIAcquisition(**options), np.random.default_rng(seed))


def test_a_seed_repeats_a_scan_and_another_differs() -> None:
    first, again, other = _scan(0), _scan(0), _scan(1)
    for name in ("kspace", "mask", "maps"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.kspace, other.kspace)
    assert not torch.equal(_scan(0, maps="true").maps, _scan(1, maps="true").maps)


@pytest.mark.parametrize("family", ["random", "equispaced", "poisson"])
@pytest.mark.parametrize("maps", ["true", "estimated"])
def test_shapes_dtypes_and_the_mask(family: str, maps: str) -> None:
    scan = _scan(mask=Mask(family=family), maps=maps, coils=5, noise_correlation=0.3)
    assert scan.kspace.shape == scan.maps.shape == (5, 48, 51)
    assert scan.kspace.dtype == scan.maps.dtype == torch.complex64
    assert scan.mask.shape == (48, 51)
    assert scan.mask.dtype == torch.float32
    assert (scan.kspace[:, scan.mask == 0] == 0).all()
    assert (scan.kspace[:, scan.mask == 1] != 0).all()


def test_without_noise_true_maps_explain_the_data() -> None:
    scan = _scan(noise=0.0, maps="true", phase=0.0, mask=Mask(acceleration=1.0))
    operator = CartesianMRI(scan.maps[None], scan.mask[None])
    image = torch.from_numpy(_disc((48, 51))).to(torch.complex64)[None]
    torch.testing.assert_close(operator.A(image)[0], scan.kspace, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(operator.A_adjoint(scan.kspace[None]), image, atol=1e-5, rtol=1e-4)


def test_noise_is_per_component_and_relative_to_a_peak_of_one() -> None:
    quiet = _scan(noise=0.0, mask=Mask(acceleration=1.0))
    noisy = _scan(noise=0.02, mask=Mask(acceleration=1.0))
    noise = noisy.kspace - quiet.kspace
    assert float(noise.real.std()) == pytest.approx(0.02, rel=0.05)
    assert float(noise.imag.std()) == pytest.approx(0.02, rel=0.05)


def test_a_given_mask_is_used_and_a_wrong_one_refused() -> None:
    mask = np.zeros((48, 51), np.float32)
    mask[:, 20:32] = 1
    scan = simulate(_disc((48, 51)), MRIAcquisition(), np.random.default_rng(0), mask)
    np.testing.assert_array_equal(scan.mask.numpy(), mask)
    with pytest.raises(GeometryError, match="same shape"):
        simulate(_disc((48, 51)), MRIAcquisition(), np.random.default_rng(0), mask.T)


def test_phase_is_smooth_and_as_strong_as_asked() -> None:
    phase = smooth_phase((64, 40), 1.5, np.random.default_rng(0))
    assert np.abs(phase).max() == pytest.approx(1.5)
    assert np.abs(np.diff(phase, axis=0)).max() < 0.2
    assert (smooth_phase((8, 8), 0.0, np.random.default_rng(0)) == 0).all()
