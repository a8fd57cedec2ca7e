"""RED-CNN: a residual encoder and decoder of 5x5 convolutions on the filtered back projection.

Chen et al., IEEE TMI 36 (2017), 2524.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.errors import GeometryError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.anatomy import AnatomyNet, AnatomySettings
from wardround.models.conditioning import HIDDEN, Hidden, ProtocolHyperNet, modulated, modulation, prefixed
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality

PRESETS = {"tiny": 8, "small": 24, "paper": 96}
Conditioning = Literal["none", "every", "bottleneck"]

_DEPTH = 5
_KERNEL = 5
# Five convolutions without padding leave one pixel of it.
SMALLEST = _DEPTH * (_KERNEL - 1) + 1


def redcnn_channels(config: REDCNNSettings) -> int:
    """The preset of a study, or its own choice."""
    return config.channels or PRESETS[config.preset]


class REDCNN(nn.Module):
    """Five convolutions without padding, five transposed ones, and three shortcuts: after 0, 2 and 4 convolutions.

    Two departures from the paper: the last layer starts at zero and no ReLU follows it, so an untrained network
    gives the initial image. conditioning: `every` modulates what each of the ten layers gives (HyperFed), `bottleneck`
    only the last of the encoder, c = ReLU((1 + gamma) h + beta) (SCAN-PhysFed). With `anatomy` the map of the
    operator's prompt weighs c.
    """

    def __init__(
        self,
        channels: int,
        *,
        conditioning: Conditioning = "none",
        hidden: Sequence[int] = HIDDEN,
        anatomy: AnatomySettings | None = None,
    ) -> None:
        super().__init__()
        inner = [channels] * (_DEPTH - 1)
        down = [nn.Conv2d(n, channels, _KERNEL) for n in (1, *inner)]
        up = [nn.ConvTranspose2d(channels, n, _KERNEL) for n in (*inner, 1)]
        for layer in (*down, *up):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(up[-1].weight)
        self.encoder, self.decoder = nn.ModuleList(down), nn.ModuleList(up)
        self.hypernetwork = None
        if conditioning != "none":
            self.hypernetwork = ProtocolHyperNet(_blocks(conditioning, channels), hidden=hidden)
        self.anatomy = None if anatomy is None else AnatomyNet(anatomy)

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The five convolutions."""
        return ("encoder",)

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, views, bins) -> real images (B, H, W). Raises GeometryError for tiny images."""
        films = modulation(self.hypernetwork, operator, data)
        h = operator.initial(data).unsqueeze(1)
        if min(h.shape[-2:]) < SMALLEST:
            raise GeometryError(
                f"RED-CNN needs images of at least {SMALLEST} x {SMALLEST} pixels, "
                f"not {h.shape[-2]} x {h.shape[-1]}; use larger images, or the model `learn`"
            )
        shortcuts = [h]
        for i, layer in enumerate(self.encoder):
            h = torch.relu(modulated(layer(h), films, f"encoder.{i}"))
            if i in (1, 3):
                shortcuts.append(h)
        if self.anatomy is not None:
            h = self.anatomy.weighed(h, operator)
        for i, layer in enumerate(self.decoder):
            h = modulated(layer(h), films, f"decoder.{i}")
            if i in (0, 2, 4):
                h = h + shortcuts.pop()
            if i < _DEPTH - 1:
                h = torch.relu(h)
        return h.squeeze(1)


def _blocks(conditioning: Conditioning, channels: int) -> dict[str, int]:
    if conditioning == "bottleneck":
        return {f"encoder.{_DEPTH - 1}": channels}
    encoder = {str(i): channels for i in range(_DEPTH)}
    return prefixed("encoder", encoder) | prefixed("decoder", encoder | {str(_DEPTH - 1): 1})


class REDCNNSettings(PresetSettings):
    """RED-CNN on the filtered back projection (Chen et al., IEEE TMI 2017); CT only."""

    kind: Literal["redcnn"]
    modalities = frozenset({"ct"})
    channels: int | None = Field(None, ge=1, le=1024)
    conditioning: Literal["none", "every", "bottleneck"] = Field(
        "none", description="`every` convolution (HyperFed) or the `bottleneck` (SCAN-PhysFed) knows the protocol"
    )
    hidden: Hidden = HIDDEN
    anatomy: AnatomySettings | None = Field(
        None, description="the bottleneck knows an embedding of the patient's report"
    )

    def build(self, modality: Modality) -> REDCNN:
        """The network."""
        return REDCNN(redcnn_channels(self), conditioning=self.conditioning, hidden=self.hidden, anatomy=self.anatomy)

    @property
    def prompt_dimension(self) -> int | None:
        """Of the anatomy prompt."""
        return None if self.anatomy is None else self.anatomy.dimension
