"""A network that outlines structures, as every task that has one begins with it: marking nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The logit of every voxel before training, in place of about 0: what is outlined is small, and a network that marks
# half of an image at first spends its first steps on learning that most of it is nothing.
RARE = -3.0
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def build_outliner(settings: Any, dimensions: int, channels: int, structures: int) -> nn.Module:
    """The network of a model section for segmentation, freshly initialised: (B, C, *shape) -> logits (B, K, *shape).

    The bias of its last convolution begins at `RARE`, a probability of 0.05 (a prior as in Lin et al., *Focal loss*,
    ICCV 2017, section 4.1). It is a value like all others, so a start from a file or a release replaces it. A network
    of which no convolution with a bias makes the logits is as it was built.
    """
    network: nn.Module = settings.build_network(dimensions, channels, structures)
    for module in reversed(list(network.modules())):
        if isinstance(module, _CONVOLUTIONS):
            if module.bias is not None and module.out_channels == structures:
                with torch.no_grad():
                    module.bias.fill_(RARE)
            break
    return network
