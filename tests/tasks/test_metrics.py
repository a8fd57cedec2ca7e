"""Image metrics against scikit-image; means over patients against their direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

from wardround.tasks.metrics import (
    RECONSTRUCTION_METRICS,
    PatientMeans,
    mean_of_sites,
    reconstruction_scores,
    replicate_weights,
)
from wardround.tasks.task import MetricSpec


def _images(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:48j, -1:1:40j]
    head = (x**2 + y**2 < 0.6)[None].repeat(3, 0)
    target = np.clip(0.6 + 0.3 * np.sin(5 * x) * np.cos(4 * y), 0, 1)[None] * head
    image = np.abs(target + 0.05 * random.standard_normal(target.shape))
    return image, target, head


def _scores() -> dict[str, torch.Tensor]:
    image, target, head = (torch.from_numpy(array) for array in _images())
    return reconstruction_scores(image, target, head.to(torch.float32))


def test_scores_have_the_names_that_are_announced() -> None:
    scores = _scores()
    assert tuple(scores) == tuple(spec.name for spec in RECONSTRUCTION_METRICS)
    assert all(values.shape == (3,) for values in scores.values())


def test_whole_image_metrics_agree_with_scikit_image() -> None:
    scores = _scores()
    for index, (image, target, _) in enumerate(zip(*_images(), strict=True)):
        assert scores["psnr"][index].item() == pytest.approx(
            peak_signal_noise_ratio(target, image, data_range=1.0), abs=1e-9
        )
        assert scores["ssim"][index].item() == pytest.approx(
            structural_similarity(target, image, win_size=7, data_range=1.0), abs=1e-9
        )
        assert scores["nmse"][index].item() == pytest.approx(normalized_root_mse(target, image) ** 2, rel=1e-9)


def test_head_metrics_use_the_pixels_of_the_mask_only() -> None:
    scores = _scores()
    for index, (image, target, head) in enumerate(zip(*_images(), strict=True)):
        error, signal = ((image - target)[head] ** 2).mean(), (target[head] ** 2).mean()
        _, similarity = structural_similarity(target, image, win_size=7, data_range=1.0, full=True)
        inside = similarity[3:-3, 3:-3][head[3:-3, 3:-3]].mean()
        assert scores["psnr_head"][index].item() == pytest.approx(-10 * math.log10(error), abs=1e-9)
        assert scores["nmse_head"][index].item() == pytest.approx(error / signal, rel=1e-9)
        assert scores["ssim_head"][index].item() == pytest.approx(inside, abs=1e-9)


def test_an_empty_mask_means_the_whole_image() -> None:
    image, target, head = (torch.from_numpy(array) for array in _images())
    scores = reconstruction_scores(image, target, torch.zeros_like(head))
    assert torch.equal(scores["psnr_head"], scores["psnr"])


def test_single_precision_is_enough_for_ssim() -> None:
    image, target, head = (torch.from_numpy(array) for array in _images())
    single = reconstruction_scores(image.float(), target.float(), head)
    assert torch.allclose(single["ssim"].double(), _scores()["ssim"], atol=1e-4)


def test_specifications_clip_and_count_nan_as_worst() -> None:
    psnr, _, nmse = RECONSTRUCTION_METRICS[:3]
    assert (psnr.clip(120.0), psnr.clip(-3.0), psnr.clip(31.5)) == (80.0, 0.0, 31.5)
    assert (psnr.clip(math.nan), nmse.clip(math.nan)) == (0.0, 10.0)
    assert psnr.is_better(31.0, 30.0)
    assert nmse.is_better(0.1, 0.2)
    with pytest.raises(ValueError, match="low < high"):
        MetricSpec("broken", 1.0, 1.0, 0.1, True)


values = st.lists(st.floats(-100, 100), min_size=1, max_size=12)


@given(st.lists(values, min_size=3, max_size=3), st.integers(0, 2**32))
def test_merging_is_associative_and_equals_the_direct_computation(sites: list[list[float]], seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = [replicate_weights(len(site), 30, random) for site in sites]
    a, b, c = (PatientMeans.of(site, drawn) for site, drawn in zip(sites, weights, strict=True))
    left, right = (a + b) + c, PatientMeans.empty(30) + a + (b + c)
    direct = PatientMeans.of(np.concatenate(sites), np.concatenate(weights, axis=1))
    for merged in (left, right):
        assert merged.count == direct.count == sum(map(len, sites))
        assert merged.total == pytest.approx(direct.total, abs=1e-9)
        np.testing.assert_allclose(merged.replicates, direct.replicates, atol=1e-9)
        assert merged.compute().value == pytest.approx(np.mean(np.concatenate(sites)), abs=1e-9)


def test_every_replicate_draws_as_many_patients_as_there_are() -> None:
    weights = replicate_weights(7, 50, np.random.default_rng(0))
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights > 1).any()


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        sample = random.normal(30.0, 2.0, size=40)
        estimate = PatientMeans.of(sample, replicate_weights(40, 300, random)).compute()
        assert estimate.ci_low < estimate.value < estimate.ci_high
        covered += estimate.ci_low <= 30.0 <= estimate.ci_high
    assert 0.87 <= covered / 200 <= 0.99


def test_sites_count_equally_in_their_mean_whatever_their_size() -> None:
    random = np.random.default_rng(0)
    large = PatientMeans.of([1.0] * 9, replicate_weights(9, 20, random))
    small = PatientMeans.of([3.0], replicate_weights(1, 20, random))
    estimate = mean_of_sites([large, small, PatientMeans.empty(20)])
    assert (estimate.value, estimate.ci_low, estimate.ci_high, estimate.n) == (2.0, 2.0, 2.0, 10)
    assert (large + small).compute().value == pytest.approx(1.2)


def test_nobody_gives_no_number() -> None:
    assert math.isnan(PatientMeans.empty(5).compute().value)
    assert math.isnan(mean_of_sites([]).value)


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        PatientMeans.of([1.0, 2.0], replicate_weights(3, 5, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="do not add"):
        PatientMeans.empty(5) + PatientMeans.empty(6)
