"""Metrics of CT images in Hounsfield units, each with its range stated.

Images (B, H, W) come in attenuation relative to water: HU = 1000 (x - 1). PSNR over the full range and in a window
differ by about 20 dB, so their names say which is which. `*_body` counts the pixels of the body only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.tasks.metrics import masked_mean, psnr, ssim
from wardround.tasks.task import MetricSpec, Window

if TYPE_CHECKING:
    from torch import Tensor

# 12 bits, as CT images are stored.
FULL = (-1024.0, 3072.0)
SSIM_RANGE = (-1000.0, 1000.0)
LUNG = (-1350.0, 150.0)  # centre -600, width 1500
SOFT = (-160.0, 240.0)  # centre 40, width 400


def _windowed(name: str, window: str, ends: tuple[float, float]) -> MetricSpec:
    low, high = (f"{end:.0f}".replace("-", "\N{MINUS SIGN}") for end in ends)
    width = f"{ends[1] - ends[0]:.0f}"
    text = f"peak signal-to-noise ratio in the {window} window ({low} to {high} HU, range {width} HU)"
    return MetricSpec(name, 0.0, 100.0, 1e-4, True, f"PSNR, {window}", "dB", 0.05, text)


_RMSE = "root of the mean squared error"
CT_METRICS = (
    MetricSpec("psnr", 0.0, 100.0, 1e-4, True, "PSNR", "dB", 0.05, "peak signal-to-noise ratio over the whole image"),
    MetricSpec("rmse_hu", 0.0, 4096.0, 1e-3, False, "RMSE", "HU", 0.5, f"{_RMSE} over the whole image"),
    MetricSpec("rmse_hu_body", 0.0, 4096.0, 1e-3, False, "RMSE in the body", "HU", 0.5, f"{_RMSE} inside the body"),
    MetricSpec(
        "ssim", -1.0, 1.0, 1e-6, True, "SSIM", "", 0.001, "structural similarity over the whole image, at most 1"
    ),
    _windowed("psnr_lung", "lung", LUNG),
    _windowed("psnr_soft", "soft tissue", SOFT),
)


def hounsfield(image: Tensor) -> Tensor:
    """Attenuation relative to water in HU."""
    return 1000.0 * (image - 1.0)


def ct_scores(image: Tensor, target: Tensor, body: Tensor) -> dict[str, Tensor]:
    """All of `CT_METRICS`: images and masks (B, H, W) -> name -> (B,).

    psnr: of HU cut off at [-1024, 3072], range 4096. rmse_hu, rmse_hu_body: in HU, cut off likewise. ssim: of HU cut
    off at [-1000, 1000], range 2000. psnr_lung: window of centre -600 and width 1500, cut off at its ends, range 1500.
    psnr_soft: window of centre 40 and width 400, range 400.
    """
    full, true = _within(image, FULL), _within(target, FULL)
    width = FULL[1] - FULL[0]
    return {
        "psnr": psnr(full, true),
        "rmse_hu": width * masked_mean((full - true).square()).sqrt(),
        "rmse_hu_body": width * masked_mean((full - true).square(), body).sqrt(),
        "ssim": ssim(_within(image, SSIM_RANGE), _within(target, SSIM_RANGE)),
        "psnr_lung": psnr(_within(image, LUNG), _within(target, LUNG)),
        "psnr_soft": psnr(_within(image, SOFT), _within(target, SOFT)),
    }


def ct_windows() -> tuple[Window, ...]:
    """Lung and soft tissue, in the units of the images."""
    named = {"lung": LUNG, "soft tissue": SOFT}
    return tuple(Window(name, low / 1e3 + 1, high / 1e3 + 1, "HU", 1e3) for name, (low, high) in named.items())


def _within(image: Tensor, ends: tuple[float, float]) -> Tensor:
    """HU cut off at both ends, scaled to [0, 1]."""
    low, high = ends
    return ((hounsfield(image) - low) / (high - low)).clamp(0.0, 1.0)
