"""Masks measure what they promise: totals, centres, distances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.masks import centred, centred_count, poisson_disc, sampling_mask
from wardround.study import Mask


@given(
    size=st.integers(16, 200),
    acceleration=st.floats(1.5, 10),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
def test_random_lines_are_exactly_as_many_as_asked(size: int, acceleration: float, share: float, seed: int) -> None:
    config = Mask(family="random", acceleration=acceleration, calibration=share / acceleration)
    mask = sampling_mask(config, (8, size), np.random.default_rng(seed))
    calibration = centred_count(config.calibration, size)
    assert mask.shape == (8, size)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert (mask == mask[:1]).all()
    assert mask[0].sum() == max(round(size / acceleration), calibration)
    assert mask[0, centred(calibration, size)].all()


@given(size=st.integers(32, 200), acceleration=st.sampled_from([2, 3.5, 4, 6, 8]), seed=st.integers(0, 99))
def test_equispaced_lines_are_even_and_nearly_as_many_as_asked(size: int, acceleration: float, seed: int) -> None:
    config = Mask(family="equispaced", acceleration=acceleration, calibration=0.08)
    line = sampling_mask(config, (4, size), np.random.default_rng(seed))[0]
    calibration = centred_count(config.calibration, size)
    assert abs(line.sum() - max(round(size / acceleration), calibration)) <= 1
    assert line[centred(calibration, size)].all()
    outside = np.flatnonzero(line[: centred(calibration, size).start])
    if outside.size > 2:
        gaps = np.diff(outside)
        assert gaps.max() - gaps.min() <= 1


def test_lines_differ_from_scan_to_scan_and_repeat_with_the_seed() -> None:
    for family in ("random", "equispaced", "poisson"):
        config = Mask(family=family)
        draws = [sampling_mask(config, (64, 64), np.random.default_rng(seed)) for seed in (0, 0, 1)]
        assert (draws[0] == draws[1]).all()
        assert (draws[0] != draws[2]).any()


@pytest.mark.parametrize("slope", [0.0, 2.0])
@pytest.mark.parametrize("acceleration", [4, 10])
def test_poisson_disc_keeps_its_distance(slope: float, acceleration: int) -> None:
    shape, block = (61, 80), (8, 9)
    measured = round(shape[0] * shape[1] / acceleration)
    mask = poisson_disc(shape, measured, block, np.random.default_rng(3), density_slope=slope)
    assert mask.sum() == measured
    inside = np.zeros(shape, bool)
    inside[centred(block[0], shape[0]), centred(block[1], shape[1])] = True
    assert mask[inside].all()
    points = np.argwhere((mask > 0) & ~inside)
    distance = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1) + 1e9 * np.eye(len(points)))
    nearest = distance.min(1)
    # Points thrown at random keep 0.5 of the mean spacing on average, with many neighbours at distance 1.
    assert nearest.mean() > 0.6 * np.sqrt(acceleration)
    radius = np.hypot(*((points - np.array(shape) // 2) / np.array(shape) * 2).T)
    outer, inner = nearest[radius > 0.8].mean(), nearest[radius < 0.4].mean()
    assert outer > 1.3 * inner if slope else outer < 1.3 * inner


def test_poisson_of_the_study_measures_its_share() -> None:
    for acceleration in (3.0, 8.0, 16.0):
        mask = sampling_mask(Mask(family="poisson", acceleration=acceleration), (96, 64), np.random.default_rng(0))
        assert mask.mean() == pytest.approx(1 / acceleration, rel=0.05)


def test_a_calibration_block_above_the_total_is_refused() -> None:
    with pytest.raises(GeometryError, match="lower `calibration`"):
        sampling_mask(Mask(family="poisson", acceleration=8, calibration=0.6), (32, 32), np.random.default_rng(0))
