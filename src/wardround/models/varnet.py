"""VarNet in image form, with known coil maps: unrolled gradient steps, each with a learned regulariser of its own.

x_{t+1} = x_t - eta_t A* (A x_t - y) - R_t(x_t),  starting at x_0 = A* y

(Hammernik et al., Magn. Reson. Med. 79 (2018), 3055, equation 8). Their R_t is the gradient of a fields-of-experts
prior; here it is a U-Net on normalised images, as in Sriram et al., MICCAI 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.checkpointing import Checkpointed
from wardround.models.normalised_unet import NormalisedUNet
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality


@dataclass(frozen=True)
class VarNetShape:
    """Iterations, and channels of each U-Net's first level; see `PRESETS`."""

    cascades: int
    channels: int
    initial_step: float = 1.0


PRESETS = {"tiny": VarNetShape(2, 4), "small": VarNetShape(5, 8), "paper": VarNetShape(12, 18)}


def varnet_shape(config: VarNetSettings) -> VarNetShape:
    """The preset of a study with its own choices on top."""
    return replace(PRESETS[config.preset], **config.model_dump(include={"cascades", "channels"}, exclude_none=True))


class VarNet(Checkpointed):
    """Reconstructs complex images from measurements through any linear operator with |A| <= 1.

    Images are expected on a scale of about [0, 1]. `steps`, the eta_t of the equation, are exp(log_steps), so they stay
    positive. Untrained, R_t is 0 and the network takes plain gradient steps from A* y.
    """

    def __init__(self, shape: VarNetShape) -> None:
        super().__init__()
        self.regularisers = nn.ModuleList(NormalisedUNet(shape.channels) for _ in range(shape.cascades))
        self.log_steps = nn.Parameter(torch.full((shape.cascades,), math.log(shape.initial_step)))

    @property
    def steps(self) -> Tensor:
        """The eta_t of the equation; positive (cascades,)."""
        return self.log_steps.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> complex images (B, H, W)."""
        adjoint = operator.A_adjoint(data)
        image = operator.initial(data)
        steps = self.steps

        def cascade(image: Tensor, t: int) -> Tensor:
            found: Tensor = image - steps[t] * (operator.normal(image) - adjoint) - self.regularisers[t](image)
            return found

        for t in range(len(self.regularisers)):
            image = self.through(cascade, image, t)
        return image


class VarNetSettings(PresetSettings):
    """Variational network in image form (Hammernik et al., MRM 2018) with U-Nets as regularisers; MRI."""

    kind: Literal["varnet"]
    modalities = frozenset({"mri"})
    consistent = True
    cascades: int | None = Field(None, ge=1, le=50, description="iterations; default 2 of `tiny`, 5 of `small`, 12")
    channels: int | None = Field(
        None, ge=1, le=256, description="of each U-Net's first level; default 4 of `tiny`, 8 of `small`, 18"
    )

    def build(self, modality: Modality) -> VarNet:
        """The network."""
        return VarNet(varnet_shape(self))
