"""Losses: zero at the target, larger away from it, blind outside the mask where masked."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from wardround.study.tasks import Loss
from wardround.tasks.losses import build_loss

KINDS = ("l1", "mse", "ssim", "l1_ssim")
Kind = Literal["l1", "mse", "ssim", "l1_ssim"]


def _target() -> torch.Tensor:
    return torch.rand((2, 32, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_zero_at_the_target_and_grows_with_the_error(kind: Kind) -> None:
    loss, target, head = build_loss(Loss(kind=kind)), _target(), torch.ones(2, 32, 24)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    small, large = (loss(target + scale * noise, target, head).item() for scale in (0.02, 0.1))
    assert loss(target, target, head).item() == pytest.approx(0.0, abs=1e-6)
    assert 0 < small < large


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_masked_loss_is_blind_outside_the_head(kind: Kind) -> None:
    target = _target()
    head = torch.zeros_like(target)
    head[:, :16] = 1
    wrong_outside = target.clone()
    wrong_outside[:, 22:] += 0.5  # farther from the head than half an SSIM window
    assert build_loss(Loss(kind=kind, masked=True))(wrong_outside, target, head).item() == pytest.approx(0, abs=1e-6)
    assert build_loss(Loss(kind=kind))(wrong_outside, target, head).item() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_leads_back_to_the_target(kind: Kind) -> None:
    loss, target, head = build_loss(Loss(kind=kind)), _target(), torch.ones(2, 32, 24)
    image = (0.5 * target + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(image, target, head), image)
    stepped = image - 1e-2 * gradient / gradient.abs().max()
    assert loss(stepped, target, head) < loss(image, target, head)


def test_l1_and_mse_are_means_over_pixels() -> None:
    target, head = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    assert build_loss(Loss(kind="l1"))(target + 0.5, target, head).item() == pytest.approx(0.5)
    assert build_loss(Loss(kind="mse"))(target + 0.5, target, head).item() == pytest.approx(0.25)
