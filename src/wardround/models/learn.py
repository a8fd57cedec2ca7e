"""LEARN: unrolled gradient descent with a learned regulariser of its own in every iteration.

x_{k+1} = x_k - t_k G(x_k) - D_k(x_k),  x_0 = filtered back projection

(Chen et al., IEEE TMI 37 (2018), 1333). t_k > 0 is learned. G is the gradient A* W (A x - y) of the data's misfit, or
the filtered back projection of W (A x - y), which moves all frequencies at about the same speed. W = 1 in the paper.
Weighted, W = v / (v + u) where u is the operator's uncertainty: a ray is trusted fully while u is small, and as in
weighted least squares (Sauer and Bouman, IEEE Trans. Signal Process. 41 (1993), 534), by 1 / u, above the learned v.
Guided, D_k sees G(x_k) beside x_k, as in learned gradient descent (Adler and Öktem, Inverse Problems 33 (2017)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator, trust
from wardround.models.blocks import Denoiser, Norm, ResidualUNet
from wardround.models.checkpointing import Checkpointed
from wardround.models.conditioning import HIDDEN, ConditionedSettings, ProtocolHyperNet, modulation, prefixed, within
from wardround.study.tasks import Modality

Gradient = Literal["adjoint", "fbp"]


@dataclass(frozen=True)
class LearnShape:
    """Everything that decides a LEARN's parameters and cost; see `PRESETS`.

    prox: `cnn` has `layers` convolutions with `norm` between them, `unet` has `levels` resolutions.
    """

    unrolls: int
    channels: int
    prox: Literal["cnn", "unet"] = "cnn"
    layers: int = 3
    norm: Norm = "none"
    levels: int = 3
    scale: int = 2
    gradient: Gradient = "adjoint"
    weighted: bool = False
    guided: bool = False
    initial_step: float = 1.0


_TOLERANCE = 0.005  # v at the start: the uncertainty of 200 photons
PRESETS = {
    "tiny": LearnShape(unrolls=2, channels=8),
    "small": LearnShape(unrolls=7, channels=24, scale=1, gradient="fbp", weighted=True, guided=True),
    "paper": LearnShape(unrolls=50, channels=48, scale=1),
}


def learn_shape(config: LearnSettings) -> LearnShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(exclude={"kind", "preset", "conditioned", "hidden"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class Learn(Checkpointed):
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
        self.guided = shape.guided
        self.log_tolerance = nn.Parameter(torch.tensor(math.log(_TOLERANCE))) if shape.weighted else None
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
        misfit = self._misfit(operator, data)
        image = operator.initial(data)
        steps = self.steps

        def unroll(image: Tensor, k: int) -> Tensor:
            gradient = misfit(image)
            # A prox returns x - D(x).
            found: Tensor = self.proxes[k](image, within(films, str(k)), (gradient,) if self.guided else ())
            return found - steps[k] * gradient

        for k in range(len(self.proxes)):
            image = self.through(unroll, image, k)
        return image

    def _misfit(self, operator: LinearOperator, data: Tensor) -> Callable[[Tensor], Tensor]:
        """G of the equation."""
        weights = self._weights(operator, data)
        if self.gradient == "adjoint" and weights is None:
            # With y only in A* y, one product A* A serves a whole iteration.
            adjoint = operator.A_adjoint(data)
            return lambda image: operator.normal(image) - adjoint
        back = operator.A_adjoint if self.gradient == "adjoint" else operator.initial

        def misfit(image: Tensor) -> Tensor:
            residual = operator.A(image) - data
            return back(residual if weights is None else weights * residual)

        return misfit

    def _weights(self, operator: LinearOperator, data: Tensor) -> Tensor | None:
        """W of the equation, in (0, 1]; nothing where it is 1."""
        uncertainty = operator.uncertainty(data)
        if self.log_tolerance is None or uncertainty is None:
            return None
        return trust(uncertainty, self.log_tolerance.exp())


def _prox(shape: LearnShape, parts: int) -> Denoiser | ResidualUNet:
    guides = 1 if shape.guided else 0
    if shape.prox == "cnn":
        return Denoiser(shape.channels, shape.layers, parts=parts, scale=shape.scale, norm=shape.norm, guides=guides)
    return ResidualUNet(shape.channels, shape.levels, parts=parts, scale=shape.scale, guides=guides)


class LearnSettings(ConditionedSettings):
    """LEARN: unrolled gradient descent with learned regularisers (Chen et al., IEEE TMI 2018); CT and MRI."""

    kind: Literal["learn"]
    consistent = True
    unrolls: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    prox: Literal["cnn", "unet"] | None = Field(None, description="each iteration's network")
    layers: int | None = Field(None, ge=2, le=50, description="convolutions of a `cnn`")
    norm: Literal["none", "batch", "instance"] | None = Field(None, description="between the layers of a `cnn`")
    levels: int | None = Field(None, ge=1, le=5, description="resolutions of a `unet`")
    scale: Literal[1, 2, 4] | None = Field(None, description="factor by which images shrink before the networks")
    gradient: Literal["adjoint", "fbp"] | None = Field(
        None, description="the misfit's gradient, or its filtered back projection"
    )
    weighted: bool | None = Field(None, description="rays count by the photons behind them, where the noise says")
    guided: bool | None = Field(None, description="each iteration's network sees the gradient, too")

    @model_validator(mode="after")
    def _norm_has_a_place(self) -> LearnSettings:
        if self.prox == "unet" and self.norm not in (None, "none"):
            raise ValueError("`norm` stands between the layers of `prox: cnn`; remove it, or choose that")
        return self

    def build(self, modality: Modality) -> Learn:
        """The network; complex images have two parts."""
        parts = 2 if modality == "mri" else 1
        return Learn(learn_shape(self), parts=parts, conditioned=self.conditioned, hidden=self.hidden)
