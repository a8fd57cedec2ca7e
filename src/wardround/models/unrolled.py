"""MoDL: unrolled reconstruction that alternates a learned denoiser with conjugate-gradient data consistency.

x_{k+1} = (A* A + lambda I)^-1 (A* y + lambda z_k),  z_k = D_w(x_k)

with one denoiser D_w and one learned lambda for all unrolls
(Aggarwal, Mani & Jacob, IEEE TMI 38 (2019), 394).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import RealImage
from wardround.models.blocks import Denoiser, Norm
from wardround.models.checkpointing import Checkpointed
from wardround.study.models import ModelSettings
from wardround.study.tasks import Modality


@dataclass(frozen=True)
class MoDLShape:
    """Everything that decides a MoDL's parameters and cost; see `PRESETS`."""

    unrolls: int
    cg_iterations: int
    channels: int
    layers: int
    scale: int = 1
    norm: Norm = "none"
    image: Literal["complex", "real"] = "complex"
    initial_weight: float = 0.05


_SMALL = MoDLShape(unrolls=6, cg_iterations=4, channels=32, layers=5, scale=2, initial_weight=0.1)
PRESETS = {
    "tiny": MoDLShape(unrolls=2, cg_iterations=4, channels=8, layers=3, scale=2),
    "small": replace(_SMALL, image="real"),
    "small_complex": _SMALL,
    "paper": MoDLShape(unrolls=10, cg_iterations=10, channels=64, layers=5, norm="batch"),
}


def modl_shape(config: MoDLSettings) -> MoDLShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(exclude={"kind", "preset"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class MoDL(Checkpointed):
    """Reconstructs images from measurements through any linear operator.

    Images are expected on a scale of about [0, 1]. `weight`, the lambda of the equation, is
    exp(log_weight), so it stays positive; every conjugate-gradient solve starts from the denoised image, so
    few iterations suffice. With `image="real"` a complex operator is constrained to real images (`RealImage`):
    for coil maps estimated from the scan itself, which carry its smooth phase.
    """

    def __init__(self, shape: MoDLShape) -> None:
        super().__init__()
        self.unrolls = shape.unrolls
        self.cg_iterations = shape.cg_iterations
        self.real = shape.image == "real"
        parts = 1 if self.real else 2
        self.denoiser = Denoiser(shape.channels, shape.layers, parts=parts, scale=shape.scale, norm=shape.norm)
        self.log_weight = nn.Parameter(torch.tensor(math.log(shape.initial_weight)))

    @property
    def weight(self) -> Tensor:
        """How much the denoised image counts against the data: positive, 0-d."""
        return self.log_weight.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W), complex or real."""
        if self.real and data.is_complex():
            operator = RealImage(operator)
        adjoint = operator.A_adjoint(data)
        weight = self.weight
        image = operator.initial(data)

        def unroll(image: Tensor) -> Tensor:
            prior = self.denoiser(image)
            return operator.solve(adjoint + weight * prior, weight, iterations=self.cg_iterations, start=prior)

        for _ in range(self.unrolls):
            image = self.through(unroll, image)
        return image


class MoDLSettings(ModelSettings):
    """Unrolled reconstruction with conjugate-gradient data consistency (Aggarwal et al., IEEE TMI 2019); CT and MRI."""

    kind: Literal["modl"] = "modl"
    consistent = True
    preset: Literal["small_complex", "tiny", "small", "paper"] = Field(
        "small_complex", description="`small_complex` is `small` without its `image: real`"
    )
    unrolls: int | None = Field(None, ge=1, le=50)
    cg_iterations: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    scale: Literal[1, 2, 4] | None = Field(None, description="factor by which images shrink before the denoiser")
    norm: Literal["none", "batch", "instance"] | None = None
    image: Literal["complex", "real"] | None = Field(
        None, description="`real` constrains the phase to that of the estimated coil maps"
    )
    initial_weight: float | None = Field(None, gt=0.0, description="the lambda that training begins with")

    def build(self, modality: Modality) -> MoDL:
        """The network; images of all but MRI are real."""
        shape = modl_shape(self)
        return MoDL(shape if modality == "mri" else replace(shape, image="real"))

    def check(self, modality: Modality) -> None:
        """Images of all but MRI are real."""
        if modality != "mri" and self.image == "complex":
            raise StudyError(f"model.image: complex is for MRI, and {modality.upper()} images are real; remove it")

    def describe(self) -> str:
        """Kind, size and what is assumed of the phase."""
        return f"{self.kind}, preset {self.preset}"

    @property
    def real_images(self) -> bool:
        """As the study or the preset says."""
        return modl_shape(self).image == "real"
