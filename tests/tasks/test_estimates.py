"""Standard errors and intervals against direct computation, and none from a handful of patients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wardround.tasks.estimates import Mean, estimate, mean_of, mean_of_sites, two_digits


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_standard_error_is_that_of_the_sample(values: list[float]) -> None:
    mean = mean_of(values)
    assert mean.count == len(values)
    assert mean.value == pytest.approx(np.mean(values), abs=1e-9)
    assert mean.error == pytest.approx(stats.sem(values), abs=1e-9)


def test_the_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(30.0, 2.0, 7)
    found = estimate(mean_of(values))
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert (found.ci_low, found.ci_high) == (pytest.approx(low), pytest.approx(high))
    assert (found.n, found.se) == (7, pytest.approx(stats.sem(values)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_handful_of_patients_has_no_interval(count: int) -> None:
    found = estimate(mean_of(np.arange(count, dtype=float)))
    assert (found.n, found.se, found.ci_low, found.ci_high) == (count, None, None, None)
    assert estimate(mean_of(np.arange(5.0))).ci_low is not None


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    covered = {"site": 0, "mean": 0}
    for _ in range(1000):
        sites = [mean_of(random.normal(30.0, spread, size)) for spread, size in ((1.0, 5), (3.0, 6), (0.5, 2))]
        for key, found in (("site", estimate(sites[0])), ("mean", mean_of_sites(sites))):
            assert found.ci_low is not None
            assert found.ci_high is not None
            covered[key] += found.ci_low <= 30.0 <= found.ci_high
    # Four standard deviations of a count of 1000 at 95 %; Welch and Satterthwaite are approximate.
    assert all(0.922 <= count / 1000 <= 0.99 for count in covered.values()), covered


def test_sites_count_equally_in_their_mean_whatever_their_size() -> None:
    large, small = Mean(1.0, 0.3, 9), Mean(3.0, 0.4, 5)
    found = mean_of_sites([large, small, Mean(math.nan, None, 0)])
    assert (found.value, found.n, found.se) == (2.0, 14, pytest.approx(0.25))
    degrees = (0.3**2 + 0.4**2) ** 2 / (0.3**4 / 8 + 0.4**4 / 4)
    assert found.ci_high == pytest.approx(2.0 + 0.25 * stats.t.ppf(0.975, degrees))
    exact = mean_of_sites([Mean(1.0, 0.0, 9), Mean(3.0, 0.0, 5)])
    assert (exact.ci_low, exact.ci_high) == (2.0, 2.0)


def test_a_mean_over_a_site_of_one_patient_has_no_interval() -> None:
    found = mean_of_sites([Mean(1.0, 0.3, 9), mean_of([3.0])])
    assert (found.value, found.n, found.se, found.ci_low) == (2.0, 10, None, None)
    assert mean_of_sites([Mean(1.0, 0.1, 2), Mean(2.0, 0.1, 2)]).ci_low is None
    assert mean_of_sites([Mean(1.0, 0.1, 2), Mean(2.0, 0.1, 3)]).ci_low is not None


def test_no_patients_give_no_number() -> None:
    assert math.isnan(estimate(mean_of([])).value)
    assert math.isnan(mean_of_sites([]).value)


def test_two_digits() -> None:
    assert [two_digits(v) for v in (0.0, 0.12345, 6.789, 0.000999)] == [0.0, 0.12, 6.8, 0.001]
