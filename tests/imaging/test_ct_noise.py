"""Photon statistics, dose and the tube's spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import GeometryError
from wardround.imaging.acquisition.ct.beam_hardening import bone_share, tube_spectrum
from wardround.imaging.acquisition.ct.noise import (
    hu_to_mu,
    insert_noise,
    line_integrals_of,
    measure,
    mu_to_hu,
    variance,
)

MANY = 100_000


def test_hounsfield_units() -> None:
    hu = np.array([-2048.0, -1000.0, 0.0, 1000.0], np.float32)
    np.testing.assert_allclose(hu_to_mu(hu), [0, 0, 0.0192, 0.0384], rtol=1e-6)
    np.testing.assert_allclose(mu_to_hu(hu_to_mu(hu)), [-1000, -1000, 0, 1000], atol=1e-3)
    torch.testing.assert_close(hu_to_mu(torch.from_numpy(hu), 0.02), torch.tensor([0, 0, 0.02, 0.04]))
    assert hu_to_mu(hu).dtype == np.float32


@given(path=st.floats(0, 4), photons=st.floats(1e4, 1e6), noise=st.floats(0, 10), seed=st.integers(0, 9))
def test_noise_has_the_stated_variance(path: float, photons: float, noise: float, seed: int) -> None:
    y = measure(np.full(MANY, path), photons, noise, np.random.default_rng(seed))
    expected = variance(np.array([path]), photons, noise)[0]
    # To first order: the next term is of the order of the variance itself.
    assert y.var() == pytest.approx(expected, rel=0.03 + 3 * expected)
    assert y.mean() == pytest.approx(path, abs=0.02 * expected**0.5 + expected)


def test_counts_below_one_photon_are_one() -> None:
    counts = np.array([-40.0, 0.0, 0.3, 1.0, 1000.0])
    np.testing.assert_allclose(line_integrals_of(counts, 1000.0), np.log([1000, 1000, 1000, 1000, 1]), rtol=1e-6)
    y = measure(np.full(1000, 20.0), 1000.0, 5.0, np.random.default_rng(0))
    assert np.isfinite(y).all()
    assert y.max() == pytest.approx(np.log(1000))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_inserted_noise_makes_up_for_the_lost_dose(fraction: float) -> None:
    """The same mean and variance as a scan with that dose."""
    random = np.random.default_rng(1)
    for path in (0.5, 3.0):
        full = measure(np.full(MANY, path), 1e5, 5.0, random)
        low = insert_noise(full, fraction, 1e5, 5.0, random)
        scanned = measure(np.full(MANY, path), fraction * 1e5, 5.0, random)
        assert low.std() == pytest.approx(scanned.std(), rel=0.02)
        # The logarithm's own bias, half the variance, comes with the dose and is not inserted.
        assert low.mean() == pytest.approx(scanned.mean(), abs=0.02 * float(scanned.std()) + float(scanned.var()) / 2)
        assert low.dtype == np.float32


def test_every_bin_lacks_the_noise_of_its_own_photons() -> None:
    """Var = exp(p) / (f N) (1 - f) + s^2 exp(2 p) / (f N)^2 (1 - f^2), N of the bin."""
    fraction, noise, photons = 0.25, 5.0, np.array([2e3, 2e4, 2e5], np.float32)
    path = np.array([[0.2], [2.0]]) * np.ones((2, 3))
    full = np.broadcast_to(path, (MANY, 2, 3)).astype(np.float32)
    added = (insert_noise(full, fraction, photons, noise, np.random.default_rng(3)) - full).astype(np.float64)
    left = np.exp(path) / (fraction * photons)
    expected = left * (1 - fraction) + (noise * left) ** 2 * (1 - fraction**2)
    np.testing.assert_allclose(added.var(0), expected, rtol=0.03)
    np.testing.assert_allclose(added.mean(0), 0, atol=0.02 * expected.max() ** 0.5)


def test_a_dose_is_only_lowered_and_darkness_stays_finite() -> None:
    random = np.random.default_rng(0)
    dark = np.full(100, np.log(1e5), np.float32)
    assert insert_noise(dark, 0.1, 1e5, 5.0, random).max() <= np.log(1e4) + 1e-5
    for fraction in (0.0, -1.0, 1.1):
        with pytest.raises(GeometryError, match="only be lowered"):
            insert_noise(dark, fraction, 1e5, 5.0, random)


@pytest.mark.parametrize("kvp", [60.0, 80.0, 100.0, 120.0, 140.0, 150.0])
def test_water_is_corrected_and_bone_is_not(kvp: float) -> None:
    spectrum = tube_spectrum(kvp)
    assert spectrum.share.sum() == pytest.approx(1)
    path = np.linspace(0.01, 450 * 0.0192, 300)
    nothing = np.zeros_like(path)
    measured = spectrum.measure(path, nothing)
    assert (np.diff(measured / path) < 0).all()  # thicker is relatively less
    corrected = spectrum.water_correction(0.0192)(measured)
    np.testing.assert_allclose(corrected, path, rtol=1e-3)
    bone = spectrum.water_correction(0.0192)(spectrum.measure(nothing, path))
    assert (np.diff(bone / path) < 0).all()
    assert bone[-1] / path[-1] < 0.97 * bone[0] / path[0]


@pytest.mark.parametrize("kvp", [60.0, 120.0])
def test_the_slope_in_water_is_the_derivative_and_the_correction_the_inverse(kvp: float) -> None:
    spectrum = tube_spectrum(kvp)
    path = torch.linspace(0, 450 * 0.0192, 50, dtype=torch.float64, requires_grad=True)
    measured, slope = spectrum.in_water(path)
    np.testing.assert_allclose(measured.detach(), spectrum.measure(path.detach().numpy(), np.zeros(50)), atol=1e-12)
    (derivative,) = torch.autograd.grad(measured.sum(), path)
    torch.testing.assert_close(slope, derivative)
    corrected = spectrum.water_correction(0.0192).deriv()(measured.detach().numpy())
    np.testing.assert_allclose(corrected * slope.detach().numpy(), 1, atol=0.02)


def test_higher_voltage_is_harder() -> None:
    thin = np.array([0.01])
    effective = [tube_spectrum(kvp).measure(thin, 0 * thin)[0] for kvp in (80.0, 100.0, 120.0, 140.0)]
    assert effective == sorted(effective, reverse=True)
    # A 120 kV beam behind 6 mm of aluminium looks like 55 to 65 keV to thin water: 0.021 to 0.0202 over 0.0193 /mm.
    assert 1.04 < effective[2] / 0.01 < 1.15


def test_bone_starts_above_soft_tissue() -> None:
    share = bone_share(np.array([-1000.0, 0.0, 100.0, 825.0, 1500.0, 3000.0]))
    np.testing.assert_allclose(share, [0, 0, 0, 0.5, 1, 1])
