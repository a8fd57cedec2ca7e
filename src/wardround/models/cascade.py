"""Deep cascade: a network corrects an image, a step returns to the measured data, and so on.

z_t = x_t + D(x_t, A*(y - A x_t), rho),   x_{t+1} = z_t + eta_t A*(y - A z_t),   x_0: total variation's image of y
x_T = argmin_x |A x - y|^2 + (rho / e)^2 |x - z_{T-1}|^2 instead of the last step,   rho^2 = mean |A x_0 - y|^2

(Schlemper et al., IEEE TMI 37 (2018), 491; with coils the step of Hammernik et al., Magn. Reson. Med. 79 (2018), 3055;
a map of the noise level beside the image: Zhang et al., FFDNet, IEEE TIP 27 (2018), 4608.) rho is what x_0 leaves of
each measured sample: noise, and what the coil maps do not explain. The last step weighs data and network by how much
either errs, as least squares do; e is the standard error of the network's image. So good data are trusted more than
the network, which keeps images unlike those of the training from harm. Learned, e would be the error on those alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.imaging.acquisition.operator import LinearOperator, beside
from wardround.imaging.acquisition.solvers import tv
from wardround.models.blocks import ResidualUNet
from wardround.models.checkpointing import Checkpointed
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality

# Of total variation's image, for data whose A* y has peak 1: between the weights that suit one coil and several, and
# fewer steps than total variation alone has.
START_WEIGHT, START_ITERATIONS = 0.003, 25
# The e of the peak of A* y, chosen on tones that training had not seen; and conjugate gradients to the minimum.
ERROR, SOLVE_ITERATIONS = 0.045, 6
# rho is about a hundredth of the peak; D sees it multiplied by this.
LEVEL = 10.0


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

    All is relative to the peak of A* y: the network works alike whatever a scanner's unit is. D sees what the image
    leaves unexplained, has no biases, and its last layer is 0 at first: untrained, the network is total variation and
    steps towards the data. `steps`, the eta_t of the equation, are exp(log_steps), 1 at first.
    """

    def __init__(self, shape: CascadeShape) -> None:
        super().__init__()
        self.denoiser = ResidualUNet(shape.channels, shape.levels, scale=shape.scale, guides=2, bias=False)
        self.log_steps = nn.Parameter(torch.zeros(shape.cascades - 1))

    @property
    def steps(self) -> Tensor:
        """The eta_t of the equation, of all turns but the last; positive (cascades - 1,)."""
        return self.log_steps.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> complex images (B, H, W)."""
        adjoint = operator.A_adjoint(data)
        peak = adjoint.abs().flatten(1).amax(1).clamp_min(torch.finfo(data.real.dtype).tiny)
        data, adjoint = data / beside(peak, data), adjoint / beside(peak, adjoint)
        image = beginning(operator, data)
        misfits = misfit(operator, data, image)
        weight = misfits / ERROR**2
        level = (LEVEL * beside(misfits.sqrt(), image)).expand_as(image).to(image.dtype)

        def corrected(image: Tensor) -> Tensor:
            found: Tensor = self.denoiser(image, guides=(adjoint - operator.normal(image), level))
            return found

        def cascade(image: Tensor, step: Tensor) -> Tensor:
            found = corrected(image)
            return found + step * (adjoint - operator.normal(found))

        def last(image: Tensor, weight: Tensor) -> Tensor:
            found = corrected(image)
            towards = adjoint + beside(weight, found) * found
            return operator.solve(towards, weight, iterations=SOLVE_ITERATIONS, start=found)

        for step in self.steps.unbind():
            image = self.through(cascade, image, step)
        return self.through(last, image, weight) * beside(peak, image)


@torch.no_grad()
def beginning(operator: LinearOperator, data: Tensor) -> Tensor:
    """Total variation's image (B, H, W) of data (B, *data_shape) whose A* y has peak 1; takes no derivatives."""
    return tv(operator, data, START_WEIGHT, START_ITERATIONS)


@torch.no_grad()
def misfit(operator: LinearOperator, data: Tensor, image: Tensor) -> Tensor:
    """The equation's rho^2 of each item (B,): mean |A x - y|^2 over measured samples, those that are not 0."""
    left = (operator.A(image) - data).abs().square().flatten(1).sum(1)
    return left / data.ne(0).flatten(1).sum(1).clamp_min(1)


class CascadeSettings(PresetSettings):
    """U-Net and gradient steps in turns from total variation's image (after Schlemper et al., 2018); for real MRI."""

    kind: Literal["cascade"]
    modalities = frozenset({"mri"})
    consistent = True
    cascades: int | None = Field(None, ge=2, le=50, description="turns; default 2 of `tiny` and `small`, 5 of `paper`")
    channels: int | None = Field(
        None, ge=1, le=1024, description="of the U-Net's first level; default 4 of `tiny`, 24 of `small`, 64 of `paper`"
    )
    levels: int | None = Field(None, ge=1, le=8, description="resolutions of the U-Net; each has twice the channels")
    scale: Literal[1, 2, 4] | None = Field(None, description="images shrink by it before the U-Net; default 2")

    def build(self, modality: Modality) -> Cascade:
        """The network."""
        return Cascade(cascade_shape(self))
