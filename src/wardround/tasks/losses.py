"""Training losses on magnitude images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from wardround.study import tasks as tasks_config
from wardround.tasks.metrics import masked_mean, psnr, ssim

ImageLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Zhao et al., "Loss functions for image restoration with neural networks", IEEE TCI 2017.
SSIM_SHARE = 0.84


def l1(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error: (B, H, W) magnitude images -> scalar."""
    return masked_mean((image - target).abs(), mask).mean()


def mse(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error: (B, H, W) magnitude images -> scalar."""
    return masked_mean((image - target).square(), mask).mean()


def psnr_loss(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """A hundredth of minus PSNR, plus one half: (B, H, W) magnitude images -> scalar.

    Each image counts by the ratio of its error before and after, so scans with little noise and few folds count like
    those with much, which rule a mean of errors. Identical images give 160 dB.
    """
    return 0.5 - psnr(image, target, mask).mean() / 100


def ssim_loss(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus structural similarity: (B, H, W) magnitude images -> scalar in [0, 2]."""
    return 1.0 - ssim(image, target, mask).mean()


def l1_ssim(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """0.84 (1 - SSIM) + 0.16 L1 (Zhao et al., IEEE TCI 2017, with single-scale SSIM): (B, H, W) -> scalar."""
    return SSIM_SHARE * ssim_loss(image, target, mask) + (1.0 - SSIM_SHARE) * l1(image, target, mask)


_LOSSES: dict[str, ImageLoss] = {"l1": l1, "mse": mse, "ssim": ssim_loss, "l1_ssim": l1_ssim, "psnr": psnr_loss}


def build_loss(config: tasks_config.Loss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The study's loss as a function of image, target and head mask, each (B, H, W)."""
    return partial(_evaluate, _LOSSES[config.kind], config.masked)


def _evaluate(loss: ImageLoss, masked: bool, image: Tensor, target: Tensor, head: Tensor) -> Tensor:
    return loss(image, target, head if masked else None)
