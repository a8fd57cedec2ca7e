"""From a study's model section to a network.

Every model has one signature: `forward(operator, data) -> images (B, H, W)`, complex for MRI and real for CT.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from wardround.models.cnn import PostUNet, unet_shape
from wardround.models.iradonmap import IRadonMAP, iradonmap_shape
from wardround.models.learn import Learn, learn_shape
from wardround.models.lpd import LPD, lpd_shape
from wardround.models.redcnn import REDCNN, redcnn_channels
from wardround.models.two_band import TwoBand, two_band_shape
from wardround.models.unrolled import MoDL, modl_shape
from wardround.study import models as models_config
from wardround.study.tasks import Modality


def build_model(config: models_config.Model, modality: Modality = "mri") -> nn.Module:
    """The network of a study, freshly initialised from torch's global generator: seed it first.

    Raises StudyError where the network does not work on images of this modality.
    """
    models_config.check_modality(config, modality)
    parts = 2 if modality == "mri" else 1
    match config:
        case models_config.MoDL():
            shape = modl_shape(config)
            return MoDL(shape if modality == "mri" else replace(shape, image="real"))
        case models_config.UNet():
            return PostUNet(unet_shape(config), parts=parts, conditioned=config.conditioned, hidden=config.hidden)
        case models_config.Learn():
            return Learn(learn_shape(config), parts=parts, conditioned=config.conditioned, hidden=config.hidden)
        case models_config.REDCNN():
            return REDCNN(
                redcnn_channels(config),
                conditioning=config.conditioning,
                hidden=config.hidden,
                anatomy=config.anatomy,
            )
        case models_config.LPD():
            return LPD(lpd_shape(config), conditioned=config.conditioned, hidden=config.hidden)
        case models_config.TwoBand():
            return TwoBand(two_band_shape(config))
        case models_config.IRadonMAP():
            return IRadonMAP(iradonmap_shape(config), conditioned=config.conditioned, hidden=config.hidden)
