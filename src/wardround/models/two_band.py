"""Two networks, one for low and one for high spatial frequencies, so that a federation can treat them differently.

After the decomposition of FedFDD (Chen et al., MIDL 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.blocks import Denoiser
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality


@dataclass(frozen=True)
class TwoBandShape:
    """Feature channels and convolutions of each network, and where the bands meet, in cycles per pixel."""

    channels: int
    layers: int
    scale: int = 2
    cutoff: float = 0.1


PRESETS = {"tiny": TwoBandShape(8, 3), "small": TwoBandShape(32, 6), "paper": TwoBandShape(64, 10, scale=1)}


def two_band_shape(config: TwoBandSettings) -> TwoBandShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(include={"channels", "layers", "cutoff"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class TwoBand(nn.Module):
    """Splits the initial image into two bands, gives each to a residual network and adds the results.

    Untrained, it gives the initial image.
    """

    def __init__(self, shape: TwoBandShape) -> None:
        super().__init__()
        self.cutoff = shape.cutoff
        self.low = Denoiser(shape.channels, shape.layers, parts=1, scale=shape.scale)
        self.high = Denoiser(shape.channels, shape.layers, parts=1, scale=shape.scale)

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, views, bins) -> real images (B, H, W)."""
        image = operator.initial(data)
        low = low_pass(image, self.cutoff)
        result: Tensor = self.low(low) + self.high(image - low)
        return result


def low_pass(image: Tensor, cutoff: float) -> Tensor:
    """Smooth real images (B, H, W) with a Gaussian whose response is one half at `cutoff` cycles per pixel.

    Pixels beyond the edge are those at the edge, so a constant stays what it is.
    """
    sigma = math.sqrt(math.log(2) / 2) / (math.pi * cutoff)
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).to(image).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = pad(image.unsqueeze(1), (reach,) * 4, mode="replicate")
    rows = conv2d(padded, kernel.view(1, 1, -1, 1))
    return conv2d(rows, kernel.view(1, 1, 1, -1)).squeeze(1)


class TwoBandSettings(PresetSettings):
    """A network for low and one for high spatial frequencies, on the filtered back projection; CT only."""

    kind: Literal["two_band"]
    modalities = frozenset({"ct"})
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    cutoff: float = Field(0.1, gt=0.0, le=0.5, description="where both bands weigh the same, in cycles per pixel")

    def build(self, modality: Modality) -> TwoBand:
        """The network."""
        return TwoBand(two_band_shape(self))
