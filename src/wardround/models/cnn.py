"""Post-processing networks: the initial image in, a better image out, no physics inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from wardround.errors import GeometryError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.blocks import as_channels, from_channels
from wardround.models.conditioning import (
    HIDDEN,
    ConditionedSettings,
    Modulation,
    ProtocolHyperNet,
    modulated,
    modulation,
)
from wardround.study.tasks import Modality

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


def unet_shape(config: UNetSettings) -> UNetShape:
    """The preset of a study with its own choices on top."""
    shape = PRESETS[config.preset]
    return shape if config.norm is None else replace(shape, norm=config.norm)


class PostUNet(nn.Module):
    """Adds MONAI's BasicUNet of the initial image to it (residual learning); for CT this is FBPConvNet.

    After Jin et al., IEEE TIP 26 (2017), 4509 and Zbontar et al., arXiv:1811.08839. Complex images are two real
    channels, `parts`. Images are expected on a scale of about [0, 1], with H and W at least 32. The last layer starts
    at zero: an untrained network gives the initial image. Conditioned, what each level gives is modulated, once on
    the way down and once on the way up.
    """

    def __init__(
        self, shape: UNetShape, *, parts: int = 2, conditioned: bool = False, hidden: Sequence[int] = HIDDEN
    ) -> None:
        super().__init__()
        # Late: MONAI takes seconds to import, and this network alone needs it.
        from monai.networks.nets import BasicUNet

        norms = {"none": None, "batch": "batch", "instance": ("instance", {"affine": True})}
        self.network = BasicUNet(
            spatial_dims=2, in_channels=parts, out_channels=parts, features=shape.features, norm=norms[shape.norm]
        )
        nn.init.zeros_(self.network.final_conv.weight)
        nn.init.zeros_(self.network.final_conv.bias)
        self.bottleneck = f"network.{_DOWN[-1]}"
        self.hypernetwork = ProtocolHyperNet(_blocks(shape.features), hidden=hidden) if conditioned else None

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The way down."""
        return tuple(f"network.{name}" for name in _DOWN)

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W). Raises GeometryError for tiny images."""
        films = modulation(self.hypernetwork, operator, data)
        channels = as_channels(operator.initial(data)).contiguous()
        if min(channels.shape[-2:]) < SMALLEST:
            raise GeometryError(
                f"the U-Net needs images of at least {SMALLEST} x {SMALLEST} pixels, "
                f"not {channels.shape[-2]} x {channels.shape[-1]}; use larger images, or the model `modl`"
            )
        return from_channels(channels + self._change(channels, films))

    def _change(self, channels: Tensor, films: Modulation) -> Tensor:
        """BasicUNet's own forward pass, with modulations in between."""
        net = self.network
        skips: list[Tensor] = []
        h = channels
        for name, layer in zip(_DOWN, (net.conv_0, net.down_1, net.down_2, net.down_3, net.down_4), strict=True):
            h = modulated(layer(h), films, name)
            skips.append(h)
        skips.pop()
        for name, layer in zip(_UP, (net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1), strict=True):
            h = modulated(layer(h, skips.pop()), films, name)
        change: Tensor = net.final_conv(h)
        return change


_DOWN = ("conv_0", "down_1", "down_2", "down_3", "down_4")
_UP = ("upcat_4", "upcat_3", "upcat_2", "upcat_1")


def _blocks(features: Sequence[int]) -> dict[str, int]:
    *down, last = features
    return dict(zip(_DOWN + _UP, (*down, *down[3:0:-1], last), strict=True))


class UNetSettings(ConditionedSettings):
    """Post-processing U-Net on the zero-filled image or, for CT (FBPConvNet), on the filtered back projection."""

    kind: Literal["unet"]
    head_parts: ClassVar[tuple[str, ...]] = ("network.final_conv.*",)
    norm: Literal["none", "batch", "instance"] | None = None

    def build(self, modality: Modality) -> PostUNet:
        """The network; complex images have two parts."""
        parts = 2 if modality == "mri" else 1
        return PostUNet(unet_shape(self), parts=parts, conditioned=self.conditioned, hidden=self.hidden)
