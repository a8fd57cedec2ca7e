"""Noise has the covariance it claims, and whitening takes it away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wardround.errors import GeometryError
from wardround.imaging.acquisition.noise import (
    coil_noise,
    corner_covariance,
    estimate_covariance,
    ring_covariance,
    whiten,
)


@pytest.mark.parametrize(("coils", "correlation"), [(1, 0.0), (2, 0.9), (8, 0.0), (8, 0.4), (7, 0.99)])
def test_ring_covariance_is_a_covariance(coils: int, correlation: float) -> None:
    covariance = ring_covariance(coils, correlation)
    np.testing.assert_array_equal(covariance, covariance.T)
    np.testing.assert_array_equal(np.diag(covariance), 1)
    assert np.linalg.eigvalsh(covariance).min() > 0
    if coils > 2:
        assert covariance[0, 1] == covariance[0, coils - 1] == pytest.approx(correlation)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_noise_has_its_covariance_and_std_per_component(correlation: float) -> None:
    covariance = ring_covariance(6, correlation)
    noise = coil_noise(covariance, 40_000, 0.3, np.random.default_rng(0))
    assert noise.dtype == np.complex64
    assert noise.real.std() == pytest.approx(0.3, rel=0.02)
    assert noise.imag.std() == pytest.approx(0.3, rel=0.02)
    estimate = estimate_covariance(torch.from_numpy(noise)).numpy() / 0.3**2
    np.testing.assert_allclose(estimate, covariance, atol=0.03)


def test_whitening_takes_correlation_away() -> None:
    random = np.random.default_rng(1)
    mixing = torch.from_numpy(random.normal(size=(5, 5)) + 1j * random.normal(size=(5, 5)))
    covariance = mixing @ mixing.conj().T + 0.1 * torch.eye(5)
    factor = torch.linalg.cholesky(covariance)
    white = torch.from_numpy(coil_noise(np.eye(5), 40_000, 1.0, random)).to(torch.complex128)
    data = (factor @ white).reshape(5, 200, 200)
    again = whiten(data, estimate_covariance(data))
    torch.testing.assert_close(estimate_covariance(again), torch.eye(5) + 0j, check_dtype=False)
    torch.testing.assert_close(whiten(data, covariance).reshape(5, -1), white)


def test_too_few_noise_samples_are_refused() -> None:
    noise = torch.ones(4, 2, dtype=torch.complex64)
    with pytest.raises(GeometryError, match="positive definite"):
        whiten(torch.ones(1, 4, 2, 2, dtype=torch.complex64), estimate_covariance(noise))


def test_whitening_by_hand_and_along_the_axis_that_coils_are_on() -> None:
    """[[4, 2], [2, 2]] = L L* with L = [[2, 0], [1, 1]], so L^-1 (a, b) = (a / 2, b - a / 2)."""
    covariance = torch.tensor([[4.0, 2.0], [2.0, 2.0]])
    data = torch.tensor([[2.0 + 2.0j, 4.0], [3.0, 5.0j]])
    expected = torch.tensor([[1.0 + 1.0j, 2.0], [2.0 - 1.0j, -2.0 + 5.0j]])
    torch.testing.assert_close(whiten(data, covariance, axis=0), expected)
    torch.testing.assert_close(whiten(data.T, covariance, axis=-1), expected.T)
    torch.testing.assert_close(whiten(data[None, :, None], covariance), expected[None, :, None])
    # A volume of slices, and scanners' tiny units.
    slices = torch.stack([data, 2 * data])[:, :, None]
    tiny = whiten(1e-12 * slices, 1e-24 * covariance.double())
    torch.testing.assert_close(tiny, torch.stack([expected, 2 * expected])[:, :, None])
    with pytest.raises(GeometryError, match=r"shape \(2, 2\), but.* 3 coils on axis 0; it must be \(3, 3\)"):
        whiten(torch.ones(3, 5, dtype=torch.complex64), covariance, axis=0)


def test_whitened_coils_combine_to_the_best_signal_to_noise_ratio() -> None:
    """Roemer et al.: no weights beat s* Psi^-1 s, which least squares reaches once coils are white."""
    random = np.random.default_rng(2)
    mixing = random.normal(size=(4, 4)) + 1j * random.normal(size=(4, 4))
    covariance = torch.from_numpy(mixing @ mixing.conj().T + 0.05 * np.eye(4))
    signal = torch.from_numpy(random.normal(size=4) + 1j * random.normal(size=4))
    best = (signal.conj() @ torch.linalg.inv(covariance) @ signal).real
    white = whiten(signal[:, None, None], covariance)[:, 0, 0]
    torch.testing.assert_close(white.abs().square().sum(), best)

    def ratio(weights: torch.Tensor) -> float:
        return float((weights.conj() @ signal).abs() ** 2 / (weights.conj() @ covariance @ weights).real)

    # Maps of length 1, as estimated, and white noise: the sum with their conjugates is that of the best weights.
    optimal = torch.linalg.inv(covariance) @ signal
    assert ratio(optimal) == pytest.approx(float(best))
    others = [signal, *(torch.from_numpy(random.normal(size=4) + 1j * random.normal(size=4)) for _ in range(50))]
    assert max(map(ratio, others)) < float(best)


def test_corners_of_k_space_hold_the_noise_and_never_too_little() -> None:
    random = np.random.default_rng(3)
    covariance = np.array([[1.0, 0.4], [0.4, 2.0]])
    noise = torch.from_numpy(coil_noise(covariance, 2 * 40 * 60, 0.1, random)).reshape(2, 2, 40, 60).movedim(0, 1)
    y, x = torch.meshgrid(torch.arange(40.0) - 20, torch.arange(60.0) - 30, indexing="ij")
    signal = 50 * torch.exp(-(y**2) / 8 - x**2 / 18)
    mask = torch.ones(40, 60)
    mask[:, 1::2] = 0
    found = corner_covariance((noise + signal) * mask, mask, share=0.25)
    torch.testing.assert_close(found.real, torch.from_numpy(0.01 * covariance).float(), rtol=0.15, atol=1.5e-3)
    more = corner_covariance((noise + 0.05 + signal) * mask, mask, share=0.25)
    assert torch.linalg.eigvalsh(more - found).max() > 0
    # What was not measured is not there: zeros would say that there is no noise.
    filled = corner_covariance((noise + signal) * mask, torch.ones(40, 60), share=0.25)
    torch.testing.assert_close(filled, found / 2, rtol=0.15, atol=1.5e-3)
    with pytest.raises(GeometryError, match="the outer 1% of k-space hold 8 samples, too few for the covariance of 2"):
        corner_covariance(noise[0, :, :20, :40], torch.ones(20, 40), share=0.01)
