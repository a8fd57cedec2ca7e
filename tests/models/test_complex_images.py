"""Networks are complex by default; the loss in decibels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wardround.models.unrolled import PRESETS, MoDL, modl_shape
from wardround.models.unrolled import MoDLSettings as Settings
from wardround.study.load import load_study
from wardround.tasks.losses import psnr_loss


def test_a_study_that_names_neither_preset_nor_image_has_complex_images() -> None:
    plain = load_study({"name": "trial", "sites": {"A": {}}})
    assert not plain.model.real_images
    assert load_study({"name": "trial", "sites": {"A": {}}, "model": {"preset": "small"}}).model.real_images
    # In all but that, it is the network of before; written out with every default, it stays what it is.
    assert replace(modl_shape(Settings()), image="real") == modl_shape(Settings(preset="small"))
    assert not load_study(plain.model_dump(mode="json")).model.real_images
    assert modl_shape(Settings(image="real")) == modl_shape(Settings(preset="small"))


def test_the_psnr_loss_is_in_hundredths_of_a_decibel() -> None:
    """An error of 0.1 everywhere is 20 dB, one of 0.01 40 dB: together 30 dB."""
    target = torch.zeros(2, 16, 16)
    image = torch.stack([torch.full((16, 16), 0.1), torch.full((16, 16), 0.01)])
    assert float(psnr_loss(image, target)) == pytest.approx(0.5 - 0.30, rel=1e-4)


@pytest.mark.parametrize("preset", ["small", "small_complex"])
def test_the_documentation_counts_parameters_right(preset: str) -> None:
    count = sum(parameter.numel() for parameter in MoDL(PRESETS[preset]).parameters())
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"| `modl` | `{preset}` | {count:,} |" in page.read_text(encoding="utf-8")
