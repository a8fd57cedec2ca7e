"""A network on the sinogram, filtered back projection and a network on the image.

After iRadonMAP (He, Wang and Ma, IEEE TMI 39 (2020), 2076) as FedCT federates it: what belongs to one scanner's
geometry is in `projection`, what all share in `image`, and a hypernetwork tells `image` the scanner's protocol. The
back projection is the known one of the geometry; iRadonMAP learns its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.blocks import Denoiser
from wardround.models.conditioning import HIDDEN, ConditionedSettings, ProtocolHyperNet, modulation, prefixed, within
from wardround.study.tasks import Modality


@dataclass(frozen=True)
class IRadonMAPShape:
    """Feature channels and convolutions of both networks; that of the image works on folded pixels."""

    channels: int
    layers: int
    projection_layers: int = 3
    scale: int = 2


PRESETS = {"tiny": IRadonMAPShape(8, 3), "small": IRadonMAPShape(32, 6), "paper": IRadonMAPShape(64, 10, 5, scale=1)}


def iradonmap_shape(config: IRadonMAPSettings) -> IRadonMAPShape:
    """The preset of a study with its own choices on top."""
    return replace(PRESETS[config.preset], **config.model_dump(include={"channels", "layers"}, exclude_none=True))


class IRadonMAP(nn.Module):
    """Both networks are residual and start as the identity: untrained, it gives the initial image."""

    def __init__(self, shape: IRadonMAPShape, *, conditioned: bool = True, hidden: Sequence[int] = HIDDEN) -> None:
        super().__init__()
        # Half the channels: the sinogram is not folded, and what is to be corrected is local.
        self.projection = Denoiser(max(1, shape.channels // 2), shape.projection_layers, parts=1)
        self.image = Denoiser(shape.channels, shape.layers, parts=1, scale=shape.scale)
        blocks = prefixed("image", self.image.blocks)
        self.hypernetwork = ProtocolHyperNet(blocks, hidden=hidden) if conditioned else None

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, views, bins) -> real images (B, H, W)."""
        films = modulation(self.hypernetwork, operator, data)
        image: Tensor = self.image(operator.initial(self.projection(data)), within(films, "image"))
        return image


class IRadonMAPSettings(ConditionedSettings):
    """A network on the sinogram, filtered back projection and a network on the image, as in FedCT; CT only."""

    kind: Literal["iradonmap"]
    modalities = frozenset({"ct"})
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    conditioned: bool = Field(True, description="a hypernetwork tells the image's network the scanner's protocol")

    def build(self, modality: Modality) -> IRadonMAP:
        """The network."""
        return IRadonMAP(iradonmap_shape(self), conditioned=self.conditioned, hidden=self.hidden)
