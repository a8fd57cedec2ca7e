"""The exact sampler against the distribution it is to have, and the cost of shared noise against numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.examples import examples
from wardround.errors import StudyError
from wardround.protection.accounting import Spending, epsilon_of
from wardround.protection.discrete_gaussian import (
    discrete_gaussians,
    epsilon_of_zcdp,
    rounded,
    rounded_bound,
    squared_norm,
    zcdp,
    zcdp_for,
)
from wardround.protection.lattice import lattice_of
from wardround.protection.secret import SecretStream
from wardround.study.protection import Privacy


@pytest.mark.parametrize("deviation", [1, 3, 20])
def test_sampler_follows_the_exact_probabilities(deviation: int) -> None:
    count = 60_000
    drawn = discrete_gaussians(SecretStream(bytes([deviation]) * 32), deviation, count)
    update_bound = 12 * deviation
    values = np.arange(-update_bound, update_bound + 1)
    probability = np.exp(-(values**2) / (2 * deviation**2))
    probability /= probability.sum()
    common = probability * count >= 10
    found = np.array([np.count_nonzero(drawn == value) for value in values[common]])
    expected = probability[common] * count
    # Everything rarer is one class.
    rest = (count - found.sum(), count - expected.sum())
    assert stats.chisquare([*found, rest[0]], [*expected, rest[1]]).pvalue > 1e-3


def test_variance_of_the_largest_deviation() -> None:
    count = 30_000
    drawn = discrete_gaussians(SecretStream(b"v" * 32), 1024, count)
    assert drawn.var() == pytest.approx(1024**2, rel=5 * math.sqrt(2 / count))
    assert abs(drawn.mean()) < 5 * 1024 / math.sqrt(count)
    assert abs(np.mean(drawn % 2) - 0.5) < 5 * 0.5 / math.sqrt(count), "the last bit is as random as the first"
    assert len(discrete_gaussians(SecretStream(b"v" * 32), 7, 0)) == 0
    with pytest.raises(ValueError, match="1025"):
        discrete_gaussians(SecretStream(b"v" * 32), 1025, 1)


def test_zcdp_by_hand() -> None:
    """Proposition 14 of Kairouz et al. (2021), for two and three parties."""
    # 100 / (2 x 8^2) = 0.78125; tau = 10 exp(-64 pi^2) is 0 in double precision.
    assert zcdp(100, 8, 2, 1000) == pytest.approx(0.390625, rel=1e-12)
    assert zcdp(100, 8, 4, 1000) == pytest.approx(0.1953125, rel=1e-12)
    # With noise of deviation 1 the sum is visibly not of one piece: tau = 10 (exp(-pi^2) + exp(-4 pi^2 / 3)).
    tau = 10 * (5.1723e-5 + 1.9251e-6)
    assert zcdp(1, 1, 3, 1000) == pytest.approx(0.5 * (math.sqrt(1 / 3) + tau * math.sqrt(1000)) ** 2, rel=1e-4)


def test_zcdp_to_epsilon() -> None:
    # The Gaussian mechanism with noise 2 is 1/8-zCDP; its exact epsilon at 1e-4 is less, and not by much.
    exact, bound = epsilon_of([Spending(2.0, 1.0, 1)], 1e-4), epsilon_of_zcdp(1 / 8, 1e-4)
    assert exact < bound < 1.15 * exact
    # rho + 2 sqrt(rho ln(1/delta)) is the older, looser one (Bun & Steinke, 2016).
    assert bound < 1 / 8 + 2 * math.sqrt(math.log(1e4) / 8)
    assert epsilon_of_zcdp(zcdp_for(3.0, 1e-3), 1e-3) == pytest.approx(3.0, rel=1e-6)
    assert epsilon_of_zcdp(zcdp_for(3.0, 1e-3), 1e-3) <= 3.0


def test_shared_noise_composes_with_itself_and_with_a_site_s_own() -> None:
    shared, own = Spending(3.0, 0.1, 10, rho=0.01), Spending(2.0, 1.0, 1)
    assert epsilon_of([shared, shared], 1e-4) == epsilon_of_zcdp(0.2, 1e-4)
    both = epsilon_of([shared, own], 1e-4)
    assert both == epsilon_of([own], 5e-5) + epsilon_of_zcdp(0.1, 5e-5)


@settings(max_examples=examples(60), deadline=None)
@given(
    scale=st.floats(0.0, 60.0), size=st.integers(1, 80), seed=st.integers(0, 9), peaked=st.booleans(), odd=st.booleans()
)
def test_no_rounding_is_longer_than_its_bound(scale: float, size: int, seed: int, peaked: bool, odd: bool) -> None:
    values = np.random.default_rng(seed).standard_normal(size)
    if peaked:
        values = np.eye(1, size)[0]
    if odd:
        values = np.full(size, 0.5)
    norm = scale * float(np.linalg.norm(values))
    bound = math.floor(rounded_bound(norm, size))
    assert squared_norm(rounded(values * scale, bound, SecretStream(bytes([seed]) * 32))) <= bound


def test_rounding_is_right_on_average() -> None:
    values, stream = np.array([0.25, -1.75, 3.0]), SecretStream(b"a" * 32)
    drawn = np.array([rounded(values, 10**6, stream) for _ in range(4000)])
    np.testing.assert_allclose(drawn.mean(axis=0), values, atol=5 * 0.5 / math.sqrt(4000))
    assert (drawn[:, 2] == 3).all()


@pytest.mark.parametrize("preset", ["reconstruction-guard", "moderate", "strict"])
def test_a_lattice_holds_its_budget(preset: str) -> None:
    rules = Privacy.model_validate({"preset": preset, "noise": "distributed", "delta": 1e-3})
    lattice = lattice_of(rules, bits=26, parties=3, dimension=2000, steps=40)
    spent = epsilon_of_zcdp(40 * lattice.rho, 1e-3)
    assert spent <= rules.budget
    if preset == "reconstruction-guard":
        assert lattice.noise == pytest.approx(0.3, rel=1e-3)
    else:
        assert spent == pytest.approx(rules.budget, rel=1e-3)
    # Rounding costs little where the steps are fine.
    assert lattice.bound * lattice.step**2 == pytest.approx(rules.clip**2, rel=0.05)


def test_a_lattice_that_does_not_fit_is_refused() -> None:
    rules = Privacy.model_validate({"preset": "strict", "noise": "distributed", "delta": 1e-3})
    coarse = lattice_of(rules, bits=12, parties=3, dimension=2000, steps=40)
    assert 8 * coarse.deviation < 2**11
    with pytest.raises(StudyError, match="ring_bits"):
        lattice_of(rules, bits=6, parties=3, dimension=2000, steps=40)
