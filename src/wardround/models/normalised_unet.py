"""The U-Net of variational networks: it sees complex images with mean 0 and variance 1, whatever their scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wardround.models.blocks import as_channels, from_channels

# Four poolings; after them instance normalisation needs more than one place.
_MULTIPLE, _LEAST = 16, 32


class NormalisedUNet(nn.Module):
    """Complex images (B, H, W) -> what a U-Net makes of them: s U((x - m) / s), of the same shape and scale.

    m is the mean of an image and s the standard deviation of its real and imaginary parts together, so the network's
    result scales with the image; U is MONAI's BasicUNet with `channels`, twice as many at each of four lower
    resolutions, and instance normalisation (Sriram et al., *End-to-end variational networks*, MICCAI 2020). MONAI's own
    ComplexUnet normalises real and imaginary parts apart and divides by zero for an empty image, such as that of a coil
    that a batch was padded with: it gives NaN, this one 0. Any size: images are padded with zeros inside. The last
    layer of U starts at zero, and so does the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Late: MONAI takes seconds to import.
        from monai.networks.nets import BasicUNet

        widths = tuple(channels * 2**level for level in range(5))
        self.unet = BasicUNet(spatial_dims=2, in_channels=2, out_channels=2, features=(*widths, channels))
        #: The module of the deepest level, where methods look for what the network makes of an image.
        self.bottleneck = "unet.down_4"
        nn.init.zeros_(self.unet.final_conv.weight)
        nn.init.zeros_(self.unet.final_conv.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Complex (B, H, W) in and out."""
        channels = as_channels(images)
        height, width = images.shape[-2:]
        centred = channels - channels.mean((2, 3), keepdim=True)
        power = centred.square().mean((1, 2, 3), keepdim=True)
        # No gradient of a root at 0: an image without any signal is left as it is.
        scale = torch.where(power > 0, power, 1.0).sqrt() * (power > 0)
        seen = centred / torch.where(power > 0, scale, 1.0)
        below, right = (max(_LEAST, n + -n % _MULTIPLE) - n for n in (height, width))
        found: Tensor = self.unet(pad(seen, (0, right, 0, below)))
        return from_channels(scale * found[..., :height, :width])
