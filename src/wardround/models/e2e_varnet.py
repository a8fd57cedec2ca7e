"""End-to-end variational network: it learns to estimate the coil maps, and refines k-space.

k_{t+1} = k_t - eta_t M (M k_t - y) - F S R_t(S* F^-1 k_t),  starting at k_0 = M y, with maps S = SME(y)

(Sriram et al., *End-to-end variational networks for accelerated MRI reconstruction*, MICCAI 2020, equations 8 to 13).
The result is the root sum of squares of the coil images of the last k_t.

The U-Nets are MONAI's. Its CoilSensitivityModel and VarNetBlock, which do the same, are not used: the first takes masks
of lines alone, the same for a whole batch, and divides real and imaginary parts of the maps by root sums of squares of
their own, so that S* S is 2 and not 1; a test holds the refinement to the second's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import NO_CENTRE
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c, ifft2c
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.checkpointing import Checkpointed
from wardround.models.normalised_unet import NormalisedUNet
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality
from wardround.wire.host import on_host

# Of a map's strongest pixel: where no coil sees anything, maps are what float32 can still tell.
_FLOOR = 1e-6


@dataclass(frozen=True)
class E2EVarNetShape:
    """Iterations, and channels of the first level of their U-Nets and of that of the maps; see `PRESETS`."""

    cascades: int
    channels: int
    map_channels: int


PRESETS = {"tiny": E2EVarNetShape(2, 4, 2), "small": E2EVarNetShape(4, 8, 4), "paper": E2EVarNetShape(12, 18, 8)}


def e2e_varnet_shape(config: E2EVarNetSettings) -> E2EVarNetShape:
    """The preset of a study with its own choices on top."""
    return replace(PRESETS[config.preset], **config.model_dump(exclude={"kind", "preset"}, exclude_none=True))


class E2EVarNet(Checkpointed):
    """Reconstructs images from Cartesian k-space of any number of coils; coils of zeros change nothing.

    Images are expected on a scale of about [0, 1]. Untrained, SME gives the low-resolution coil images over their root
    sum of squares and R_t is 0, so the result is the zero-filled image.
    """

    def __init__(self, shape: E2EVarNetShape) -> None:
        super().__init__()
        self.maps = SensitivityModel(shape.map_channels)
        self.regularisers = nn.ModuleList(NormalisedUNet(shape.channels) for _ in range(shape.cascades))
        self.steps = nn.Parameter(torch.ones(shape.cascades))

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """K-space (B, C, H, W) -> complex images (B, H, W) whose magnitude is the root sum of squares.

        Of the operator the mask alone decides the magnitude. Its maps give the phase, which no loss of magnitudes sees:
        so the image explains the data under that operator, for the check of `wardround reconstruct`.
        Raises GeometryError for another operator than `CartesianMRI`, and where the centre was not measured.
        """
        if not isinstance(operator, CartesianMRI):
            raise GeometryError(
                f"the model e2e_varnet estimates coil maps from Cartesian k-space, and a {type(operator).__name__} "
                "measures something else; take the model varnet, swin_denoiser or modl"
            )
        images = ifft2c(self.kspace(operator.mask, data))
        magnitude = torch.linalg.vector_norm(torch.view_as_real(images), dim=(1, 4))
        with torch.no_grad():
            phase = (operator.maps.conj() * images).sum(1).angle()
        return torch.polar(magnitude, phase)

    def kspace(self, mask: Tensor, data: Tensor) -> Tensor:
        """The k-space of all coils (B, C, H, W) that the last cascade gives; mask (B or 1, H or 1, W or 1)."""
        weights = mask[:, None]
        measured = weights * data
        maps = self.through(self.maps, mask, measured)

        def cascade(k: Tensor, t: int) -> Tensor:
            combined = (maps.conj() * ifft2c(k)).sum(1)
            refined = fft2c(maps * self.regularisers[t](combined)[:, None])
            return k - self.steps[t] * weights * (weights * k - data) - refined

        k = measured
        for t in range(len(self.regularisers)):
            k = self.through(cascade, k, t)
        return k


class SensitivityModel(nn.Module):
    """SME of the equations: coil maps (B, C, H, W) from the calibration lines, root sum of squares 1.

    Each coil's low-resolution image passes one U-Net, which adds to it (in the paper it replaces it); then all are
    divided by their root sum of squares. A coil of zeros has a map of zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unet = NormalisedUNet(channels)

    def forward(self, mask: Tensor, kspace: Tensor) -> Tensor:
        """Mask (B or 1, H or 1, W or 1) and measured k-space (B, C, H, W) -> maps of its shape."""
        window = calibration_window(mask.expand(-1, *kspace.shape[2:]))
        images = ifft2c(window[:, None] * kspace)
        flat = images.flatten(0, 1)
        # Of nothing, this U-Net makes nothing: a coil that is not there gets no map.
        maps = (flat + self.unet(flat)).reshape(images.shape)
        power = torch.view_as_real(maps).square().sum((1, 4))[:, None]
        lowest = _FLOOR**2 * power.detach().amax((-2, -1), keepdim=True)
        found: Tensor = maps * torch.maximum(power, lowest.clamp_min(torch.finfo(power.dtype).tiny)).rsqrt()
        return found


def calibration_window(mask: Tensor) -> Tensor:
    """The largest fully sampled centred rectangle of each mask (B, H, W): 1 inside, 0 outside.

    Which rectangle is that of `wardround.imaging.acquisition.mri.coils.calibration_region`; all is computed where the
    mask is. Raises GeometryError where the centre of k-space was not measured.
    """
    height, width = mask.shape[1:]
    sums = torch.nn.functional.pad((mask != 0).long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    rows, columns = (torch.arange(1, n + 1, device=mask.device) for n in (height, width))
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    low, high = sums[:, top], sums[:, top + rows]
    inside = high[..., left + columns] - high[..., left] - low[..., left + columns] + low[..., left]
    area = rows[:, None] * columns
    full = inside == area
    if not mask.is_meta and not on_host(full.flatten(1).any(1).all()):
        raise GeometryError(NO_CENTRE)
    # In whole numbers: the shorter side relative to its axis, then the area.
    shorter = torch.minimum(rows[:, None] * width, columns * height) * full
    best = torch.where(shorter == shorter.amax((1, 2), keepdim=True), area * full, 0).flatten(1).argmax(1)
    across = _centred(best // width + 1, height), _centred(best % width + 1, width)
    return (across[0][:, :, None] & across[1][:, None, :]).to(mask.dtype)


def _centred(count: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size): the central `count` of `size` places."""
    place = torch.arange(size, device=count.device)
    first = size // 2 - count[:, None] // 2
    return (place >= first) & (place < first + count[:, None])


class E2EVarNetSettings(PresetSettings):
    """End-to-end variational network with learned coil maps (Sriram et al., MICCAI 2020); MRI, Cartesian."""

    kind: Literal["e2e_varnet"]
    modalities = frozenset({"mri"})
    cartesian = True
    consistent = True
    cascades: int | None = Field(None, ge=1, le=50, description="iterations; default 2 of `tiny`, 4 of `small`, 12")
    channels: int | None = Field(
        None, ge=1, le=256, description="of the first level of each cascade's U-Net; default 4, 8, 18"
    )
    map_channels: int | None = Field(
        None, ge=1, le=256, description="of the first level of the coil maps' U-Net; default 2, 4, 8"
    )

    def build(self, modality: Modality) -> E2EVarNet:
        """The network."""
        return E2EVarNet(e2e_varnet_shape(self))
