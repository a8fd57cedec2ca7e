"""Deep cascade: a network corrects an image, a gradient step returns to the measured data, and so on.

z_t = x_t + D(x_t, A*(y - A x_t)),   x_{t+1} = z_t + eta_t A*(y - A z_t),   x_0: total variation's image of the data

(Schlemper et al., IEEE TMI 37 (2018), 491; with coils the step of Hammernik et al., Magn. Reson. Med. 79 (2018), 3055).
For one coil of modulus 1 and eta = 1 the step puts the measured samples themselves in place, which is Schlemper's data
consistency. For several coils it moves towards them, and does not fit what coil maps estimated from few lines cannot
explain, as a solve would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.solvers import tv
from wardround.models.blocks import ResidualUNet
from wardround.models.checkpointing import Checkpointed
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality

# Of total variation's image, for data whose A* y has peak 1: between the weights that suit one coil and several, and
# fewer steps than total variation alone has.
START_WEIGHT, START_ITERATIONS = 0.003, 25


@dataclass(frozen=True)
class CascadeShape:
    """Everything that decides the network's parameters and cost; see `PRESETS`.

    `cascades` passes of one U-Net with `levels` resolutions, `channels` at the first, on images `scale` times smaller.
    """

    cascades: int
    channels: int
    levels: int
    scale: int = 2


PRESETS = {
    "tiny": CascadeShape(cascades=2, channels=4, levels=3),
    "small": CascadeShape(cascades=2, channels=24, levels=4),
    "paper": CascadeShape(cascades=5, channels=64, levels=5),
}


def cascade_shape(config: CascadeSettings) -> CascadeShape:
    """The preset of a study with its own choices on top."""
    return replace(PRESETS[config.preset], **config.model_dump(exclude={"kind", "preset"}, exclude_none=True))


class Cascade(Checkpointed):
    """Reconstructs complex images from measurements through any linear operator with |A| <= 1.

    No part has a bias, and the first image scales with the data: the network does, whatever a scanner's unit is. D sees
    what the image leaves unexplained, and has its last layer at 0 at first: untrained, the network is total variation
    and steps towards the data. `steps`, the eta_t of the equation, are exp(log_steps): positive, 1 at first.
    """

    def __init__(self, shape: CascadeShape) -> None:
        super().__init__()
        self.denoiser = ResidualUNet(shape.channels, shape.levels, scale=shape.scale, guides=1, bias=False)
        self.log_steps = nn.Parameter(torch.zeros(shape.cascades))

    @property
    def steps(self) -> Tensor:
        """The eta_t of the equation; positive (cascades,)."""
        return self.log_steps.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> complex images (B, H, W)."""
        adjoint = operator.A_adjoint(data)
        image = beginning(operator, data)

        def unexplained(image: Tensor) -> Tensor:
            return adjoint - operator.normal(image)

        def cascade(image: Tensor, step: Tensor) -> Tensor:
            corrected: Tensor = self.denoiser(image, guides=(unexplained(image),))
            return corrected + step * unexplained(corrected)

        for step in self.steps.unbind():
            image = self.through(cascade, image, step)
        return image


def beginning(operator: LinearOperator, data: Tensor) -> Tensor:
    """Total variation's image (B, H, W) of data (B, *data_shape), its weight relative to the peak of A* y.

    Scales with the data, and takes no derivatives.
    """
    with torch.no_grad():
        scale = operator.A_adjoint(data).abs().flatten(1).amax(1).clamp_min(torch.finfo(data.real.dtype).tiny)
        found = tv(operator, data / scale.reshape(-1, *(1 for _ in data.shape[1:])), START_WEIGHT, START_ITERATIONS)
        return found * scale[:, None, None]


class CascadeSettings(PresetSettings):
    """U-Net and gradient steps in turns from total variation's image (after Schlemper et al., 2018); for real MRI."""

    kind: Literal["cascade"]
    modalities = frozenset({"mri"})
    consistent = True
    cascades: int | None = Field(None, ge=1, le=50, description="turns; default 2 of `tiny` and `small`, 5 of `paper`")
    channels: int | None = Field(
        None, ge=1, le=1024, description="of the U-Net's first level; default 4 of `tiny`, 24 of `small`, 64 of `paper`"
    )
    levels: int | None = Field(None, ge=1, le=8, description="resolutions of the U-Net; each has twice the channels")
    scale: Literal[1, 2, 4] | None = Field(None, description="images shrink by it before the U-Net; default 2")

    def build(self, modality: Modality) -> Cascade:
        """The network."""
        return Cascade(cascade_shape(self))
