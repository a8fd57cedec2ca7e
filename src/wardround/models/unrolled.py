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
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from wardround.physics.operator import LinearOperator, RealImage
from wardround.study import models as models_config

Norm = Literal["none", "batch", "instance"]


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


PRESETS = {
    "tiny": MoDLShape(unrolls=2, cg_iterations=4, channels=8, layers=3, scale=2),
    "small": MoDLShape(unrolls=6, cg_iterations=4, channels=32, layers=5, scale=2, image="real", initial_weight=0.1),
    "paper": MoDLShape(unrolls=10, cg_iterations=10, channels=64, layers=5, norm="batch"),
}


def modl_shape(config: models_config.MoDL) -> MoDLShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(exclude={"kind", "preset"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class MoDL(nn.Module):
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
        self.denoiser = Denoiser(
            shape.channels, shape.layers, parts=1 if self.real else 2, scale=shape.scale, norm=shape.norm
        )
        self.log_weight = nn.Parameter(torch.tensor(math.log(shape.initial_weight)))

    @property
    def weight(self) -> Tensor:
        """How much the denoised image counts against the data; a positive 0-d tensor."""
        return self.log_weight.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W), complex or real."""
        if self.real and data.is_complex():
            operator = RealImage(operator)
        adjoint = operator.A_adjoint(data)
        weight = self.weight
        image = adjoint
        for _ in range(self.unrolls):
            prior = self.denoiser(image)
            image = operator.solve(adjoint + weight * prior, weight, iterations=self.cg_iterations, start=prior)
        return image


class Denoiser(nn.Module):
    """A stack of 3x3 convolutions that predicts what to add to an image (DnCNN, Zhang et al. 2017).

    `parts` is 2 for complex images and 1 for real ones.
    `scale` s folds s x s pixels into channels first and back last (pixel shuffle), so the stack runs on
    images s times smaller in each direction: on a processor that is the cheaper way to the same field of
    view. Weights start at He's scale, which keeps the size of the signal through the stack, those of the
    last layer at zero: an untrained denoiser is the identity. `norm` stands between the inner layers.
    """

    def __init__(self, channels: int, layers: int, *, parts: int = 2, scale: int = 1, norm: Norm = "none") -> None:
        super().__init__()
        self.scale = scale
        folded = parts * scale * scale
        stack: list[nn.Module] = [_convolution(folded, channels), nn.ReLU()]
        for _ in range(layers - 2):
            # A bias in front of a normalisation would be subtracted again.
            stack += [_convolution(channels, channels, bias=norm == "none"), *_norm(norm, channels), nn.ReLU()]
        last = _convolution(channels, folded)
        nn.init.zeros_(last.weight)
        self.stack = nn.Sequential(*stack, last)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, H, W) of the same type in and out; sizes that `scale` does not divide are padded inside."""
        channels = as_channels(image)
        height, width = image.shape[-2:]
        whole = pad(channels, (0, -width % self.scale, 0, -height % self.scale))
        change = pixel_shuffle(self.stack(pixel_unshuffle(whole, self.scale)), self.scale)
        return from_channels(channels + change[..., :height, :width])


def as_channels(image: Tensor) -> Tensor:
    """Complex (B, H, W) -> real (B, 2, H, W); real (B, H, W) -> (B, 1, H, W)."""
    return torch.view_as_real(image).permute(0, 3, 1, 2) if image.is_complex() else image.unsqueeze(1)


def from_channels(channels: Tensor) -> Tensor:
    """Real (B, 2, H, W) -> complex (B, H, W); (B, 1, H, W) -> real (B, H, W)."""
    if channels.shape[1] == 1:
        return channels.squeeze(1)
    return torch.view_as_complex(channels.permute(0, 2, 3, 1).contiguous())


def _convolution(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """A convolution at He's scale (ICCV 2015), which trains much faster here than torch's default."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(kind: Norm, channels: int) -> tuple[nn.Module, ...]:
    if kind == "batch":
        return (nn.BatchNorm2d(channels),)
    if kind == "instance":
        return (nn.InstanceNorm2d(channels, affine=True),)
    return ()
