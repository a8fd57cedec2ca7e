"""Image metrics against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

from wardround.tasks.metrics import RECONSTRUCTION_METRICS, reconstruction_scores
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
    with pytest.raises(ValueError, match="negligible"):
        MetricSpec("broken", 0.0, 1.0, 0.1, True, negligible=-1.0)


def test_a_specification_says_how_results_are_read() -> None:
    told = MetricSpec("hd_95", 0.0, 500.0, 1e-3, False).to_json()
    assert (told["label"], told["unit"], told["negligible"], told["larger_is_better"]) == ("hd 95", "", 1e-3, False)
    head = {spec.name: spec.to_json() for spec in RECONSTRUCTION_METRICS}["psnr_head"]
    assert (head["label"], head["unit"], head["negligible"]) == ("PSNR in the head", "dB", 0.05)
    assert head["definition"] == "peak signal-to-noise ratio inside the head"
