"""Noise has the covariance it claims, and whitening takes it away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wardround.errors import GeometryError
from wardround.imaging.acquisition.noise import coil_noise, estimate_covariance, ring_covariance, whiten


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
