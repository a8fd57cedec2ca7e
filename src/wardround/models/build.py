"""From a study's model section to a network.

Every model has one signature: `forward(operator, data) -> images (B, H, W)`, complex for MRI, real for CT.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from wardround.models.cnn import PostUNet, unet_shape
from wardround.models.unrolled import MoDL, modl_shape
from wardround.study import models as models_config


def build_model(config: models_config.Model, modality: Literal["mri", "ct"] = "mri") -> nn.Module:
    """The network of a study, freshly initialised from torch's global generator: seed it first."""
    match config:
        case models_config.MoDL():
            return MoDL(replace(modl_shape(config), image="real") if modality == "ct" else modl_shape(config))
        case models_config.UNet():
            return PostUNet(unet_shape(config), parts=1 if modality == "ct" else 2)
