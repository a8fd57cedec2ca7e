"""Post-processing networks: the zero-filled image in, a better image out, no physics inside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from wardround.errors import GeometryError
from wardround.models.unrolled import as_channels, from_channels
from wardround.physics.operator import LinearOperator
from wardround.study import models as models_config

# Four poolings leave 2 x 2 of it, the least that a normalisation over an image can work with.
SMALLEST = 32


@dataclass(frozen=True)
class UNetShape:
    """Feature channels of the five levels and of the last decoder, and the normalisation between layers."""

    features: tuple[int, int, int, int, int, int]
    norm: Literal["none", "batch", "instance"] = "instance"


PRESETS = {
    "tiny": UNetShape((8, 8, 8, 16, 16, 8)),
    "small": UNetShape((16, 16, 32, 64, 128, 16)),
    "paper": UNetShape((32, 64, 128, 256, 512, 32)),
}


def unet_shape(config: models_config.UNet) -> UNetShape:
    """The preset of a study with its own choices on top."""
    shape = PRESETS[config.preset]
    return shape if config.norm is None else replace(shape, norm=config.norm)


class PostUNet(nn.Module):
    """Adds MONAI's BasicUNet of the first image to it (residual learning): the zero-filled one, as two real channels
    (`parts` 2), or for real images (`parts` 1) the filtered back projection.

    After Jin et al., IEEE TIP 26 (2017), 4509 and Zbontar et al., arXiv:1811.08839. Images are expected on a
    scale of about [0, 1], with H and W at least 32. The last layer starts at zero: an untrained network gives the
    first image.
    """

    def __init__(self, shape: UNetShape, *, parts: Literal[1, 2] = 2) -> None:
        super().__init__()
        norms = {"none": None, "batch": "batch", "instance": ("instance", {"affine": True})}
        self.network = BasicUNet(
            spatial_dims=2, in_channels=parts, out_channels=parts, features=shape.features, norm=norms[shape.norm]
        )
        nn.init.zeros_(self.network.final_conv.weight)
        nn.init.zeros_(self.network.final_conv.bias)

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W). Raises GeometryError for tiny images."""
        channels = as_channels(operator.initial(data)).contiguous()
        if min(channels.shape[-2:]) < SMALLEST:
            raise GeometryError(
                f"the U-Net needs images of at least {SMALLEST} x {SMALLEST} pixels, "
                f"not {channels.shape[-2]} x {channels.shape[-1]}; use larger images, or the model `modl`"
            )
        return from_channels(channels + self.network(channels))
