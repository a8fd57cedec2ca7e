"""LEARN: unrolled gradient descent with a learned regulariser of its own in every iteration.

x_{k+1} = x_k - t_k G(x_k) - D_k(x_k),  x_0 = filtered back projection

(Chen et al., IEEE TMI 37 (2018), 1333). t_k > 0 is learned. G is the gradient A* (A x - y) of the data's misfit, or
the filtered back projection of A x - y, which moves all frequencies at about the same speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from wardround.models.blocks import Denoiser, ResidualUNet
from wardround.models.conditioning import HIDDEN, ProtocolHyperNet, modulation, prefixed, within
from wardround.physics.operator import LinearOperator
from wardround.study import models as models_config

Gradient = Literal["adjoint", "fbp"]


@dataclass(frozen=True)
class LearnShape:
    """Everything that decides a LEARN's parameters and cost; see `PRESETS`.

    prox: `cnn` has `layers` convolutions, `unet` has `levels` resolutions.
    """

    unrolls: int
    channels: int
    prox: Literal["cnn", "unet"] = "cnn"
    layers: int = 3
    levels: int = 3
    scale: int = 2
    gradient: Gradient = "adjoint"
    initial_step: float = 1.0


PRESETS = {
    "tiny": LearnShape(unrolls=2, channels=8),
    "small": LearnShape(unrolls=7, channels=32, layers=4, scale=1, gradient="fbp"),
    "paper": LearnShape(unrolls=50, channels=48, scale=1),
}


def learn_shape(config: models_config.Learn) -> LearnShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(exclude={"kind", "preset", "conditioned", "hidden"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class Learn(nn.Module):
    """Reconstructs images from measurements through any linear operator with |A| = 1.

    Images are expected on a scale of about [0, 1]. `parts` is 1 for real images and 2 for complex ones. Conditioned,
    every convolution but the last of every D_k is modulated by `hypernetwork`. An untrained network takes plain
    gradient steps from the initial image.
    """

    def __init__(
        self, shape: LearnShape, *, parts: int = 1, conditioned: bool = False, hidden: Sequence[int] = HIDDEN
    ) -> None:
        super().__init__()
        self.gradient = shape.gradient
        proxes = [_prox(shape, parts) for _ in range(shape.unrolls)]
        self.proxes = nn.ModuleList(proxes)
        self.log_steps = nn.Parameter(torch.full((shape.unrolls,), math.log(shape.initial_step)))
        blocks = {name: c for k, prox in enumerate(proxes) for name, c in prefixed(str(k), prox.blocks).items()}
        self.hypernetwork = ProtocolHyperNet(blocks, hidden=hidden) if conditioned else None

    @property
    def steps(self) -> Tensor:
        """The t_k of the equation; positive (unrolls,)."""
        return self.log_steps.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W), real or complex as the operator's."""
        films = modulation(self.hypernetwork, operator, data)
        # With y only in A* y, one product A* A serves a whole iteration.
        adjoint = operator.A_adjoint(data) if self.gradient == "adjoint" else None
        image = operator.initial(data)
        for k, (prox, step) in enumerate(zip(self.proxes, self.steps, strict=True)):
            if adjoint is None:
                misfit = operator.initial(operator.A(image) - data)
            else:
                misfit = operator.normal(image) - adjoint
            # A prox returns x - D(x).
            image = prox(image, within(films, str(k))) - step * misfit
        return image


def _prox(shape: LearnShape, parts: int) -> Denoiser | ResidualUNet:
    if shape.prox == "cnn":
        return Denoiser(shape.channels, shape.layers, parts=parts, scale=shape.scale)
    return ResidualUNet(shape.channels, shape.levels, parts=parts, scale=shape.scale)
