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
from wardround.imaging.acquisition.solvers import tv
from wardround.imaging.acquisition.wrapped import RealImage
from wardround.models.blocks import Denoiser, Norm, ResidualUNet
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
    denoiser: Literal["cnn", "unet"] = "cnn"
    levels: int = 1
    bias: bool = True
    weights: Literal["shared", "each"] = "shared"
    residual: bool = False
    start: Literal["adjoint", "tv"] = "adjoint"


# Of `start: tv`: between the weights that suit one coil and several, for data of peak 1; fewer steps than TV alone.
START_WEIGHT, START_ITERATIONS = 0.002, 25
_SMALL = MoDLShape(unrolls=6, cg_iterations=4, channels=32, layers=5, scale=2, initial_weight=0.1)
PRESETS = {
    "tiny": MoDLShape(unrolls=2, cg_iterations=4, channels=8, layers=3, scale=2),
    "small": replace(_SMALL, image="real"),
    "small_complex": _SMALL,
    "transfer": MoDLShape(
        unrolls=2,
        cg_iterations=4,
        channels=24,
        layers=5,
        scale=2,
        denoiser="unet",
        levels=4,
        bias=False,
        initial_weight=0.3,
        weights="each",
        residual=True,
        start="tv",
    ),
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
        self.residual, self.start = shape.residual, shape.start
        parts, guides = 1 if self.real else 2, 1 if shape.residual else 0
        self.denoiser: Denoiser | ResidualUNet
        if shape.denoiser == "unet":
            self.denoiser = ResidualUNet(
                shape.channels, shape.levels, parts=parts, scale=shape.scale, guides=guides, bias=shape.bias
            )
        else:
            self.denoiser = Denoiser(
                shape.channels,
                shape.layers,
                parts=parts,
                scale=shape.scale,
                norm=shape.norm,
                guides=guides,
                bias=shape.bias,
            )
        first = torch.tensor(math.log(shape.initial_weight))
        self.log_weight = nn.Parameter(first.repeat(shape.unrolls) if shape.weights == "each" else first)

    @property
    def weight(self) -> Tensor:
        """How much the denoised image counts against the data: positive, 0-d or, one for each unroll, (unrolls,)."""
        return self.log_weight.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W), complex or real."""
        if self.real and data.is_complex():
            operator = RealImage(operator)
        adjoint = operator.A_adjoint(data)
        weight = self.weight
        weights = weight.unbind() if weight.ndim else (weight,) * self.unrolls
        image = beginning(operator, data) if self.start == "tv" else operator.initial(data)

        def unroll(image: Tensor, weight: Tensor) -> Tensor:
            guides = (adjoint - operator.normal(image),) if self.residual else ()
            prior = self.denoiser(image, guides=guides)
            return operator.solve(adjoint + weight * prior, weight, iterations=self.cg_iterations, start=prior)

        for weight in weights:
            image = self.through(unroll, image, weight)
        return image


def beginning(operator: LinearOperator, data: Tensor) -> Tensor:
    """Total variation's image (B, H, W) of data (B, *data_shape), its weight relative to the peak of A* y.

    Scales with the data, and takes no derivatives.
    """
    with torch.no_grad():
        scale = operator.A_adjoint(data).abs().flatten(1).amax(1).clamp_min(torch.finfo(data.real.dtype).tiny)
        found = tv(operator, data / scale.reshape(-1, *(1 for _ in data.shape[1:])), START_WEIGHT, START_ITERATIONS)
        return found * scale[:, None, None]


class MoDLSettings(ModelSettings):
    """Unrolled reconstruction with conjugate-gradient data consistency (Aggarwal et al., IEEE TMI 2019); CT and MRI."""

    kind: Literal["modl"] = "modl"
    consistent = True
    preset: Literal["small_complex", "tiny", "small", "transfer", "paper"] = Field(
        "small_complex",
        description="`small_complex` is `small` without its `image: real`; `transfer` is for real scanners, trained "
        "with `acquisition.vary`",
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
    denoiser: Literal["cnn", "unet"] | None = None
    levels: int | None = Field(None, ge=1, le=8, description="resolutions of the U-Net; each has twice the channels")
    bias: bool | None = Field(None, description="without biases the denoiser scales with its input")
    weights: Literal["shared", "each"] | None = Field(None, description="one lambda, or one for each unroll")
    start: Literal["adjoint", "tv"] | None = Field(None, description="the first image: A* y, or total variation's")
    residual: bool | None = Field(None, description="the denoiser sees A* (y - A x) too: how well x explains the data")

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
