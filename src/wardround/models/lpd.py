"""Learned primal-dual reconstruction: small networks take turns on the sinogram and on the image.

h_i = h_{i-1} + Gamma_i(h_{i-1}, A f_{i-1}^(2), y),  f_i = f_{i-1} + Lambda_i(f_{i-1}, A* h_i^(1))

(Adler and Oktem, IEEE TMI 37 (2018), 1322, algorithm 3); f and h are stacks of images and of sinograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.blocks import convolution
from wardround.models.checkpointing import Checkpointed
from wardround.models.conditioning import (
    HIDDEN,
    ConditionedSettings,
    Modulation,
    ProtocolHyperNet,
    modulated,
    modulation,
    prefixed,
    within,
)
from wardround.study.tasks import Modality


@dataclass(frozen=True)
class LPDShape:
    """Iterations, feature channels of each network, and images (and sinograms) that iterations hand on."""

    unrolls: int
    channels: int
    memory: int = 5


PRESETS = {"tiny": LPDShape(2, 8, memory=2), "small": LPDShape(4, 16, memory=3), "paper": LPDShape(10, 32)}


def lpd_shape(config: LPDSettings) -> LPDShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(include={"unrolls", "channels", "memory"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class LPD(Checkpointed):
    """Reconstructs real images from measurements through a linear operator with |A| = 1.

    Where the paper starts at zero, f_0 is the initial image `memory` times; the last layers start at zero, so an
    untrained network gives the initial image. Conditioned, all layers but the last are modulated.
    """

    def __init__(self, shape: LPDShape, *, conditioned: bool = False, hidden: Sequence[int] = HIDDEN) -> None:
        super().__init__()
        self.memory = shape.memory
        inputs = {"dual": shape.memory + 2, "primal": shape.memory + 1}
        sides = {side: [_Update(n, shape) for _ in range(shape.unrolls)] for side, n in inputs.items()}
        self.dual, self.primal = nn.ModuleList(sides["dual"]), nn.ModuleList(sides["primal"])
        blocks: dict[str, int] = {}
        for side, updates in sides.items():
            for i, update in enumerate(updates):
                blocks |= prefixed(f"{side}.{i}", update.blocks)
        self.hypernetwork = ProtocolHyperNet(blocks, hidden=hidden) if conditioned else None

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, views, bins) -> real images (B, H, W)."""
        films = modulation(self.hypernetwork, operator, data)
        measured = data.unsqueeze(1)
        f = operator.initial(data).unsqueeze(1).repeat(1, self.memory, 1, 1)
        h = torch.zeros_like(measured).repeat(1, self.memory, 1, 1)
        second = min(1, self.memory - 1)

        def unroll(f: Tensor, h: Tensor, i: int) -> tuple[Tensor, Tensor]:
            projected = operator.A(f[:, second].contiguous()).unsqueeze(1)
            h = h + self.dual[i](torch.cat([h, projected, measured], 1), within(films, f"dual.{i}"))
            returned = operator.A_adjoint(h[:, 0].contiguous()).unsqueeze(1)
            return f + self.primal[i](torch.cat([f, returned], 1), within(films, f"primal.{i}")), h

        for i in range(len(self.dual)):
            f, h = self.through(unroll, f, h, i)
        return f[:, 0]


class _Update(nn.Module):
    """Three convolutions with PReLU between them, as the paper's; untrained, it gives zero."""

    def __init__(self, inputs: int, shape: LPDShape) -> None:
        super().__init__()
        width = shape.channels
        self.layers = nn.ModuleList([convolution(inputs, width), convolution(width, width)])
        self.activations = nn.ModuleList(nn.PReLU(width, init=0.0) for _ in self.layers)
        self.last = convolution(width, shape.memory)
        nn.init.zeros_(self.last.weight)
        self.blocks = {f"layers.{i}": width for i in range(len(self.layers))}

    def forward(self, h: Tensor, films: Modulation) -> Tensor:
        for i, (layer, activation) in enumerate(zip(self.layers, self.activations, strict=True)):
            h = activation(modulated(layer(h), films, f"layers.{i}"))
        result: Tensor = self.last(h)
        return result


class LPDSettings(ConditionedSettings):
    """Learned primal-dual reconstruction (Adler and Oktem, IEEE TMI 2018); CT only."""

    kind: Literal["lpd"]
    modalities = frozenset({"ct"})
    unrolls: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    memory: int | None = Field(None, ge=1, le=64, description="images, and sinograms, that iterations hand on")

    def build(self, modality: Modality) -> LPD:
        """The network."""
        return LPD(lpd_shape(self), conditioned=self.conditioned, hidden=self.hidden)
